# SPDX-License-Identifier: Apache-2.0
"""The encode kernel: rows of keys or values to packed records, in one pass.

A program takes some tiles of one KV head, keys or values, in blocks of 64 tokens. Rows come in two
slices of half the dimensions, whose elements i are the pairs that RoPE turns, so that a mean before
RoPE needs no shuffle. mean_n is turned in two steps, to the tile's start and from there on: the
second table then has a tile's rows only.
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
from rq_hf.ops.triton.products import load_parts, multiply, multiply_exact
from rq_hf.ops.triton.sketching import sketch_rows, store_joined_signs

ROWS = tl.constexpr(64)


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
        key_mean: `KeyMean`.
        turns: `Turns`, or None without RoPE.
        value_mean: float32 [B, Hk, D]; rotated like the rows, [B, Hk, D padded], and subtracted
            behind the rotation for `CENTER_LAST`, so that 16-bit values are rotated as they are.
        key_rotation: `Matrix` [2, D / 2 padded, D padded], transposed, rows in pairs. In fragment
            order each 16 columns count j1, t, j0.
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
        _encode_keys(
            data,
            keys.row,
            KeyMean(
                key_mean.pre + head * 2 * shape.half,
                key_mean.cross + head * 2 * shape.half,
                key_mean.post + head * 2 * shape.half,
                key_mean.balance + head * 2 * shape.half,
            ),
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
        _encode_values(
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
def _encode_keys(
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
    row = tl.arange(0, ROWS)
    resident = _resident(rotation, shape.key_step, shape)
    for tile in tl.range(first, last, num_stages=1):
        tile_rows, words, tile_scales = _tile(data, stride, records, scales, tile, shape)
        sign_words = words + shape.length * shape.head_dim * (BITS + value_book.bits) // 32
        fields = tl.zeros([ROWS, 1, 32], tl.int32)
        signs = tl.zeros([ROWS, 1, 32], tl.int32)
        for s in tl.range(0, shape.length // ROWS, num_stages=1):
            token = row + s * ROWS
            rows = tile_rows + token[:, None] * stride
            y = _rotated_keys(rows, token, tile, mean, turns, rotation, resident, shape)
            codes, scale, units = fit_rows(y, rotation.unscale, input_scales, book, shape, RULE)
            place = tile_scales + scale_place(token, shape.length)
            tl.store(place, scale)
            if JOINED:
                fields += join_operands(codes, 2 * s, BITS, 2)
            elif shape.fragment:
                joined = join_operands(codes, 0, BITS, OPERANDS)
                store_columns(words, joined, token, BITS, shape.length)
            else:
                store_plain(words, codes, s, shape.head_dim, BITS)
            if sketch is not None:
                residual = residual_rows(y, units, scale, rotation.unscale, book, shape)
                signs, weight = sketch_rows(residual, signs, sign_words, s, sketch, shape)
                tl.store(place + 2 * shape.length, to_half(weight * rotation.unscale))
        if JOINED:
            store_columns(words, fields, row, BITS, ROWS)
        if sketch is not None:
            store_joined_signs(sign_words, signs, sketch, shape)


@triton.jit
def _encode_values(
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
    resident = _resident(rotation, shape.value_step, shape)
    for tile in tl.range(first, last, num_stages=1):
        tile_rows, words, tile_scales = _tile(data, stride, records, scales, tile, shape)
        fields = tl.zeros([4, 8, shape.padded], tl.int32)
        for s in tl.range(0, shape.length // ROWS, num_stages=1):
            token = value_token(row, s, BITS) if shape.fragment else row + s * ROWS
            rows = tile_rows + token[:, None] * stride
            y = _rotated_values(rows, mean, rotation, resident, shape, CENTER_LAST)
            codes, scale, _ = fit_rows(y, rotation.unscale, input_scales, book, shape, RULE)
            tl.store(tile_scales + scale_place(token, shape.length), scale)
            if shape.fragment:
                fields += join_value_rows(codes, s, BITS)
            else:
                store_plain(words, codes, s, shape.head_dim, BITS)
        if shape.fragment:
            store_value_rows(words, fields, BITS, shape.length)


@triton.jit
def _tile(data, stride, records, scales, tile, shape):
    """Where a tile's rows, words and scales begin."""
    number = tl.full([], tile, tl.int64)
    data += number * shape.length * stride
    return data, records + number * shape.words, scales + number * shape.scale_rows * shape.length


@triton.jit
def _resident(rotation, step: tl.constexpr, shape):
    """All slices of a rotation's rows, if they are few enough to stay; else None."""
    if shape.padded > 128:
        return None
    elif shape.padded == step:
        return (_load_slice(rotation, 0, step, shape),)
    elif shape.padded == 2 * step:
        return (_load_slice(rotation, 0, step, shape), _load_slice(rotation, 1, step, shape))
    else:
        return (
            _load_slice(rotation, 0, step, shape),
            _load_slice(rotation, 1, step, shape),
            _load_slice(rotation, 2, step, shape),
            _load_slice(rotation, 3, step, shape),
        )


