# SPDX-License-Identifier: Apache-2.0
"""One launch before the packed part: rotates queries, and attends to the exact rows (Triton).

A unit is a block of H query rows of one KV head, rows counted as head in group times L plus query.
Programs of a unit: the first prepares its rows for the packed part, the others take one chunk of
exact rows each and write a partial result (`combine`).
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

LOG2E = tl.constexpr(1.4426950408889634)
# what a maximum starts from: finite, so that differences are never inf - inf
LOWEST = tl.constexpr(-1e30)


@triton.jit
def row_of(unit, kv_heads, group, queries, H: tl.constexpr):
    """Sequence, KV head, and for 16 rows head in group, query and whether the row exists."""
    blocks = (group * queries + H - 1) // H
    head = unit // blocks
    r = tl.arange(0, 16)
    row = (unit % blocks) * H + r
    exists = (r < H) & (row < group * queries)
    row = tl.minimum(row, group * queries - 1)
    return head // kv_heads, head % kv_heads, row // queries, row % queries, exists


@triton.jit
def multiply(x, MATRIX, D: tl.constexpr, DP: tl.constexpr, HAS_LOW: tl.constexpr):
    """x [16, DP] times a matrix given as float16 parts, float32.

    Products of float16 halves leave an error of 2**-22, and are many times as fast as float32.

    Args:
        MATRIX: float16 [2, D, D], `tables.Matrix.parts`, with its factor of sqrt(D).
    """
    peak = tl.maximum(tl.max(tl.abs(x), 1), 1e-30)
    x = x / peak[:, None]
    high = x.to(tl.float16)
    low = (x - high.to(tl.float32)).to(tl.float16)
    if DP > 128:
        # half of the columns at a time, for the matrix to fit on the chip
        left = product_of_halves(high, low, MATRIX, 0, D, DP, DP // 2, HAS_LOW)
        right = product_of_halves(high, low, MATRIX, DP // 2, D, DP, DP // 2, HAS_LOW)
        product = tl.reshape(tl.permute(tl.join(left, right), [0, 2, 1]), [16, DP])
    else:
        product = product_of_halves(high, low, MATRIX, 0, D, DP, DP, HAS_LOW)
    return product * (peak * (1.0 / D**0.5))[:, None]


@triton.jit
def product_of_halves(
    high,
    low,
    MATRIX,
    first,
    D: tl.constexpr,
    DP: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_LOW: tl.constexpr,
):
    """(high + low) times the columns `first` to `first + WIDTH - 1` of a matrix of two parts."""
    k = tl.arange(0, DP)
    column = first + tl.arange(0, WIDTH)
    square = (k < D)[:, None] & (column < D)[None, :]
    place = MATRIX + k[:, None] * D + column[None, :]
    matrix = tl.load(place, mask=square, other=0.0)
    product = tl.dot(low, matrix)
    if HAS_LOW:
        product = tl.dot(high, tl.load(place + D * D, mask=square, other=0.0), product)
    return tl.dot(high, matrix, product)


@triton.jit
def split_bytes(x, step):
    """High and low byte of x / step, rounded to an integer of 16 bits."""
    whole = tl.floor(x / step[:, None] + 0.5).to(tl.int32)
    high = (whole + 128) >> 8
    return high.to(tl.int8), (whole - high * 256).to(tl.int8)


@triton.jit
def store_rows(
    rotated, ROWS8, ROW_SCALES, ROWS, side, D: tl.constexpr, H: tl.constexpr, PLAIN: tl.constexpr
):
    """Stores rotated rows [16, DP] of a unit: as float32 (PLAIN), or as bytes and their steps."""
    r = tl.arange(0, 16)
    d = tl.arange(0, rotated.shape[1])
    valid = (r < H)[:, None] & (d < D)[None, :]
    if PLAIN:
        tl.store(ROWS + (side * H + r)[:, None] * D + d[None, :], rotated, mask=valid)
    else:
        step = tl.maximum(tl.max(tl.abs(rotated), 1), 1e-30) / 32512.0
        high, low = split_bytes(rotated, step)
        place = ROWS8 + (side * 2 * H + 2 * r)[:, None] * D + d[None, :]
        tl.store(place, high, mask=valid)
        tl.store(place + D, low, mask=valid)
        tl.store(ROW_SCALES + side * H + r, step, mask=r < H)


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


@triton.jit
def visible(
    scores,
    index,
    inside,
    mask_row,
    query,
    MASK,
    mask_token,
    last_seen,
    hidden_before,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
):
    """`scores` [rows, n] with hidden keys at -inf; `index` [n] are the keys' places."""
    if MASKED == 1:
        at = MASK + mask_row[:, None] + index[None, :].to(tl.int64) * mask_token
        seen = tl.load(at, mask=inside[None, :] & (mask_row >= 0)[:, None], other=0) != 0
        scores = tl.where(seen, scores, float("-inf"))
    if MASKED == 2:
        at = MASK + mask_row[:, None] + index[None, :].to(tl.int64) * mask_token
        bias = tl.load(at, mask=inside[None, :] & (mask_row >= 0)[:, None], other=float("-inf"))
        bias = bias.to(tl.float32) * LOG2E
        # a finite bias hides nothing if all are equal: -inf alone does
        scores = tl.where(bias > float("-inf"), tl.maximum(scores + bias, LOWEST), bias)
    if CAUSAL:
        later = index[None, :] > (last_seen + query)[:, None]
        scores = tl.where(later, float("-inf"), scores)
    seen = inside & (index >= hidden_before)
    return tl.where(seen[None, :], scores, float("-inf"))


