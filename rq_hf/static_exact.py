# SPDX-License-Identifier: Apache-2.0
"""The host's static layers, exact, for use beside packed ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

from rq_hf.static_limits import check_room


class ExactStaticLayer(StaticLayer):
    """Gives of several new tokens, and of all before them, the rows that are there.

    So do packed layers, and the host makes one mask for all of them.
    """

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stores new states; returns keys and values, for one token those of all the room.

        Raises:
            ValueError: There is no room for them; the layer is as it was. Of a single token that
                is seen on a CPU only: elsewhere the length would have to be waited for, and the
                last row is written again and again.
        """
        tokens = key_states.shape[2]
        if tokens > 1:
            length = self._check_room(tokens)
            key, value = super().update(key_states, value_states, *args, **kwargs)
            return key[:, :, :length], value[:, :, :length]
        if key_states.device.type == "cpu" and not torch.compiler.is_compiling():
            self._check_room(1)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        place = self.cumulative_length.clamp(max=self.max_cache_len - 1).view(1)
        self.keys.index_copy_(2, place, key_states)
        self.values.index_copy_(2, place, value_states)
        self.cumulative_length.add_(1)
        return self.keys, self.values

    def _check_room(self, new: int) -> int:
        """Returns the tokens of a sequence with `new` ones."""
        return check_room(int(self.get_seq_length()), new, self.max_cache_len, "an exact layer")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Returns length and offset of the keys that `query_length` new tokens will see."""
        if query_length == 1:
            return self.max_cache_len, 0
        return int(self.get_seq_length()) + query_length, 0


class ExactStaticSlidingLayer(StaticSlidingWindowLayer):
    """Moves its window on by one token at a time without a number from the host.

    The host's own goes by a number that it counts in Python. What is compiled of it takes that
    number as an input, another one in each step, so that every step records a CUDA graph of its
    own, and is compiled anew when the window is full. To move a full window it also copies a number
    to the device, which cannot be recorded. Here compiled steps count on the device alone.
    """

    def __init__(self, max_cache_len: int, sliding_window: int, **kwargs: Any) -> None:
        self._room = max_cache_len
        super().__init__(max_cache_len, sliding_window, **kwargs)

    @property
    def cumulative_length_int(self) -> int:
        """Tokens of a sequence so far; waits for the device after compiled steps."""
        if self._behind:
            self.cumulative_length_int = int(self.cumulative_length)
        return self._counted

    @cumulative_length_int.setter
    def cumulative_length_int(self, count: int) -> None:
        self._counted, self._behind = count, False

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stores new states; returns keys and values, see `StaticSlidingWindowLayer`."""
        tokens = key_states.shape[2]
        if self._is_compiled_step(tokens):
            return self._step(key_states, value_states)
        if tokens == 1 and self.cumulative_length_int >= self.max_cache_len:
            return self._move(key_states, value_states)
        states = super().update(key_states, value_states, *args, **kwargs)
        if tokens > 1:
            # the host's own stops counting there as soon as the window is full
            self.cumulative_length.fill_(self.cumulative_length_int)
        return states

    def _is_compiled_step(self, tokens: int) -> bool:
        return tokens == 1 and self.is_initialized and torch.compiler.is_compiling()

    def _step(self, *states: Tensor) -> tuple[Tensor, Tensor]:
        """Stores one token a sequence, in a full window or not, as the device knows."""
        assert self.keys is not None and self.values is not None
        count, last = self.cumulative_length, self.max_cache_len - 1
        rows = torch.arange(self.max_cache_len, device=self.device)
        is_new = (rows == count.clamp(max=last))[:, None]
        source = (rows + (count > last)).clamp(max=last)
        for window, new in zip((self.keys, self.values), states, strict=True):
            window.copy_(torch.where(is_new, new, window.index_select(2, source)))
        count.add_(1)
        self._behind = True
        return self.keys, self.values

    def _move(self, *states: Tensor) -> tuple[Tensor, Tensor]:
        """Stores one token a sequence in a full window."""
        assert self.keys is not None and self.values is not None
        for window, new in zip((self.keys, self.values), states, strict=True):
            window.copy_(torch.cat((window[:, :, 1:], new), 2))
        self.cumulative_length.add_(1)
        self.cumulative_length_int += 1
        return self.keys, self.values

    def get_seq_length(self) -> Any:
        """Returns the tokens of a sequence so far: a number, or a tensor while compiling."""
        if self.is_initialized and torch.compiler.is_compiling():
            return self.cumulative_length
        return self.cumulative_length_int

    def get_mask_sizes(self, query_length: int) -> tuple[int, Any]:
        """Returns length and offset of the keys that `query_length` new tokens will see."""
        if not self._is_compiled_step(query_length):
            return super().get_mask_sizes(query_length)
        offset = (self.cumulative_length - self.max_cache_len + 1).clamp(min=0)
        return self.max_cache_len, _Offset(offset, self._room)


class _Offset:
    """Where a window begins in the sequence, which the device knows, for the host to make masks.

    Added to a tensor it is the tensor it stands for. The host also adds it to a number of keys, to
    see whether a mask of all tokens reaches as far; that gives the farthest that keys will ever be.

    Args:
        start: The place of the first key, int64 `[]`.
        room: Tokens of a sequence at most.
    """

    def __init__(self, start: Tensor, room: int) -> None:
        self._start = start
        self._room = room

    def __radd__(self, keys: int) -> int:
        return self._room

    # the compiler asks an object of any other kind after the tensor it is added to, and gives up
    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, arguments: tuple[Any, ...] = (), options: Any = None
    ) -> Any:
        places, offset = arguments
        return function(places, offset._start.to(places.device))
