# SPDX-License-Identifier: Apache-2.0
"""Codes and scales of rotated vectors, in kernels: `rq_hf.quant.scale_fit` line by line.

Codebooks are symmetric, so magnitudes are compared and the sign is put back. Levels count in
units of the codebook's step; up to 4 bits these are whole numbers of few digits, and a float32 has
room for a code behind the point: one sum finds both. Rows are not divided by their norm; what
compares them with boundaries is.

A comparison and a selection take the integer half of a GPU's units, and an encoder has too many of
both. So a step at a boundary is a steep line cut off at 0 and 1, and a level the sum of the steps
below it: one multiply-add each.
"""

import triton
import triton.language as tl

LARGEST_HALF = tl.constexpr(65504.0)
# the square of a norm is cut off there: codes saturate, and so does the scale
LARGEST_SQUARE = tl.constexpr(3.4e38)
# the square of a norm below which the scale is 0, whatever the codes
SMALLEST_SQUARE = tl.constexpr(1e-36)
# slope of a step, so steep that none ends between 0 and 1: edges are above 2**-7, so that products
# near them are multiples of 2**-55, and the least excess times the slope is beyond 1
STEEP = tl.constexpr(2.0**60)
# what brings the codes behind the point of a sum below 256 into the lowest bits
TO_LOWEST = tl.constexpr(128.0)


@triton.jit
def select_levels(size, stretch, book, levels):
    """The one of the positive `levels` that magnitudes times `stretch` are nearest to."""
    chosen = tl.full(size.shape, levels[0], tl.float32)
    for j in tl.static_range(2 ** (book.bits - 1) - 1):
        step = tl.clamp(tl.fma(size, stretch * STEEP, -book.edges[j] * STEEP), 0.0, 1.0)
        chosen = tl.fma(step, levels[j + 1] - levels[j], chosen)
    return chosen


@triton.jit
def search_index(size, stretch, book):
    """Index of the positive level that magnitudes times `stretch` are nearest to."""
    index = tl.zeros(size.shape, tl.int32)
    for k in tl.static_range(1, book.bits):
        edge = tl.load(book.table + index + (2 ** (book.bits - 1 - k) - 1))
        index = tl.where(size * stretch > edge, index + 2 ** (book.bits - 1 - k), index)
    return index


@triton.jit
def nearest_units(size, stretch, book):
    """Units of the levels that magnitudes times `stretch` are nearest to."""
    if book.bits <= 4:
        return select_levels(size, stretch, book, book.units)
    else:
        index = search_index(size, stretch, book)
        return tl.load(book.table + index + 2 ** (book.bits - 1))


@triton.jit
def nearest(size, stretch, book):
    """`nearest_units`, and codes of the positive levels in the lowest bits of an int32.

    Up to 4 bits a unit is too large by 2**-16 times its code, and scales are fitted to that: they
    come out smaller by a few millionths.
    """
    if book.bits <= 4:
        tagged = select_levels(size, stretch, book, book.tagged)
        return tagged, (tagged + TO_LOWEST).to(tl.int32, bitcast=True)
    else:
        code = search_index(size, stretch, book) + 2 ** (book.bits - 1)
        return tl.load(book.table + code), code


@triton.jit
def whole_units(units, book):
    """Units without what codes add."""
    if book.bits <= 4:
        bits = (units + TO_LOWEST).to(tl.int32, bitcast=True) & -65536
        return bits.to(tl.float32, bitcast=True) - TO_LOWEST
    else:
        return units


@triton.jit
def level_sums(size, units, shape):
    """<y, l> and |l|^2 of magnitudes and unit levels [R, D padded]."""
    if shape.head_dim < shape.padded:
        units = tl.where((tl.arange(0, shape.padded) < shape.head_dim)[None, :], units, 0.0)
    return tl.sum(size * units, 1), tl.sum(units * units, 1)


@triton.jit
def best_stretch(size, inverse, input_scales, book, shape):
    """The inverse norm times the input scale of the least squared error, [R]."""
    best = inverse
    explained = tl.full(inverse.shape, -1.0, tl.float32)
    for i in tl.range(input_scales.count, num_stages=1):
        stretch = inverse * tl.load(input_scales.factor + i)
        product, energy = level_sums(size, nearest_units(size, stretch[:, None], book), shape)
        product *= inverse
        gain = product * product / energy
        best = tl.where(gain > explained, stretch, best)
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
    square = tl.minimum(tl.sum(y * y, 1), LARGEST_SQUARE)
    size = tl.abs(y)
    stretch = tl.where(square > SMALLEST_SQUARE, tl.rsqrt(square), 0.0)
    # one bit has one magnitude, whatever the scale
    if RULE == "search" and book.bits > 1:
        stretch = best_stretch(size, stretch, input_scales, book, shape)
    units, codes = nearest(size, stretch[:, None], book)
    if RULE == "norm":
        scale = tl.sqrt(square)
    else:
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
    levels = whole_units(units, book) * (scale.to(tl.float32) * book.step / unscale)[:, None]
    residual = y - tl.where(y < 0, -levels, levels)
    if shape.head_dim < shape.padded:
        inside = tl.arange(0, shape.padded) < shape.head_dim
        residual = tl.where(inside[None, :], residual, 0.0)
    return residual
