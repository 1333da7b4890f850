# SPDX-License-Identifier: Apache-2.0
"""A step's token waits for its attention, which stores it if kernels compute it."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rq_hf import RotorQuantConfig
from rq_hf.layers import RotorQuantLayer

pytest.importorskip("triton")

# tiles in plain order: the interpreter runs them
HEAD_DIM, KV_HEADS, HEADS = 48, 2, 4
PROMPT, RESIDUAL, STEPS = 292, 40, 12


def states(tokens: int, heads: int = KV_HEADS, batch: int = 2) -> Tensor:
    return torch.randn(batch, heads, tokens, HEAD_DIM).to(device())


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def filled(impl: str) -> RotorQuantLayer:
    """A layer behind its prompt, less than STEPS tokens short of packing the next tile."""
    layer = RotorQuantLayer(RotorQuantConfig(residual_length=RESIDUAL, impl=impl))
    torch.manual_seed(0)
    ask(layer, *layer.update(states(PROMPT), states(PROMPT)), states(PROMPT, HEADS))
    return layer


def ask(layer: RotorQuantLayer, key: Tensor, value: Tensor, query: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)


def step(layer: RotorQuantLayer) -> Tensor:
    key, value, query = states(1), states(1), states(1, HEADS)
    return ask(layer, *layer.update(key, value), query)


def test_steps_give_the_same_store_and_the_same_attention() -> None:
    by_kernels, by_torch = filled("triton"), filled("reference")
    assert by_kernels.store is not None and by_torch.store is not None
    tiles = by_kernels.store.tiles.length
    for number in range(STEPS):
        torch.manual_seed(number + 1)
        mine = step(by_kernels)
        torch.manual_seed(number + 1)
        theirs = step(by_torch)
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
        assert by_kernels._pending is None
        assert by_kernels.get_seq_length() == by_torch.get_seq_length() == PROMPT + number + 1
    assert by_kernels.store.tiles.length == by_torch.store.tiles.length == tiles + 1
    for mine, theirs in zip(
        by_kernels.store.exact.view(), by_torch.store.exact.view(), strict=True
    ):
        assert torch.equal(mine, theirs)
    assert by_kernels.calls["sdpa by kernels"] == by_torch.calls["sdpa"] == STEPS


def test_only_a_layer_that_kernels_read_lets_a_token_wait() -> None:
    for impl, waits in (("triton", True), ("reference", False)):
        layer = filled(impl)
        layer.update(states(1), states(1))
        assert (layer._pending is not None) == waits
        # several tokens are stored at once
        layer.update(states(2), states(2))
        assert layer._pending is None and layer.get_seq_length() == PROMPT + 3


@pytest.mark.parametrize(
    "what", ["update", "keys", "crop", "select", "view", "copy", "two", "eager", "away"]
)
def test_a_waiting_token_is_never_lost(what: str) -> None:
    layer, plain = filled("triton"), filled("reference")
    torch.manual_seed(3)
    key, value, query = states(1), states(1), states(1, HEADS)
    handles = layer.update(key, value)
    theirs = plain.update(key, value)
    assert layer._pending is not None
    if what == "update":
        layer.update(key, value), plain.update(key, value)
    elif what == "crop":
        layer.crop(-1), plain.crop(-1)
    elif what == "select":
        for one in (layer, plain):
            one.batch_select_indices(torch.tensor([1]))
    elif what == "view":
        assert layer.view().recent[0].keys.shape[2] == plain.view().recent[0].keys.shape[2]
    elif what == "copy":
        layer = deepcopy(layer)
    elif what == "two":
        # as layers that share keys and values do
        first, second = (ask(layer, *handles, query) for _ in range(2))
        torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)
    elif what == "away":
        # as an offloading cache does before layers that share keys and values have read them
        layer.offload()
        layer.prefetch()
        mine = ask(layer, *handles, query)
        torch.testing.assert_close(mine, ask(plain, *theirs, query), atol=1e-4, rtol=1e-4)
    elif what == "eager":
        scores = query @ handles[0].repeat_interleave(2, 1).transpose(2, 3)
        wanted = query @ theirs[0].repeat_interleave(2, 1).transpose(2, 3)
        torch.testing.assert_close(scores, wanted, atol=1e-4, rtol=1e-4)
    sinks, packed = plain.view().sinks.keys.shape[2], plain.view().packed_length
    parts = sinks, packed, plain.get_seq_length() - sinks - packed
    for mine, other in ((layer.keys, plain.keys), (layer.values, plain.values)):
        first, middle, last = zip(mine.split(parts, 2), other.split(parts, 2), strict=True)
        assert torch.equal(*first) and torch.equal(*last)
        # scales are rounded to float16, a few of them the other way
        torch.testing.assert_close(*middle, atol=2.0**-10, rtol=2.0**-10)
    assert layer.get_seq_length() == plain.get_seq_length()
    assert layer._pending is None


def test_a_refused_pass_takes_the_stored_token_back() -> None:
    layer = filled("triton")
    before = layer.keys
    step(layer)
    assert layer.can_go_back_to(PROMPT)
    layer.go_back()
    assert before is not None and layer.keys is not None and torch.equal(layer.keys, before)
