# SPDX-License-Identifier: Apache-2.0
"""Codes to words and where words lie, in kernels. Letters as in `rq_hf.quant.packing`.

A block of codes holds 64 tokens, its rows. In fragment order the codes of all operands m that
share a word's nibble are put together first (`place_operand`, summed over m), then those of all j.
Both steps suit any axis: keys and signs are packed along columns, values along rows.
"""

import triton
import triton.language as tl


@triton.jit
def place_operand(code, m, BITS: tl.constexpr):
    """Bits of a code of operand `m`, where they lie in the nibbles of j = 0: a field.

    3 bits give three nibbles, that of plane x in byte x. Otherwise operands share one, and the
    upper half of a word (bit 16) starts a second one.
    """
    if BITS == 1:
        return code << m
    elif BITS == 2:
        return code << (16 * (m & 1) + (m & 2))
    elif BITS == 3:
        # bit x of operand 3 becomes bit 8 x + 3
        return tl.where(m == 3, (code * 0x20408) & 0x080808, code << (8 * m))
    else:
        return code << (16 * m)


@triton.jit
def join_operands(codes, first, BITS: tl.constexpr, OPERANDS: tl.constexpr):
    """Operands `first`, `first` + 1, .. of codes [R, columns] together: [R, blocks, rest]."""
    ROWS: tl.constexpr = codes.shape[0]
    PER_BLOCK: tl.constexpr = OPERANDS * (64 if BITS == 4 and codes.shape[1] > 64 else 32)
    BLOCKS: tl.constexpr = codes.shape[1] // PER_BLOCK
    split = tl.reshape(codes, [ROWS, BLOCKS, OPERANDS, PER_BLOCK // OPERANDS])
    m = tl.arange(0, OPERANDS)[None, None, :, None] + first
    return tl.sum(place_operand(split, m, BITS), 2)


@triton.jit
def store_columns(words_ptr, fields, row, BITS: tl.constexpr, ROWS: tl.constexpr, FIRST_BLOCK=0):
    """Stores joined operands [R, blocks, rest], packed along columns, of the rows `row` [R].

    The last 16 columns count j1, t, j0: codes of a word then lie in one thread of a matrix
    product's result.
    """
    R: tl.constexpr = fields.shape[0]
    BLOCKS: tl.constexpr = fields.shape[1]
    Q: tl.constexpr = fields.shape[2] // 16
    shape: tl.constexpr = [R, BLOCKS, Q, 2, 4, 2]
    j0 = tl.arange(0, 2)[None, None, None, None, None, :]
    j1 = tl.arange(0, 2)[None, None, None, :, None]
    pairs = tl.sum(tl.reshape(fields, shape) << (4 * j0), 5)
    block = tl.arange(0, BLOCKS) + FIRST_BLOCK
    t = tl.arange(0, 4)
    q = tl.arange(0, Q)
    for x in tl.static_range(3 if BITS == 3 else 1):
        plane = (pairs >> (8 * x)) & 255 if BITS == 3 else pairs
        words = tl.sum(plane << (8 * j1), 3)
        if BITS % 2 == 1:
            words = tl.sum(words << (16 * q[None, None, :, None]), 2)
            chunk = chunk_of(row[:, None], block[None, :], x, 0, ROWS, BITS, 1)
            at = word_of(chunk, row[:, None], 0, BITS)
            tl.store(words_ptr + at[:, :, None] + 4 * t[None, None, :], words)
        else:
            rows = row[:, None, None]
            chunk = chunk_of(rows, block[None, :, None], 0, (q // 2)[None, None, :], ROWS, BITS, Q)
            at = word_of(chunk, rows, (q % 2)[None, None, :], BITS)
            tl.store(words_ptr + at[:, :, :, None] + 4 * t[None, None, None, :], words)


@triton.jit
def chunk_of(row, block, x, ks, ROWS: tl.constexpr, BITS: tl.constexpr, COLUMN_STEPS: tl.constexpr):
    """Number of a chunk of 128 words; `COLUMN_STEPS` counts the values of (ks, kk)."""
    if BITS % 2 == 1:
        return (BITS * block + x) * (ROWS // 32) + row // 32
    else:
        return (block * (ROWS // 16) + row // 16) * (COLUMN_STEPS // 2) + ks


@triton.jit
def word_of(chunk, row, kk, BITS: tl.constexpr):
    """Number of the word of t = 0 in a record's part."""
    h = (row // 8) % 2
    w = 2 * ((row // 16) % 2) + h if BITS % 2 == 1 else 2 * h + kk
    return 128 * chunk + 16 * (row % 8) + w


@triton.jit
def value_token(row, s, BITS: tl.constexpr):
    """Token of a row of the block `s` of values: [t, h, kk, j], 4 bits [t, j1, ks or m, kk, j0].

    Threads of a matrix product's result then hold codes of a word in neighbouring lanes, and the
    two of the middle axis in one lane; t counts the warps.
    """
    t = row // 16
    middle = (row // 8) % 2
    low = row % 8
    if BITS == 4:
        return 32 * (low // 4) + 16 * ((low // 2) % 2) + 4 * t + 2 * middle + low % 2 + 64 * s
    else:
        return 32 * middle + 16 * (low // 4) + 4 * t + low % 4 + 64 * s


@triton.jit
def join_value_rows(codes, s, BITS: tl.constexpr):
    """The part of block `s` [64, D] in the fields [4, 8, D]; those of all blocks are summed."""
    split = tl.reshape(codes, [4, 2, 8, codes.shape[1]])
    middle = tl.arange(0, 2)[None, :, None, None]
    if BITS == 4:
        return tl.sum(split << (8 * middle), 1) << (16 * s)
    else:
        return tl.sum(place_operand(split, middle + 2 * s, BITS), 1)


@triton.jit
def store_value_rows(words_ptr, fields, BITS: tl.constexpr, LENGTH: tl.constexpr):
    """Stores the fields [4, 8, D] of values, packed along tokens."""
    D: tl.constexpr = fields.shape[2]
    d = tl.arange(0, D)
    two = tl.arange(0, 2)
    # a split brings both of a pair to one thread, by way of shared memory
    pairs = _join(tl.reshape(tl.trans(fields, (0, 2, 1)), [4, D, 2, 2, 2]), 4)
    if BITS == 4:
        if LENGTH == 64:
            words = _join(tl.trans(pairs, (0, 1, 3, 2)), 16)
            at = word_of(d[:, None] // 16, d[:, None], two[None, :], BITS)
        else:
            row = d[:, None, None]
            words = pairs
            at = word_of(2 * (row // 16) + two[None, :, None], row, two[None, None, :], BITS)
        _store_by_t(words_ptr, words, at)
    elif BITS == 2:
        at = word_of(d[:, None] // 16, d[:, None], two[None, :], BITS)
        _store_by_t(words_ptr, _join(pairs, 8), at)
    elif BITS == 1:
        _store_by_t(words_ptr, _join(_join(pairs, 8), 16), word_of(d // 32, d, 0, BITS))
    else:
        first, second = tl.split(pairs)
        for x in tl.static_range(3):
            byte = ((first >> (8 * x)) & 0xFF) | (((second >> (8 * x)) & 0xFF) << 8)
            at = word_of(d // 32 + x * (D // 32), d, 0, BITS)
            _store_by_t(words_ptr, _join(byte, 16), at)


@triton.jit
def _join(fields, shift: tl.constexpr):
    """Both fields of the last axis together, the second one `shift` bits up."""
    first, second = tl.split(fields)
    return first | (second << shift)


@triton.jit
def _store_by_t(words_ptr, words, at):
    """Stores words [4, ..], of which those of t = 0 lie at `at` [..]."""
    t = tl.arange(0, 4)
    if len(at.shape) == 1:
        tl.store(words_ptr + at[None, :] + 4 * t[:, None], words)
    elif len(at.shape) == 2:
        tl.store(words_ptr + at[None, :, :] + 4 * t[:, None, None], words)
    else:
        tl.store(words_ptr + at[None, :, :, :] + 4 * t[:, None, None, None], words)


@triton.jit
def store_plain(words_ptr, codes, s, COLUMNS: tl.constexpr, BITS: tl.constexpr, first=0):
    """Stores codes [64, C] of the block `s` of tokens in plain order, columns `first` and on."""
    column = tl.arange(0, codes.shape[1]) + first
    bits = tl.reshape(codes, [2, 32, codes.shape[1]])
    place = tl.arange(0, 32)[None, :, None]
    line = tl.arange(0, 2) + 2 * s
    at = (line[:, None] * COLUMNS + column[None, :]) * BITS
    for p in tl.static_range(BITS):
        words = tl.sum(((bits >> p) & 1) << place, 1)
        tl.store(words_ptr + at + p, words, mask=(column < COLUMNS)[None, :])


@triton.jit
def scale_place(token, LENGTH: tl.constexpr):
    """Position of a token's scale."""
    return (token % 8) * (LENGTH // 8) + token // 8
