# SPDX-License-Identifier: Apache-2.0
"""The last launch: merges partial results, turns packed sums back, adds the mean value (Triton).

One program takes one row. Sums over its parts, and their rotation, are products of matrices with 16
rows, of which few are used: threads that add up numbers of one another would wait for longer.
"""

import triton
import triton.language as tl

from rq_hf.ops.triton.exact_rows import LOG2E, LOWEST

# numbers that change from step to step: a kernel compiled anew for some would stall generation
VARYING = ("kv_heads", "group", "queries", "splits", "parts")


@triton.jit
def factors(highest, maximum, part, splits, parts):
    """What parts are multiplied by, [16, n]: packed ones in row 0, exact ones in row 1."""
    factor = tl.where(part < parts, tl.exp2(highest - maximum), 0.0)
    r = tl.arange(0, 16)[:, None]
    mine = ((r == 0) & (part < splits)[None, :]) | ((r == 1) & (part >= splits)[None, :])
    return tl.where(mine, factor[None, :], 0.0)


@triton.jit
def load_matrix(MATRIX, first, D: tl.constexpr, DP: tl.constexpr, WIDTH: tl.constexpr):
    """Columns `first` to `first + WIDTH - 1`, float16 [DP, WIDTH]."""
    k = tl.arange(0, DP)
    column = first + tl.arange(0, WIDTH)
    inside = (k < D)[:, None] & (column < D)[None, :]
    return tl.load(MATRIX + k[:, None] * D + column[None, :], mask=inside, other=0.0)


@triton.jit(do_not_specialize=VARYING)
def combine(
    PARTIAL,
    WEIGHT,
    VALUE_ROTATION,
    VALUE_MEAN,
    SINK_LOGITS,
    OUT,
    kv_heads,
    group,
    queries,
    splits,
    parts,
    D: tl.constexpr,
    DP: tl.constexpr,
    H: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    PACKED: tl.constexpr,
    PRECONDITIONED: tl.constexpr,
    SINK: tl.constexpr,
    HAS_LOW: tl.constexpr,
):
    """Grid: (units, H).

    Args:
        PARTIAL: float32 [units, parts, H, D]; the first `splits` parts in rotated coordinates.
        WEIGHT: float32 [units, parts, H, 2], maximum (base 2) and sum of weights.
        VALUE_ROTATION: float16 [2, D, D], `tables.Matrix.parts`, with its factor of sqrt(D).
        SINK_LOGITS: float32 [Hq], logits without a value (SINK).
        OUT: [B, Hq, L, D].
        PARTS: `parts` as a power of two.
        BLOCK: How many of them are added up at a time.
        PACKED: Whether there are packed parts.
    """
    unit = tl.program_id(0)
    in_unit = tl.program_id(1)
    blocks = (group * queries + H - 1) // H
    head = unit // blocks
    row = (unit % blocks) * H + in_unit
    if row >= group * queries:
        return
    query_head = (head % kv_heads) * group + row // queries
    # half of the columns of a wide matrix at a time, for them to fit on the chip
    WIDTH: tl.constexpr = 128 if DP > 128 else DP

    d = tl.arange(0, DP)
    real = d < D
    part = tl.arange(0, PARTS)
    first = unit.to(tl.int64) * parts * H + in_unit
    weight_at = WEIGHT + (first + part * H) * 2
    highest = tl.load(weight_at, mask=part < parts, other=LOWEST)
    shares = tl.load(weight_at + 1, mask=part < parts, other=0.0)
    # asked for now, so that it is there when the sums are
    if PACKED:
        matrix = load_matrix(VALUE_ROTATION, 0, D, DP, WIDTH)
    if PACKED and PRECONDITIONED:
        mean = tl.load(VALUE_MEAN + head.to(tl.int64) * D + d, mask=real, other=0.0)

    maximum = tl.max(highest, 0)
    if SINK:
        logit = tl.load(SINK_LOGITS + query_head).to(tl.float32) * LOG2E
        maximum = tl.maximum(maximum, logit)
    weights = tl.where(part < parts, tl.exp2(highest - maximum), 0.0) * shares
    total = tl.sum(weights, 0)
    if SINK:
        total += tl.exp2(logit - maximum)
    # a row with everything hidden gives 0
    normal = tl.where(total > 0, 1 / total, 0.0)

    sums = tl.zeros([16, DP], tl.float32)
    for at in range(0, parts, BLOCK):
        some = at + tl.arange(0, BLOCK)
        known = some < parts
        some_highest = tl.load(WEIGHT + (first + some * H) * 2, mask=known, other=LOWEST)
        place = (first + some.to(tl.int64) * H)[:, None] * D + d[None, :]
        partial = tl.load(PARTIAL + place, mask=known[:, None] & real[None, :], other=0.0)
        factor = factors(some_highest, maximum, some, splits, parts)
        sums = tl.dot(factor, partial, sums, input_precision="tf32x3")

    r = tl.arange(0, 16)[:, None]
    out = tl.sum(tl.where(r == 1, sums, 0.0), 0)
    if PACKED:
        # x = R^T y: columns of the product are columns of R
        packed = tl.where(r == 0, sums, 0.0)
        peak = tl.maximum(tl.max(tl.max(tl.abs(packed), 1), 0), 1e-30)
        packed /= peak
        high = packed.to(tl.float16)
        low = (packed - high.to(tl.float32)).to(tl.float16)
        turned = turn(high, low, matrix, VALUE_ROTATION, 0, D, DP, WIDTH, HAS_LOW)
        if DP > WIDTH:
            other = load_matrix(VALUE_ROTATION, WIDTH, D, DP, WIDTH)
            right = turn(high, low, other, VALUE_ROTATION, WIDTH, D, DP, WIDTH, HAS_LOW)
            turned = tl.reshape(tl.permute(tl.join(turned, right), [0, 2, 1]), [16, DP])
        out += tl.sum(turned, 0) * (peak * (1.0 / D**0.5))
        if PRECONDITIONED:
            out += mean * tl.sum(tl.where(part < splits, weights, 0.0), 0)
    out *= normal
    out_at = OUT + ((head // kv_heads).to(tl.int64) * (kv_heads * group) + query_head) * queries * D
    tl.store(out_at + (row % queries) * D + d, out.to(OUT.dtype.element_ty), mask=real)


@triton.jit
def turn(
    high,
    low,
    matrix,
    MATRIX,
    first,
    D: tl.constexpr,
    DP: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_LOW: tl.constexpr,
):
    """(high + low) [16, DP] times columns of a matrix of two parts, the first of them loaded."""
    product = tl.dot(low, matrix)
    if HAS_LOW:
        product = tl.dot(high, load_matrix(MATRIX + D * D, first, D, DP, WIDTH), product)
    return tl.dot(high, matrix, product)
