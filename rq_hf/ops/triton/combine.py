# SPDX-License-Identifier: Apache-2.0
"""The last launch: merges partial results, turns packed sums back, adds the mean value (Triton)."""

import triton
import triton.language as tl

from rq_hf.ops.triton.prepare import LOG2E, LOWEST


@triton.jit
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
    DK: tl.constexpr,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECONDITIONED: tl.constexpr,
    SINK: tl.constexpr,
):
    """Grid: (units * H / ROWS,), `ROWS` rows of a unit each.

    Args:
        PARTIAL: float32 [units, parts, H, D]; the first `splits` parts in rotated coordinates.
        WEIGHT: float32 [units, parts, H, 2], maximum (base 2) and sum of weights.
        SINK_LOGITS: float32 [Hq], logits without a value (SINK).
        OUT: [B, Hq, L, D].
    """
    unit = tl.program_id(0) // (H // ROWS)
    blocks = (group * queries + H - 1) // H
    head = unit // blocks
    r = (tl.program_id(0) % (H // ROWS)) * ROWS + tl.arange(0, ROWS)
    row = (unit % blocks) * H + r
    exists = row < group * queries
    row = tl.minimum(row, group * queries - 1)
    query_head = (head % kv_heads) * group + row // queries
    unit = unit.to(tl.int64)
    weight_at = WEIGHT + (unit * parts * H + r) * 2
    s = tl.arange(0, BLOCK)

    maximum = tl.full([ROWS], LOWEST, tl.float32)
    for first in range(0, parts, BLOCK):
        known = ((first + s) < parts)[:, None] & (r >= 0)[None, :]
        place = weight_at[None, :] + (first + s)[:, None] * (2 * H)
        maximum = tl.maximum(maximum, tl.max(tl.load(place, mask=known, other=LOWEST), 0))
    total = tl.zeros([ROWS], tl.float32)
    if SINK:
        logit = tl.load(SINK_LOGITS + query_head).to(tl.float32) * LOG2E
        maximum = tl.maximum(maximum, logit)
        total = tl.exp2(logit - maximum)

    d = tl.arange(0, DP)
    packed = tl.zeros([ROWS, DP], tl.float32)
    share = tl.zeros([ROWS], tl.float32)
    for first in range(0, splits, BLOCK):
        part = first + s
        known = (part < splits)[:, None] & (r >= 0)[None, :]
        place = weight_at[None, :] + part[:, None] * (2 * H)
        factor = tl.exp2(tl.load(place, mask=known, other=LOWEST) - maximum[None, :])
        share += tl.sum(factor * tl.load(place + 1, mask=known, other=0.0), 0)
        at = PARTIAL + ((unit * parts + part)[:, None, None] * H + r[None, :, None]) * D + d[None, None, :]
        sums = tl.load(at, mask=known[:, :, None] & (d < D)[None, None, :], other=0.0)
        packed += tl.sum(sums * factor[:, :, None], 0)
    total += share
    for part in range(splits, parts):
        one_at = weight_at + part * (2 * H)
        total += tl.load(one_at + 1) * tl.exp2(tl.load(one_at) - maximum)
    # a row with everything hidden gives 0
    normal = tl.where(total > 0, 1 / total, 0.0)
    packed *= normal[:, None]
    share *= normal
    # a product has at least 16 rows: these repeat
    packed = tl.reshape(tl.broadcast_to(packed[None, :, :], [16 // ROWS, ROWS, DP]), [16, DP])

    out_at = OUT + ((head // kv_heads).to(tl.int64) * (kv_heads * group) + query_head) * queries * D
    out_at += (row % queries) * D
    for at in tl.static_range(0, DP, DK):
        out = at + tl.arange(0, DK)
        real = out < D
        exact = tl.zeros([ROWS, DK], tl.float32)
        for part in range(splits, parts):
            factor = tl.exp2(tl.load(weight_at + part * (2 * H)) - maximum) * normal
            sums_at = PARTIAL + ((unit * parts + part) * H + r)[:, None] * D + out[None, :]
            exact += factor[:, None] * tl.load(sums_at, mask=real[None, :], other=0.0)
        if splits > 0:
            # x = R^T y: columns of this product are columns of R
            square = (d < D)[:, None] & real[None, :]
            matrix = tl.load(VALUE_ROTATION + d[:, None] * D + out[None, :], mask=square, other=0.0)
            turned = tl.dot(packed, matrix, input_precision="tf32x3")
            exact += tl.sum(tl.reshape(turned, [16 // ROWS, ROWS, DK]), 0) * (ROWS / 16)
            if PRECONDITIONED:
                mean = tl.load(VALUE_MEAN + head.to(tl.int64) * D + out, mask=real, other=0.0)
                exact += share[:, None] * mean[None, :]
        tl.store(out_at[:, None] + out[None, :], exact.to(OUT.dtype.element_ty), mask=exists[:, None] & real[None, :])
