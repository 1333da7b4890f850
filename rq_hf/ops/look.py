# SPDX-License-Identifier: Apache-2.0
"""Where the first token lies that is not finite: the public function and its reference.

A place is kept in one int32 number that kernels can write to without an order among them: 0 for
none, else `LAST` minus the token's index in the sequence, so that the first token is the largest
number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rq_hf.ops.dispatch import device_obstacle, use_triton

LAST = 2**31 - 1


def place_in(number: int) -> int | None:
    """Returns the index that a number stands for; None for none."""
    return LAST - number if number else None


def number_of(place: int | None) -> int:
    """Returns the number that stands for an index, or for none."""
    return 0 if place is None else LAST - place


def note_not_finite(
    key: Tensor, value: Tensor, first: int, not_finite: Tensor, *, impl: str = "auto"
) -> None:
    """Notes the first token whose key or value is NaN or infinite, if one is.

    Args:
        key: Keys `[B, Hk, t, D]`, any floating dtype, any strides.
        value: Values, same shape.
        first: Index in the sequence of the first of these tokens.
        not_finite: Where to note it, int32, one number; for a kernel it may be in pinned memory of
            the host. A token noted before stays if it is an earlier one.
        impl: "auto" (a kernel on a GPU, where it can run), "reference" or "triton". The kernel does
            not wait for the device, the reference does.

    Raises:
        ValueError: The kernel was asked for and cannot run.
    """
    if notes_without_waiting(key.device, impl):
        from rq_hf.ops.triton.look_launch import note_not_finite as by_kernel

        by_kernel(key, value, first, not_finite)
        return
    bad = ~(torch.isfinite(key) & torch.isfinite(value)).all(3).all(1).all(0)
    if bool(bad.any()):
        place = first + int(bad.nonzero()[0])
        not_finite.fill_(max(int(not_finite), number_of(place)))


def notes_without_waiting(device: torch.device, impl: str = "auto") -> bool:
    """Whether `note_not_finite` runs a kernel for tensors of a device; raises as it would."""
    return use_triton(impl, device_obstacle(device), device)
