# SPDX-License-Identifier: Apache-2.0
"""A kernel that does nothing but read: every program adds up a run of words."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Way(NamedTuple):
    """Words a step, steps a program, and warps."""

    block: int
    steps: int
    warps: int


WAYS = (Way(2048, 8, 4), Way(4096, 4, 8), Way(4096, 16, 8), Way(8192, 8, 8))


@triton.jit
def _sum_kernel(words_ptr, sums_ptr, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    at = words_ptr + program * (STEPS * BLOCK) + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.int32)
    for step in tl.static_range(STEPS):
        total += tl.load(at + step * BLOCK)
    tl.store(sums_ptr + program, tl.sum(total, 0))


def add_up(words: Tensor, way: Way) -> Tensor:
    """Returns sums of runs of int32 `words`, modulo 2^32.

    Raises:
        ValueError: The words do not fill all programs.
    """
    run = way.block * way.steps
    if words.numel() % run:
        raise ValueError(f"words must be a multiple of {run}, got {words.numel()}")
    sums = torch.empty(words.numel() // run, dtype=torch.int32, device=words.device)
    _sum_kernel[(sums.numel(),)](words, sums, way.steps, way.block, num_warps=way.warps)
    return sums
