# SPDX-License-Identifier: Apache-2.0
"""The host's static layer, exact, for use beside packed ones."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import StaticLayer


class ExactStaticLayer(StaticLayer):
    """Gives of several new tokens, and of all before them, the rows that are there.

    So do packed layers, and the host makes one mask for all of them.
    """

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stores new states; returns keys and values, for one token those of all the room."""
        tokens = key_states.shape[2]
        length = self.max_cache_len if tokens == 1 else self.get_mask_sizes(tokens)[0]
        key, value = super().update(key_states, value_states, *args, **kwargs)
        return key[:, :, :length], value[:, :, :length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Returns length and offset of the keys that `query_length` new tokens will see."""
        if query_length == 1:
            return self.max_cache_len, 0
        return int(self.get_seq_length()) + query_length, 0
