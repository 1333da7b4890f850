# SPDX-License-Identifier: Apache-2.0
"""Which implementation of an operation runs: plain torch, or Triton kernels."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

# queries of a sequence that the attention kernels take at a time; more are matrix products
MAX_QUERIES = 32
IMPLS = ("auto", "reference", "triton")


def use_triton(impl: str, why_not: str | None, device: torch.device) -> bool:
    """Tells whether the kernels run.

    Args:
        impl: "auto" (kernels on a GPU where they can run), "reference" (plain torch) or "triton".
        why_not: Why the kernels cannot run on these inputs; None if they can.
        device: Where the inputs are.

    Raises:
        ValueError: Unknown `impl`, or kernels were asked for and cannot run.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(map(repr, IMPLS))}, got {impl!r}")
    if impl == "triton" and why_not is not None:
        raise ValueError(f"impl='triton' cannot run: {why_not}; use impl='reference' or 'auto'")
    # on a CPU kernels are interpreted: for tests that ask for it
    wanted = impl == "triton" or (impl == "auto" and device.type == "cuda")
    return wanted and why_not is None


def device_obstacle(device: torch.device) -> str | None:
    """Why kernels cannot run on tensors of this device; None if they can.

    CPU tensors serve in Triton's interpreter (`TRITON_INTERPRET=1`).
    """
    kind = device.type
    if kind == "cuda":
        if torch.version.hip is not None:
            return "the kernels are for NVIDIA GPUs"
    elif kind != "cpu" or os.environ.get("TRITON_INTERPRET") != "1":
        return f"it needs tensors on an NVIDIA GPU, got {kind}"
    return None if _triton_is_installed() else "triton is not installed"


@functools.cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None
