# SPDX-License-Identifier: Apache-2.0
"""Guards that keep the surroundings of a call from changing its numbers."""

from contextlib import AbstractContextManager, nullcontext

import torch


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Context in which matrix products keep their dtype, whatever the caller has switched on."""
    kind = device.type
    # switching it off takes longer than the launch of a kernel
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()
