# SPDX-License-Identifier: Apache-2.0
"""The last launch: merges partial results, turns packed sums back, adds the mean value (Triton).

A program takes one row of a unit, or all of them where programs are many. Sums over parts, and
their rotation, are products of matrices with 16 rows, of which few are used: a multiprocessor with
several programs has no time for more instructions. See `combine_few` for one that has.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from rq_hf.ops.triton.exact_rows import LOG2E, LOWEST

# numbers that change from step to step: a kernel compiled anew for some would stall generation
VARYING = ("kv_heads", "group", "queries", "splits", "parts")


@triton.jit
def load_matrix(MATRIX, first, D: tl.constexpr, DP: tl.constexpr, WIDTH: tl.constexpr):
    """Columns `first` to `first + WIDTH - 1`, float16 [DP, WIDTH]."""
    k = tl.arange(0, DP)
    column = first + tl.arange(0, WIDTH)
    inside = (k < D)[:, None] & (column < D)[None, :]
    return tl.load(MATRIX + k[:, None] * D + column[None, :], mask=inside, other=0.0)


@triton.jit
def load_parts(
    PARTIAL,
    WEIGHT,
    first,
    parts,
    D: tl.constexpr,
    DP: tl.constexpr,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Parts `first` to `first + BLOCK - 1` of ROWS rows, row by row within a part.

    Args:
        PARTIAL: Part 0 of the first row.
        WEIGHT: Maximum of part 0 of the first row.

    Returns:
        Sums [BLOCK ROWS, DP], maxima [BLOCK ROWS].
    """
    d = tl.arange(0, DP)
    n = tl.arange(0, BLOCK * ROWS)
    part = first + n // ROWS
    known = part < parts
    place = part.to(tl.int64) * H + n % ROWS
    highest = tl.load(WEIGHT + place * 2, mask=known, other=LOWEST)
    partial = tl.load(
        PARTIAL + place[:, None] * D + d[None, :],
        mask=known[:, None] & (d < D)[None, :],
        other=0.0,
    )
    return partial, highest


