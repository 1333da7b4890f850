# SPDX-License-Identifier: Apache-2.0
"""The last launch: merges partial results, turns packed sums back, adds the mean value (Triton)."""

import triton
import triton.language as tl

from rq_hf.ops.triton.exact_rows import LOG2E, LOWEST
from rq_hf.ops.triton.query_rows import multiply


@triton.jit
def weighted_sum(
    PARTIAL,
    weight_at,
    first_row,
    first,
    stop,
    maximum,
    D: tl.constexpr,
    DP: tl.constexpr,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum over parts `first` to `stop - 1` of weighted sums, [ROWS, DP], and of weights, [ROWS]."""
    r = tl.arange(0, ROWS)
    d = tl.arange(0, DP)
    sums = tl.zeros([ROWS, DP], tl.float32)
    share = tl.zeros([ROWS], tl.float32)
    for at in range(first, stop, BLOCK):
        part = at + tl.arange(0, BLOCK)
        known = (part < stop)[:, None] & (r >= 0)[None, :]
        place = weight_at[None, :] + part[:, None] * (2 * H)
        factor = tl.exp2(tl.load(place, mask=known, other=LOWEST) - maximum[None, :])
        factor = tl.where(known, factor, 0.0)
        share += tl.sum(factor * tl.load(place + 1, mask=known, other=0.0), 0)
        row = first_row + part[:, None] * H + r[None, :]
        of_row = PARTIAL + row[:, :, None] * D + d[None, None, :]
        real = known[:, :, None] & (d < D)[None, None, :]
        sums += tl.sum(tl.load(of_row, mask=real, other=0.0) * factor[:, :, None], 0)
    return sums, share


# numbers that change from step to step: a kernel compiled anew for some would stall generation
COUNTS = ("kv_heads", "group", "queries", "splits", "parts")


@triton.jit(do_not_specialize=COUNTS)
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
    PRECONDITIONED: tl.constexpr,
    SINK: tl.constexpr,
    HAS_LOW: tl.constexpr,
):
    """Grid: (units * H / ROWS,), `ROWS` rows of a unit each.

    Args:
        PARTIAL: float32 [units, parts, H, D]; the first `splits` parts in rotated coordinates.
        WEIGHT: float32 [units, parts, H, 2], maximum (base 2) and sum of weights.
        VALUE_ROTATION: float16 [2, D, D], see `multiply`.
        SINK_LOGITS: float32 [Hq], logits without a value (SINK).
        OUT: [B, Hq, L, D].
        PARTS: `parts` as a power of two.
    """
    unit = tl.program_id(0) // (H // ROWS)
    blocks = (group * queries + H - 1) // H
    head = unit // blocks
    first = (tl.program_id(0) % (H // ROWS)) * ROWS
    r = first + tl.arange(0, ROWS)
    row = (unit % blocks) * H + r
    exists = row < group * queries
    row = tl.minimum(row, group * queries - 1)
    query_head = (head % kv_heads) * group + row // queries
    first_row = unit.to(tl.int64) * parts * H + first
    weight_at = WEIGHT + (first_row + tl.arange(0, ROWS)) * 2

    part = tl.arange(0, PARTS)
    known = (part < parts)[:, None] & (r >= 0)[None, :]
    place = weight_at[None, :] + part[:, None] * (2 * H)
    maximum = tl.max(tl.load(place, mask=known, other=LOWEST), 0)
    total = tl.zeros([ROWS], tl.float32)
    if SINK:
        logit = tl.load(SINK_LOGITS + query_head).to(tl.float32) * LOG2E
        maximum = tl.maximum(maximum, logit)
        total = tl.exp2(logit - maximum)
    packed, share = weighted_sum(
        PARTIAL, weight_at, first_row, 0, splits, maximum, D, DP, H, ROWS, BLOCK
    )
    exact, exact_share = weighted_sum(
        PARTIAL, weight_at, first_row, splits, parts, maximum, D, DP, H, ROWS, 8
    )
    total += share + exact_share
    # a row with everything hidden gives 0
    normal = tl.where(total > 0, 1 / total, 0.0)
    if splits > 0:
        # x = R^T y: columns of the product are columns of R; it has at least 16 rows, which repeat
        again = tl.broadcast_to(packed[None, :, :], [16 // ROWS, ROWS, DP])
        turned = multiply(tl.reshape(again, [16, DP]), VALUE_ROTATION, D, DP, HAS_LOW)
        exact += tl.sum(tl.reshape(turned, [16 // ROWS, ROWS, DP]), 0) * (ROWS / 16)
        if PRECONDITIONED:
            d = tl.arange(0, DP)
            mean = tl.load(VALUE_MEAN + head.to(tl.int64) * D + d, mask=d < D, other=0.0)
            exact += share[:, None] * mean[None, :]
    exact *= normal[:, None]
    out = tl.arange(0, DP)
    out_at = OUT + ((head // kv_heads).to(tl.int64) * (kv_heads * group) + query_head) * queries * D
    out_at += (row % queries) * D
    valid = exists[:, None] & (out < D)[None, :]
    tl.store(out_at[:, None] + out[None, :], exact.to(OUT.dtype.element_ty), mask=valid)
