# SPDX-License-Identifier: Apache-2.0
"""The append kernel against the reference: the same rows, counts and packed words."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import cache
from typing import Any

import pytest
import torch
from support.compile import compile_call, outside_interpreter
from support.driver import fake_driver
from torch import Tensor
from torch.utils._pytree import tree_leaves

from rq_hf.ops.append import Buffers, append
from rq_hf.quant.preconditioning import Preconditioner
from rq_hf.quant.rope import RopeTable
from rq_hf.quant.tiles import TileCodec

pytest.importorskip("triton")

BATCH, HEADS, TILES, SINKS = 2, 2, 4, 4
# over two tiles, the first steps before the first of them
BEFORE, BEHIND = 2, 3

CASES: dict[str, tuple[int, int, torch.dtype, dict[str, Any]]] = {
    "3 bits": (64, 40, torch.float32, {}),
    "as many kept as a tile has": (128, 128, torch.bfloat16, {}),
    "more, in blocks that overlap": (64, 200, torch.float16, {"key_bits": 4, "value_bits": 4}),
    "more": (128, 150, torch.bfloat16, {"key_bits": 2, "value_bits": 4, "rope": False}),
    "none kept": (64, 0, torch.float16, {"key_bits": 4, "value_bits": 4}),
    "plain order": (80, 40, torch.float32, {"rotary": 0.5}),
    "signs": (64, 40, torch.bfloat16, {"key_codec": "prod", "base": 1}),
}


def run(device: torch.device, case: str, impl: str) -> dict[str, Tensor]:
    """All buffers behind steps that fill the tail, pack a tile, fill it again and pack another."""
    head_dim, kept, dtype, options = CASES[case]
    options = dict(options)
    rotary = options.pop("rotary", 1.0) if options.pop("rope", True) else 0.0
    base = options.pop("base", 0)
    options = {"key_bits": 3, "value_bits": 3, **options}
    codec = TileCodec(head_dim, **options)
    length = codec.layout.tile_length
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    pre = make_preconditioner(random, head_dim, rotary)
    rows = (BATCH, HEADS, SINKS + kept + length, head_dim)
    exact = [random(*rows).to(dtype) for _ in range(2)]
    layout = codec.layout
    records = torch.zeros(BATCH, HEADS, TILES, layout.record_words, dtype=torch.int32)
    scales = torch.zeros(BATCH, HEADS, TILES, layout.scale_rows, length, dtype=torch.float16)
    records, scales = records.to(device), scales.to(device)
    counts, not_finite = (torch.zeros(n, dtype=torch.int32, device=device) for n in ((4,), ()))
    packed = torch.tensor(base * length, device=device)
    stored = packed + SINKS + kept + length - BEFORE
    room = rows[2] + TILES * length
    numbers = (counts, not_finite, stored, packed, SINKS, kept, room)
    buffers = Buffers(*exact, records, scales, *numbers)
    history = []
    for step in range(BEFORE + length + BEHIND):
        near_a_tile = min(abs(step - BEFORE), abs(step - BEFORE - length)) <= BEHIND
        append(
            codec,
            pre,
            *(random(BATCH, HEADS, 1, head_dim).to(dtype) for _ in range(2)),
            buffers,
            impl=impl if near_a_tile else "reference",
        )
        stored += 1
        history.append(counts.clone())
    return {
        "keys": exact[0],
        "values": exact[1],
        "records": records,
        "scales": scales,
        "counts": torch.stack(history),
    }


def make_preconditioner(random: Any, head_dim: int, rotary: float) -> Preconditioner:
    shape = (BATCH, HEADS, head_dim)
    mean, none = random(*shape), torch.zeros_like(random(*shape))
    balance, value_mean = random(*shape).sigmoid() + 0.5, random(*shape)
    if rotary == 0:
        return Preconditioner(none, mean, balance, value_mean)
    pairs = int(head_dim * rotary) // 2
    rope = RopeTable(10000.0 ** -torch.linspace(0, 1, pairs, dtype=torch.float64))
    return Preconditioner(mean, none, balance, value_mean, rope)


@pytest.mark.parametrize("case", CASES)
def test_steps_leave_what_the_reference_leaves(case: str, device: torch.device) -> None:
    expected, actual = (run(device, case, impl) for impl in ("reference", "triton"))
    tiles = expected["counts"][-1, 3]
    assert tiles == expected["counts"][0, 3] + 2
    for name in ("keys", "values", "counts"):
        assert torch.equal(actual[name], expected[name])
    # the products of kernels round otherwise: a code next to a boundary may be its neighbour
    different = (actual["records"] != expected["records"]).float().mean()
    assert different <= 2e-3
    assert expected["records"].count_nonzero() > 0
    # a row with another code has another scale
    others = ~torch.isclose(actual["scales"], expected["scales"], rtol=2**-9, atol=0)
    assert others.float().mean() <= 1e-2
    torch.testing.assert_close(actual["scales"], expected["scales"], rtol=0.1, atol=0)


def make_call(dtype: torch.dtype, seed: int = 0) -> tuple[Any, ...]:
    """Arguments of `append_tokens`, tensors of their own each time."""
    torch.manual_seed(seed)
    codec = make_codec()
    layout = codec.layout
    new, value, keys, values = (
        torch.randn(BATCH, HEADS, n, 128).to(dtype) for n in (1, 1, *2 * (SINKS + 256,))
    )
    buffers = Buffers(
        keys,
        values,
        torch.zeros(BATCH, HEADS, TILES, layout.record_words, dtype=torch.int32),
        torch.zeros(BATCH, HEADS, TILES, layout.scale_rows, 128, dtype=torch.float16),
        *(torch.zeros(n, dtype=torch.int32) for n in ((4,), ())),
        *(torch.zeros((), dtype=torch.int64) for _ in range(2)),
        SINKS,
        128,
        TILES * 128,
    )
    return codec, make_statistics(), new, value, buffers


@cache
def make_codec() -> TileCodec:
    return TileCodec(128, key_bits=3, value_bits=3, rotation="hadamard")


@cache
def make_rope() -> RopeTable:
    return RopeTable(10000.0 ** -torch.linspace(0, 1, 64, dtype=torch.float64))


def make_statistics() -> Preconditioner:
    return replace(make_preconditioner(torch.randn, 128, 1.0), rope=make_rope())


def compiled_usage(dtype: str, capability: int) -> dict[str, int]:
    """What the kernel takes of a GPU; called where Triton does not interpret."""
    from rq_hf.ops.triton import append_launch
    from rq_hf.ops.triton.append import append_kernel

    codec, pre, key, value, buffers = make_call(getattr(torch, dtype))
    tables, options = append_launch.shared_arguments(codec, pre, buffers)
    new = append_launch.rows_of(key), append_launch.rows_of(value)
    arguments = append_launch._arguments(pre, new, buffers, tables) | {"heads": 8, "tiles": 256}
    return asdict(compile_call(append_kernel, arguments, capability=capability, **options))


def test_graphs_keep_tables_and_no_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    from rq_hf.ops.triton import append_launch, tables

    monkeypatch.setattr(tables, "_in_graphs", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(
        append_launch,
        "keep_for_graphs",
        lambda kept, device: tables.keep_for_graphs(kept, torch.device("cuda")),
    )
    codec, pre, key, value, buffers = make_call(torch.bfloat16)
    append_launch.append_tokens(codec, pre, key, value, buffers)
    read, _ = append_launch.shared_arguments(codec, pre, buffers)
    constant = {id(x) for x in tree_leaves(read) if isinstance(x, Tensor)}
    assert {id(x) for x in read["turns"][:2]} < constant
    assert constant == set(tables._in_graphs)


def launched_again() -> dict[str, list[Any]]:
    """Arguments of launches, and of those made for the first time in place of each.

    Called where Triton does not interpret.
    """
    from rq_hf.ops.triton import append_launch

    first = make_call(torch.bfloat16)
    other_layer = make_call(torch.bfloat16, 1)
    other_token = (*first[:2], *make_call(torch.bfloat16, 2)[2:4], first[4])
    wide = torch.zeros(BATCH, HEADS, 3, 256, dtype=torch.bfloat16)
    strided = (*first[:2], wide[:, :, 1:2, :128], wide[:, :, 2:, 128:], first[4])
    unaligned = (*first[:2], wide[:, :, 1:2, 1:129], wide[:, :, 2:, 1:129], first[4])
    # equal statistics in other tensors, as behind a step through an operator
    calls = [first, other_token, other_layer, first, other_layer, strided, unaligned, strided]
    calls.append((first[0], replace(first[1]), *first[2:]))
    notes = {}
    for name in ("again", "anew"):
        with fake_driver() as noted:
            append_launch._known.clear()
            for call in calls:
                if name == "anew":
                    append_launch._known.clear()
                append_launch.append_tokens(*call)
        notes[name] = [_plain(note.arguments) for note in noted]
        if name == "again":
            notes["first"] = [note.first for note in noted]
    return notes


def _plain(arguments: dict[str, Any]) -> list[Any]:
    """Arguments as numbers, without the scratch, which is another one each time."""
    leaves = tree_leaves([x for name, x in arguments.items() if name != "SCRATCH"])
    values = [getattr(x, "value", x) for x in leaves]
    return [x.data_ptr() if isinstance(x, Tensor) else x for x in values]


def test_steps_launch_what_the_first_would() -> None:
    notes = outside_interpreter("ops.test_append_kernel:launched_again")
    assert notes["first"] == [True, False, True, False, False, True, True, False, False]
    assert notes["again"] == notes["anew"]
    # all nine differ but for those of the same layer and token
    assert len({str(note) for note in notes["again"]}) == 5


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_compiles_without_spills(dtype: str) -> None:
    usage = outside_interpreter("ops.test_append_kernel:compiled_usage", dtype, 90)
    assert usage["registers"] <= 255
    assert usage["stack"] <= 64
    assert usage["spills"] == 0
