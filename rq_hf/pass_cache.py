# SPDX-License-Identifier: Apache-2.0
"""A cache that knows where a pass begins, and takes back the tokens of one that is refused."""

from __future__ import annotations

import contextlib
import copy
import sys
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)

from rq_hf.cropping import INSTEAD
from rq_hf.host_history import HostHistory, is_kept
from rq_hf.layers import RotorQuantLayer
from rq_hf.linear_states import LinearStatesCache
from rq_hf.noted import (
    can_take_back,
    is_noted,
    packed_in,
    refuse_noted,
    refuse_to_pack,
    wait_for_notes,
)

_NOT_TAKEN_BACK = (
    "The layers before it hold these tokens already, and cannot give them back: {why}, do not crop "
    "it"
)
_PERHAPS_ONE_OF_TWO = "If this cache is one of an EncoderDecoderCache, reset() that"
_NEW = "make a new one with this model's config"
_BROKE_OFF = "a pass broke off there, or a model with fewer layers has stored in this cache"


class PassCache(LinearStatesCache):
    """A `transformers.Cache` whose layers hold the same tokens, whatever one of them refuses.

    Args:
        revertible: See `RotorQuantCache`.
        **kwargs: Arguments of `transformers.Cache`.

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
        """Starts anew: no layer has stored anything."""
        self._updates = self._deepest = 0
        # why a pass that broke off could not be taken back
        self._spoilt_by: str | None = None
        self._history.forget()
        self._end_pass()

    def _end_pass(self) -> None:
        """Lets the next layer begin a pass, whichever it is."""
        # of the pass under way: the layer that was last, whether it has stored, what all that have
        # stored held before, and how many tokens the first one stored
        self._layer, self._stored = sys.maxsize, True
        self._before: dict[int, int] = {}
        self._new_tokens = 0

    @property
    def packed_layers(self) -> list[RotorQuantLayer]:
        """The layers that are packed."""
        return packed_in(self.layers)

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
        wait for it, and so does every pass beside exact windows, convolutions or copied states of
        linear attention.

        Raises:
            ValueError: A token is NaN or infinite. It was taken back with all that follow it, out
                of all layers; or a layer cannot, and the message says that only `reset` helps.
        """
        wait_for_notes(self.packed_layers)
        refuse_noted(self.layers, self._history, new_tokens=False)

    @torch.compiler.disable(reason="the host keeps account of passes")
    def _before_states(self, layer_idx: int) -> None:
        """Lets a layer of linear attention be part of a pass, before its states change.

        Raises:
            ValueError: The cache has no such layer, or one of another kind.
        """
        layers: list[Any] = self.layers
        if layer_idx >= len(layers):
            self._refuse_layer(layer_idx)
        if not _is_linear(layers[layer_idx]):
            self._refuse_kind(layer_idx, "states of linear attention")
        self._go_on(layer_idx)
        self._history.note_states(layer_idx, layers[layer_idx])

    @torch.compiler.disable(reason="the host keeps account of passes")
    def _before_any_states(self) -> None:
        """As `_before_states`, where any layer may be meant.

        Some models of transformers 5.17 ask so before each one.
        """
        layers: list[Any] = self.layers
        linear = [i for i, layer in enumerate(layers) if _is_linear(layer)]
        if linear and linear[-1] <= self._layer:
            # none of them is still to come in this pass
            self._begin_pass()
            self._layer, self._stored = -1, False
        for i in linear:
            self._history.note_states(i, layers[i])

    @torch.compiler.disable(reason="the host keeps account of passes")
    def _check_states(self, kind: str, states: Tensor, layer_idx: int, state_idx: int) -> None:
        """Refuses states of another form than a layer's, which the host would store or choke on."""
        layer: Any = self.layers[layer_idx]
        held = getattr(layer, kind)[state_idx]
        # what is packed refuses another dtype too; recurrent states have their own
        same = held is None or kind == "recurrent_states" or held.dtype == states.dtype
        # tokens are last in those of a convolution
        end = -1 if kind == "conv_states" else None
        if held is None or (same and held.shape[:end] == states.shape[:end]):
            self._history.note_stored(layer_idx)
            return
        text = (
            f"layer {layer_idx}: the cache holds {kind} {list(held.shape)}, {held.dtype}, got "
            f"{list(states.shape)}, {states.dtype}; use a new cache for another model or batch, or "
            "reset() this one"
        )
        # what else it has may have been stored before
        unchanged = layer_idx if kind == "conv_states" else None
        raise ValueError(self._with_reason(text, self._undo(but=unchanged)))

    def _go_on(self, layer_idx: int, length: int | None = None, new: int = 0) -> None:
        """Takes note of a layer; where it is one that comes anew, a pass begins.

        Layers come in order, whichever of them a model leaves out. One of linear attention may read
        and store several times.

        Args:
            layer_idx: The layer.
            length: Tokens before those that it is about to store; None for linear attention.
            new: Tokens that it is about to store.
        """
        again = self._stored and length is not None
        if layer_idx < self._layer or (layer_idx == self._layer and again):
            self._begin_pass()
        self._layer, self._stored = layer_idx, length is not None
        if length is not None:
            if not self._before:
                self._new_tokens = new
            self._before[layer_idx] = length
            self._deepest = max(self._deepest, layer_idx)

    def _begin_pass(self) -> None:
        """Tells of earlier tokens that were not finite, and of a pass that has left layers out."""
        self.packs = False
        self._check_last_pass()
        packed = self.packed_layers
        # without attention nobody knows where a pass ends
        counted = any(isinstance(layer, CacheLayerMixin) for layer in self.layers)
        keeps = counted and any(map(is_kept, self.layers))
        if packed and self._history.is_whole:
            # what is kept of a pass is enough to take back this one alone
            wait_for_notes(packed)
        if is_noted(packed):
            refuse_noted(self.layers, self._history, new_tokens=True)
        self._end_pass()
        if keeps:
            self._history.begin(max(map(_length, self.layers)))

    def _check_last_pass(self) -> None:
        """Takes back a pass that has broken off, or of a model with fewer layers.

        Raises:
            ValueError: It was one, and has stored tokens.
        """
        if self._spoilt_by is not None:
            raise ValueError(f"a pass broke off: {self._spoilt_by}")
        if not self._before:
            # it stored no tokens: a layer may have handed out its states before it broke off
            why = self._undo() if self._history.start is not None else None
            if why is not None and self._history.has_stored:
                raise ValueError(f"a pass broke off: {why}")
            return
        left_out = self._left_out()
        if left_out is None or not self._was_read():
            return
        start = max(self._before.values())
        text = f"layer {left_out} has not seen the tokens behind the first {start}: {_BROKE_OFF}"
        why = self._undo()
        if why is None:
            raise ValueError(f"{text}; they were taken back")
        raise ValueError(f"{text}. {_NOT_TAKEN_BACK.format(why=why)}")

    def _left_out(self) -> int | None:
        """Returns the first layer behind those of the last pass that it should have come to."""
        layers: list[Any] = self.layers
        start = max(self._before.values())
        for i in range(self._layer + 1, len(layers)):
            if _is_linear(layers[i]):
                if self._history.start is not None and any(layers[i].has_previous_state.values()):
                    return i
            elif i <= self._deepest and 0 < start == _length(layers[i]):
                return i
        return None

    def _note_window(self, layer_idx: int, shown: tuple[Tensor, Tensor], new: int) -> None:
        """Notes what has left a window of the host."""
        layer: Any = self.layers[layer_idx]
        if isinstance(layer, DynamicSlidingWindowLayer):
            self._history.note_window(layer_idx, layer, shown, new)

    def _was_read(self, but: int | None = None) -> bool:
        """Whether a pass is a model's: somebody who fills layers by hand reads none of them.

        Args:
            but: A layer that is not asked.
        """
        packed = packed_in(self.layers[i] for i in self._before if i != but)
        return not packed or any(layer.was_read for layer in packed)

    def _check_in_step(self, layer_idx: int, new: int) -> None:
        """Refuses `new` tokens for a layer that lacks some which layers before it hold.

        Cross-attention to images may come late, with another number of tokens.
        """
        held, before = self._before[layer_idx], next(iter(self._before.values()))
        if held < before and new == self._new_tokens and self._was_read(but=layer_idx):
            raise ValueError(
                f"layer {layer_idx} holds {held} tokens, those before it {before}: {_BROKE_OFF}; "
                "reset() it"
            )

    def _refused(self, error: Exception, layer_idx: int, held: int) -> None:
        """Takes back the tokens of a pass that a layer has refused, out of the layers before it.

        Args:
            error: What it has raised; by a ValueError it is as it was.
            layer_idx: The layer.
            held: How many layers there were before.

        Raises:
            ValueError: In place of `error`: they cannot be taken back, or kernels had found others.
        """
        if not isinstance(error, ValueError):
            # the next pass tells; a device out of order cannot be asked
            self._spoilt_by = f"layer {layer_idx} failed; {INSTEAD}"
            with contextlib.suppress(RuntimeError):
                self._spoilt_by = self._undo()
            del self.layers[held:]
            return
        if can_take_back(self.layers, layer_idx, self._history):
            # out of the layers ahead this takes the new tokens too
            del self.layers[held:]
            self._end_pass()
            refuse_noted(self.layers, self._history, new_tokens=True)
        shared = self.layer_class_to_replicate is not None and layer_idx > 0
        why = self._undo(but=layer_idx)
        del self.layers[held:]
        if why is not None:
            raise ValueError(self._with_reason(str(error), why)) from error
        refuse_noted(self.layers, self._history, new_tokens=True)
        if shared:
            raise ValueError(f"{error}. {_PERHAPS_ONE_OF_TWO}") from error

    def _refuse_layer(self, layer_idx: int, tokens: int = 0) -> NoReturn:
        """Refuses a layer that the cache does not have, and takes back what the others hold."""
        text = (
            f"layer {layer_idx}: the cache was made for a model with {len(self.layers)} layers; "
            f"{_NEW}"
        )
        raise ValueError(self._with_reason(text, self._undo(tokens=tokens)))

    def _refuse_kind(self, layer_idx: int, asked: str) -> NoReturn:
        """Refuses to use a layer as one of another kind."""
        kind = type(self.layers[layer_idx]).__name__
        text = f"layer {layer_idx}: the model asks for {asked}, the cache has a {kind} here; {_NEW}"
        # else no pass is under way
        why = self._undo() if layer_idx > self._layer else None
        raise ValueError(self._with_reason(text, why))

    @staticmethod
    def _with_reason(text: str, why: str | None) -> str:
        return text if why is None else f"{text}. {_NOT_TAKEN_BACK.format(why=why)}"

    def _undo(self, but: int | None = None, tokens: int = 0) -> str | None:
        """Takes back what layers have stored in the pass under way, which ends.

        Args:
            but: A layer that has not.
            tokens: How many tokens, where nobody keeps account of layers.

        Returns:
            Why a layer cannot go back, and what to do, all being as they were; None if all have.
        """
        layers: list[Any] = self.layers
        lengths = {i: n for i, n in self._before.items() if i != but and self._has_changed(i, n)}
        if self._history.start is not None:
            lengths |= dict.fromkeys(self._history.noted - {but}, self._history.start)
        for i, length in lengths.items():
            obstacle = self._obstacle(i, length) if length else None
            if obstacle is not None:
                return f"layer {i}: {obstacle}"
        for i, length in lengths.items():
            if not length:
                self._go_back_to_start(i)
            elif isinstance(layers[i], RotorQuantLayer):
                layers[i].go_back()
            else:
                self._history.put_back(i, layers[i], length)
        if not any(self._before.values()):
            self._updates = 0
        self._history.forget()
        self._end_pass()
        return None

    def _has_changed(self, index: int, length: int) -> bool:
        layer: Any = self.layers[index]
        if isinstance(layer, RotorQuantLayer) and layer.can_go_back_to(length):
            return True
        return bool(layer.get_seq_length() != length)

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
            self._check_last_pass()
            self.check_steps()
            self._history.forget()
            self._end_pass()


def _length(layer: Any) -> int:
    """Tokens of a layer; 0 where it does not count them."""
    return int(layer.get_seq_length()) if isinstance(layer, CacheLayerMixin) else 0


def _is_linear(layer: Any) -> bool:
    return isinstance(layer, LinearAttentionCacheLayerMixin)
