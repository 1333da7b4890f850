# SPDX-License-Identifier: Apache-2.0
"""Attention of query rows to exact rows, and which keys a query may see (Triton)."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# what a maximum starts from: finite, so that differences are never inf - inf
LOWEST = tl.constexpr(-1e30)


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
    if tl.float32 != COMPUTE:
        rest = (weights - high.to(tl.float32)).to(COMPUTE)
        out = tl.dot(rest, v.to(COMPUTE), out)
    tl.store(PARTIAL + r[:, None] * D + d[None, :], out, mask=(r < H)[:, None] & real[None, :])
