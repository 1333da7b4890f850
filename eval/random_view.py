# SPDX-License-Identifier: Apache-2.0
"""Packed keys and values made of random bits: attention takes as long as over a text's.

Any word is a valid record at 2, 3 and 4 bits, so nothing has to be encoded. Numbers have the sizes
that a model's have, and all that the defaults subtract and scale is there.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from eval.shapes import Shape
from rq_hf import RotorQuantConfig
from rq_hf.ops import ExactRows, LayerView
from rq_hf.quant.preconditioning import Preconditioner
from rq_hf.quant.rope import RopeTable
from rq_hf.quant.tiles import TileCodec

_DEFAULTS = RotorQuantConfig()
# of a key's residual behind its codes, and of a mean, beside the key itself
_RESIDUAL, _MEAN = 0.3, 0.5
_SCALE_DTYPE = torch.float16


def random_view(
    shape: Shape, codec: TileCodec, *, dtype: torch.dtype, device: torch.device
) -> LayerView:
    """Returns what a cache with the default settings would hold of so many tokens.

    The exact tail is the cache's own at this length: `residual_length` tokens and those that do not
    fill a tile. A context too short for a tile gives an empty packed part.
    """
    heads, case = shape.heads, shape.case
    sinks, length = _DEFAULTS.sink_length, codec.layout.tile_length
    tiles = max(0, case.context - sinks - _DEFAULTS.residual_length) // length
    packed = tiles * length
    rows = (case.batch, heads.kv, case.context - packed, heads.dim)
    keys, values = (torch.randn(rows, dtype=dtype, device=device) for _ in range(2))
    grid = (case.batch, heads.kv, tiles)
    return LayerView(
        sinks=ExactRows(keys[:, :, :sinks], values[:, :, :sinks]),
        packed_start=sinks,
        packed_length=packed,
        records=_random_words((*grid, codec.layout.record_words), device),
        scales=_random_scales((*grid, codec.layout.scale_rows, length), heads.dim, device),
        codec=codec,
        preconditioner=_random_preconditioner(shape, device),
        recent=(ExactRows(keys[:, :, sinks:], values[:, :, sinks:], sinks + packed),),
    )


def _random_words(shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, device=device)


def _random_scales(shape: tuple[int, ...], head_dim: int, device: torch.device) -> Tensor:
    """Returns norms of vectors of `head_dim` numbers near 1, and weights of residuals' signs."""
    scales = torch.rand(shape, dtype=_SCALE_DTYPE, device=device) * 0.5 + 0.75
    scales *= head_dim**0.5
    # the signs' part of a key has D times the length of its weight
    scales[..., 2:, :] *= _RESIDUAL / head_dim
    return scales


def _random_preconditioner(shape: Shape, device: torch.device) -> Preconditioner:
    heads = shape.heads
    size = (shape.case.batch, heads.kv, heads.dim)
    pre_mean, value_mean = (torch.randn(size, device=device) * _MEAN for _ in range(2))
    return Preconditioner(
        pre_mean=pre_mean,
        post_mean=torch.zeros_like(pre_mean),
        balance=torch.rand(size, device=device) + 0.5,
        value_mean=value_mean,
        rope=rope_table(heads.dim, heads.rope_theta),
    )


@cache
def rope_table(head_dim: int, theta: float) -> RopeTable:
    """Returns RoPE over the whole head, one for all layers as in a model."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    return RopeTable(1.0 / theta**exponent, interleaved=False)


def view_bytes(view: LayerView) -> int:
    """Returns the bytes that attention has to read of a view."""
    exact = [tensor for rows in (view.sinks, *view.recent) for tensor in (rows.keys, rows.values)]
    means: list[Tensor] = []
    if view.preconditioner is not None:
        view.preconditioner.map(lambda tensor: means.append(tensor) or tensor)
    return sum(tensor.nbytes for tensor in (view.records, view.scales, *exact, *means))


def first_sequence(view: LayerView) -> LayerView:
    """Returns the view of the batch's first sequence alone."""

    def cut(rows: ExactRows) -> ExactRows:
        return replace(rows, keys=rows.keys[:1], values=rows.values[:1])

    statistics = view.preconditioner
    return replace(
        view,
        sinks=cut(view.sinks),
        records=view.records[:1],
        scales=view.scales[:1],
        preconditioner=None if statistics is None else statistics.map(lambda t: t[:1]),
        recent=tuple(cut(rows) for rows in view.recent),
    )
