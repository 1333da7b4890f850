# SPDX-License-Identifier: Apache-2.0
"""What the host's layers held before the pass under way, so that a refused pass leaves no trace.

Packed layers and those that only grow can drop their newest tokens. A full window cannot, nor can
a convolution or linear attention: what they held before is gone with the next token, unless
somebody keeps it. Of a window that costs nothing: the rows that left it are in the memory of those
that stay, until more come. The states of a convolution are small, and copied. Those of linear
attention are large, and copied on request only.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)

from rq_hf.cropping import INSTEAD, crop_obstacle, holds_nothing

_STATES = (
    "conv_states",
    "recurrent_states",
    "has_previous_state",
    "is_conv_states_initialized",
    "is_recurrent_states_initialized",
    "conv_kernel_size",
)

_NO_STATES = (
    "linear attention keeps no states of earlier tokens (a cache made with revertible=True copies "
    f"them); {INSTEAD}"
)


class HostHistory:
    """What has changed in a cache's host layers since a pass began.

    Args:
        recurrent: Whether to copy the states of linear attention.

    Attributes:
        start: Tokens of a sequence before the pass; None while no pass is known.
        has_stored: Whether a layer of linear attention has stored states since.
    """

    def __init__(self, recurrent: bool) -> None:
        self.start: int | None = None
        self._recurrent = recurrent
        # keys and values before new ones, with these behind them, and how many are new
        self._windows: dict[int, tuple[Tensor, Tensor, int]] = {}
        # None: what there was is not known
        self._states: dict[int, dict[str, Any] | None] = {}
        self.has_stored = False

    @property
    def noted(self) -> set[int]:
        """Layers of linear attention that are part of the pass."""
        return set(self._states)

    @property
    def is_whole(self) -> bool:
        """Whether all that has changed is known."""
        return self.start is not None and None not in self._states.values()

    def begin(self, start: int) -> None:
        """Notes that a pass begins behind `start` tokens, and forgets the one before."""
        self.forget()
        self.start = start

    def forget(self) -> None:
        """Forgets what there was."""
        self.start, self.has_stored = None, False
        self._windows.clear()
        self._states.clear()

    def note_window(
        self, index: int, layer: DynamicSlidingWindowLayer, shown: tuple[Tensor, Tensor], new: int
    ) -> None:
        """Notes what a window held before.

        Args:
            index: The layer's position in the model.
            layer: The layer, which has stored new tokens.
            shown: Keys and values `[B, Hk, n, D]` of all that these see, as `update` gave them: the
                window's are a part of their memory.
            new: How many tokens are new.
        """
        if not self.start:
            return
        assert layer.keys is not None and layer.values is not None
        key, value = (layer.keys, layer.values) if layer.record_past else shown
        if key.device != layer.keys.device:
            # offloaded meanwhile
            key, value = (x.to(layer.keys.device) for x in (key, value))
        self._windows[index] = key, value, new

    def note_states(self, index: int, layer: LinearAttentionCacheLayerMixin) -> None:
        """Notes the states of a layer that are about to change, before it hands them out."""
        if self.start is None or index in self._states:
            return
        known = self._recurrent or not any(layer.is_recurrent_states_initialized.values())
        self._states[index] = (
            {name: _copy(getattr(layer, name)) for name in _STATES} if known else None
        )

    def note_stored(self, index: int) -> None:
        """Notes that a layer of linear attention stores states, unless what it held is known."""
        self.has_stored = self.has_stored or self._states.get(index, {}) is None

    def obstacle(self, index: int, layer: Any, length: int) -> str | None:
        """Returns why a layer cannot go back to the first `length` tokens; None if it can."""
        if self.start == length and self._knows(index, layer):
            return None
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            return None if holds_nothing(layer) else _NO_STATES
        removal = _removal(layer, length)
        return crop_obstacle(layer, removal) if removal else None

    def put_back(self, index: int, layer: Any, length: int) -> None:
        """Puts a layer back to its first `length` tokens, where there is no obstacle."""
        known = self.start == length and self._knows(index, layer)
        if known:
            self._restore_states(index, layer)
            self._restore_window(index, layer)
        removal = _removal(layer, length)
        if removal and known:
            # a layer with both kinds of attention grows too
            DynamicLayer.crop(layer, removal)
        elif removal:
            layer.crop(removal)

    def tensors(self) -> Iterable[Tensor]:
        """Yields all tensors that are kept."""
        for key, value, _ in self._windows.values():
            yield from (key, value)
        for states in self._states.values():
            for by_number in (states or {}).values():
                yield from (x for x in by_number.values() if isinstance(x, Tensor))

    def _knows(self, index: int, layer: Any) -> bool:
        """Whether it knows what a layer held when the pass began."""
        linear = isinstance(layer, LinearAttentionCacheLayerMixin)
        window = isinstance(layer, DynamicSlidingWindowLayer)
        if not (linear or window):
            return False
        if linear and self._states.get(index, {}) is None:
            return False
        return not window or index in self._windows or layer.get_seq_length() == self.start

    def _restore_states(self, index: int, layer: Any) -> None:
        states = self._states.pop(index, None)
        for name, value in (states or {}).items():
            setattr(layer, name, value)

    def _restore_window(self, index: int, layer: Any) -> None:
        if index not in self._windows:
            return
        key, value, new = self._windows.pop(index)
        rows = key.shape[2] - new
        layer.keys, layer.values = key[:, :, :rows], value[:, :, :rows]
        layer.cumulative_length -= new

    def __getstate__(self) -> dict[str, Any]:
        # a pickle would hold the memory of windows twice
        return self.__dict__ | {"_windows": {}}

    def __deepcopy__(self, memo: dict[int, Any]) -> HostHistory:
        again = HostHistory(self._recurrent)
        again.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return again


def is_kept(layer: Any) -> bool:
    """Whether what a layer of the host held has to be kept: it cannot drop its newest tokens."""
    return isinstance(layer, (DynamicSlidingWindowLayer, LinearAttentionCacheLayerMixin))


def _removal(layer: Any, length: int) -> int:
    """Returns what `crop` of a layer takes to leave `length` tokens; 0 where it holds no more."""
    if not hasattr(layer, "get_seq_length"):
        # of linear attention, or one that stores nothing: neither counts tokens
        return 0
    return min(0, length - int(layer.get_seq_length()))


@torch.inference_mode(False)
def _copy(states: dict[int, Any]) -> dict[int, Any]:
    # the host writes to them in place, in whatever mode
    return {i: x.detach().clone() if isinstance(x, Tensor) else x for i, x in states.items()}
