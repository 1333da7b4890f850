# SPDX-License-Identifier: Apache-2.0
"""A packed layer that forgets what has left the attention's sliding window."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from rq_hf.config import RotorQuantConfig
from rq_hf.layers import RotorQuantLayer
from rq_hf.sources import PromptSource, ViewSource

# tokens that leave together: whole tiles whatever the bits, so that all layers of a model have as
# many columns as the one mask that the host makes for them
_DROPPED_AT_ONCE = 128


class RotorQuantSlidingLayer(RotorQuantLayer):
    """Keeps the newest tokens: those that the next query sees, and up to 127 older ones.

    A query sees `sliding_window` tokens, itself included, or fewer (attention in chunks). Tiles
    that are out of its sight are dropped; those that stay keep their codes. There are no sinks,
    since no later query would see them.

    Args:
        config: How to store; `sink_length` does not count.
        sliding_window: The window, longer than the exact tail.
        **kwargs: Other arguments of `RotorQuantLayer`.
    """

    is_sliding = True

    def __init__(self, config: RotorQuantConfig, sliding_window: int, **kwargs: Any) -> None:
        # so what leaves the window has been packed before, and is a whole number of tiles
        assert not covers(config, sliding_window)
        self.sliding_window = sliding_window
        self.record_past = False
        super().__init__(replace(config, sink_length=0), **kwargs)

    def activate_past_recording(self) -> None:
        """Drops nothing from now on but in `crop`, which can so go back any number of tokens."""
        self.record_past = True

    def reset(self, keep_statistics: bool = False) -> None:
        """Forgets all tokens, and that the past was to be recorded; see `RotorQuantLayer.reset`."""
        super().reset(keep_statistics)
        self.record_past = False

    def go_back_to_start(self) -> None:
        """Forgets all tokens; a past that is recorded is recorded on."""
        record_past = self.record_past
        super().go_back_to_start()
        self.record_past = record_past

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Returns length and offset of the keys that `query_length` new tokens will see."""
        length = self.get_seq_length()
        offset = 0 if self.store is None else self.store.dropped
        if not self.record_past:
            offset = max(offset, self._out_of_sight(length))
        return length + query_length - offset, offset

    def get_max_length(self) -> int:
        """Returns the window."""
        return self.sliding_window

    def expired(self, total: int) -> int:
        """Of a sequence's first `total` tokens, those that no query will read again."""
        # in strict mode the queries of these very tokens are still to come
        return 0 if self.record_past or self.config.strict else self._out_of_sight(total)

    def extend(self, key: Tensor, value: Tensor) -> None:
        """Appends new tokens, packs those that leave the tail, drops those that have expired."""
        super().extend(key, value)
        self._drop(self.expired(self._store.dropped + self._store.length))

    def pack(self, *new: Tensor) -> None:
        """Packs the oldest of the exact tokens and `new` ones, and drops those that expired."""
        super().pack(*new)
        self._drop(self.expired(self._store.dropped + self._store.length))

    def crop_obstacle(self, tokens_to_remove: int) -> str | None:
        """As for other layers; or tokens that would be in the window again are gone."""
        obstacle = super().crop_obstacle(tokens_to_remove)
        if obstacle is not None:
            return obstacle
        left = self.get_seq_length() + tokens_to_remove
        if left <= 0 or self._store.dropped <= max(0, left - self.sliding_window + 1):
            return None
        return (
            f"cropping to {left} tokens would bring back some that have left the window of "
            f"{self.sliding_window} and are gone; call activate_past_recording() before they are "
            "stored, or reset() the cache and run the prompt again"
        )

    def crop(self, tokens_to_remove: int) -> None:
        """Drops the newest tokens, and of the oldest ones those that have left the window."""
        super().crop(tokens_to_remove)
        if self.store is not None:
            self._drop(self._out_of_sight(self.get_seq_length()))

    def check_numbers(self, key: Tensor, value: Tensor) -> None:
        """As for other layers; what kernels have noted is waited for before tokens are dropped."""
        if self.store is not None and self._drops(key.shape[2]):
            self._wait_before_packing()
        super().check_numbers(key, value)

    def _drops(self, new: int) -> bool:
        """Whether tokens are dropped where `new` ones are stored."""
        length = self.get_seq_length()
        gone = 0 if self.record_past else self._out_of_sight(length)
        return max(gone, self.expired(length + new)) > self._store.dropped

    def _take(self, key_states: Tensor, value_states: Tensor) -> PromptSource | ViewSource:
        if not self.record_past:
            self._drop(self._out_of_sight(self.get_seq_length()))
        return super()._take(key_states, value_states)

    def _out_of_sight(self, length: int) -> int:
        """Of `length` tokens, those that the next query does not see, in whole tiles."""
        hidden = max(0, length - self.sliding_window + 1)
        return hidden - hidden % _DROPPED_AT_ONCE

    def _drop(self, first: int) -> None:
        """Drops the tokens before that of index `first`."""
        if first > self._store.dropped:
            self._store.drop(first - self._store.dropped)


def covers(config: RotorQuantConfig, sliding_window: int) -> bool:
    """Whether the exact tail holds all that a later query sees of a window."""
    return sliding_window - 1 <= config.residual_length
