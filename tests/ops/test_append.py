# SPDX-License-Identifier: Apache-2.0
"""Appending to buffers of a fixed size, against the growing store, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rq_hf.config import RotorQuantConfig
from rq_hf.ops.append import Buffers, append
from rq_hf.packed_states import PackedStates
from rq_hf.quant.preconditioning import Preconditioner
from rq_hf.quant.rope import RopeTable

BATCH, HEADS, HEAD_DIM = 2, 2, 64
TILES = 6


def make_states(tokens: int, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shape = (BATCH, HEADS, tokens, HEAD_DIM)
    return [torch.randn(shape, generator=generator).to(device) for _ in range(2)]


def make_preconditioner(device: torch.device) -> Preconditioner:
    generator = torch.Generator().manual_seed(0)
    pre, post, value = torch.randn(3, BATCH, HEADS, HEAD_DIM, generator=generator)
    # of the two key means a head has one
    first = torch.tensor([1.0, 0.0])[:, None]
    balance = torch.rand(BATCH, HEADS, HEAD_DIM, generator=generator) + 0.5
    rope = RopeTable(10_000.0 ** -torch.arange(0, 1, 2 / HEAD_DIM))
    made = Preconditioner(pre * first, post * (1 - first), balance, value, rope)
    return made.map(lambda tensor: tensor.to(device))


def start(prompt: int, device: torch.device, **settings: Any) -> tuple[PackedStates, Buffers]:
    """Returns a growing store of a prompt, and buffers that hold the same."""
    # kernels round otherwise: a code next to a boundary may be its neighbour
    config = RotorQuantConfig(impl="reference", **settings)
    states = PackedStates(config, 0, None)
    key, value = make_states(prompt, device)
    states.allocate(key)
    states.preconditioner = make_preconditioner(device)
    states.extend(key, value)
    store, codec = states.store, states.codec
    assert store is not None and codec is not None
    rows = config.sink_length + config.residual_length + store.tile_length
    grid = (BATCH, HEADS, TILES)
    layout = codec.layout
    buffers = Buffers(
        *(torch.full((BATCH, HEADS, rows, HEAD_DIM), torch.nan, device=device) for _ in range(2)),
        torch.full((*grid, layout.record_words), -1, dtype=torch.int32, device=device),
        torch.full(
            (*grid, layout.scale_rows, layout.tile_length),
            torch.nan,
            dtype=torch.float16,
            device=device,
        ),
        torch.zeros(4, dtype=torch.int32, device=device),
        torch.zeros((), dtype=torch.int32, device=device),
        torch.tensor(prompt, device=device),
        torch.tensor(store.packed_length, device=device),
        config.sink_length,
        config.residual_length,
        TILES * store.tile_length,
    )
    for mine, theirs in zip(buffers[:4], (*store.exact.view(), *store.tiles.view()), strict=True):
        mine[:, :, : theirs.shape[2]] = theirs
    return states, buffers


def step(
    states: PackedStates, buffers: Buffers, key: Tensor, value: Tensor, impl: str = "reference"
) -> None:
    assert states.codec is not None and states.preconditioner is not None
    append(states.codec, states.preconditioner, key, value, buffers, impl=impl)
    buffers.length.add_(1)


@pytest.mark.parametrize(
    ("prompt", "settings"),
    [
        (150, {"nbits": 4, "residual_length": 16}),
        (1, {"nbits": 4, "residual_length": 0, "sink_length": 0}),
        (2, {"nbits": 4, "residual_length": 5, "sink_length": 4}),
        # a full tail is packed before the prompt is handed over
        (4 + 16 + 64, {"nbits": 4, "residual_length": 16}),
        (4 + 16 + 63, {"nbits": 4, "residual_length": 16}),
        (200, {"nbits": 3, "residual_length": 130, "scale": "norm"}),
        (140, {"key_codec": "prod", "key_bits": 3, "value_bits": 2, "residual_length": 3}),
    ],
)
def test_every_step_holds_what_the_growing_store_holds(
    prompt: int, settings: dict[str, Any], device: torch.device
) -> None:
    states, buffers = start(prompt, device, **settings)
    store = states.store
    assert store is not None
    before = store.packed_length
    new = make_states(2 * store.tile_length + 10, device)
    for at in range(new[0].shape[2]):
        key, value = (x[:, :, at : at + 1] for x in new)
        step(states, buffers, key, value)
        # what attention reads of a step was there before its tile is packed
        store.exact.append(key, value)
        expected = [store.sinks, store.tail, store.packed_length, store.tiles.length]
        assert buffers.counts.tolist() == expected
        held = (*store.exact.view(), *store.tiles.view())
        for mine, theirs in zip(buffers[:4], held, strict=True):
            assert torch.equal(mine[:, :, : theirs.shape[2]], theirs)
        states.pack()
    assert store.packed_length - before >= 2 * store.tile_length


IMPLS = ["reference", "triton"]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("beyond", [0, 1, 63, 64, 10_000])
def test_a_loop_that_runs_on_changes_nothing(beyond: int, impl: str, device: torch.device) -> None:
    pytest.importorskip("triton")
    states, buffers = start(4, device, nbits=4, residual_length=16)
    buffers = buffers._replace(max_length=64 * TILES - 3)
    buffers.length.fill_(buffers.max_length - 1)
    step(states, buffers, *make_states(1, device), impl=impl)
    counts = buffers.counts.tolist()
    assert counts[0] + counts[1] + counts[2] == buffers.max_length
    before = [tensor.clone() for tensor in buffers[:6]]
    buffers.length.add_(beyond)
    step(states, buffers, *make_states(1, device), impl=impl)
    for mine, old in zip(buffers[:6], before, strict=True):
        torch.testing.assert_close(mine, old, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_tokens_that_are_not_finite_are_noted(
    which: int, number: float, impl: str, device: torch.device
) -> None:
    pytest.importorskip("triton")
    states, buffers = start(4, device, nbits=4, residual_length=0)
    step(states, buffers, *make_states(1, device), impl=impl)
    assert buffers.not_finite.tolist() == 0
    new = make_states(1, device)
    new[which][1, 1, 0, -1] = number
    step(states, buffers, *new, impl=impl)
    assert buffers.not_finite.tolist() == 1
    step(states, buffers, *make_states(1, device), impl=impl)
    assert buffers.not_finite.tolist() == 1


def test_shapes_are_checked(device: torch.device) -> None:
    states, buffers = start(4, device, nbits=4, residual_length=0)
    with pytest.raises(ValueError, match="one token a sequence"):
        step(states, buffers, *make_states(2, device))
    with pytest.raises(ValueError, match="must have 68 rows"):
        short = buffers._replace(exact_keys=buffers.exact_keys[:, :, 1:])
        step(states, short, *make_states(1, device))
    with pytest.raises(ValueError, match="no room for 453 tokens"):
        step(states, buffers._replace(max_length=453), *make_states(1, device))


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run here")
def test_kernels_that_cannot_run_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    states, buffers = start(4, torch.device("cpu"), nbits=4, residual_length=0)
    with pytest.raises(ValueError, match="impl='triton' cannot run"):
        step(states, buffers, *make_states(1, torch.device("cpu")), impl="triton")
