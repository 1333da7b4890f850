# SPDX-License-Identifier: Apache-2.0
"""Where and how kernels run."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from triton import knobs


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Context in which kernels are launched on `device`."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def compute_dtype(device: torch.device, narrow: torch.dtype) -> torch.dtype:
    """`narrow`, or float32 in Triton's interpreter, whose products of bfloat16 are wrong."""
    return torch.float32 if interpreting() else narrow


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return bool(knobs.runtime.interpret)


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 for a CPU."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
