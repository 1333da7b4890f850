# SPDX-License-Identifier: Apache-2.0
"""The decode kernel: packed records to rotated rows of keys and values."""

import triton
import triton.language as tl

from rq_hf.ops.triton.fields import chunk_of, scale_place, word_of
from rq_hf.ops.triton.products import load_parts, multiply_exact


@triton.jit
def decode_kernel(
    records,
    scales,
    keys,
    values,
    key_levels,
    value_levels,
    sketch,
    heads,
    shape,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Decodes `ROWS` tokens of the keys (axis 2: 0) or values (1) of a tile (axes 0 and 1).

    Args:
        records: `Rows` of words; their rows are the tiles.
        scales: `Rows` of scales, [S, T] for a tile.
        keys, values: Results [B, Hk, n * T, D], without gaps.
        key_levels, value_levels: Levels of all codes, float32.
        sketch: `SketchPlan` in plain order or None.
        heads: Hk.
        shape: `Shape`.
    """
    BLOCKS: tl.constexpr = shape.length // ROWS
    block = tl.program_id(0)
    head = tl.program_id(1)
    tile = (block // BLOCKS).to(tl.int64)
    token = tl.arange(0, ROWS) + (block % BLOCKS) * ROWS
    batch, of_batch = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    words = records.data + batch * records.batch + of_batch * records.head + tile * records.row
    scale = scales.data + batch * scales.batch + of_batch * scales.head + tile * scales.row
    scale += scale_place(token, shape.length)
    dim = tl.arange(0, shape.padded)
    inside = (dim < shape.head_dim)[None, :]
    tiles = tl.num_programs(0) // BLOCKS
    out = (head.to(tl.int64) * tiles + tile) * shape.length * shape.head_dim
    out += token[:, None] * shape.head_dim + dim[None, :]
    key_words = shape.length * shape.head_dim * KEY_BITS // 32
    if tl.program_id(2) == 0:
        y = _decode_keys(words, scale, token, dim, inside, key_levels, shape, KEY_BITS)
        if sketch is not None:
            signs = words + key_words + shape.length * shape.head_dim * VALUE_BITS // 32
            weight = tl.load(scale + 2 * shape.length).to(tl.float32)
            y += _expand_signs(signs, token, sketch, shape) * weight[:, None]
        tl.store(keys + out, y.to(keys.dtype.element_ty), mask=inside)
    else:
        words += key_words
        scale += shape.length
        y = _decode_values(words, scale, token, dim, inside, value_levels, shape, VALUE_BITS)
        tl.store(values + out, y.to(values.dtype.element_ty), mask=inside)


@triton.jit
def _decode_keys(words, scale, token, dim, inside, levels, shape, BITS: tl.constexpr):
    row, column = token[:, None], dim[None, :]
    codes = load_codes(
        words, row, column, inside, shape.length, shape.head_dim, BITS, shape.fragment
    )
    return tl.load(levels + codes) * tl.load(scale).to(tl.float32)[:, None]


@triton.jit
def _decode_values(words, scale, token, dim, inside, levels, shape, BITS: tl.constexpr):
    by_token, by_dim = token[:, None], dim[None, :]
    if shape.fragment:
        codes = load_codes(
            words, by_dim, by_token, inside, shape.head_dim, shape.length, BITS, True
        )
    else:
        codes = load_codes(
            words, by_token, by_dim, inside, shape.length, shape.head_dim, BITS, False
        )
    return tl.load(levels + codes) * tl.load(scale).to(tl.float32)[:, None]


@triton.jit
def load_codes(
    words,
    row,
    column,
    inside,
    R: tl.constexpr,
    C: tl.constexpr,
    BITS: tl.constexpr,
    FRAGMENT: tl.constexpr,
):
    """Codes at rows and columns of a packed matrix [R, C]; the two broadcast, as does `inside`."""
    if not FRAGMENT:
        at = ((row // 32) * C + column) * BITS
        codes = (tl.load(words + at, mask=inside, other=0) >> (row % 32)) & 1
        for p in tl.static_range(1, BITS):
            plane = tl.load(words + at + p, mask=inside, other=0)
            codes |= ((plane >> (row % 32)) & 1) << p
        return codes
    elif C == 64 and BITS < 4:
        half = row // (R // 2)
        return _load_joined(words, row % (R // 2), column + 64 * half, inside, R // 2, 128, BITS)
    else:
        return _load_joined(words, row, column, inside, R, 64 if C == 64 else 128, BITS)


@triton.jit
def _load_joined(
    words, row, column, inside, R: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr
):
    """`load_codes` in fragment order, halves joined; blocks have `BLOCK` columns."""
    WIDTH: tl.constexpr = BLOCK // (2 if BITS == 4 else 4)
    block = column // BLOCK
    m = (column % BLOCK) // WIDTH
    q = (column % WIDTH) // 16
    t = (column % 16) // 4
    nibble = 4 * (column % 4)
    if BITS % 2 == 0:
        chunk = chunk_of(row, block, 0, q // 2, R, BITS, WIDTH // 16)
        word = tl.load(words + word_of(chunk, row, q % 2, BITS) + 4 * t, mask=inside, other=0)
        if BITS == 2:
            return (word >> (nibble + 16 * (m & 1) + (m & 2))) & 3
        else:
            return (word >> (nibble + 16 * m)) & 15
    nibble += 16 * q
    if BITS == 1:
        at = word_of(chunk_of(row, block, 0, 0, R, BITS, 2), row, 0, BITS) + 4 * t
        return (tl.load(words + at, mask=inside, other=0) >> (nibble + m)) & 1
    last = m == 3
    at = word_of(chunk_of(row, block, tl.where(last, 0, m), 0, R, BITS, 2), row, 0, BITS) + 4 * t
    word = tl.load(words + at, mask=inside, other=0) >> nibble
    codes = tl.where(last, (word >> 3) & 1, word & 7)
    for x in tl.static_range(1, 3):
        at = word_of(chunk_of(row, block, x, 0, R, BITS, 2), row, 0, BITS) + 4 * t
        word = tl.load(words + at, mask=inside & last, other=0) >> nibble
        codes |= ((word >> 3) & 1) << x
    return codes


@triton.jit
def _expand_signs(words, token, sketch, shape):
    """S^T s of the tokens, [rows, D padded]."""
    total = tl.zeros([token.shape[0], shape.padded], tl.float32)
    dim = tl.arange(0, shape.padded)
    for chunk in tl.range(sketch.padded // 32, num_stages=1):
        column = tl.arange(0, 32) + chunk * 32
        inside = (column < sketch.size)[None, :]
        negative = load_codes(
            words,
            token[:, None],
            column[None, :],
            inside,
            shape.length,
            sketch.size,
            1,
            shape.fragment,
        )
        high, low = load_parts(sketch.back, column, dim, shape.padded)
        sign = (1 - 2 * negative).to(tl.float32)
        total = multiply_exact(sign, high, low, total, sketch.back)
    return total
