# SPDX-License-Identifier: Apache-2.0
"""What `combine` does, where rows are fewer than multiprocessors (Triton).

A program takes one row, and only some columns of the result where that leaves multiprocessors idle:
programs of a row add up the same parts, which lie in the caches. Then what counts is how few steps
wait for one another. Parts are added up lane by lane, and the row is multiplied with the rotation
in float32, without tensor cores.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from rq_hf.ops.triton.combine import VARYING
from rq_hf.ops.triton.exact_rows import LOG2E, LOWEST

# exact parts that are added up at a time
EXACT = tl.constexpr(8)


@triton.jit
def load_columns(
    MATRIX, column, D: tl.constexpr, DP: tl.constexpr, WIDTH: tl.constexpr, HAS_LOW: tl.constexpr
):
    """Columns of a matrix of two parts, [DP, WIDTH]: float16, or the float32 sum of both."""
    k = tl.arange(0, DP)
    inside = (k < D)[:, None] & (column < D)[None, :]
    place = MATRIX + k[:, None] * D + column[None, :]
    matrix = tl.load(place, mask=inside, other=0.0)
    if HAS_LOW:
        matrix = matrix.to(tl.float32) + tl.load(place + D * D, mask=inside, other=0.0)
    return matrix


@triton.jit
def load_terms(
    PARTIAL, WEIGHT, first, stop, column, D: tl.constexpr, H: tl.constexpr, N: tl.constexpr
):
    """Columns of the parts `first` to `first + N - 1`, below `stop`: sums [N, columns], maxima [N].

    Args:
        PARTIAL: Part 0 of the row.
        WEIGHT: Maximum of part 0 of the row.
        column: Which columns, those below D.
    """
    part = first + tl.arange(0, N)
    known = part < stop
    place = part.to(tl.int64) * H
    partial = tl.load(
        PARTIAL + place[:, None] * D + column[None, :],
        mask=known[:, None] & (column < D)[None, :],
        other=0.0,
    )
    return partial, tl.load(WEIGHT + place * 2, mask=known, other=LOWEST)


@triton.jit
def weighted(partial, highest, maximum):
    """Sums of parts, made relative to `maximum`."""
    return tl.exp2(highest - maximum)[:, None] * partial


@triton.jit(do_not_specialize=VARYING)
def combine_few(
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
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    PACKED: tl.constexpr,
    PRECONDITIONED: tl.constexpr,
    SINK: tl.constexpr,
    HAS_LOW: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """Grid: (units, H times DP / WIDTH). Arguments as of `combine`, and

    Args:
        WIDTH: Columns of a program.
        PARTS: `parts` as a power of two.
        BLOCK: How many packed parts are added up at a time.
    """
    BLOCKS: tl.constexpr = DP // WIDTH
    unit = tl.program_id(0)
    row_of_unit = tl.program_id(1) // BLOCKS
    column = tl.program_id(1) % BLOCKS * WIDTH + tl.arange(0, WIDTH)
    blocks = (group * queries + H - 1) // H
    head = unit // blocks
    row = (unit % blocks) * H + row_of_unit
    query_head = (head % kv_heads) * group + tl.minimum(row // queries, group - 1)

    d = tl.arange(0, DP)
    part = tl.arange(0, PARTS)
    first = unit.to(tl.int64) * parts * H + row_of_unit
    sums_at = PARTIAL + first * D
    weights_at = WEIGHT + first * 2
    # asked for now, so that it is there when the sums are
    if PACKED:
        matrix = load_columns(VALUE_ROTATION, column, D, DP, WIDTH, HAS_LOW)
    if PACKED and PRECONDITIONED:
        mean = tl.load(VALUE_MEAN + head.to(tl.int64) * D + column, mask=column < D, other=0.0)
    if CHAINED:
        # all above was there before the launches of this call, all below is their work
        gdc_wait()
    highest = tl.load(weights_at + part * (2 * H), mask=part < parts, other=LOWEST)
    shares = tl.load(weights_at + part * (2 * H) + 1, mask=part < parts, other=0.0)
    if PACKED:
        packed, packed_highest = load_terms(sums_at, weights_at, 0, splits, d, D, H, BLOCK)
    exact, exact_highest = load_terms(sums_at, weights_at, splits, parts, column, D, H, EXACT)

    maximum = tl.max(highest, 0)
    if SINK:
        logit = tl.load(SINK_LOGITS + query_head).to(tl.float32) * LOG2E
        maximum = tl.maximum(maximum, logit)
    weights = tl.exp2(highest - maximum) * shares
    total = tl.sum(weights, 0)
    if SINK:
        total += tl.exp2(logit - maximum)

    terms = weighted(exact, exact_highest, maximum)
    for at in range(splits + EXACT, parts, EXACT):
        exact, exact_highest = load_terms(sums_at, weights_at, at, parts, column, D, H, EXACT)
        terms += weighted(exact, exact_highest, maximum)
    out = tl.sum(terms, 0)
    if PACKED:
        terms = weighted(packed, packed_highest, maximum)
        for at in range(BLOCK, splits, BLOCK):
            packed, packed_highest = load_terms(sums_at, weights_at, at, splits, d, D, H, BLOCK)
            terms += weighted(packed, packed_highest, maximum)
        # x = R^T y: columns of the product are columns of R
        turned = tl.sum(tl.sum(terms, 0)[:, None] * matrix, 0)
        out += turned * (1.0 / D**0.5)
        if PRECONDITIONED:
            out += tl.sum(tl.where(part < splits, weights, 0.0), 0) * mean
    # a row with everything hidden gives 0
    out *= tl.where(total > 0, 1 / total, 0.0)
    batch = (head // kv_heads).to(tl.int64)
    row_at = (batch * (kv_heads * group) + query_head) * queries + row % queries
    real = tl.where(row < group * queries, D, 0)
    tl.store(OUT + row_at * D + column, out.to(OUT.dtype.element_ty), mask=column < real)
