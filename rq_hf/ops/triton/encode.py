# SPDX-License-Identifier: Apache-2.0
"""The encode kernel: rows of keys or values to packed records, in one pass.

A program takes some tiles of one KV head, keys or values, in blocks of 64 tokens. The rotation, up
to 128 dimensions, stays in shared memory all the while. Addresses are then computed anew for each
block: registers are short where three programs share a processor.
"""

import triton
import triton.language as tl

from rq_hf.ops.triton.arguments import KeyMean
from rq_hf.ops.triton.fields import (
    join_operands,
    join_value_rows,
    scale_place,
    store_columns,
    store_plain,
    store_value_rows,
    value_token,
)
from rq_hf.ops.triton.fitting import fit_rows, residual_rows, to_half
from rq_hf.ops.triton.rows import resident_slices, rotated_keys, rotated_values
from rq_hf.ops.triton.sketching import sketch_rows, store_joined_signs

ROWS = tl.constexpr(64)
# dimensions up to which addresses are computed anew. Compiled so by Triton 3.6, programs of 256
# dimensions with Prod keys read beyond their shared memory, and nobody knows why
# (eval/results/compute-sanitizer.txt)
RECOMPUTED = tl.constexpr(128)


@triton.jit
def encode_kernel(
    keys,
    values,
    key_mean,
    turns,
    value_mean,
    key_rotation,
    value_rotation,
    key_book,
    value_book,
    sketch,
    input_scales,
    records,
    scales,
    heads,
    tiles,
    tiles_each,
    shape,
    RULE: tl.constexpr,
    CENTER_LAST: tl.constexpr,
):
    """Encodes `tiles_each` tiles of the keys (axis 2: 0) or values (1) of a head (axis 1).

    Args:
        keys, values: `Rows`.
        key_mean: `KeyMean`, its members one behind the other: float32 [B, Hk, 4, 2, D / 2].
        turns: `Turns`, or None without RoPE.
        value_mean: float32 [B, Hk, D]; rotated like the rows, [B, Hk, D padded], and subtracted
            behind the rotation for `CENTER_LAST`, so that 16-bit values are rotated as they are.
        key_rotation: `Matrix` [D padded, D padded], transposed, rows in pairs, the first of a pair
            before its second. In fragment order each 16 columns count j1, t, j0.
        value_rotation: `Matrix` [D padded, D padded], transposed.
        key_book, value_book: `Book`.
        sketch: `SketchPlan` or None.
        input_scales: `InputScales`.
        records: Words, int32 [B, Hk, n, W].
        scales: float16 [B, Hk, n, S, T].
        heads, tiles: Hk and n.
        shape: `Shape`.
        RULE: Scale rule.
    """
    head = tl.program_id(1)
    first = tl.program_id(0) * tiles_each
    last = tl.minimum(first + tiles_each, tiles)
    records += head.to(tl.int64) * tiles * shape.words
    scales += head.to(tl.int64) * tiles * (shape.scale_rows * shape.length)
    at = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    if tl.program_id(2) == 0:
        data = keys.data + at[0] * keys.batch + at[1] * keys.head
        encode_keys(
            data,
            keys.row,
            _key_mean(key_mean + head * 8 * shape.half, 2 * shape.half),
            turns,
            key_rotation,
            key_book,
            value_book,
            sketch,
            input_scales,
            records,
            scales,
            first,
            last,
            shape,
            RULE,
        )
    else:
        data = values.data + at[0] * values.batch + at[1] * values.head
        encode_values(
            data,
            values.row,
            value_mean + head * (shape.padded if CENTER_LAST else shape.head_dim),
            value_rotation,
            value_book,
            input_scales,
            records + shape.length * shape.head_dim * key_book.bits // 32,
            scales + shape.length,
            first,
            last,
            shape,
            RULE,
            CENTER_LAST,
        )