@triton.jit
def _matrix_slice(rotation, resident, k: tl.constexpr, step: tl.constexpr, shape):
    if resident is None:
        return _load_slice(rotation, k, step, shape)
    else:
        return resident[k]


@triton.jit
def _load_slice(rotation, k: tl.constexpr, step: tl.constexpr, shape):
    """The k-th `step` rows of a rotation, as high and low part."""
    row = tl.arange(0, step) + k * step
    return load_parts(rotation, row, tl.arange(0, shape.padded), shape.padded)


@triton.jit
def _dims(turns, i, inside, first, shape):
    """Dimensions of pairs `i`, numbered behind `first`: 0 for the firsts, D / 2 for the seconds."""
    if turns is None or turns.pairs is None:
        return i + first
    else:
        return tl.load(turns.pairs + first + i, mask=inside, other=0)


@triton.jit
def _slice(numbers, i, inside):
    return tl.load(numbers + i, mask=inside, other=0.0)


@triton.jit
def _rotated_keys(rows, token, tile, mean, turns, rotation, resident, shape):
    """balance * (k - mean_n), rotated: [64, D padded]."""
    STEPS: tl.constexpr = shape.padded // 2 // shape.key_step
    y = tl.zeros([ROWS, shape.padded], tl.float32)
    for k in tl.static_range(STEPS):
        i = tl.arange(0, shape.key_step) + k * shape.key_step
        inside = i < shape.half
        angles = _angles(turns, token, tile, i, inside, shape)
        matrix = _matrix_slice(rotation, resident, k, shape.key_step, shape)
        x = _key_slice(rows, i, inside, 0, mean, turns, angles, shape)
        y = multiply(x, matrix[0], matrix[1], y, rotation)
        matrix = _matrix_slice(rotation, resident, STEPS + k, shape.key_step, shape)
        x = _key_slice(rows, i, inside, 1, mean, turns, angles, shape)
        y = multiply(x, matrix[0], matrix[1], y, rotation)
    return y


@triton.jit
def _angles(turns, token, tile, i, inside, shape):
    """Cosines and sines of pairs `i`: to the tile's start [step], from there on [64, step]."""
    if turns is None:
        return None
    else:
        at = i + tile * shape.half
        tile_cos = tl.load(turns.tile_cos + at, mask=inside, other=1.0)
        tile_sin = tl.load(turns.tile_sin + at, mask=inside, other=0.0)
        at = token[:, None] * shape.half + i[None, :]
        cos = tl.load(turns.row_cos + at, mask=inside[None, :], other=1.0)
        sin = tl.load(turns.row_sin + at, mask=inside[None, :], other=0.0)
        return tile_cos, tile_sin, cos, sin


@triton.jit
def _key_slice(rows, i, inside, SECOND: tl.constexpr, mean, turns, angles, shape):
    """balance * (k - mean_n) of the firsts or seconds of pairs `i`: float32 [64, step]."""
    at = i + SECOND * shape.half
    dims = _dims(turns, i, inside, SECOND * shape.half, shape)
    x = tl.load(rows + dims[None, :], mask=inside[None, :], other=0.0).to(tl.float32)
    balance, post = _masked(mean.balance, at, inside), _masked(mean.post, at, inside)
    x = x * balance[None, :] - post[None, :]
    if angles is not None:
        tile_cos, tile_sin, cos, sin = angles
        own, other = _masked(mean.pre, at, inside), _masked(mean.cross, at, inside)
        if SECOND:
            x -= (own * tile_cos + other * tile_sin)[None, :] * cos
            x -= (other * tile_cos - own * tile_sin)[None, :] * sin
        else:
            x -= (own * tile_cos - other * tile_sin)[None, :] * cos
            x += (other * tile_cos + own * tile_sin)[None, :] * sin
    return x


@triton.jit
def _masked(numbers, at, inside):
    return tl.load(numbers + at, mask=inside, other=0.0)


@triton.jit
def _rotated_values(rows, mean, rotation, resident, shape, CENTER_LAST: tl.constexpr):
    """v - mean, rotated: [64, D padded]."""
    y = tl.zeros([ROWS, shape.padded], tl.float32)
    for k in tl.static_range(shape.padded // shape.value_step):
        i = tl.arange(0, shape.value_step) + k * shape.value_step
        inside = i < shape.head_dim
        matrix = _matrix_slice(rotation, resident, k, shape.value_step, shape)
        x = tl.load(rows + i[None, :], mask=inside[None, :], other=0.0)
        if CENTER_LAST:
            y = multiply_exact(x, matrix[0], matrix[1], y, rotation)
        else:
            x = x.to(tl.float32) - _masked(mean, i, inside)[None, :]
            y = multiply(x, matrix[0], matrix[1], y, rotation)
    if CENTER_LAST:
        y -= tl.load(mean + tl.arange(0, shape.padded))[None, :]
    return y