@triton.jit
def attend_exact(
    queries_at,
    exists,
    keys_at,
    values_at,
    key_token,
    value_token,
    first,
    count,
    index_of_first,
    hidden_before,
    mask_row,
    query,
    MASK,
    mask_token,
    last_seen,
    factor,
    cap,
    PARTIAL,
    WEIGHT,
    D: tl.constexpr,
    DP: tl.constexpr,
    N: tl.constexpr,
    H: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
    CAPPED: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Partial result of the rows of a unit over exact rows `first` to `first + N - 1`."""
    n = first + tl.arange(0, N)
    inside = n < count
    d = tl.arange(0, DP)
    real = d < D
    q = tl.load(queries_at[:, None] + d[None, :], mask=exists[:, None] & real[None, :], other=0.0)
    k = tl.load(
        keys_at + n[None, :] * key_token + d[:, None],
        mask=inside[None, :] & real[:, None],
        other=0.0,
    )
    v = tl.load(
        values_at + n[:, None] * value_token + d[None, :],
        mask=inside[:, None] & real[None, :],
        other=0.0,
    )
    # products of numbers of one half type are exact; float32 is split in three by the compiler
    scores = tl.dot(q.to(COMPUTE), k.to(COMPUTE), input_precision="tf32x3")
    scores *= factor
    if CAPPED:
        scores = cap - (2 * cap) / (tl.exp2(scores) + 1)
    index = index_of_first + n
    scores = visible(
        scores,
        index,
        inside,
        mask_row,
        query,
        MASK,
        mask_token,
        last_seen,
        hidden_before,
        CAUSAL,
        MASKED,
    )
    maximum = tl.maximum(tl.max(scores, 1), LOWEST)
    weights = tl.exp2(scores - maximum[:, None])
    r = tl.arange(0, 16)
    tl.store(WEIGHT + r * 2, maximum, mask=r < H)
    tl.store(WEIGHT + r * 2 + 1, tl.sum(weights, 1), mask=r < H)
    high = weights.to(COMPUTE)
    out = tl.dot(high, v.to(COMPUTE), input_precision="tf32x3")
    if COMPUTE != tl.float32:
        rest = (weights - high.to(tl.float32)).to(COMPUTE)
        out = tl.dot(rest, v.to(COMPUTE), out)
    tl.store(PARTIAL + r[:, None] * D + d[None, :], out, mask=(r < H)[:, None] & real[None, :])


# numbers that change from step to step: a kernel compiled anew for some would stall generation
COUNTS = (
    "sinks",
    "count0",
    "count1",
    "index0",
    "index1",
    "kv_heads",
    "group",
    "queries",
    "units",
    "tiles",
    "splits",
    "parts",
    "last_seen",
)


@triton.jit(do_not_specialize=COUNTS)
def prepare(
    QUERY,
    BALANCE,
    KEY_ROTATION,
    SKETCHED,
    PRE,
    POST,
    ORIGIN,
    ANGLES,
    CHEBYSHEV,
    PADDING,
    SINK_KEY,
    SINK_VALUE,
    KEY0,
    VALUE0,
    KEY1,
    VALUE1,
    MASK,
    ROWS8,
    ROW_SCALES,
    ROWS,
    COEF,
    CONSTANT,
    BASIS,
    PARTIAL,
    WEIGHT,
    query_batch,
    query_head,
    query_query,
    sink_batch,
    sink_head,
    batch0,
    head0,
    batch1,
    head1,
    mask_batch,
    mask_head,
    mask_query,
    mask_token,
    sinks,
    count0,
    count1,
    index0,
    index1,
    kv_heads,
    group,
    queries,
    units,
    tiles,
    splits,
    parts,
    last_seen,
    score_factor,
    cap,
    D: tl.constexpr,
    DP: tl.constexpr,
    N: tl.constexpr,
    H: tl.constexpr,
    PAIRS: tl.constexpr,
    TURNED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    SKETCH: tl.constexpr,
    PLAIN: tl.constexpr,
    PACKED: tl.constexpr,
    SLOW: tl.constexpr,
    PRECONDITIONED: tl.constexpr,
    PADDED: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
    CAPPED: tl.constexpr,
    COMPUTE: tl.constexpr,
    FIRST_SLOW: tl.constexpr,
    HAS_LOW: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """Grid: (1 + chunks of exact rows + what slow pairs take, units).

    Outputs are laid out as `attend_tiles` reads them. CHAINED: the next launch may start early.
    """
    if CHAINED:
        gdc_launch_dependents()
    part = tl.program_id(0) - 1
    if SLOW:
        which = (part - (parts - splits)) * units + tl.program_id(1)
        if which >= 0:
            if which < ((units * H + 15) // 16) * ((tiles + 15) // 16):
                store_slow_pairs(
                    QUERY,
                    PRE,
                    ORIGIN,
                    ANGLES,
                    CHEBYSHEV,
                    BASIS,
                    which,
                    query_batch,
                    query_head,
                    query_query,
                    kv_heads,
                    group,
                    queries,
                    units,
                    tiles,
                    score_factor,
                    D,
                    H,
                    PAIRS,
                    TURNED,
                    INTERLEAVED,
                    FIRST_SLOW,
                )
            return
    unit = tl.program_id(1)
    batch, kv_head, in_group, query, exists = row_of(unit, kv_heads, group, queries, H)
    unit = unit.to(tl.int64)
    batch = batch.to(tl.int64)
    kv_head = kv_head.to(tl.int64)
    head = kv_head * group + in_group
    queries_at = QUERY + batch * query_batch + head * query_head + query * query_query
    if part < 0:
        if PACKED:
            d = tl.arange(0, DP)
            real = d < D
            stat = (batch * kv_heads + kv_head) * D
            q = tl.load(
                queries_at[:, None] + d[None, :], mask=exists[:, None] & real[None, :], other=0.0
            )
            q = q.to(tl.float32) * score_factor
            constant = tl.zeros([16], tl.float32)
            if PRECONDITIONED:
                mean = tl.load(POST + stat + d, mask=real, other=0.0)
                if TURNED > 0:
                    mean += tl.load(PRE + stat + d, mask=real & (d >= 2 * TURNED), other=0.0)
                constant = tl.sum(q * mean[None, :], 1)
                q = q / tl.load(BALANCE + stat + d, mask=real, other=1.0)[None, :]
            rotated = multiply(q, KEY_ROTATION, D, DP, HAS_LOW)
            if SKETCH:
                sketched = multiply(q, SKETCHED, D, DP, True)
            SIDES: tl.constexpr = 2 if SKETCH else 1
            rows8 = ROWS8 + unit * (SIDES * 2 * H * D)
            row_scales = ROW_SCALES + unit * (SIDES * H)
            rows = ROWS + unit * (SIDES * H * D)
            store_rows(rotated, rows8, row_scales, rows, 0, D, H, PLAIN)
            if SKETCH:
                store_rows(sketched, rows8, row_scales, rows, 1, D, H, PLAIN)
            r = tl.arange(0, 16)
            tl.store(CONSTANT + unit * H + r, constant, mask=r < H)
            if PAIRS > 0:
                store_coefficients(
                    queries_at,
                    exists,
                    PRE + stat,
                    ORIGIN,
                    COEF + unit * (2 * H * PAIRS),
                    score_factor,
                    H,
                    PAIRS,
                    TURNED,
                    INTERLEAVED,
                )
    else:
        pad = tl.zeros([], tl.int64)
        if PADDED:
            pad = tl.load(PADDING + batch)
        mask_row = batch * mask_batch + head * mask_head + query.to(tl.int64) * mask_query
        at = (unit * parts + splits + part) * H
        chunks_of_sinks = (sinks + N - 1) // N
        chunks0 = (count0 + N - 1) // N
        key = SINK_KEY + batch * sink_batch + kv_head * sink_head
        value = SINK_VALUE + batch * sink_batch + kv_head * sink_head
        first = part * N
        count = sinks
        index = pad
        hidden = tl.zeros([], tl.int64)
        if part >= chunks_of_sinks:
            hidden = pad + sinks
            if not PADDED:
                hidden = tl.zeros([], tl.int64)
            if part - chunks_of_sinks < chunks0:
                key = KEY0 + batch * batch0 + kv_head * head0
                value = VALUE0 + batch * batch0 + kv_head * head0
                first = (part - chunks_of_sinks) * N
                count = count0
                index = tl.zeros([], tl.int64) + index0
            else:
                key = KEY1 + batch * batch1 + kv_head * head1
                value = VALUE1 + batch * batch1 + kv_head * head1
                first = (part - chunks_of_sinks - chunks0) * N
                count = count1
                index = tl.zeros([], tl.int64) + index1
        attend_exact(
            queries_at,
            exists,
            key,
            value,
            D,
            D,
            first,
            count,
            index,
            hidden,
            mask_row,
            query,
            MASK,
            mask_token,
            last_seen,
            score_factor,
            cap,
            PARTIAL + at * D,
            WEIGHT + at * 2,
            D,
            DP,
            N,
            H,
            CAUSAL,
            MASKED,
            CAPPED,
            COMPUTE,
        )
