# SPDX-License-Identifier: Apache-2.0
"""Attention of a few query rows to packed tiles in plain order (Triton): any head_dim, 1-8 bits.

The formula is that of `attend_tiles`. Levels are looked up in memory and products are float32,
which is slower; it serves the sizes that tensor-core operands do not fit.
"""

import triton
import triton.language as tl

from rq_hf.ops.triton.exact_rows import LOWEST, visible
from rq_hf.ops.triton.query_rows import row_of

GROUP = tl.constexpr(32)  # tokens of a word


@triton.jit
def codes(RECORD, group, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr):
    """Codes of 32 tokens, [32, WIDTH] int32, zero beyond COLUMNS."""
    column = tl.arange(0, WIDTH)
    token = tl.arange(0, GROUP)
    result = tl.zeros([GROUP, WIDTH], tl.int32)
    for bit in tl.static_range(BITS):
        place = RECORD + (group * COLUMNS + column) * BITS + bit
        word = tl.load(place, mask=column < COLUMNS, other=0)
        result |= ((word[None, :] >> token[:, None]) & 1) << bit
    return result


# numbers that change from step to step: a kernel compiled anew for some would stall generation
VARYING = (
    "tokens",
    "splits",
    "parts",
    "first_token",
    "last_seen",
    "kv_heads",
    "group",
    "queries",
)


