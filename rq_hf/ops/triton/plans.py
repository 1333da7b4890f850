# SPDX-License-Identifier: Apache-2.0
"""Constants of a codec in the form that kernels read, made once for each device."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from rq_hf.ops.triton.arguments import Book, InputScales, Matrix, Shape, SketchPlan
from rq_hf.ops.triton.means import Pairing
from rq_hf.quant.codebooks import Codebook
from rq_hf.quant.packing import TileLayout
from rq_hf.quant.prod_quantizer import ProdQuantizer
from rq_hf.quant.qjl import OrthogonalSketch, Sketch
from rq_hf.quant.rotations import Rotation
from rq_hf.quant.scale_fit import INPUT_SCALES

# pairs of keys, and dimensions of values, that are rotated at a time: what registers and shared
# memory can hold, and at best all of 128 dimensions of values, which are then waited for once
_STEPS, _WIDE_STEPS = (32, 64), (32, 128)
# how far a number may be from one of 16 bits to count as one: far below float32's rounding
_EXACT = 2.0**-40


def shape_of(layout: TileLayout, *, wide: bool = False) -> Shape:
    """Returns the sizes of a layout; `wide` if there is room for whole rows of a block."""
    padded = max(32, triton.next_power_of_2(layout.head_dim))
    key_step, value_step = _WIDE_STEPS if wide else _STEPS
    sizes = Shape(
        head_dim=layout.head_dim,
        half=layout.head_dim // 2,
        key_step=min(key_step, padded // 2),
        value_step=min(value_step, padded),
        padded=padded,
        length=layout.tile_length,
        words=layout.record_words,
        scale_rows=layout.scale_rows,
        fragment=layout.order == "fragment",
    )
    return Shape(*map(tl.constexpr, sizes))


@lru_cache(maxsize=256)
def plan_rotation(
    rotation: Rotation,
    pairing: Pairing | None,
    permuted: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> Matrix:
    """Returns the transposed matrix of a rotation, [D padded, D padded].

    Args:
        rotation: The rotation.
        pairing: Pairs that the rows are in, firsts before seconds; None for their own order.
        permuted: Whether columns are in the order of `accumulator_columns`.
        dtype: Type of the parts; float32 for one part.
        device: Where it is to lie.
    """
    size = rotation.head_dim
    padded = max(32, triton.next_power_of_2(size))
    exact = rotation.matrix("cpu", torch.float64).T
    if pairing is not None:
        exact = exact[pairing.dims(size).T.flatten()]
    if permuted:
        exact = exact[:, accumulator_columns(size)]
    grown = F.pad(exact, (0, padded - size, 0, padded - size))
    return _split(grown, dtype, device)


def accumulator_columns(count: int) -> Tensor:
    """Columns, [count], such that those of one j1, t, j0 follow one another: j = 2 j1 + j0.

    What one thread holds of a matrix product are columns 2 t and 2 t + 1 of every 8; so reordered,
    they are the codes of its own words.
    """
    j1, t, j0 = torch.meshgrid(torch.arange(2), torch.arange(4), torch.arange(2), indexing="ij")
    within = (4 * t + 2 * j1 + j0).flatten()
    return (torch.arange(0, count, 16)[:, None] + within).flatten()


@lru_cache(maxsize=64)
def plan_sketch(
    quantizer: ProdQuantizer, permuted: bool, dtype: torch.dtype, device: torch.device
) -> SketchPlan:
    """Returns the sketch of a quantizer; `permuted` as for `plan_rotation`, both ways."""
    sketch = quantizer.sketch
    size, dim = sketch.sketch_size, sketch.head_dim
    exact = sketch.matrix("cpu", torch.float64).T
    if permuted:
        exact = exact[accumulator_columns(dim)][:, accumulator_columns(size)]
    padded = -(-size // 32) * 32
    grown = F.pad(exact, (0, padded - size, 0, max(32, triton.next_power_of_2(dim)) - dim))
    energy = _energy(sketch)
    return SketchPlan(
        forward=_split(grown, dtype, device),
        back=_split(grown.T, dtype, device),
        size=tl.constexpr(size),
        padded=tl.constexpr(padded),
        mmse=tl.constexpr(quantizer.estimator == "mmse"),
        one_energy=tl.constexpr(energy is not None),
        weight=float(sketch.unbiased_weight),
        energy=energy or 0.0,
    )


def _energy(sketch: Sketch) -> float | None:
    """|S^T s|^2 for signs s, if it is the same for all: rows orthogonal, of length sqrt(D)."""
    if isinstance(sketch, OrthogonalSketch) and sketch.sketch_size <= sketch.head_dim:
        return float(sketch.head_dim * sketch.sketch_size)
    return None


def _split(exact: Tensor, dtype: torch.dtype, device: torch.device) -> Matrix:
    """Parts of a float64 matrix, which is scaled if that makes it one of 16-bit numbers."""
    largest = exact.abs().max()
    unit = exact / largest
    whole = (unit - unit.to(torch.bfloat16).double()).abs().max() <= _EXACT
    scaled = unit if whole else exact
    high = scaled.to(dtype)
    low = (scaled - high.double()).to(dtype)
    return Matrix(
        high=high.to(device).contiguous(),
        low=low.to(device).contiguous(),
        split=tl.constexpr(dtype != torch.float32),
        has_low=tl.constexpr(dtype != torch.float32 and not whole),
        unscale=float(largest) if whole else 1.0,
    )


@lru_cache(maxsize=64)
def plan_book(codebook: Codebook, device: torch.device) -> Book:
    """Returns a codebook; symmetric, and of int8 levels up to 4 bits, as tiles use."""
    half = 2 ** (codebook.bits - 1)
    edges, levels = codebook.boundaries[half:], codebook.levels[half:]
    bits = tl.constexpr(codebook.bits)
    table = torch.cat((edges, edges.new_zeros(1), levels)).to(device)
    if codebook.bits > 4:
        none = tl.constexpr(None)
        return Book(table, bits, none, none, none, tl.constexpr(1.0))
    assert codebook.int_levels is not None and codebook.step is not None
    units = codebook.int_levels[half:].float()
    tagged = units + torch.arange(half, 2 * half) * 2.0**-16
    edges, units, tagged = (tl.constexpr(tuple(x.tolist())) for x in (edges, units, tagged))
    return Book(table, bits, edges, units, tagged, tl.constexpr(codebook.step))


@lru_cache(maxsize=16)
def plan_input_scales(device: torch.device) -> InputScales:
    """Returns the input scales of "search"."""
    factor = torch.tensor(INPUT_SCALES, dtype=torch.float32, device=device)
    return InputScales(factor, tl.constexpr(len(INPUT_SCALES)))


@lru_cache(maxsize=64)
def plan_levels(codebook: Codebook, device: torch.device) -> Tensor:
    """Returns the levels of a codebook, float32."""
    return codebook.levels.to(device)
