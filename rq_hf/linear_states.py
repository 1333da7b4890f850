# SPDX-License-Identifier: Apache-2.0
"""A cache that is told of linear attention before it reads or stores states."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache


class LinearStatesCache(Cache):
    """A `transformers.Cache` whose states of linear attention do not change unseen.

    What a layer was given it may change in place, and need not say so: the host's own kernels do so
    with the states of single tokens.
    """

    def has_previous_state(self, layer_idx: int | None = None, *args: Any, **kwargs: Any) -> bool:
        """Whether a layer of linear attention has states; see `Cache`."""
        if layer_idx is None:
            self._before_any_states()
        elif layer_idx < len(self.layers):
            self._before_states(layer_idx)
        return super().has_previous_state(layer_idx, *args, **kwargs)

    def get_conv_state(self, layer_idx: int, *args: Any, **kwargs: Any) -> Tensor | None:
        """Returns the states of a convolution; see `Cache`."""
        self._before_states(layer_idx)
        return super().get_conv_state(layer_idx, *args, **kwargs)

    def get_recurrent_state(self, layer_idx: int, *args: Any, **kwargs: Any) -> Tensor | None:
        """Returns the states of linear attention; see `Cache`."""
        self._before_states(layer_idx)
        return super().get_recurrent_state(layer_idx, *args, **kwargs)

    def update_conv_state(
        self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        """Stores the states of a convolution; see `Cache`.

        Raises:
            ValueError: They do not continue those stored; this layer is as it was, and those before
                it as after a refused `update`.
        """
        self._before_states(layer_idx)
        self._check_states("conv_states", conv_states, layer_idx, state_idx)
        return super().update_conv_state(conv_states, layer_idx, state_idx, **kwargs)

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        """Stores the states of linear attention; see `Cache`.

        Raises:
            ValueError: As `update_conv_state`.
        """
        self._before_states(layer_idx)
        self._check_states("recurrent_states", recurrent_states, layer_idx, state_idx)
        return super().update_recurrent_state(recurrent_states, layer_idx, state_idx, **kwargs)

    @abstractmethod
    def _before_states(self, layer_idx: int) -> None:
        """Called before a layer's states are handed out or stored."""

    @abstractmethod
    def _before_any_states(self) -> None:
        """Called where a model asks for states of whichever layer."""

    @abstractmethod
    def _check_states(self, kind: str, states: Tensor, layer_idx: int, state_idx: int) -> None:
        """Refuses states that do not continue those of a layer, before they are stored."""
