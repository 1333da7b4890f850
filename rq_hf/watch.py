# SPDX-License-Identifier: Apache-2.0
"""What kernels tell the host of a layer's new tokens, without that it waits for them."""

from __future__ import annotations

import contextlib
import weakref
from typing import Any

import torch
from torch import Tensor

from rq_hf.ops.look import note_not_finite, notes_without_waiting, number_of, place_in


class Watch:
    """Looks after a layer's few new tokens on a GPU: which of them was the first not finite.

    Kernels note it in pinned memory of the host, to which a GPU can write, only when there is
    something to note. The host reads that like any other number. What it reads was right when the
    kernels so far had run; `wait` for these to know.

    Args:
        impl: Which implementation the layer asks for, see `rq_hf.ops.look`.

    Attributes:
        unseen: Whether the newest tokens are still to be looked at, before or while they are
            stored.
    """

    def __init__(self, impl: str) -> None:
        self.impl = impl
        self.unseen = False
        self._note: _Note | None = None

    def takes(self, device: torch.device) -> bool:
        """Whether kernels can look at tokens on a device; the next ones are then left to them."""
        if self._note is None and notes_without_waiting(device, self.impl):
            self._note = _Note(device, None)
        self.unseen = self._note is not None
        return self.unseen

    def look(self, key: Tensor, value: Tensor, first: int) -> None:
        """Has a kernel look at tokens that are about to be stored, if nobody has.

        Args:
            key: Keys `[B, Hk, t, D]`.
            value: Values, same shape.
            first: Index in the sequence of the first of these tokens.
        """
        number = self.by_attention()
        if number is not None:
            note_not_finite(key, value, first, number, impl=self.impl)
        self.unseen = False

    def by_attention(self) -> Tensor | None:
        """Returns where a kernel is to note that the token it stores is not finite, if it is."""
        return self._note.number if self.unseen and self._note is not None else None

    @property
    def first(self) -> int | None:
        """Index in the sequence of the first token found so far; None for none."""
        return None if self._note is None else self._note.place

    @property
    def device(self) -> torch.device | None:
        """Where the tokens are that kernels look at; None while there were none."""
        return None if self._note is None else self._note.device

    def wait(self) -> None:
        """Waits for the kernels that were launched so far."""
        if self._note is not None:
            self._note.wait()

    def forget(self, length: int) -> bool:
        """Forgets tokens from index `length` on, after a wait; tells whether one was noted."""
        self.wait()
        noted = self.first is not None and self.first >= length
        if noted and self._note is not None:
            self._note.place = None
        return noted

    def clear(self) -> None:
        """Forgets everything, without a wait."""
        self._note, self.unseen = None, False

    def to(self, device: torch.device) -> None:
        """Goes with the tokens to another device, after a wait."""
        if self._note is not None:
            self.wait()
            self._note = _Note(device, self._note.place)

    def __getstate__(self) -> tuple[Any, ...]:
        # a copied or pickled tensor would not be pinned
        self.wait()
        return self.impl, self.unseen, self.device, self.first

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.impl, self.unseen, device, place = state
        self._note = None if device is None else _Note(device, place)


class _Note:
    """A token's index that kernels of a device write.

    Attributes:
        device: The device.
        number: int32 `[1]`, see `rq_hf.ops.look`.
    """

    def __init__(self, device: torch.device, place: int | None) -> None:
        self.device = device
        on_gpu = device.type == "cuda"
        with torch.inference_mode(False):
            self.number = torch.zeros(1, dtype=torch.int32, device="cpu", pin_memory=on_gpu)
        # the same memory, read in a fraction of a microsecond
        self._numbers = self.number.numpy()
        self.place = place
        if on_gpu:
            weakref.finalize(self, _let_go, self.number, device).atexit = False

    @property
    def place(self) -> int | None:
        return place_in(self._numbers.item())

    @place.setter
    def place(self, place: int | None) -> None:
        self._numbers[0] = number_of(place)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()


def _let_go(number: Tensor, device: torch.device) -> None:
    """Keeps pinned memory from being used anew while kernels may still write to it.

    Of a copy to the device torch takes note, and gives the memory to nobody before it has run.
    """
    with contextlib.suppress(RuntimeError):
        if not torch.cuda.is_current_stream_capturing():
            number.to(device, non_blocking=True)
