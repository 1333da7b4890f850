# SPDX-License-Identifier: Apache-2.0
"""One launch before the packed part: rotates queries, and attends to the exact rows (Triton).

A unit is a block of H query rows of one KV head, rows counted as head in group times L plus query.
Programs of a unit: the first rotates its rows for the packed part, the second prepares what the
mean of keys before RoPE adds to them, a third sketches them where keys have a sketch. The others
take one chunk of exact rows each and write a partial result (`combine`).
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from rq_hf.ops.triton.exact_rows import attend_exact
from rq_hf.ops.triton.look import is_lost, note
from rq_hf.ops.triton.mean_coefficients import (
    coefficients,
    store_coefficients,
    store_slow_coefficients,
)
from rq_hf.ops.triton.query_rows import balanced, load_rows, multiply, row_of, store_rows

# numbers that change from step to step: a kernel compiled anew for some would stall generation
VARYING = (
    "sinks",
    "count0",
    "count1",
    "index0",
    "index1",
    "kv_heads",
    "group",
    "queries",
    "splits",
    "parts",
    "last_seen",
    "offset",
)


@triton.jit(do_not_specialize=VARYING)
def prepare(
    QUERY,
    BALANCE,
    KEY_ROTATION,
    SKETCHED,
    PRE,
    POST,
    ORIGIN,
    PADDING,
    SINK_KEY,
    SINK_VALUE,
    KEY0,
    VALUE0,
    KEY1,
    VALUE1,
    MASK,
    COUNTS,
    NOT_FINITE,
    ROWS8,
    ROW_SCALES,
    ROWS,
    COEF,
    CONSTANT,
    SLOW_COEF,
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
    splits,
    parts,
    last_seen,
    offset,
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
    PRECONDITIONED: tl.constexpr,
    PADDED: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
    CAPPED: tl.constexpr,
    COMPUTE: tl.constexpr,
    FIRST_SLOW: tl.constexpr,
    STEPS: tl.constexpr,
    SLOW_WIDTH: tl.constexpr,
    HAS_LOW: tl.constexpr,
    COUNTED: tl.constexpr,
    STORED: tl.constexpr,
    NOTED: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """Grid: (2, or 3 with a sketch, + chunks of exact rows, units).

    Outputs are laid out as `attend_tiles` reads them.

    Args:
        COUNTS: int32 [4], see `LayerView.counts`; in place of `sinks`, `count0` and `index0`
            (COUNTED).
        NOT_FINITE: int32 [1], see `rq_hf.ops.look`; on the device or in pinned memory.
        offset: Index in the sequence of the view's first token, for what is noted.
        FIRST_SLOW: The first of the slow pairs, see `tables.RopeOperands`.
        STEPS: Groups of eight slow pairs.
        SLOW_WIDTH: Eight times that as a power of two.
        STORED: Whether the one token of the second piece is written behind the first piece's.
        NOTED: Whether it is then noted if it is not finite.
        CHAINED: Whether the next launch may begin at once, see `launching.Launch`.
    """
    if CHAINED:
        gdc_launch_dependents()
    role = tl.program_id(0)
    OTHERS: tl.constexpr = 3 if SKETCH else 2
    part = role - OTHERS
    if COUNTED:
        sinks = tl.load(COUNTS)
        count0 = tl.load(COUNTS + 1)
        index0 = sinks + tl.load(COUNTS + 2)
    unit = tl.program_id(1)
    batch, kv_head, in_group, query, exists = row_of(unit, kv_heads, group, queries, H)
    unit = unit.to(tl.int64)
    batch = batch.to(tl.int64)
    kv_head = kv_head.to(tl.int64)
    head = kv_head * group + in_group
    queries_at = QUERY + batch * query_batch + head * query_head + query * query_query
    stat = (batch * kv_heads + kv_head) * D
    SIDES: tl.constexpr = 2 if SKETCH else 1
    rows8 = ROWS8 + unit * (SIDES * 2 * H * D)
    row_scales = ROW_SCALES + unit * (SIDES * H)
    rows = ROWS + unit * (SIDES * H * D)
    if role == 0:
        if PACKED:
            q = load_rows(queries_at, exists, score_factor, D, DP)
            if PRECONDITIONED:
                d = tl.arange(0, DP)
                mean = tl.load(POST + stat + d, mask=d < D, other=0.0)
                if TURNED > 0:
                    mean += tl.load(PRE + stat + d, mask=(d >= 2 * TURNED) & (d < D), other=0.0)
                constant = tl.sum(q * mean[None, :], 1)
                q = balanced(q, BALANCE + stat, D)
            else:
                constant = tl.zeros([16], tl.float32)
            rotated = multiply(q, KEY_ROTATION, D, DP, HAS_LOW)
            store_rows(rotated, rows8, row_scales, rows, 0, D, H, PLAIN)
            r = tl.arange(0, 16)
            tl.store(CONSTANT + unit * H + r, constant, mask=r < H)
    elif role == 1:
        if PACKED:
            if PAIRS > 0:
                p = tl.arange(0, PAIRS)
                a, b = coefficients(
                    queries_at,
                    exists,
                    PRE + stat,
                    ORIGIN,
                    score_factor,
                    p,
                    PAIRS,
                    TURNED,
                    INTERLEAVED,
                )
                store_coefficients(a, b, COEF + unit * (2 * H * PAIRS), H, PAIRS)
            if STEPS > 0:
                n = tl.arange(0, SLOW_WIDTH)
                a, b = coefficients(
                    queries_at,
                    exists,
                    PRE + stat,
                    ORIGIN,
                    score_factor,
                    FIRST_SLOW + n,
                    PAIRS,
                    TURNED,
                    INTERLEAVED,
                )
                slow_coef = SLOW_COEF + unit * (STEPS * 2 * H * 16)
                store_slow_coefficients(a, b, slow_coef, H, STEPS, n)
    elif role < OTHERS:
        if PACKED and SKETCH:
            q = load_rows(queries_at, exists, score_factor, D, DP)
            if PRECONDITIONED:
                q = balanced(q, BALANCE + stat, D)
            sketched = multiply(q, SKETCHED, D, DP, True)
            store_rows(sketched, rows8, row_scales, rows, 1, D, H, PLAIN)
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
                if STORED:
                    d = tl.arange(0, DP)
                    end = count0.to(tl.int64) * D + d
                    of_head = batch * batch0 + kv_head * head0 + end
                    new_key = tl.load(key + d, mask=d < D, other=0.0)
                    new_value = tl.load(value + d, mask=d < D, other=0.0)
                    tl.store(KEY0 + of_head, new_key, mask=d < D)
                    tl.store(VALUE0 + of_head, new_value, mask=d < D)
                    if NOTED:
                        lost = is_lost(new_key) | is_lost(new_value)
                        if tl.max(lost.to(tl.int32)) > 0:
                            note(NOT_FINITE, offset + index1)
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
