# SPDX-License-Identifier: Apache-2.0
"""Attention of a few query rows to the packed tiles of one KV head (Gluon, one warp a program).

For the packed tokens n of a split, with rotated integer levels k_n and z_n, scales a_n and b_n:

    score_n = a_n <q', k_n> (+ w_n <S q', signs_n>) + q . RoPE_n(pre_mean) + q . post_mean
    partial = (max, sum of weights, sum_n weight_n b_n z_n)         with weights exp2(score_n - max)

Products with levels are exact: queries, and weights times scales, are 16-bit integers, split into
two int8 columns (high and low byte) of one tensor-core product. Levels never touch shared memory.
Padding columns cost nothing: a product has at least 8 columns, for 4 rows of queries.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from rq_hf.ops.triton.mean_term import fast_coefficients, mean_products
from rq_hf.ops.triton.operands import in_lanes, operands, operands_1
from rq_hf.ops.triton.tile_loads import (
    ask_for_angles,
    ask_for_coefficients,
    ask_for_scales,
    ask_for_terms,
    ask_for_words,
    barrier,
    load_once,
    load_rows,
    load_words,
    make_stage,
    make_words,
    staged_scales,
    staged_words,
)
from rq_hf.ops.triton.tile_products import block_products, high_low

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


@gluon.jit(do_not_specialize=VARYING)
def attend_tiles(
    RECORDS,
    SCALES,
    ROWS8,
    ROW_SCALES,
    COEF,
    CONSTANT,
    SLOW_COEF,
    ROPE,
    TERMS,
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
    key_step,
    value_step,
    cap,
    k0_,
    k1_,
    k2_,
    k3_,
    v0_,
    v1_,
    v2_,
    v3_,
    D: gl.constexpr,
    T: gl.constexpr,
    KEY_BITS: gl.constexpr,
    VALUE_BITS: gl.constexpr,
    SKETCH: gl.constexpr,
    H: gl.constexpr,
    PAIRS: gl.constexpr,
    HALVES: gl.constexpr,
    STEPS: gl.constexpr,
    STAGED: gl.constexpr,
    PADDED: gl.constexpr,
    CAUSAL: gl.constexpr,
    MASKED: gl.constexpr,
    CAPPED: gl.constexpr,
    COUNTED: gl.constexpr,
    CHAINED: gl.constexpr,
):
    """Writes the partial result of one split for a block of H query rows of one KV head.

    Args:
        RECORDS: int32 [B, Hk, tiles, W], strides `record_batch`, `record_head`, W, 1.
        SCALES: float16 [B, Hk, tiles, S, T], strides `scale_batch`, `scale_head`, S T, T, 1.
        ROWS8: int8 [B Hk, blocks, 1 or 2, 2H, D]: bytes of the rotated rows, then of the sketched.
        ROW_SCALES: float32 [B Hk, blocks, 1 or 2, H]: steps of these integers.
        COEF: float32 [B Hk, blocks, 2, H, PAIRS], see `mean_products`.
        CONSTANT: float32 [B Hk, blocks, H], added to all scores of a row.
        SLOW_COEF: float16 [B Hk, blocks, STEPS, 2H, 16], see `mean_products`.
        ROPE, TERMS, ANGLES: See `tables.RopeOperands`: `operands`, `turned_terms`, `tiles`.
        PADDING: int64 [B]; that many first packed tokens are hidden.
        MASK: bool (MASKED = 1) or float (2) [B, Hq, L, N] with the strides `mask_...`.
        COUNTS: int32 [4], see `LayerView.counts`; in place of `tokens` and `first_token` (COUNTED).
        PARTIAL: float32 [B Hk, blocks, parts, H, D].
        WEIGHT: float32 [B Hk, blocks, parts, H, 2]: maximum (base 2) and sum.
        tokens: Packed tokens.
        splits: Programs of a unit; each takes every so many-th tile.
        first_token: Index of the first packed token in the sequence.
        last_seen: Index of the last packed token that the first query may see (CAUSAL).
        key_step, value_step: Steps of the integer levels.
        cap: Softcap times log2(e); rows are then prepared for tanh (CAPPED).
        k0_ .. v3_: Tables of levels, four bytes each.
        STAGED: Whether the next tile's words wait in shared memory. Registers do not hold those of
            a wide head, nor beside 8 rows any without spilling.
        CHAINED: Whether it begins while `prepare` still runs, see `launching.Launch`.
    """
    M: gl.constexpr = gl.NVMMADistributedLayout(
        version=[2, 0], warps_per_cta=[1, 1], instr_shape=[16, 8]
    )
    A: gl.constexpr = gl.DotOperandLayout(0, M, 4)
    B: gl.constexpr = gl.DotOperandLayout(1, M, 4)
    LOAD: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [1, 1], [1, 0])
    LN: gl.constexpr = gl.BlockedLayout([1, T // 8], [8, 4], [1, 1], [1, 0])
    WIDE: gl.constexpr = D == 256
    # registers in which no words wait have room for the mean's coefficients: wide heads have more
    HELD: gl.constexpr = WIDE and not STAGED
    JOINED: gl.constexpr = D == 64 and KEY_BITS != 4
    SIGN_JOINED: gl.constexpr = D == 64
    KEY_BLOCKS: gl.constexpr = 2 if WIDE else 1
    KEY_ROWS: gl.constexpr = T // 2 if JOINED else T
    KEY_WIDTH: gl.constexpr = (64 if D > 64 else 32) if KEY_BITS == 4 else 32
    KEY_FOUR: gl.constexpr = KEY_BITS != 4
    VALUE_ROWS: gl.constexpr = 128 if WIDE else D
    VALUE_FOUR: gl.constexpr = VALUE_BITS != 4
    VALUE_WIDTH: gl.constexpr = T // 4 if VALUE_FOUR else T // 2
    KEY_WORDS: gl.constexpr = T * D * KEY_BITS // 32
    VALUE_WORDS: gl.constexpr = T * D * VALUE_BITS // 32
    SIGN_WORDS: gl.constexpr = T * D // 32 if SKETCH else 0
    RECORD: gl.constexpr = KEY_WORDS + VALUE_WORDS + SIGN_WORDS
    KEY_PLANES: gl.constexpr = 3 if KEY_BITS == 3 else 1
    VALUE_PLANES: gl.constexpr = 3 if VALUE_BITS == 3 else 1
    KEY_LOAD: gl.constexpr = KEY_WORDS // KEY_BLOCKS // KEY_PLANES
    VALUE_LOAD: gl.constexpr = VALUE_WORDS // KEY_BLOCKS // VALUE_PLANES
    VALUE_PLANE: gl.constexpr = VALUE_WORDS // VALUE_PLANES
    KEY_BLOCK: gl.constexpr = KEY_PLANES * KEY_LOAD
    SIGN_LOAD: gl.constexpr = T * D // 32 // KEY_BLOCKS
    SIDES: gl.constexpr = 2 if SKETCH else 1
    SCALE_ROWS: gl.constexpr = 3 if SKETCH else 2

    if CHAINED:
        gdc_launch_dependents()
    if COUNTED:
        first_token = gl.load(COUNTS)
        tokens = gl.load(COUNTS + 2)
    k0_, k1_, k2_, k3_ = in_lanes(k0_), in_lanes(k1_), in_lanes(k2_), in_lanes(k3_)
    v0_, v1_, v2_, v3_ = in_lanes(v0_), in_lanes(v1_), in_lanes(v2_), in_lanes(v3_)
    split = gl.program_id(0)
    unit = gl.program_id(1)
    blocks = (group * queries + H - 1) // H
    head = unit // blocks
    block = unit % blocks
    batch = (head // kv_heads).to(gl.int64)
    kv_head = (head % kv_heads).to(gl.int64)
    unit = unit.to(gl.int64)
    tiles = (tokens + T - 1) // T
    # tiles that are read at one time lie side by side
    start = split
    pad = 0
    if PADDED:
        pad = gl.load(PADDING + batch).to(gl.int32)
        start += gl.maximum(pad // T - split + splits - 1, 0) // splits * splits

    line = gl.arange(0, KEY_LOAD // 4, layout=gl.SliceLayout(1, LOAD))[:, None] * 4
    word = gl.arange(0, 4, layout=gl.SliceLayout(0, LOAD))[None, :]
    key_at = line + word
    value_line = gl.arange(0, VALUE_LOAD // 4, layout=gl.SliceLayout(1, LOAD))[:, None] * 4
    value_at = value_line + word + KEY_WORDS
    sign_line = gl.arange(0, SIGN_LOAD // 4, layout=gl.SliceLayout(1, LOAD))[:, None] * 4
    sign_at = sign_line + word + (KEY_WORDS + VALUE_WORDS)
    records = RECORDS + batch * record_batch + kv_head * record_head
    scales = SCALES + batch * scale_batch + kv_head * scale_head

    first = gl.maximum(gl.minimum(start, tiles - 1), 0).to(gl.int64)
    stage, stage_angles, stage_terms, slow_coef = make_stage(SCALE_ROWS, T, H, PAIRS, STEPS)
    ask_for_scales(stage, 0, scales + first * (SCALE_ROWS * T), SCALE_ROWS, T)
    if PAIRS > 0:
        ask_for_angles(stage_angles, 0, ANGLES + first * (2 * PAIRS), PAIRS)
    if STEPS > 0:
        ask_for_terms(stage_terms, 0, TERMS + first * (STEPS * 256), STEPS)
    async_copy.commit_group()
    here = records + first * RECORD
    if STAGED:
        key_words = make_words(KEY_BLOCKS, KEY_PLANES, KEY_LOAD)
        value_words = make_words(KEY_BLOCKS, VALUE_PLANES, VALUE_LOAD)
        ask_for_words(key_words, here + key_at, KEY_BLOCKS, KEY_BLOCK, KEY_PLANES, KEY_LOAD)
        if SKETCH:
            sign_words = make_words(KEY_BLOCKS, 1, SIGN_LOAD)
            ask_for_words(sign_words, here + sign_at, KEY_BLOCKS, SIGN_LOAD, 1, SIGN_LOAD)
        async_copy.commit_group()
        ask_for_words(
            value_words, here + value_at, KEY_BLOCKS, VALUE_LOAD, VALUE_PLANES, VALUE_PLANE
        )
        async_copy.commit_group()
    elif not WIDE:
        k0w, k1w, k2w = load_words(here, key_at, KEY_LOAD, KEY_BITS, WIDE)
        v0w, v1w, v2w = load_words(here, value_at, VALUE_PLANE, VALUE_BITS, WIDE)
        if SKETCH:
            sw = load_once(here + sign_at, WIDE)
    if CHAINED:
        # all above was there before `prepare`, all below is its work
        gdc_wait()
    if STEPS > 0:
        ask_for_coefficients(slow_coef, SLOW_COEF + unit * (STEPS * 32 * H), H, STEPS)
        async_copy.commit_group()
    if STAGED:
        # in the loop, copies are waited for in the order in which it asks for them
        async_copy.wait_group(0)
    column = gl.arange(0, 2 * H, layout=gl.SliceLayout(0, B))
    rows8 = ROWS8 + unit * (SIDES * 2 * H * D)
    q0 = load_rows(rows8, column, KEY_WIDTH, D, B)
    q1 = load_rows(rows8 + KEY_WIDTH, column, KEY_WIDTH, D, B)
    q2, q3, q4, q5, q6, q7 = q0, q1, q0, q1, q0, q1
    if KEY_FOUR and not JOINED:
        q2 = load_rows(rows8 + 64, column, 32, D, B)
        q3 = load_rows(rows8 + 96, column, 32, D, B)
    if WIDE:
        q4 = load_rows(rows8 + 128, column, KEY_WIDTH, D, B)
        q5 = load_rows(rows8 + 128 + KEY_WIDTH, column, KEY_WIDTH, D, B)
        if KEY_FOUR:
            q6 = load_rows(rows8 + 192, column, 32, D, B)
            q7 = load_rows(rows8 + 224, column, 32, D, B)
    if SKETCH:
        signs8 = rows8 + 2 * H * D
        z0 = load_rows(signs8, column, 32, D, B)
        z1 = load_rows(signs8 + 32, column, 32, D, B)
        z2, z3, z4, z5, z6, z7 = z0, z1, z0, z1, z0, z1
        if not SIGN_JOINED:
            z2 = load_rows(signs8 + 64, column, 32, D, B)
            z3 = load_rows(signs8 + 96, column, 32, D, B)
        if WIDE:
            z4 = load_rows(signs8 + 128, column, 32, D, B)
            z5 = load_rows(signs8 + 160, column, 32, D, B)
            z6 = load_rows(signs8 + 192, column, 32, D, B)
            z7 = load_rows(signs8 + 224, column, 32, D, B)

    zero_scores = gl.full([T, 2 * H], 0, gl.int32, layout=M)
    zero_values = gl.full([VALUE_ROWS, 2 * H], 0, gl.int32, layout=M)
    zero_half = gl.full([T // 2, 2 * H], 0, gl.int32, layout=M)
    half0, half1 = gl.split(gl.reshape(zero_scores, [T, H, 2]))
    S: gl.constexpr = half0.type.layout
    half2, half3 = gl.split(gl.reshape(zero_values, [VALUE_ROWS, H, 2]))
    O: gl.constexpr = half2.type.layout
    row = gl.arange(0, H, layout=gl.SliceLayout(0, S))
    token = gl.arange(0, T, layout=gl.SliceLayout(1, S))
    row_scale = gl.load(ROW_SCALES + unit * (SIDES * H) + row) * key_step
    if SKETCH:
        sign_scale = gl.load(ROW_SCALES + unit * (SIDES * H) + H + row)
    constant = gl.load(CONSTANT + unit * H + row)
    this_row = block * H + row
    query = this_row % queries
    mask_row = (
        batch * mask_batch
        + (kv_head * group + gl.minimum(this_row // queries, group - 1)) * mask_head
        + query.to(gl.int64) * mask_query
    )

    # the constant is where the high parts of the mean's products start
    start_mean = gl.join(constant, gl.full([H], 0.0, gl.float32, layout=gl.SliceLayout(0, S)))
    start_mean = gl.convert_layout(gl.reshape(start_mean, [2 * H]), gl.SliceLayout(0, M))
    start_products = zero_half if JOINED else zero_scores
    if KEY_BITS == 4:
        # levels are stored as level + 64: 64 times the sum of a row is taken off in advance
        ones = gl.full([16, KEY_WIDTH], 1, gl.int8, layout=A)
        sums = mma_v2(ones, q0, mma_v2(ones, q1, gl.full([16, 2 * H], 0, gl.int32, layout=M)))
        if WIDE:
            sums = mma_v2(ones, q4, mma_v2(ones, q5, sums))
        sums = gl.convert_layout(gl.max(sums, 0) * -64, gl.SliceLayout(0, M))
        start_products = zero_scores + sums[None, :]

    if PAIRS > 0:
        coef = COEF + unit * (2 * H * PAIRS)
        if HELD:
            coef = fast_coefficients(coef, H, PAIRS, HALVES)
    maximum = gl.full([H], -1e30, gl.float32, layout=gl.SliceLayout(0, S))
    total = gl.full([H], 0.0, gl.float32, layout=gl.SliceLayout(0, S))
    out0 = gl.full([VALUE_ROWS, H], 0.0, gl.float32, layout=O)
    out1 = out0

    half = 1
    for tile in range(start, tiles, splits):
        next_tile = gl.minimum(tile + splits, tiles - 1).to(gl.int64)
        here = records + tile.to(gl.int64) * RECORD
        after = records + next_tile * RECORD
        half = 1 - half
        # of what is under way, only the values' words may be missing now
        async_copy.wait_group(1 if STAGED else 0)
        # copies of other lanes are to be seen, and what is overwritten has been read
        barrier()
        ask_for_scales(stage, 1 - half, scales + next_tile * (SCALE_ROWS * T), SCALE_ROWS, T)
        if PAIRS > 0:
            ask_for_angles(stage_angles, 1 - half, ANGLES + next_tile * (2 * PAIRS), PAIRS)
        if STEPS > 0:
            ask_for_terms(stage_terms, 1 - half, TERMS + next_tile * (STEPS * 256), STEPS)
        if not STAGED:
            async_copy.commit_group()
        key_scale = staged_scales(stage, half * SCALE_ROWS, T, LN, gl.SliceLayout(1, S))
        value_scale = staged_scales(stage, half * SCALE_ROWS + 1, T, LN, gl.SliceLayout(1, S))
        if STAGED:
            k0w, k1w, k2w = staged_words(key_words, 0, KEY_PLANES, LOAD)
        elif WIDE:
            k0w, k1w, k2w = load_words(here, key_at, KEY_LOAD, KEY_BITS, WIDE)
        c0, c1, c2, c3 = operands(
            k0w, k1w, k2w, k0_, k1_, k2_, k3_, KEY_ROWS, KEY_WIDTH, KEY_BITS, A
        )
        products = block_products(
            c0, c1, c2, c3, q0, q1, q2, q3, start_products, KEY_FOUR, JOINED, M
        )
        if WIDE:
            if STAGED:
                k0w, k1w, k2w = staged_words(key_words, 1, KEY_PLANES, LOAD)
            else:
                k0w, k1w, k2w = load_words(here + KEY_BLOCK, key_at, KEY_LOAD, KEY_BITS, WIDE)
            c0, c1, c2, c3 = operands(
                k0w, k1w, k2w, k0_, k1_, k2_, k3_, KEY_ROWS, KEY_WIDTH, KEY_BITS, A
            )
            products = block_products(c0, c1, c2, c3, q4, q5, q6, q7, products, KEY_FOUR, JOINED, M)
        if not STAGED and not WIDE:
            k0w, k1w, k2w = load_words(after, key_at, KEY_LOAD, KEY_BITS, WIDE)
        score = high_low(products, T, H) * (key_scale[:, None] * row_scale[None, :])
        if SKETCH:
            sign_scale_of = staged_scales(stage, half * SCALE_ROWS + 2, T, LN, gl.SliceLayout(1, S))
            if STAGED:
                sw = sign_words.index(0).load(LOAD)
            elif WIDE:
                sw = load_once(here + sign_at, WIDE)
            c0, c1, c2, c3 = operands_1(sw, 0xFF01, T // 2 if SIGN_JOINED else T, A)
            signed = block_products(
                c0,
                c1,
                c2,
                c3,
                z0,
                z1,
                z2,
                z3,
                zero_half if SIGN_JOINED else zero_scores,
                True,
                SIGN_JOINED,
                M,
            )
            if WIDE:
                if STAGED:
                    sw = sign_words.index(1).load(LOAD)
                else:
                    sw = load_once(here + sign_at + SIGN_LOAD, WIDE)
                c0, c1, c2, c3 = operands_1(sw, 0xFF01, T, A)
                signed = block_products(c0, c1, c2, c3, z4, z5, z6, z7, signed, True, False, M)
            if not STAGED and not WIDE:
                sw = load_once(after + sign_at, WIDE)
            score += high_low(signed, T, H) * (sign_scale_of[:, None] * sign_scale[None, :])
        if STAGED:
            ask_for_words(key_words, after + key_at, KEY_BLOCKS, KEY_BLOCK, KEY_PLANES, KEY_LOAD)
            if SKETCH:
                ask_for_words(sign_words, after + sign_at, KEY_BLOCKS, SIGN_LOAD, 1, SIGN_LOAD)
            async_copy.commit_group()
        if PAIRS > 0:
            of_mean = mean_products(
                ROPE,
                coef,
                stage_angles,
                stage_terms,
                slow_coef,
                half,
                start_mean,
                T,
                H,
                PAIRS,
                HALVES,
                STEPS,
                HELD,
                M,
            )
            high, low = gl.split(gl.reshape(of_mean, [T, H, 2]))
            score += high + low
        else:
            score += constant[None, :]
        if CAPPED:
            score = cap - (2 * cap) / (gl.exp2(score) + 1)

        place = tile * T + token
        if MASKED == 1:
            at = MASK + mask_row[None, :] + (first_token + place)[:, None].to(gl.int64) * mask_token
            inside = (place < tokens)[:, None]
            seen = gl.load(at, mask=inside & (mask_row[None, :] >= 0), other=0) != 0
            score = gl.where(seen, score, float("-inf"))
        if MASKED == 2:
            at = MASK + mask_row[None, :] + (first_token + place)[:, None].to(gl.int64) * mask_token
            inside = (place < tokens)[:, None]
            bias = gl.load(at, mask=inside & (mask_row[None, :] >= 0), other=float("-inf"))
            bias = bias.to(gl.float32) * 1.4426950408889634
            # a finite bias hides nothing if all are equal: -inf alone does
            score = gl.where(bias > float("-inf"), gl.maximum(score + bias, -1e30), bias)
        if CAUSAL:
            score = gl.where(place[:, None] <= (last_seen + query)[None, :], score, float("-inf"))
        if (tile + 1) * T > tokens or tile * T < pad:
            inside_split = (place < tokens) & (place >= pad)
            score = gl.where(inside_split[:, None], score, float("-inf"))

        new_maximum = gl.maximum(maximum, gl.max(score, 0))
        weight = gl.exp2(score - new_maximum[None, :])
        shrink = gl.exp2(maximum - new_maximum)
        total = total * shrink + gl.sum(weight, 0)
        maximum = new_maximum
        scaled = weight * value_scale[:, None]
        peak = gl.maximum(gl.max(scaled, 0), 1e-30)
        whole = (scaled * (32512.0 / peak)[None, :] + 0.5).to(gl.int32)
        bytes8 = gl.join(((whole + 128) >> 8).to(gl.int8), whole.to(gl.int8))  # [T, H, 2]
        bytes8 = gl.reshape(bytes8, [T // VALUE_WIDTH, VALUE_WIDTH, 2 * H])
        bytes8 = gl.permute(bytes8, [1, 2, 0])
        if VALUE_FOUR:
            even, odd = gl.split(gl.reshape(bytes8, [VALUE_WIDTH, 2 * H, 2, 2]))
            p0, p2 = gl.split(even)
            p1, p3 = gl.split(odd)
            p0 = gl.convert_layout(p0, B)
            p1 = gl.convert_layout(p1, B)
            p2 = gl.convert_layout(p2, B)
            p3 = gl.convert_layout(p3, B)
            start_values = zero_values
        else:
            p0, p1 = gl.split(bytes8)
            p0 = gl.convert_layout(p0, B)
            p1 = gl.convert_layout(p1, B)
            p2, p3 = p0, p1
            minus = gl.full([16, VALUE_WIDTH], -64, gl.int8, layout=A)
            sums = gl.full([16, 2 * H], 0, gl.int32, layout=M)
            sums = gl.max(mma_v2(minus, p0, mma_v2(minus, p1, sums)), 0)
            start_values = zero_values + gl.convert_layout(sums, gl.SliceLayout(0, M))[None, :]
        shrink_out = gl.convert_layout(shrink, gl.SliceLayout(0, O))
        step = gl.convert_layout(peak, gl.SliceLayout(0, O)) * (value_step / 32512.0)
        if STAGED:
            async_copy.wait_group(1)
            v0w, v1w, v2w = staged_words(value_words, 0, VALUE_PLANES, LOAD)
        elif WIDE:
            v0w, v1w, v2w = load_words(here, value_at, VALUE_PLANE, VALUE_BITS, WIDE)
        c0, c1, c2, c3 = operands(
            v0w, v1w, v2w, v0_, v1_, v2_, v3_, VALUE_ROWS, VALUE_WIDTH, VALUE_BITS, A
        )
        summed = block_products(c0, c1, c2, c3, p0, p1, p2, p3, start_values, VALUE_FOUR, False, M)
        out0 = out0 * shrink_out[None, :] + high_low(summed, VALUE_ROWS, H) * step[None, :]
        if WIDE:
            if STAGED:
                v0w, v1w, v2w = staged_words(value_words, 1, VALUE_PLANES, LOAD)
            else:
                v0w, v1w, v2w = load_words(
                    here + VALUE_LOAD, value_at, VALUE_PLANE, VALUE_BITS, WIDE
                )
            c0, c1, c2, c3 = operands(
                v0w, v1w, v2w, v0_, v1_, v2_, v3_, VALUE_ROWS, VALUE_WIDTH, VALUE_BITS, A
            )
            summed = block_products(
                c0, c1, c2, c3, p0, p1, p2, p3, start_values, VALUE_FOUR, False, M
            )
            out1 = out1 * shrink_out[None, :] + high_low(summed, VALUE_ROWS, H) * step[None, :]
        if STAGED:
            ask_for_words(
                value_words, after + value_at, KEY_BLOCKS, VALUE_LOAD, VALUE_PLANES, VALUE_PLANE
            )
            async_copy.commit_group()
        elif not WIDE:
            v0w, v1w, v2w = load_words(after, value_at, VALUE_PLANE, VALUE_BITS, WIDE)

    # nothing may be under way to a program's memory when it ends
    async_copy.wait_group(0)
    out_row = gl.arange(0, H, layout=gl.SliceLayout(0, O))
    out_dim = gl.arange(0, VALUE_ROWS, layout=gl.SliceLayout(1, O))
    at = (unit * parts + split) * H
    place_out = PARTIAL + (at + out_row[None, :]) * D + out_dim[:, None]
    gl.store(place_out, out0)
    if WIDE:
        gl.store(place_out + 128, out1)
    gl.store(WEIGHT + (at + row) * 2, maximum)
    gl.store(WEIGHT + (at + row) * 2 + 1, total)
