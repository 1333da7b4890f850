# SPDX-License-Identifier: Apache-2.0
"""When each token of `generate()` arrives on the host: prefill, steps, and the memory of each."""

from __future__ import annotations

import time
from itertools import pairwise

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer


class StepClock(BaseStreamer):
    """A streamer that notes the time at which it is given tokens.

    `generate()` waits for the device after every step to see whether it is done, with a streamer or
    without, so the time between two tokens is that of a whole step: the device's work and what the
    host could not hide behind it. The streamer's part is one copy of the tokens.

    Args:
        device: Where the model is.

    Attributes:
        prefill_peak: Most bytes allocated until the first token, on top of those when the clock was
            made; None where nobody counts.
        decode_peak: The same, behind the first token.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._times: list[float] = []
        self._before = _allocated(device)
        self.prefill_peak: int | None = None
        self.decode_peak: int | None = None
        _forget_peak(device)

    def put(self, value: Tensor) -> None:
        """Takes the prompt first, and then the tokens of each step; all are on the CPU."""
        self._times.append(time.perf_counter())
        if len(self._times) == 2:
            self.prefill_peak = self._peak()
            _forget_peak(self.device)

    def end(self) -> None:
        """Takes note that all tokens have come."""
        self.decode_peak = self._peak()

    @property
    def prefill_seconds(self) -> float:
        """From the prompt to the first token."""
        return self._times[1] - self._times[0]

    @property
    def step_seconds(self) -> list[float]:
        """Time of each later token."""
        return [later - sooner for sooner, later in pairwise(self._times[1:])]

    def _peak(self) -> int | None:
        if self.device.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated(self.device) - self._before


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
