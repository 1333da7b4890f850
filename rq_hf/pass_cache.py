# SPDX-License-Identifier: Apache-2.0
"""A cache that knows where a pass begins, and takes back the tokens of one that is refused."""

from __future__ import annotations

import copy
import sys
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)

from rq_hf.cropping import INSTEAD
from rq_hf.host_history import HostHistory, is_kept
from rq_hf.layers import RotorQuantLayer
from rq_hf.noted import can_take_back, is_noted, refuse_noted, refuse_to_pack, wait_for_notes

_NOT_TAKEN_BACK = (
    "The layers before it hold these tokens already, and cannot give them back: {why}, do not crop "
    "it"
)
_PERHAPS_ONE_OF_TWO = "If this cache is one of an EncoderDecoderCache, reset() that"


class PassCache(Cache):
    """A `transformers.Cache` whose layers hold the same tokens, whatever one of them refuses.

    Args:
        revertible: See `RotorQuantCache`.
        **kwargs: Arguments of `Cache`.

    Attributes:
        packs: Whether a layer has packed tokens in the pass under way.
    """

    def __init__(self, *, revertible: bool, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.packs = False
        self._history = HostHistory(recurrent=revertible)
        self._keep_empty_layers()
        self._forget_passes()

    def _keep_empty_layers(self) -> None:
        """Copies the host's layers while they are empty."""
        self._empty_layers = {
            i: copy.deepcopy(layer)
            for i, layer in enumerate(self.layers)
            if not isinstance(layer, RotorQuantLayer)
        }

    def _forget_passes(self) -> None:
        """Starts anew: whatever layer comes next begins a pass."""
        self._updates = 0
        self._last_updated = self._deepest = 0
        self._history.forget()
        self._end_pass()

    def _end_pass(self) -> None:
        """Lets the next layer begin a pass, whichever it is."""
        # of the pass under way: the layer that was last, and whether it has stored
        self._layer, self._stored = sys.maxsize, True

    @property
    def packed_layers(self) -> list[RotorQuantLayer]:
        """The layers that are packed."""
        return [layer for layer in self.layers if isinstance(layer, RotorQuantLayer)]

    def before_packing(self) -> None:
        """Waits for what steps have noted: a layer is about to pack tokens.

        Raises:
            ValueError: A token of any layer is not finite; `update` takes it back.
        """
        if not self.packs:
            refuse_to_pack(self.packed_layers)
        # from here on the tokens of this pass are looked at at once
        self.packs = True

    def check_steps(self) -> None:
        """Waits for the device, and looks at what kernels have noted of the steps so far.

        Steps of up to 32 tokens on a GPU do not wait to learn whether their keys and values are
        finite. The next pass tells of what is known by then; `save` and passes that pack tokens
        wait for it, and so does every pass of a model with sliding windows or linear attention.

        Raises:
            ValueError: A token is NaN or infinite. It was taken back with all that follow it, out
                of all layers; or a layer cannot, and the message says that only `reset` helps.
        """
        wait_for_notes(self.packed_layers)
        refuse_noted(self.layers, self._history, new_tokens=False)

    # linear attention changes what it was given here, and need not say so

    def has_previous_state(self, layer_idx: int | None = None, *args: Any, **kwargs: Any) -> bool:
        """Whether a layer of linear attention has states; see `Cache`."""
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
        self, conv_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Stores the states of a convolution; see `Cache`."""
        self._before_states(layer_idx)
        return super().update_conv_state(conv_states, layer_idx, *args, **kwargs)

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Stores the states of linear attention; see `Cache`."""
        self._before_states(layer_idx)
        return super().update_recurrent_state(recurrent_states, layer_idx, *args, **kwargs)

    @torch.compiler.disable(reason="the host keeps account of passes")
    def _before_states(self, layer_idx: int | None) -> None:
        """Lets a layer of linear attention be part of a pass, before its states change.

        Args:
            layer_idx: The layer; None where any may be meant, as some models of transformers 5.17
                ask before each one.
        """
        layers: list[Any] = self.layers
        if layer_idx is None:
            self._before_any_states()
        elif layer_idx < len(layers) and _is_linear(layers[layer_idx]):
            self._go_on(layer_idx, stores=False)
            self._history.note_states(layer_idx, layers[layer_idx])

    def _before_any_states(self) -> None:
        layers: list[Any] = self.layers
        linear = [i for i, layer in enumerate(layers) if _is_linear(layer)]
        if linear and linear[-1] <= self._layer:
            # none of them is still to come in this pass
            self._begin_pass()
            self._layer, self._stored = -1, False
        for i in linear:
            self._history.note_states(i, layers[i])

    def _go_on(self, layer_idx: int, stores: bool) -> None:
        """Takes note of a layer; where it is one that comes anew, a pass begins.

        Layers come in order, whichever of them a model leaves out. One of linear attention may read
        and store several times.
        """
        again = self._stored and stores
        if layer_idx < self._layer or (layer_idx == self._layer and again):
            self._begin_pass()
        self._layer, self._stored = layer_idx, stores
        if stores:
            self._last_updated = layer_idx
            self._deepest = max(self._deepest, layer_idx)

    def _begin_pass(self) -> None:
        """Tells of earlier tokens that were not finite, and that layers have been left out."""
        self.packs = False
        if self._last_updated < self._deepest:
            self._check_lengths()
        packed = self.packed_layers
        keeps = bool(packed) and any(map(is_kept, self.layers))
        if keeps and self._history.start is not None:
            # what is kept of a pass is enough to take back this one alone
            wait_for_notes(packed)
        if is_noted(packed):
            refuse_noted(self.layers, self._history, new_tokens=True)
        if keeps:
            self._history.begin(max(self._lengths(), default=0))

    def _note_window(self, layer_idx: int, shown: tuple[Tensor, Tensor], new: int) -> None:
        """Notes what has left a window of the host."""
        layer: Any = self.layers[layer_idx]
        if isinstance(layer, DynamicSlidingWindowLayer):
            self._history.note_window(layer_idx, layer, shown, new)

    def _refused(self, error: ValueError, layer_idx: int, tokens: int, held: int) -> None:
        """Takes back the tokens of a pass that a layer has refused, out of the layers before it.

        Args:
            error: What it has raised.
            layer_idx: The layer; it is as it was.
            tokens: How many tokens.
            held: How many layers there were before.

        Raises:
            ValueError: In place of `error`: they cannot be taken back, or kernels had found others.
        """
        self._end_pass()
        if can_take_back(self.layers, layer_idx, self._history):
            # out of the layers ahead this takes the new tokens too
            del self.layers[held:]
            refuse_noted(self.layers, self._history, new_tokens=True)
        layer: Any = self.layers[layer_idx]
        shared = self.layer_class_to_replicate is not None and layer_idx > 0
        why = None
        if isinstance(layer, CacheLayerMixin):
            why = self._take_back(tokens, layer_idx, layer.get_seq_length())
        del self.layers[held:]
        if why is not None:
            raise ValueError(f"{error}. {_NOT_TAKEN_BACK.format(why=why)}") from error
        refuse_noted(self.layers, self._history, new_tokens=True)
        if shared:
            raise ValueError(f"{error}. {_PERHAPS_ONE_OF_TWO}") from error

    def _refuse_layer(self, key_states: Tensor, layer_idx: int) -> NoReturn:
        """Refuses a layer that the cache does not have, and takes back what the others hold."""
        text = (
            f"layer {layer_idx}: the cache was made for a model with {len(self.layers)} layers; "
            "make a new one with this model's config"
        )
        self._end_pass()
        tokens = token_count(key_states)
        held = max(self._lengths(), default=0)
        why = None
        if held >= tokens:
            why = self._take_back(tokens, len(self.layers), held - tokens)
        raise ValueError(text if why is None else f"{text}. {_NOT_TAKEN_BACK.format(why=why)}")

    def _check_lengths(self) -> None:
        """Refuses to go on behind a pass that has left layers out."""
        held = sorted(set(self._lengths()))
        if len(held) < 2:
            return
        text = (
            f"layers hold {held[0]} to {held[-1]} tokens: a model with fewer layers has stored in "
            "this cache"
        )
        if len(held) == 2:
            why = self._take_back(held[1] - held[0], len(self.layers), held[0])
            if why is None:
                self._last_updated = self._deepest
                raise ValueError(f"{text}; its tokens were taken back")
        raise ValueError(f"{text}; reset() it")

    def _lengths(self) -> list[int]:
        """Tokens of the layers that have any and know how many."""
        lengths = [int(x.get_seq_length()) for x in self.layers if isinstance(x, CacheLayerMixin)]
        return [length for length in lengths if length]

    def _take_back(self, tokens: int, layer_idx: int, length: int) -> str | None:
        """Takes `tokens` behind the first `length` out of layers before `layer_idx`.

        Returns:
            Why a layer cannot give them back, and what to do; None if no layer holds them any more.
        """
        layers: list[Any] = self.layers
        ahead = [i for i in range(layer_idx) if _may_hold(layers[i], length + tokens)]
        if not ahead or tokens == 0:
            return None
        if length == 0:
            for i in ahead:
                self._go_back_to_start(i)
            self._updates = 0
            return None
        for i in ahead:
            obstacle = self._obstacle(i, length)
            if obstacle is not None:
                return f"layer {i}: {obstacle}"
        for i in ahead:
            if isinstance(layers[i], RotorQuantLayer):
                layers[i].go_back()
            else:
                self._history.put_back(i, layers[i], length)
        return None

    def _obstacle(self, index: int, length: int) -> str | None:
        """Returns why a layer cannot go back to before this pass; None if it can."""
        layer: Any = self.layers[index]
        if not isinstance(layer, RotorQuantLayer):
            return self._history.obstacle(index, layer, length)
        return None if layer.can_go_back_to(length) else f"it was changed since; {INSTEAD}"

    def _go_back_to_start(self, index: int) -> None:
        """Puts a layer back to before its first tokens."""
        layers: list[Any] = self.layers
        layer = layers[index]
        if isinstance(layer, RotorQuantLayer):
            layer.go_back_to_start()
            return
        self._make_anew(index)
        if getattr(layer, "record_past", False):
            layers[index].activate_past_recording()

    def _make_anew(self, index: int) -> None:
        # the host's own reset keeps shapes, and in transformers 5.17 lengths
        self.layers[index] = copy.deepcopy(self._empty_layers.get(index, DynamicLayer()))

    def _close_pass(self) -> None:
        """Looks at the last pass, and forgets what there was before it.

        Raises:
            ValueError: As `check_steps`, where the host's layers could not go back later.
        """
        if self._history.start is not None:
            self.check_steps()
            self._history.forget()


def token_count(states: Tensor) -> int:
    """Tokens of states `[B, Hk, t, D]`; none of those that are no such tensor."""
    return states.shape[2] if states.dim() == 4 else 0


def _may_hold(layer: Any, tokens: int) -> bool:
    """Whether a layer has that many tokens; one of linear attention does not know."""
    if isinstance(layer, CacheLayerMixin):
        return layer.get_seq_length() == tokens
    return _is_linear(layer)


def _is_linear(layer: Any) -> bool:
    return isinstance(layer, LinearAttentionCacheLayerMixin)
