# SPDX-License-Identifier: Apache-2.0
"""Codes and scales of rotated vectors, in kernels: `rq_hf.quant.scale_fit` line by line.

Codebooks are symmetric, so magnitudes are compared and the sign is put back. Levels count in
units of the codebook's step; up to 4 bits these are whole numbers of few digits, and the lowest
bits of such a float32 can carry its code: one selection finds both. Rows are not divided by their
norm; the boundaries are multiplied by it.
"""

import triton
import triton.language as tl

LARGEST_HALF = tl.constexpr(65504.0)
# the norm beyond which squares overflow: codes saturate there, and so does the scale
LARGEST_NORM = tl.constexpr(1.8446743e19)


@triton.jit
def select_levels(size, factor, book, levels):
    """The one of the positive `levels` that magnitudes are nearest to, edges times `factor`."""
    chosen = tl.full(size.shape, levels[0], tl.float32)
    for j in tl.static_range(2 ** (book.bits - 1) - 1):
        chosen = tl.where(size > book.edges[j] * factor, levels[j + 1], chosen)
    return chosen


@triton.jit
def search_index(size, factor, book):
    """Index of the positive level that magnitudes are nearest to, edges times `factor`."""
    index = tl.zeros(size.shape, tl.int32)
    for k in tl.static_range(1, book.bits):
        edge = tl.load(book.table + index + (2 ** (book.bits - 1 - k) - 1))
        index = tl.where(size > edge * factor, index + 2 ** (book.bits - 1 - k), index)
    return index


@triton.jit
def nearest_units(size, factor, book):
    """Units of the levels that magnitudes are nearest to, edges times `factor`."""
    if book.bits <= 4:
        return select_levels(size, factor, book, book.units)
    else:
        index = search_index(size, factor, book)
        return tl.load(book.table + index + 2 ** (book.bits - 1))


@triton.jit
def nearest(size, factor, book):
    """`nearest_units`, and codes of the positive levels in the lowest bits of an int32."""
    if book.bits <= 4:
        tagged = select_levels(size, factor, book, book.tagged).to(tl.int32, bitcast=True)
        return (tagged & -16).to(tl.float32, bitcast=True), tagged
    else:
        code = search_index(size, factor, book) + 2 ** (book.bits - 1)
        return tl.load(book.table + code), code


@triton.jit
def level_sums(size, units, shape):
    """<y, l> and |l|^2 of magnitudes and unit levels [R, D padded]."""
    if shape.head_dim < shape.padded:
        units = tl.where((tl.arange(0, shape.padded) < shape.head_dim)[None, :], units, 0.0)
    return tl.sum(size * units, 1), tl.sum(units * units, 1)


@triton.jit
def best_factor(size, norm, input_scales, book, shape):
    """The norm over the input scale of the least squared error, [R]."""
    best = norm
    explained = tl.full(norm.shape, -1.0, tl.float32)
    unit = tl.where(norm > 0, 1.0 / norm, 0.0)
    for i in tl.range(input_scales.count, num_stages=1):
        factor = norm * tl.load(input_scales.inverse + i)
        product, energy = level_sums(size, nearest_units(size, factor[:, None], book), shape)
        product *= unit
        gain = product * product / energy
        best = tl.where(gain > explained, factor, best)
        explained = tl.maximum(gain, explained)
    return best


@triton.jit
def fit_rows(y, unscale, input_scales, book, shape, RULE: tl.constexpr):
    """Codes [R, D padded] int32, stored scales [R] float16 and unit levels of rotated rows.

    Args:
        y: Rotated rows [R, D padded], zero from column D on.
        unscale: Factor of the scales: `y` comes multiplied by its inverse.
        input_scales: `InputScales`.
        book: `Book`.
        shape: `Shape`.
        RULE: Scale rule.
    """
    norm = tl.minimum(tl.sqrt(tl.sum(y * y, 1)), LARGEST_NORM)
    size = tl.abs(y)
    factor = norm
    # one bit has one magnitude, whatever the scale
    if RULE == "search" and book.bits > 1:
        factor = best_factor(size, norm, input_scales, book, shape)
    units, codes = nearest(size, factor[:, None], book)
    scale = norm
    if RULE != "norm":
        product, energy = level_sums(size, units, shape)
        scale = product / (energy * book.step)
    negative = y.to(tl.int32, bitcast=True) >> 31
    return (codes ^ negative) & (2**book.bits - 1), to_half(scale * unscale), units


@triton.jit
def to_half(scale):
    """float16; what it cannot hold becomes its largest number."""
    return tl.minimum(scale, LARGEST_HALF).to(tl.float16)


@triton.jit
def residual_rows(y, units, scale, unscale, book, shape):
    """What the stored record leaves of rows [R, D padded], multiplied like them."""
    levels = units * (scale.to(tl.float32) * book.step / unscale)[:, None]
    residual = y - tl.where(y < 0, -levels, levels)
    if shape.head_dim < shape.padded:
        inside = tl.arange(0, shape.padded) < shape.head_dim
        residual = tl.where(inside[None, :], residual, 0.0)
    return residual