@triton.jit
def add_parts(
    sums,
    partial,
    highest,
    maximum,
    first,
    splits,
    parts,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`sums` [16, DP] and what `load_parts` gave: packed parts, and exact ones from row 8 on.

    Args:
        maximum: float32 [ROWS], what weights are relative to.
    """
    r = tl.arange(0, 16)
    n = tl.arange(0, BLOCK * ROWS)
    part = first + n // ROWS
    mine = (n % ROWS)[None, :] == tl.arange(0, ROWS)[:, None]
    maximum = tl.sum(tl.where(mine, maximum[:, None], 0.0), 0)
    factor = tl.where(part < parts, tl.exp2(highest - maximum), 0.0)
    row = n % ROWS + tl.where(part < splits, 0, 8)
    factor = tl.where(r[:, None] == row[None, :], factor[None, :], 0.0)
    return tl.dot(factor, partial, sums, input_precision="tf32x3")


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
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    PACKED: tl.constexpr,
    PRECONDITIONED: tl.constexpr,
    SINK: tl.constexpr,
    HAS_LOW: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """Grid: (units, H / ROWS).

    Args:
        PARTIAL: float32 [units, parts, H, D]; the first `splits` parts in rotated coordinates.
        WEIGHT: float32 [units, parts, H, 2], maximum (base 2) and sum of weights.
        VALUE_ROTATION: float16 [2, D, D], `tables.Matrix.parts`, with its factor of sqrt(D).
        SINK_LOGITS: float32 [Hq], logits without a value (SINK).
        OUT: [B, Hq, L, D].
        ROWS: Rows of a program.
        PARTS: `parts` as a power of two.
        BLOCK: How many of them are added up at a time.
        PACKED: Whether there are packed parts.
        CHAINED: Whether it begins while `attend_tiles` still runs, see `launching.Launch`.
    """
    unit = tl.program_id(0)
    first_row = tl.program_id(1) * ROWS
    blocks = (group * queries + H - 1) // H
    head = unit // blocks
    first_of_head = (unit % blocks) * H + first_row
    # half of the columns of a wide matrix at a time, for them to fit on the chip
    WIDTH: tl.constexpr = 128 if DP > 128 else DP

    d = tl.arange(0, DP)
    part = tl.arange(0, PARTS)
    known = (part < parts)[None, :]
    first = unit.to(tl.int64) * parts * H + first_row
    weights_at = WEIGHT + first * 2
    weight_at = weights_at + (tl.arange(0, ROWS)[:, None] + part[None, :] * H) * 2
    # asked for now, so that it is there when the sums are
    if PACKED:
        matrix = load_matrix(VALUE_ROTATION, 0, D, DP, WIDTH)
    if PACKED and PRECONDITIONED:
        mean = tl.load(VALUE_MEAN + head.to(tl.int64) * D + d, mask=d < D, other=0.0)
    if CHAINED:
        # all above was there before the launches of this call, all below is their work
        gdc_wait()
    highest = tl.load(weight_at, mask=known, other=LOWEST)
    shares = tl.load(weight_at + 1, mask=known, other=0.0)
    partials = PARTIAL + first * D
    partial, highest_of = load_parts(partials, weights_at, 0, parts, D, DP, H, ROWS, BLOCK)

    maximum = tl.max(highest, 1)
    if SINK:
        row = tl.minimum(first_of_head + tl.arange(0, ROWS), group * queries - 1)
        logit = tl.load(SINK_LOGITS + (head % kv_heads) * group + row // queries)
        logit = logit.to(tl.float32) * LOG2E
        maximum = tl.maximum(maximum, logit)
    weights = tl.where(known, tl.exp2(highest - maximum[:, None]), 0.0) * shares
    total = tl.sum(weights, 1)
    if SINK:
        total += tl.exp2(logit - maximum)
    # a row with everything hidden gives 0
    normal = tl.where(total > 0, 1 / total, 0.0)

    sums = tl.zeros([16, DP], tl.float32)
    sums = add_parts(sums, partial, highest_of, maximum, 0, splits, parts, ROWS, BLOCK)
    for at in range(BLOCK, parts, BLOCK):
        partial, highest_of = load_parts(partials, weights_at, at, parts, D, DP, H, ROWS, BLOCK)
        sums = add_parts(sums, partial, highest_of, maximum, at, splits, parts, ROWS, BLOCK)
    r = tl.arange(0, 16)[:, None]
    out = eight_rows(tl.where(r >= 8, sums, 0.0))
    if PACKED:
        # x = R^T y: columns of the product are columns of R
        packed = tl.where(r < 8, sums, 0.0)
        peak = tl.maximum(tl.max(tl.abs(packed), 1), 1e-30)[:, None]
        packed /= peak
        high = packed.to(tl.float16)
        low = (packed - high.to(tl.float32)).to(tl.float16)
        turned = turn(high, low, matrix, VALUE_ROTATION, 0, D, DP, WIDTH, HAS_LOW)
        if DP > WIDTH:
            other = load_matrix(VALUE_ROTATION, WIDTH, D, DP, WIDTH)
            right = turn(high, low, other, VALUE_ROTATION, WIDTH, D, DP, WIDTH, HAS_LOW)
            turned = tl.reshape(tl.permute(tl.join(turned, right), [0, 2, 1]), [16, DP])
        out += eight_rows(turned * (peak * (1.0 / D**0.5)))
        if PRECONDITIONED:
            of_packed = tl.sum(tl.where((part < splits)[None, :], weights, 0.0), 1)
            out += in_rows(of_packed, ROWS)[:, None] * mean[None, :]
    out *= in_rows(normal, ROWS)[:, None]
    in_unit = tl.arange(0, 8)
    row = first_of_head + in_unit
    query_head = (head % kv_heads) * group + row // queries
    batch = (head // kv_heads).to(tl.int64)
    row_at = (batch * (kv_heads * group) + query_head) * queries + row % queries
    real = ((in_unit < ROWS) & (row < group * queries))[:, None] & (d < D)[None, :]
    out_at = OUT + row_at[:, None] * D + d[None, :]
    tl.store(out_at, out.to(OUT.dtype.element_ty), mask=real)


@triton.jit
def eight_rows(x):
    """x [16, n], of which eight rows are zero, as [8, n]."""
    return tl.sum(tl.reshape(x, [2, 8, x.shape[1]]), 0)


@triton.jit
def in_rows(x, ROWS: tl.constexpr):
    """x [ROWS] as the first of 8 numbers."""
    mine = tl.arange(0, 8)[:, None] == tl.arange(0, ROWS)[None, :]
    return tl.sum(tl.where(mine, x[None, :], 0.0), 1)


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
