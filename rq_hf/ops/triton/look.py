# SPDX-License-Identifier: Apache-2.0
"""Kernels that look for NaN and infinity, and note where they are."""

import triton
import triton.language as tl

from rq_hf.ops.look import LAST

_LAST = tl.constexpr(LAST)


@triton.jit
def is_lost(numbers):
    """Which numbers are NaN or infinite."""
    size = tl.abs(numbers.to(tl.float32))
    return (size == float("inf")) | (size != size)


@triton.jit
def note(NOT_FINITE, place):
    """Notes a token; of several, in whatever order, the first stays."""
    number = tl.full([], _LAST, tl.int32) - place
    # as far as the device is concerned, this is atomic in the host's memory too
    tl.atomic_max(NOT_FINITE, number, sem="relaxed")


@triton.jit(do_not_specialize=("heads", "tokens", "first"))
def look_kernel(
    KEY,
    VALUE,
    NOT_FINITE,
    key_batch,
    key_head,
    key_token,
    value_batch,
    value_head,
    value_token,
    heads,
    tokens,
    first,
    D: tl.constexpr,
    DP: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Grid: (B Hk, 1).

    Args:
        KEY, VALUE: [B, Hk, `tokens`, D], numbers of a token side by side.
        NOT_FINITE: int32 [1], see `rq_hf.ops.look`; on the device or in pinned memory.
        first: Index in the sequence of the first token.
        ROWS: Tokens looked at at a time.
    """
    batch = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    key = KEY + batch * key_batch + head * key_head
    value = VALUE + batch * value_batch + head * value_head
    d = tl.arange(0, DP)[None, :]
    found = tokens
    for start in tl.range(0, tokens, ROWS):
        token = start + tl.arange(0, ROWS)[:, None]
        inside = (token < tokens) & (d < D)
        row = token.to(tl.int64)
        keys = tl.load(key + row * key_token + d, mask=inside, other=0.0)
        values = tl.load(value + row * value_token + d, mask=inside, other=0.0)
        bad = tl.where(is_lost(keys) | is_lost(values), token, tokens)
        found = tl.minimum(found, tl.min(bad))
    if found < tokens:
        note(NOT_FINITE, first + found)
