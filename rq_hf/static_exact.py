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
    """Moves a full window on by one token without a number from the host.

    The host's own copies one to the device, which cannot be recorded as a CUDA graph.
    """

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stores new states; returns keys and values, see `StaticSlidingWindowLayer`."""
        is_full = self.cumulative_length_int >= self.max_cache_len
        # compiled steps are as the host has them
        if torch.compiler.is_compiling() or not is_full or key_states.shape[2] != 1:
            return super().update(key_states, value_states, *args, **kwargs)
        self.cumulative_length_int += 1
        assert self.keys is not None and self.values is not None
        for window, new in ((self.keys, key_states), (self.values, value_states)):
            window.copy_(torch.cat((window[:, :, 1:], new), 2))
        return self.keys, self.values
