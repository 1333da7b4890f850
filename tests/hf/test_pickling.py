# SPDX-License-Identifier: Apache-2.0
"""Caches that are pickled, as those of the host can be."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.flows import LENGTH, NEW, make_cache, packed_tokens
from support.models import make_model, make_tokens
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from rq_hf import RotorQuantCache


def save_and_load(cache: Any) -> Any:
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "torch.save": save_and_load,
    "deepcopy": copy.deepcopy,
}


@pytest.fixture(params=WAYS)
def duplicate(request: pytest.FixtureRequest) -> Callable[[Any], Any]:
    return WAYS[request.param]


@torch.no_grad()
def go_on(model: Any, cache: Any) -> Tensor:
    """Returns the logits of steps, and of a later prompt that packs a tile more."""
    passes = [make_tokens(n, seed=n) for n in (1, NEW, 1, 200)]
    return torch.cat([model(tokens, past_key_values=cache).logits for tokens in passes], 1)


# nothing stored, statistics still open, and tokens packed
@pytest.mark.parametrize("length", [0, 9, LENGTH])
@pytest.mark.parametrize("family", ["llama", "gemma3-window", "qwen3-next"])
@torch.no_grad()
def test_a_cache_goes_on_as_if_nothing_had_happened(
    family: str, length: int, duplicate: Callable[[Any], Any]
) -> None:
    model = make_model(family)
    cache = make_cache(model)
    if length:
        model(make_tokens(length), past_key_values=cache)
    other = duplicate(cache)
    assert other.describe() == cache.describe()
    assert torch.equal(go_on(model, other), go_on(model, cache))
    assert other.describe() == cache.describe()
    assert packed_tokens(other) == packed_tokens(cache) != {0}
    # once more, and reset as the first one
    other = duplicate(other)
    for each in (cache, other):
        each.reset(keep_statistics=True)
    assert torch.equal(go_on(model, other), go_on(model, cache))


@torch.no_grad()
def test_without_config_and_beside_another_cache(duplicate: Callable[[Any], Any]) -> None:
    model = make_model("bart")
    cache = EncoderDecoderCache(RotorQuantCache(residual_length=32), DynamicCache())
    prompt = make_tokens(20)
    model(prompt, decoder_input_ids=make_tokens(LENGTH), past_key_values=cache)
    other = duplicate(cache)
    step = {"decoder_input_ids": make_tokens(1, seed=1)}
    mine, theirs = (model(prompt, past_key_values=x, **step).logits for x in (other, cache))
    assert torch.equal(mine, theirs)
    assert packed_tokens(other.self_attention_cache) == {128}


@torch.no_grad()
def test_a_pickle_holds_little_more_than_the_buffers() -> None:
    model = make_model("llama")
    cache = make_cache(model)
    model(make_tokens(LENGTH), past_key_values=cache)
    model(make_tokens(1), past_key_values=cache)
    held = sum(t.nbytes for layer in cache.packed_layers for t in layer.store.tensors())
    statistics = sum(
        t.nbytes
        for layer in cache.packed_layers
        for t in vars(layer.preconditioner).values()
        if isinstance(t, Tensor)
    )
    # angles of the newest positions
    table = len(pickle.dumps(cache.packed_layers[0].rope))
    # a tensor has a few hundred bytes of its own
    assert held < len(pickle.dumps(cache)) < held + statistics + table + 2**14
    codecs = {id(layer.codec) for layer in pickle.loads(pickle.dumps(cache)).packed_layers}
    assert codecs == {id(layer.codec) for layer in cache.packed_layers}


@torch.no_grad()
def test_attention_that_takes_no_handles_is_remembered() -> None:
    """A copy follows the model; what a pickle says of the attention is of when it was written."""
    model = make_model("llama")
    cache = make_cache(model)
    model(make_tokens(LENGTH), past_key_values=cache)
    model.config._attn_implementation = "flex_attention"
    pickled, copied = pickle.loads(pickle.dumps(cache)), copy.deepcopy(cache)
    model.config._attn_implementation = "sdpa"
    for each, taken in ((cache, True), (copied, True), (pickled, False)):
        assert all(layer.gives_handles() is taken for layer in each.packed_layers)


@torch.no_grad()
def test_the_cache_is_found_again(duplicate: Callable[[Any], Any]) -> None:
    model = make_model("llama")
    cache = make_cache(model)
    model(make_tokens(LENGTH), past_key_values=cache)
    other = duplicate(cache)
    model(make_tokens(1), past_key_values=other)
    assert all(layer.holder() is other for layer in other.packed_layers)
