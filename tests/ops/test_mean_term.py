# SPDX-License-Identifier: Apache-2.0
"""What the kernels read for q . RoPE_n(pre_mean), summed up as tensor cores would."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from eval.random_view import random_view
from eval.shapes import parse_shape
from rq_hf.quant.rope import RopeTable
from rq_hf.quant.tiles import TileCodec

if TYPE_CHECKING:
    from rq_hf.ops.triton.attend_launch import Call

pytest.importorskip("triton")

SCALE = 0.125
SHAPES = {64: "qwen2.5-0.5b:2x1k", 128: "llama-3-8b:1x1k", 256: "gemma-3-270m:2x1k"}


@pytest.mark.parametrize("head_dim", SHAPES)
@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize(("theta", "interleaved"), [(1e4, True), (5e5, False)])
def test_fast_and_slow_pairs_add_up(
    head_dim: int, bits: int, theta: float, interleaved: bool
) -> None:
    from rq_hf.ops.triton.attend_launch import Call, Inputs
    from rq_hf.ops.triton.launching import launch

    torch.manual_seed(0)
    shape = parse_shape(SHAPES[head_dim])
    codec = TileCodec(head_dim, key_bits=bits, value_bits=bits)
    view = random_view(shape, codec, dtype=torch.float32, device=torch.device("cpu"))
    assert view.preconditioner is not None
    rope = RopeTable(theta ** -torch.linspace(0, 1, head_dim // 2), interleaved)
    view = replace(view, preconditioner=replace(view.preconditioner, rope=rope))
    query = torch.randn(shape.case.batch, shape.heads.query, 1, head_dim)
    call = Call(Inputs(query, view, [view.sinks, *view.recent], None, None, SCALE, False, None))
    launch(call.prepare())

    expected, size = mean_scores(query, view.preconditioner.pre_mean, rope, view.packed_start)
    found = summed_up(call)[:, : query.shape[1] // view.records.shape[1]]
    length = found.shape[2]
    expected, size = (x.unflatten(1, (-1, found.shape[1])).flatten(0, 1) for x in (expected, size))
    # the table of positions is float16: half a unit of 2**-11
    error = (found - expected[:, :, :length]).abs() / size[:, :, None]
    assert error.max() < 2**-11
    assert expected.abs().max() > 0.05 * size.max()


def mean_scores(query: Tensor, mean: Tensor, rope: RopeTable, start: int) -> tuple[Tensor, Tensor]:
    """Scores `[B, Hq, 1024]` from position `start` on, and sums of their terms' sizes `[B, Hq]`."""
    factor = SCALE / torch.log(torch.tensor(2.0, dtype=torch.float64))
    group = query.shape[1] // mean.shape[1]
    x = in_pairs(query[:, :, 0].double() * factor, rope)
    m = in_pairs(mean.double().repeat_interleave(group, 1), rope)
    position = torch.arange(start, start + 1024, dtype=torch.float64)
    angle = position[:, None] * rope.inv_freq.double()
    terms = (x.conj() * m)[:, :, None] * torch.polar(torch.ones_like(angle), angle)
    return terms.real.sum(-1), (x.conj() * m).abs().sum(-1)


def in_pairs(x: Tensor, rope: RopeTable) -> Tensor:
    """Pairs that RoPE turns, as complex numbers."""
    first, second = (x[..., ::2], x[..., 1::2]) if rope.interleaved else x.chunk(2, -1)
    return torch.complex(first.contiguous(), second.contiguous())


def summed_up(call: Call) -> Tensor:
    """Scores `[units, H, tokens]` from all that `prepare` stored and the tables."""
    space, sizes, angles = call.space, call.sizes, call.angles
    units, rows, tiles, fast = sizes.units, sizes.block, sizes.tiles, 4 * angles.halves
    a, b = space.coef.view(units, 2, rows, call.pairs).double().unbind(1)
    cos, sin = angles.tiles[:tiles].double().unbind(1)
    a, b = (x[:, :, None] for x in (a, b))
    turned = torch.stack([a * cos + b * sin, b * cos - a * sin], -1)
    # pairs beyond the table's own are zero
    padding = max(0, fast - turned.shape[3])
    turned = torch.nn.functional.pad(turned, (0, 0, 0, padding))[:, :, :, :fast].flatten(3)
    slow = space.slow_coef.view(units, call.steps, rows, 2, 4, 2, 2).double().sum(3)
    terms = angles.turned_terms[:tiles].view(tiles, call.steps, 8, 4, 2, 2, 2).double().sum(5)
    basis = torch.einsum("usrthj,nskthj->urnk", slow, terms)
    columns = torch.cat([turned, basis] if call.steps else [turned], -1)
    # block mt g t hi h j
    table = angles.operands.double().permute(1, 5, 2, 0, 4, 3, 6).flatten(0, 2).flatten(1)
    return torch.einsum("tc,urnc->urnt", table, columns).flatten(2)
