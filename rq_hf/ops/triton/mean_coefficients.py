# SPDX-License-Identifier: Apache-2.0
"""What the keys' mean before RoPE adds to scores, as numbers of a query row (Triton).

q . RoPE_n(pre_mean) is a sum of a cos(n w) + b sin(n w) over the pairs that RoPE turns; see
`tables.RopeOperands` for fast and slow pairs.
"""

import triton
import triton.language as tl


@triton.jit
def store_coefficients(
    queries_at,
    exists,
    PRE,
    ORIGIN,
    COEF,
    factor,
    H: tl.constexpr,
    PAIRS: tl.constexpr,
    TURNED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Stores a, b of q . RoPE_n(pre_mean) = sum a cos + b sin, n counted from the first token."""
    p = tl.arange(0, PAIRS)
    real = p < TURNED
    if INTERLEAVED:
        first, second = 2 * p, 2 * p + 1
    else:
        first, second = p, p + TURNED
    mask = exists[:, None] & real[None, :]
    x1 = tl.load(queries_at[:, None] + first[None, :], mask=mask, other=0.0).to(tl.float32) * factor
    x2 = (
        tl.load(queries_at[:, None] + second[None, :], mask=mask, other=0.0).to(tl.float32) * factor
    )
    m1 = tl.load(PRE + first, mask=real, other=0.0)
    m2 = tl.load(PRE + second, mask=real, other=0.0)
    cos = tl.load(ORIGIN + p)
    sin = tl.load(ORIGIN + PAIRS + p)
    v1 = (m1 * cos - m2 * sin)[None, :]
    v2 = (m2 * cos + m1 * sin)[None, :]
    r = tl.arange(0, 16)
    place = COEF + r[:, None] * PAIRS + p[None, :]
    valid = (r < H)[:, None] & (p >= 0)[None, :]
    tl.store(place, x1 * v1 + x2 * v2, mask=valid)
    tl.store(place + H * PAIRS, x2 * v1 - x1 * v2, mask=valid)


@triton.jit
def store_slow_pairs(
    QUERY,
    PRE,
    ORIGIN,
    TURNED_TERMS,
    BASIS,
    index,
    query_batch,
    query_head,
    query_query,
    kv_heads,
    group,
    queries,
    units,
    capacity,
    columns,
    factor,
    D: tl.constexpr,
    H: tl.constexpr,
    PAIRS: tl.constexpr,
    TURNED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    FIRST_SLOW: tl.constexpr,
):
    """Stores, for 16 rows and 16 tiles, what the slow pairs of q . RoPE_n(pre_mean) add up to.

    Within a tile these are eight Chebyshev polynomials of the position; see `tables.RopeOperands`.
    Blocks are numbered rows first.
    """
    blocks_of_rows = (units * H + 15) // 16
    r = (index % blocks_of_rows) * 16 + tl.arange(0, 16)
    unit = r // H
    blocks = (group * queries + H - 1) // H
    head = unit // blocks
    row = (unit % blocks) * H + r % H
    exists = (unit < units) & (row < group * queries)
    batch = (head // kv_heads).to(tl.int64)
    query_of = (head % kv_heads) * group + row // queries
    queries_at = QUERY + batch * query_batch + query_of * query_head + (row % queries) * query_query
    SLOW: tl.constexpr = PAIRS - FIRST_SLOW
    # a multiple of 16, which the compiler is to know
    columns = columns // 16 * 16
    column = (index // blocks_of_rows) * 128 + tl.arange(0, 128)
    inside = column < columns
    sums = tl.zeros([16, 128], tl.float32)
    for at in tl.static_range(0, SLOW, 16):
        pair = at + tl.arange(0, 16)
        terms = TURNED_TERMS + pair[:, None].to(tl.int64) * columns + column[None, :]
        p = FIRST_SLOW + pair
        real = p < TURNED
        if INTERLEAVED:
            one, other = 2 * p, 2 * p + 1
        else:
            one, other = p, p + TURNED
        mask = exists[:, None] & real[None, :]
        x1 = tl.load(queries_at[:, None] + one[None, :], mask=mask, other=0.0).to(tl.float32)
        x2 = tl.load(queries_at[:, None] + other[None, :], mask=mask, other=0.0).to(tl.float32)
        mean = PRE + head[:, None].to(tl.int64) * D
        m1 = tl.load(mean + one[None, :], mask=mask, other=0.0) * factor
        m2 = tl.load(mean + other[None, :], mask=mask, other=0.0) * factor
        cos = tl.load(ORIGIN + p)[None, :]
        sin = tl.load(ORIGIN + PAIRS + p)[None, :]
        v1 = m1 * cos - m2 * sin
        v2 = m2 * cos + m1 * sin
        a = x1 * v1 + x2 * v2
        b = x2 * v1 - x1 * v2
        peak = tl.maximum(tl.max(tl.maximum(tl.abs(a), tl.abs(b)), 1), 1e-30)[:, None]
        product = times_parts(a / peak, terms, 2 * SLOW * columns, inside)
        other_half = terms + SLOW * columns
        product += times_parts(b / peak, other_half, 2 * SLOW * columns, inside)
        sums += product * peak
    tile = column // 8
    place = (unit[:, None].to(tl.int64) * capacity + tile[None, :]) * H + (r % H)[:, None]
    valid = (unit < units)[:, None] & (tile < capacity)[None, :]
    tl.store(BASIS + place * 8 + (column % 8)[None, :], sums, mask=valid)


@triton.jit
def times_parts(x, HIGH, low_behind, inside):
    """x [16, 16], at most 1, times a matrix [16, n] of two parts in float16."""
    high = x.to(tl.float16)
    low = (x - high.to(tl.float32)).to(tl.float16)
    first = tl.load(HIGH, mask=inside[None, :], other=0.0)
    second = tl.load(HIGH + low_behind, mask=inside[None, :], other=0.0)
    return tl.dot(high, first, tl.dot(low, first, tl.dot(high, second)))
