# SPDX-License-Identifier: Apache-2.0
"""Launch of the kernel that looks for NaN and infinity in a few tokens."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from rq_hf.ops.triton.launching import Launch, launch, on_device
from rq_hf.ops.triton.look import look_kernel

_ROWS = 8


# launches are not for torch.compile to look into
@torch.compiler.disable
def note_not_finite(key: Tensor, value: Tensor, first: int, not_finite: Tensor) -> None:
    """See `rq_hf.ops.look`."""
    key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (key, value))
    batch, heads, tokens, dim = key.shape
    with on_device(key.device):
        launch(
            Launch(
                look_kernel,
                (batch * heads, 1),
                (
                    key,
                    value,
                    not_finite,
                    *key.stride()[:3],
                    *value.stride()[:3],
                    heads,
                    tokens,
                    first,
                ),
                {"D": dim, "DP": triton.next_power_of_2(dim), "ROWS": _ROWS},
                num_warps=4,
            )
        )