@triton.jit(do_not_specialize=VARYING)
def attend_plain(
    RECORDS,
    SCALES,
    ROWS,
    KEY_LEVELS,
    VALUE_LEVELS,
    COEF,
    CONSTANT,
    LOCAL,
    ANGLES,
    PADDING,
    MASK,
    COUNTS,
    PARTIAL,
    WEIGHT,
    record_batch,
    record_head,
    scale_batch,
    scale_head,
    mask_batch,
    mask_head,
    mask_query,
    mask_token,
    tokens,
    splits,
    parts,
    first_token,
    last_seen,
    kv_heads,
    group,
    queries,
    cap,
    D: tl.constexpr,
    DP: tl.constexpr,
    T: tl.constexpr,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    SKETCH: tl.constexpr,
    H: tl.constexpr,
    PAIRS: tl.constexpr,
    PADDED: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
    CAPPED: tl.constexpr,
    COUNTED: tl.constexpr,
):
    """Writes the partial result of one split for a block of H rows; arguments as `attend_tiles`.

    ROWS holds the rotated (and sketched) rows, float32 [units, 1 or 2, H, D]; LOCAL the cosines and
    sines of positions from a tile's centre, float32 [T, 2, PAIRS], ANGLES those of the centres.
    """
    if COUNTED:
        first_token = tl.load(COUNTS)
        tokens = tl.load(COUNTS + 2)
    split = tl.program_id(0)
    unit = tl.program_id(1)
    batch, kv_head, in_group, query, exists = row_of(unit, kv_heads, group, queries, H)
    unit = unit.to(tl.int64)
    batch = batch.to(tl.int64)
    kv_head = kv_head.to(tl.int64)
    tiles = (tokens + T - 1) // T
    per = (tiles + splits - 1) // splits
    stop = tl.minimum(tokens, (split + 1) * per * T)
    pad = tl.zeros([], tl.int64)
    if PADDED:
        pad = tl.load(PADDING + batch)
    SIDES: tl.constexpr = 2 if SKETCH else 1
    SCALE_ROWS: tl.constexpr = 3 if SKETCH else 2
    KEY_WORDS: tl.constexpr = T * D * KEY_BITS // 32
    VALUE_WORDS: tl.constexpr = T * D * VALUE_BITS // 32
    RECORD: tl.constexpr = KEY_WORDS + VALUE_WORDS + (T * D // 32 if SKETCH else 0)
    r = tl.arange(0, 16)
    d = tl.arange(0, DP)
    mine = (r < H)[:, None] & (d < D)[None, :]
    rows = tl.load(ROWS + (unit * SIDES * H + r)[:, None] * D + d[None, :], mask=mine, other=0.0)
    if SKETCH:
        sketched_at = ROWS + ((unit * SIDES + 1) * H + r)[:, None] * D + d[None, :]
        sketched = tl.load(sketched_at, mask=mine, other=0.0)
    constant = tl.load(CONSTANT + unit * H + r, mask=r < H, other=0.0)
    if PAIRS > 0:
        p = tl.arange(0, PAIRS)
        coef_at = COEF + (unit * 2 * H + r)[:, None] * PAIRS + p[None, :]
        real = (r < H)[:, None] & (p >= 0)[None, :]
        a = tl.load(coef_at, mask=real, other=0.0)
        b = tl.load(coef_at + H * PAIRS, mask=real, other=0.0)
    head = kv_head * group + in_group
    mask_row = batch * mask_batch + head * mask_head + query.to(tl.int64) * mask_query
    maximum = tl.full([16], LOWEST, tl.float32)
    total = tl.zeros([16], tl.float32)
    out = tl.zeros([16, DP], tl.float32)
    for first in range(split * per * T, stop, GROUP):
        tile = tl.zeros([], tl.int64) + first // T
        part = (first % T) // GROUP
        token = first % T + tl.arange(0, GROUP)
        record = RECORDS + batch * record_batch + kv_head * record_head + tile * RECORD
        scale_at = SCALES + batch * scale_batch + kv_head * scale_head + tile * (SCALE_ROWS * T)
        scale_at += (token % 8) * (T // 8) + token // 8
        keys = tl.load(KEY_LEVELS + codes(record, part, D, DP, KEY_BITS))
        scores = tl.dot(rows, tl.trans(keys), input_precision="tf32x3")
        scores *= tl.load(scale_at).to(tl.float32)[None, :]
        if SKETCH:
            signs = 1.0 - 2.0 * codes(record + KEY_WORDS + VALUE_WORDS, part, D, DP, 1).to(
                tl.float32
            )
            signed = tl.dot(sketched, tl.trans(signs), input_precision="tf32x3")
            scores += signed * tl.load(scale_at + 2 * T).to(tl.float32)[None, :]
        if PAIRS > 0:
            cos = tl.load(ANGLES + tile * (2 * PAIRS) + p)[None, :]
            sin = tl.load(ANGLES + tile * (2 * PAIRS) + PAIRS + p)[None, :]
            local = LOCAL + token[None, :] * (2 * PAIRS) + p[:, None]
            turned = tl.dot(a * cos + b * sin, tl.load(local), input_precision="tf32x3")
            scores += tl.dot(
                b * cos - a * sin, tl.load(local + PAIRS), turned, input_precision="tf32x3"
            )
        scores += constant[:, None]
        if CAPPED:
            scores = cap - (2 * cap) / (tl.exp2(scores) + 1)
        place = first + tl.arange(0, GROUP)
        scores = visible(
            scores,
            first_token + place,
            place < tokens,
            mask_row,
            query,
            MASK,
            mask_token,
            first_token + last_seen,
            first_token + pad,
            CAUSAL,
            MASKED,
        )
        new = tl.maximum(maximum, tl.max(scores, 1))
        weights = tl.exp2(scores - new[:, None])
        shrink = tl.exp2(maximum - new)
        total = total * shrink + tl.sum(weights, 1)
        maximum = new
        values = tl.load(VALUE_LEVELS + codes(record + KEY_WORDS, part, D, DP, VALUE_BITS))
        weights *= tl.load(scale_at + T).to(tl.float32)[None, :]
        out = tl.dot(weights, values, out * shrink[:, None], input_precision="tf32x3")
    at = (unit * parts + split) * H + r
    tl.store(PARTIAL + at[:, None] * D + d[None, :], out, mask=mine)
    tl.store(WEIGHT + at * 2, maximum, mask=r < H)
    tl.store(WEIGHT + at * 2 + 1, total, mask=r < H)
