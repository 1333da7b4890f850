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
    ANGLES,
    CHEBYSHEV,
    BASIS,
    index,
    query_batch,
    query_head,
    query_query,
    kv_heads,
    group,
    queries,
    units,
    tiles,
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
    column = tl.arange(0, 128)
    first_tile = (index // blocks_of_rows) * 16
    some = first_tile + tl.arange(0, 16)
    term = tl.arange(0, 8)
    sums = tl.zeros([16, 128], tl.float32)
    for at in tl.static_range(FIRST_SLOW, PAIRS, 16):
        p = at + tl.arange(0, 16)
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
        angle = ANGLES + some[None, :].to(tl.int64) * (2 * PAIRS) + p[:, None]
        known = (some < tiles)[None, :] & (p >= 0)[:, None]
        tile_cos = tl.load(angle, mask=known, other=0.0)[:, :, None]
        tile_sin = tl.load(angle + PAIRS, mask=known, other=0.0)[:, :, None]
        even = tl.load(CHEBYSHEV + term[None, :] * PAIRS + p[:, None])[:, None, :]
        odd = tl.load(CHEBYSHEV + (8 + term)[None, :] * PAIRS + p[:, None])[:, None, :]
        of_a = tl.reshape(tile_cos * even - tile_sin * odd, [16, 128])
        of_b = tl.reshape(tile_sin * even + tile_cos * odd, [16, 128])
        sums = tl.dot(x1 * v1 + x2 * v2, of_a, sums, input_precision="ieee")
        sums = tl.dot(x2 * v1 - x1 * v2, of_b, sums, input_precision="ieee")
    tile = first_tile + column // 8
    term_of = column % 8
    place = (unit[:, None].to(tl.int64) * tiles + tile[None, :]) * H + (r % H)[:, None]
    valid = (unit < units)[:, None] & (tile < tiles)[None, :]
    tl.store(BASIS + place * 8 + term_of[None, :], sums, mask=valid)
