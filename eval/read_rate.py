# SPDX-License-Identifier: Apache-2.0
"""The rate at which a device reads its memory, measured on a buffer far larger than its caches."""

from __future__ import annotations

import torch
from torch import Tensor

from eval.timing import measure

GPU_BYTES = 1 << 30
# what a smoke test can wait for
CPU_BYTES = 1 << 24


def read_rate(device: torch.device) -> float:
    """Returns bytes a second: the best of a few ways to add up a buffer of random words."""
    size = GPU_BYTES if device.type == "cuda" else CPU_BYTES
    words = torch.randint(-(2**31), 2**31, (size // 4,), dtype=torch.int32, device=device)
    ways = [lambda: words.sum()]
    if device.type == "cuda":
        ways = _kernel_ways(words)
    return size / min(measure([way], device).us for way in ways) * 1e6


def _kernel_ways(words: Tensor) -> list:
    from eval.sum_kernel import WAYS, add_up

    return [lambda way=way: add_up(words, way) for way in WAYS]