@triton.jit
def encode_keys(
    data,
    stride,
    mean,
    turns,
    rotation,
    book,
    value_book,
    sketch,
    input_scales,
    records,
    scales,
    first,
    last,
    shape,
    RULE: tl.constexpr,
):
    BITS: tl.constexpr = book.bits
    OPERANDS: tl.constexpr = 2 if BITS == 4 else 4
    # 64 columns of less than 4 bits are joined: both blocks of a tile share its words
    JOINED: tl.constexpr = shape.fragment and shape.head_dim == 64 and BITS < 4
    BLOCKS: tl.constexpr = shape.length // ROWS
    row = tl.arange(0, ROWS)
    resident = resident_slices(rotation, 2 * shape.key_step, shape)
    fields = tl.zeros([ROWS, 1, 32], tl.int32)
    signs = tl.zeros([ROWS, 1, 32], tl.int32)
    # a loop over tiles around one over their blocks would take more registers
    for block in tl.range(
        first * BLOCKS, last * BLOCKS, num_stages=1, disable_licm=shape.padded <= RECOMPUTED
    ):
        tile = block // BLOCKS
        s = block - tile * BLOCKS
        tile_rows, words, tile_scales = _tile(data, stride, records, scales, tile, shape)
        sign_words = words + shape.length * shape.head_dim * (BITS + value_book.bits) // 32
        token = row + s * ROWS
        rows = tile_rows + token[:, None] * stride
        y = rotated_keys(rows, s, tile, mean, turns, rotation, resident, shape)
        codes, scale, units = fit_rows(y, rotation.unscale, input_scales, book, shape, RULE)
        place = tile_scales + scale_place(token, shape.length)
        tl.store(place, scale)
        if sketch is not None:
            residual = residual_rows(y, units, scale, rotation.unscale, book, shape)
        if JOINED:
            fields = tl.where(s == 0, 0, fields) + join_operands(codes, 2 * s, BITS, 2)
            if s == BLOCKS - 1:
                store_columns(words, fields, row, BITS, ROWS)
        elif shape.fragment:
            joined = join_operands(codes, 0, BITS, OPERANDS)
            store_columns(words, joined, token, BITS, shape.length)
        else:
            store_plain(words, codes, s, shape.head_dim, BITS)
        if sketch is not None:
            signs = tl.where(s == 0, 0, signs)
            signs, weight = sketch_rows(residual, signs, sign_words, s, sketch, shape)
            tl.store(place + 2 * shape.length, to_half(weight * rotation.unscale))
            if s == BLOCKS - 1:
                store_joined_signs(sign_words, signs, sketch, shape)


@triton.jit
def encode_values(
    data,
    stride,
    mean,
    rotation,
    book,
    input_scales,
    records,
    scales,
    first,
    last,
    shape,
    RULE: tl.constexpr,
    CENTER_LAST: tl.constexpr,
):
    BITS: tl.constexpr = book.bits
    row = tl.arange(0, ROWS)
    resident = resident_slices(rotation, shape.value_step, shape)
    for tile in tl.range(first, last, num_stages=1, disable_licm=shape.padded <= RECOMPUTED):
        tile_rows, words, tile_scales = _tile(data, stride, records, scales, tile, shape)
        fields = tl.zeros([4, 8, shape.padded], tl.int32)
        for s in tl.range(
            0, shape.length // ROWS, num_stages=1, disable_licm=shape.padded <= RECOMPUTED
        ):
            token = value_token(row, s, BITS) if shape.fragment else row + s * ROWS
            rows = tile_rows + token[:, None] * stride
            y = rotated_values(rows, mean, rotation, resident, shape, CENTER_LAST)
            codes, scale, _ = fit_rows(y, rotation.unscale, input_scales, book, shape, RULE)
            tl.store(tile_scales + scale_place(token, shape.length), scale)
            if shape.fragment:
                fields += join_value_rows(codes, s, BITS)
            else:
                store_plain(words, codes, s, shape.head_dim, BITS)
        if shape.fragment:
            store_value_rows(words, fields, BITS, shape.length)


@triton.jit
def _key_mean(numbers, dim: tl.constexpr):
    # one address to keep in registers in place of four
    return KeyMean(numbers, numbers + dim, numbers + 2 * dim, numbers + 3 * dim)


@triton.jit
def _tile(data, stride, records, scales, tile, shape):
    """Where a tile's rows, words and scales begin."""
    number = tl.full([], tile, tl.int64)
    data += number * shape.length * stride
    return data, records + number * shape.words, scales + number * shape.scale_rows * shape.length
