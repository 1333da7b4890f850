# SPDX-License-Identifier: Apache-2.0
"""Attention of one token over dense keys and values, with the tokens split over the GPU.

The baseline beside the library's kernels. Every program runs online softmax over one run of tokens
for all query heads of a KV head; a second kernel adds up the splits, all of them in parallel. Sums
are float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# the least number of rows that tensor cores take
LEAST_ROWS = 16
LOG2E = math.log2(math.e)
# numbers that a program of the second kernel holds: 64 registers a thread
COMBINED_NUMBERS = 8192
MOST_SPLITS = 512


class Config(NamedTuple):
    """How the work is laid out.

    Attributes:
        splits: Runs of tokens of a KV head.
        block: Tokens a step.
        warps: Warps a program.
        stages: Steps loaded ahead.
    """

    splits: int
    block: int
    warps: int
    stages: int


# (block, warps, stages), the one that serves best as a rule first; by head_dim
TILINGS = {
    64: ((128, 4, 3), (64, 4, 4), (64, 4, 3)),
    128: ((64, 4, 3), (64, 4, 4), (128, 8, 3), (32, 4, 4)),
    256: ((32, 4, 3), (64, 4, 2), (64, 8, 3)),
}
# programs a multiprocessor: what fits on it at once, and some more
WAVES = (2, 1, 3, 4, 8)


@triton.jit
def _attend_split_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    sums_ptr,
    maxima_ptr,
    totals_ptr,
    scale,
    tokens,
    tokens_a_split,
    G: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
):
    split = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    g = tl.arange(0, ROWS)
    d = tl.arange(0, D)
    n = tl.arange(0, BLOCK)
    is_row = g < G
    q = tl.load(q_ptr + (head * G + g[:, None]) * D + d[None, :], mask=is_row[:, None], other=0.0)
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    summed = tl.zeros([ROWS, D], tl.float32)
    k_at = k_ptr + head * tokens * D + n[:, None] * D + d[None, :]
    v_at = v_ptr + head * tokens * D + n[:, None] * D + d[None, :]
    first = split * tokens_a_split
    for start in range(first, min(first + tokens_a_split, tokens), BLOCK):
        if EVEN:
            k = tl.load(k_at + start * D)
        else:
            k = tl.load(k_at + start * D, mask=(start + n < tokens)[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(k)) * scale
        if not EVEN:
            scores = tl.where((start + n < tokens)[None, :], scores, float("-inf"))
        larger = tl.maximum(maximum, tl.max(scores, 1))
        weights = tl.exp2(scores - larger[:, None])
        shrink = tl.exp2(maximum - larger)
        if EVEN:
            v = tl.load(v_at + start * D)
        else:
            v = tl.load(v_at + start * D, mask=(start + n < tokens)[:, None], other=0.0)
        summed = tl.dot(weights.to(v.dtype), v, summed * shrink[:, None])
        total = total * shrink + tl.sum(weights, 1)
        maximum = larger
    row = (head * tl.num_programs(0) + split) * G + g
    tl.store(sums_ptr + row[:, None] * D + d[None, :], summed, mask=is_row[:, None])
    tl.store(maxima_ptr + row, maximum, mask=is_row)
    tl.store(totals_ptr + row, total, mask=is_row)


# one binary serves all of these numbers
@triton.jit(do_not_specialize=["splits", "group"])
def _combine_kernel(
    sums_ptr,
    maxima_ptr,
    totals_ptr,
    out_ptr,
    splits,
    group,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    s = tl.arange(0, SPLITS)
    at = (row // group * splits + s) * group + row % group
    maxima = tl.load(maxima_ptr + at, mask=s < splits, other=float("-inf"))
    totals = tl.load(totals_ptr + at, mask=s < splits, other=0.0)
    sums = tl.load(sums_ptr + at[:, None] * D + d[None, :], mask=(s < splits)[:, None], other=0.0)
    weights = tl.exp2(maxima - tl.max(maxima, 0))
    out = tl.sum(sums * weights[:, None], 0) / tl.sum(totals * weights, 0)
    tl.store(out_ptr + row * D + d, out.to(out_ptr.dtype.element_ty))


def attend(query: Tensor, keys: Tensor, values: Tensor, *, scale: float, config: Config) -> Tensor:
    """Returns softmax(scale q k^T) v, `[B, Hq, 1, D]`.

    Args:
        query: `[B, Hq, 1, D]`, contiguous.
        keys: `[B, Hk, N, D]`, contiguous.
        values: The same.
        scale: Factor of the inner products.
        config: How the work is laid out.

    Raises:
        ValueError: Several queries, or strided tensors.
    """
    if query.shape[2] != 1:
        raise ValueError(f"one query a head is taken, got {query.shape[2]}")
    if not (query.is_contiguous() and keys.is_contiguous() and values.is_contiguous()):
        raise ValueError("query, keys and values must be contiguous")
    batch, kv_heads, tokens, head_dim = keys.shape
    heads, group = batch * kv_heads, query.shape[1] // kv_heads
    splits, block, warps, stages = config
    partial = (heads, splits, group)
    sums = torch.empty(*partial, head_dim, dtype=torch.float32, device=query.device)
    maxima = torch.empty(partial, dtype=torch.float32, device=query.device)
    totals = torch.empty_like(maxima)
    out = torch.empty_like(query)
    _attend_split_kernel[(splits, heads)](
        query,
        keys,
        values,
        sums,
        maxima,
        totals,
        scale * LOG2E,
        tokens,
        triton.cdiv(triton.cdiv(tokens, block), splits) * block,
        G=group,
        D=head_dim,
        ROWS=max(LEAST_ROWS, triton.next_power_of_2(group)),
        BLOCK=block,
        EVEN=tokens % block == 0,
        num_warps=warps,
        num_stages=stages,
    )
    padded = max(2, triton.next_power_of_2(splits))
    chunk = min(head_dim, max(16, COMBINED_NUMBERS // padded))
    _combine_kernel[(heads * group, head_dim // chunk)](
        sums, maxima, totals, out, splits, group, D=head_dim, SPLITS=padded, CHUNK=chunk
    )
    return out


def configs(
    heads: int, tokens: int, head_dim: int, processors: int, *, quick: bool = False
) -> Iterator[Config]:
    """Yields layouts to try: the usual tiling at several numbers of splits, then other tilings.

    Args:
        heads: KV heads of the whole batch.
        tokens: Tokens of a sequence.
        head_dim: 64, 128 or 256.
        processors: Multiprocessors of the GPU.
        quick: Yield the few best ones only.
    """
    tilings = TILINGS[head_dim]
    tries = [(wave, tilings[0]) for wave in (WAVES[:3] if quick else WAVES)]
    tries += [] if quick else [(WAVES[0], tiling) for tiling in tilings[1:]]
    seen = set()
    for wave, (block, warps, stages) in tries:
        most = min(MOST_SPLITS, triton.cdiv(tokens, block))
        config = Config(max(1, min(most, processors * wave // heads)), block, warps, stages)
        if config not in seen:
            seen.add(config)
            yield config
