# SPDX-License-Identifier: Apache-2.0
"""The append kernel: one token to buffers of a fixed size, and a tile where the tail is full.

What a step does follows from numbers on the device (`rq_hf.ops.append`), so that its launch is the
same every time. Most steps store a row and are through; programs that find the tail full read what
packing takes, which is why none of that is prepared before.
"""

import triton
import triton.language as tl

from rq_hf.ops.triton.arguments import KeyMean
from rq_hf.ops.triton.encode import encode_keys, encode_values

# rows that move at a time: no more than a tile has
BLOCK = tl.constexpr(64)


@triton.jit
def append_kernel(
    new_keys,
    new_values,
    EXACT_KEYS,
    EXACT_VALUES,
    statistics,
    turns,
    PAIRS,
    key_rotation,
    value_rotation,
    key_book,
    value_book,
    sketch,
    input_scales,
    RECORDS,
    SCALES,
    LENGTH,
    BASE,
    COUNTS,
    NOT_FINITE,
    SCRATCH,
    heads,
    tiles,
    rows,
    sinks,
    kept,
    room,
    shape,
    RULE: tl.constexpr,
    CENTER_LAST: tl.constexpr,
):
    """Grid: (B Hk, 2), keys and values of a head.

    Args:
        new_keys, new_values: `Rows` of one token.
        EXACT_KEYS, EXACT_VALUES: [B, Hk, `rows`, D].
        statistics: `Statistics`.
        turns: `Turns` from the first packed token on, or None without RoPE.
        PAIRS: int32 [2, D / 2], dimensions of the pairs.
        RECORDS: int32 [B, Hk, `tiles`, W].
        SCALES: float16 [B, Hk, `tiles`, S, T].
        LENGTH, BASE: int64 [1], tokens stored before, and of these the ones packed by the host.
        COUNTS: int32 [4], written; see `LayerView.counts`.
        NOT_FINITE: int32 [1], set to 1 by a row that is not finite.
        SCRATCH: float32 [B Hk, 2, 8 D padded].
        sinks: Exact rows that never move.
        kept: Exact rows behind them that are not to be packed.
        room: Tokens that may be stored; steps beyond write nothing.
        Others as for `encode_kernel`.
    """
    head = tl.program_id(0)
    side = tl.program_id(1)
    at = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    packed = tl.load(BASE)
    length = tl.load(LENGTH)
    # what the counts say, attention reads: a loop that runs on must not lead out of the buffers
    if length >= room:
        return
    behind = length - packed - sinks - kept
    flushed = tl.maximum(behind, 0) // shape.length
    tile = (packed // shape.length + flushed - 1).to(tl.int32)
    slot = behind + sinks + kept - flushed * shape.length
    due = (flushed > 0) & (behind % shape.length == 0)
    d = tl.arange(0, shape.padded)
    inside = d < shape.head_dim
    if side == 0:
        exact = EXACT_KEYS + head.to(tl.int64) * rows * shape.head_dim
        new = tl.load(
            new_keys.data + at[0] * new_keys.batch + at[1] * new_keys.head + d,
            mask=inside,
            other=0.0,
        )
    else:
        exact = EXACT_VALUES + head.to(tl.int64) * rows * shape.head_dim
        new = tl.load(
            new_values.data + at[0] * new_values.batch + at[1] * new_values.head + d,
            mask=inside,
            other=0.0,
        )
    if due:
        records = RECORDS + head.to(tl.int64) * tiles * shape.words
        scales = SCALES + head.to(tl.int64) * tiles * (shape.scale_rows * shape.length)
        # where the sequence's first packed token would lie
        tokens = exact + (sinks - tile.to(tl.int64) * shape.length) * shape.head_dim
        scratch = SCRATCH + (head * 2 + side) * 8 * shape.padded
        if side == 0:
            encode_keys(
                tokens,
                shape.head_dim,
                _key_mean(statistics, PAIRS, scratch, head, shape),
                turns,
                key_rotation,
                key_book,
                value_book,
                sketch,
                input_scales,
                records,
                scales,
                tile,
                tile + 1,
                shape,
                RULE,
            )
        else:
            encode_values(
                tokens,
                shape.head_dim,
                _value_mean(statistics, value_rotation, scratch, head, shape, CENTER_LAST),
                value_rotation,
                value_book,
                input_scales,
                records + shape.length * shape.head_dim * key_book.bits // 32,
                scales + shape.length,
                tile,
                tile + 1,
                shape,
                RULE,
                CENTER_LAST,
            )
        tl.debug_barrier()
        _move_down(exact + sinks * shape.head_dim, kept, shape)
        tl.debug_barrier()
    tl.store(exact + slot * shape.head_dim + d, new, mask=inside)
    # rows are looked at once, here: scales of NaN are made finite, and packed as if nothing were
    size = tl.abs(new.to(tl.float32))
    lost = (size == float("inf")) | (size != size)
    tl.store(NOT_FINITE + 0 * d, tl.full(d.shape, 1, tl.int32), mask=lost)
    if (head == 0) & (side == 0):
        first = tl.minimum(sinks, slot + 1)
        tl.store(COUNTS, first.to(tl.int32))
        tl.store(COUNTS + 1, (slot + 1 - first).to(tl.int32))
        tl.store(COUNTS + 2, (packed + flushed * shape.length).to(tl.int32))
        tl.store(COUNTS + 3, tile + 1)


@triton.jit
def _move_down(rows, kept, shape):
    """Moves `kept` rows, which begin a tile behind `rows`, to there.

    A block's old and new rows are disjoint, since a tile has no fewer rows than a block, and no
    block reads what an earlier one has written, which lies before. Left is that a block writes what
    an earlier one reads; the barrier between loads and stores has all threads read first.
    """
    row = tl.arange(0, BLOCK)[:, None]
    d = tl.arange(0, shape.padded)[None, :]
    for first in tl.range(0, kept, BLOCK):
        inside = (first + row < kept) & (d < shape.head_dim)
        place = rows + (first + row) * shape.head_dim + d
        moved = tl.load(place + shape.length * shape.head_dim, mask=inside)
        tl.debug_barrier()
        tl.store(place, moved, mask=inside)


@triton.jit
def _key_mean(statistics, PAIRS, scratch, head, shape):
    """What keys of a head are freed of, as `encode_keys` reads it, written to `scratch`."""
    i = tl.arange(0, shape.padded // 2)
    inside = i < shape.half
    one = head * shape.head_dim + tl.load(PAIRS + i, mask=inside, other=0)
    other = head * shape.head_dim + tl.load(PAIRS + shape.half + i, mask=inside, other=0)
    balance1 = tl.load(statistics.balance + one, mask=inside)
    balance2 = tl.load(statistics.balance + other, mask=inside)
    pre1 = tl.load(statistics.pre_mean + one, mask=inside)
    pre2 = tl.load(statistics.pre_mean + other, mask=inside)
    post1 = tl.load(statistics.post_mean + one, mask=inside)
    post2 = tl.load(statistics.post_mean + other, mask=inside)
    D: tl.constexpr = shape.head_dim
    _store_pairs(scratch, i, inside, balance1 * pre1, balance2 * pre2, shape)
    _store_pairs(scratch + D, i, inside, balance1 * pre2, balance2 * pre1, shape)
    _store_pairs(scratch + 2 * D, i, inside, balance1 * post1, balance2 * post2, shape)
    _store_pairs(scratch + 3 * D, i, inside, balance1, balance2, shape)
    tl.debug_barrier()
    return KeyMean(scratch, scratch + D, scratch + 2 * D, scratch + 3 * D)


@triton.jit
def _store_pairs(place, i, inside, firsts, seconds, shape):
    tl.store(place + i, firsts, mask=inside)
    tl.store(place + shape.half + i, seconds, mask=inside)


@triton.jit
def _value_mean(statistics, rotation, scratch, head, shape, CENTER_LAST: tl.constexpr):
    """The mean of a head's values; rotated like the rows, in `scratch`, for CENTER_LAST."""
    mean = statistics.value_mean + head * shape.head_dim
    if not CENTER_LAST:
        return mean
    else:
        column = tl.arange(0, shape.padded)
        rotated = tl.zeros([shape.padded], tl.float32)
        for first in tl.static_range(0, shape.padded, 32):
            d = first + tl.arange(0, 32)
            place = d[:, None] * shape.padded + column[None, :]
            rows = tl.load(rotation.high + place).to(tl.float32)
            if rotation.has_low:
                rows += tl.load(rotation.low + place).to(tl.float32)
            some = tl.load(mean + d, mask=d < shape.head_dim, other=0.0)
            rotated += tl.sum(some[:, None] * rows, 0)
        tl.store(scratch + column, rotated)
        tl.debug_barrier()
        return scratch
