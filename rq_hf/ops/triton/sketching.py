# SPDX-License-Identifier: Apache-2.0
"""Signs and weights of residuals, in kernels: `rq_hf.quant.qjl`.

With p = S r and s its signs, <r, S^T s> is the sum of |p|. Sketches of orthogonal rows have one
|S^T s|^2 for all s; otherwise it takes another product.
"""

import triton
import triton.language as tl

from rq_hf.ops.triton.fields import place_operand, store_columns, store_plain
from rq_hf.ops.triton.products import load_parts, multiply, multiply_exact, split


@triton.jit
def sketch_rows(residual, joined, words, s, sketch, shape):
    """Stores the signs of residuals [64, D padded]; returns `joined` and weights [64], float32.

    Args:
        residual: What the record leaves, float32.
        joined: Fields [64, 1, 32] of the tile's blocks before, where 64 columns are joined: these
            are stored in the end.
        words: Where the tile's signs begin.
        s: Number of the block of tokens in its tile.
        sketch: `SketchPlan`.
        shape: `Shape`.
    """
    JOINED: tl.constexpr = shape.fragment and sketch.size == 64
    row = tl.arange(0, 64)
    total = tl.zeros([64], tl.float32)
    direction = tl.zeros([64, shape.padded], tl.float32)
    parts = split(residual, sketch.forward)
    for block in tl.static_range((sketch.padded + 127) // 128):
        fields = tl.zeros([64, 1, 32], tl.int32)
        for chunk in tl.range(0, min(4, sketch.padded // 32 - 4 * block), num_stages=1):
            first = 128 * block + 32 * chunk
            negative, part, direction = _project(parts, first, direction, sketch, shape)
            total += part
            if shape.fragment:
                m = chunk + 2 * s if JOINED else chunk
                fields += place_operand(tl.reshape(negative, [64, 1, 32]), m, 1)
            else:
                store_plain(words, negative, s, sketch.size, 1, first)
        if JOINED:
            joined += fields
        elif shape.fragment:
            store_columns(words, fields, row + 64 * s, 1, shape.length, block)
    return joined, _weight(residual, total, direction, sketch)


@triton.jit
def store_joined_signs(words, joined, sketch, shape):
    """Stores what `sketch_rows` joined."""
    if shape.fragment and sketch.size == 64:
        store_columns(words, joined, tl.arange(0, 64), 1, 64)


@triton.jit
def _weight(residual, total, direction, sketch):
    if not sketch.mmse:
        return sketch.weight * tl.sqrt(tl.sum(residual * residual, 1))
    elif sketch.one_energy:
        return total / sketch.energy
    else:
        energy = tl.sum(direction * direction, 1)
        return total / tl.where(energy > 0, energy, 1.0)


@triton.jit
def _project(parts, first, direction, sketch, shape):
    """Signs [64, 32] of 32 rows of the sketch, sums of |S r| and `direction` plus S^T s."""
    column = tl.arange(0, 32) + first
    dim = tl.arange(0, shape.padded)
    high, low = load_parts(sketch.forward, dim, column, sketch.padded)
    zero = tl.zeros([64, 32], tl.float32)
    projected = multiply(parts, high, low, zero, sketch.forward)
    negative = (projected < 0).to(tl.int32)
    if sketch.mmse and not sketch.one_energy:
        high, low = load_parts(sketch.back, column, dim, shape.padded)
        sign = (1 - 2 * negative).to(tl.float32)
        direction = multiply_exact(sign, high, low, direction, sketch.back)
    return negative, tl.sum(tl.abs(projected), 1), direction
