# SPDX-License-Identifier: Apache-2.0
"""The packed cache in buffers of a fixed size, whose steps can be compiled."""

from __future__ import annotations

import os
import weakref
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, StaticLayer

from rq_hf.cache import RotorQuantCache
from rq_hf.config import RotorQuantConfig
from rq_hf.cropping import INSTEAD
from rq_hf.model_layers import make_static_layers
from rq_hf.places import Places
from rq_hf.static_exact import ExactStaticLayer, ExactStaticSlidingLayer
from rq_hf.static_layer import HALF_WAY, RotorQuantStaticLayer
from rq_hf.static_limits import check_room


class RotorQuantStaticCache(RotorQuantCache):
    """A `RotorQuantCache` with room for `max_cache_len` tokens, all of it held from the start.

    With it `generate()` compiles the model's steps on a GPU by itself, as with the host's
    `StaticCache`, and a whole step fits one CUDA graph; so does `torch.compile(model)` by hand, for
    steps of one token. Prompts are not compiled. `rq_hf.cuda_graph` does without a compiler.

    Statistics are frozen at the end of the first prompt, however short that is. Sliding layers and
    all others that are not packed are the host's static ones. Sequences keep their number, dtype
    and device from the first use on, beyond `reset()`; tokens cannot be dropped. So a pass that one
    layer refuses after others have stored its tokens spoils the cache, unless it was the first one:
    everything but `reset()` is refused from then on.

    Args:
        config: The model's config; it tells the kind of every layer.
        max_cache_len: Tokens to make room for, padding included.
        quantization: How to store, in full.
        preset: A named method to start from, see `RotorQuantCache`.
        **settings: Fields of `RotorQuantConfig`, in place of the preset's: `nbits=4`, ...

    Raises:
        ValueError: A setting is out of range, or one that only `RotorQuantCache` takes.

    Example:
        >>> cache = RotorQuantStaticCache(config=model.config, max_cache_len=4096)
        >>> model.generate(**inputs, past_key_values=cache)
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        max_cache_len: int,
        *,
        quantization: RotorQuantConfig | None = None,
        preset: str | None = None,
        **settings: Any,
    ) -> None:
        if isinstance(max_cache_len, bool) or not isinstance(max_cache_len, int):
            raise ValueError(f"max_cache_len must be a number of tokens, got {max_cache_len!r}")
        if max_cache_len < 1:
            raise ValueError(f"max_cache_len must be at least 1, got {max_cache_len}")
        if settings.pop("offloading", False) or "offload_only_non_sliding" in settings:
            raise ValueError("the buffers of a static cache do not move; use RotorQuantCache")
        if settings.pop("revertible", False):
            raise ValueError("a static cache takes no steps back; use RotorQuantCache")
        self._spoilt = False
        super().__init__(quantization=quantization, preset=preset, **settings)
        _check(self.quantization)
        layers, self.exact_because = make_static_layers(config, self.quantization, max_cache_len)
        Cache.__init__(self, layers=layers)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stores the new states of one layer; see `RotorQuantStaticLayer.update`.

        Raises:
            ValueError: The states cannot be stored; this layer is as it was. If others hold tokens
                of the same pass already, these are taken back if they are the first ones: all
                layers are empty then. Else the message says that only `reset` helps, and so does
                every later call until then. Compiled steps are not taken back.
        """
        if self._spoilt:
            self._refuse()
        # past the packed cache's own, which counts its calls: numbers that change are compiled anew
        if torch.compiler.is_compiling():
            return Cache.update(self, key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx >= len(self.layers):
            self._refuse_layer(layer_idx, key_states.shape[-2])
        layer: Any = self.layers[layer_idx]
        if not any(isinstance(x, CacheLayerMixin) for x in self.layers[:layer_idx]):
            self._check_pass(key_states.shape[2])
        if isinstance(layer, RotorQuantStaticLayer):
            # by a weak reference, so that memory is free as soon as nobody has the cache
            layer.owner = weakref.ref(self)
        try:
            return Cache.update(self, key_states, value_states, layer_idx, *args, **kwargs)
        except Exception as error:
            self.refused(error, layer_idx, 0)
            raise

    def refused(self, error: Exception, layer_idx: int, stored: int) -> None:
        """Takes back the first tokens where a later layer has refused them, or spoils the cache.

        Args:
            error: What the layer has raised.
            layer_idx: The layer.
            stored: How many tokens of the same pass it holds itself.

        Raises:
            ValueError: In place of another one: the cache must be reset.
        """
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            # nothing has run yet, and the device cannot be asked
            return
        layers: list[Any] = self.layers
        layer = layers[layer_idx]
        packed = isinstance(layer, RotorQuantStaticLayer)
        knows = packed or isinstance(layer, ExactStaticLayer)
        length = int(layer.get_seq_length()) - stored if knows else None
        as_it_was = knows and stored == 0 and isinstance(error, ValueError)
        if as_it_was and all(_length(x) == length for x in layers[:layer_idx]):
            return
        after = [x for x in self.packed_layers if x.layer_idx > layer_idx]
        was_empty = length == 0 if packed else any(_length(x) == 0 for x in after)
        if was_empty:
            for x in layers:
                _go_back_to_start(x)
            return
        self._spoil()
        if isinstance(error, ValueError):
            raise ValueError(f"{error}. {_NOT_TAKEN_BACK}") from error

    # of linear attention it takes no note: its states keep their places in compiled steps

    def _before_states(self, layer_idx: int) -> None:
        pass

    def _before_any_states(self) -> None:
        pass

    def _check_states(self, kind: str, states: Tensor, layer_idx: int, state_idx: int) -> None:
        pass

    def _undo(self, but: int | None = None, tokens: int = 0) -> str | None:
        held = max((_length(layer) or 0 for layer in self.layers), default=0)
        if held < tokens:
            return None
        if held == tokens:
            for layer in self.layers:
                _go_back_to_start(layer)
            return None
        self._spoil()
        return INSTEAD

    def _spoil(self) -> None:
        self._spoilt = True
        for layer in self.packed_layers:
            if isinstance(layer, RotorQuantStaticLayer):
                layer.spoilt = True

    @torch.compiler.disable(reason="this is not a step")
    def _refuse(self) -> None:
        raise ValueError(HALF_WAY)

    def _check_pass(self, tokens: int) -> None:
        """Refuses tokens that a layer will refuse, before the first layer has stored them.

        Single tokens on a GPU are let through: lengths would have to be waited for.

        Raises:
            ValueError: There is no room for them, or layers have different lengths.
        """
        layers: list[Any] = self.layers
        if tokens == 1 and any(_is_elsewhere(layer) for layer in layers):
            return
        lengths = {_length(layer) for layer in layers if isinstance(layer, _OURS)}
        # a layer that shares another's states holds nothing
        if len(lengths - {0}) > 1:
            self._spoil()
            self._refuse()
        for i, layer in enumerate(layers):
            if isinstance(layer, _WITH_ROOM) and not layer.is_sliding:
                check_room(int(layer.get_seq_length()), tokens, layer.max_cache_len, f"layer {i}")

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Returns length and offset of the keys that `query_length` new tokens will see.

        Raises:
            ValueError: There is no room for them, the cache must be reset (see `update`), or there
                is more than one and `check_steps` finds something.
        """
        if not torch.compiler.is_compiling():
            if self._spoilt:
                self._refuse()
            self._store_prompts()
            # before the first layer stores what a later one would refuse
            if query_length > 1:
                self.check_steps()
            self._check_pass(query_length)
        return super().get_mask_sizes(query_length, layer_idx)

    def _store_prompts(self) -> None:
        """Stores what waits for queries still: a compiled step could not."""
        for layer in self.layers:
            if isinstance(layer, RotorQuantStaticLayer) and layer.is_waiting:
                layer.settle()

    def check_steps(self) -> None:
        """Looks at what steps have noted on the device, and waits for it.

        Compiled and recorded steps, and all on a GPU, do not wait to learn whether their keys and
        values are finite. A prompt, `memory`, `describe` and the end of `cuda_graph` do.

        Raises:
            ValueError: A layer has stored numbers that are not finite; so it is until `reset`.
        """
        for layer in self.packed_layers:
            if isinstance(layer, RotorQuantStaticLayer):
                layer.check_steps()

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """Returns the tokens that there is room for."""
        return self.get_max_length(layer_idx)

    def reset(self, keep_statistics: bool = False) -> None:
        """Forgets all tokens; buffers stay, so that nothing is compiled anew.

        Args:
            keep_statistics: Pack the next prompt with the statistics of this one, see
                `RotorQuantStaticLayer.reset`.
        """
        self._spoilt = False
        for layer in self.layers:
            if isinstance(layer, RotorQuantStaticLayer):
                layer.reset(keep_statistics)
            else:
                layer.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Refuses to drop tokens.

        Raises:
            ValueError: Any but 0 tokens are to be dropped.
        """
        # layers of the host do not know how to drop none either
        if int(tokens_to_remove):
            raise ValueError(
                "a static cache drops no tokens: use RotorQuantCache for speculative decoding, or "
                "reset()"
            )

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refuses to change the batch size.

        Raises:
            ValueError: `repeats` is not 1.
        """
        if repeats != 1:
            raise ValueError("a static cache keeps its batch size; use RotorQuantCache")

    def batch_select_indices(self, indices: Tensor) -> None:
        """Puts the sequences `indices` in place of those here, see `reorder_cache`.

        Args:
            indices: Integer `[B]`, or boolean `[B]` with all of them true.

        Raises:
            ValueError: The batch size would change; the cache is as it was.
        """
        indices = torch.as_tensor(indices)
        self.reorder_cache(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Puts the sequences `beam_idx`, int64 `[B]`, in place of those here.

        Raises:
            ValueError: The batch size would change; the cache is as it was.
        """
        # before the host's layers, which take any number, are changed
        for layer in self.packed_layers:
            if isinstance(layer, RotorQuantStaticLayer):
                layer.check_indices(beam_idx)
        super().reorder_cache(beam_idx)

    def to(self, device: Places) -> NoReturn:
        """Refuses to move.

        Raises:
            ValueError: Always.
        """
        raise ValueError("the buffers of a static cache do not move; make a new one")

    def save(self, path: str | os.PathLike[str]) -> NoReturn:
        """Refuses to save.

        Raises:
            ValueError: Always.
        """
        raise ValueError("a static cache cannot be saved; use RotorQuantCache")

    @classmethod
    def load(cls, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuses to load.

        Raises:
            ValueError: Always.
        """
        raise ValueError("a static cache cannot be loaded; use RotorQuantCache.load")


_NOT_TAKEN_BACK = (
    "The layers before it hold these tokens already, and cannot give them back: reset() the cache "
    "and run the prompt again, until then everything else is refused"
)
# layers whose lengths go together
_OURS = (RotorQuantStaticLayer, ExactStaticLayer, ExactStaticSlidingLayer)
_WITH_ROOM = (RotorQuantStaticLayer, StaticLayer)


def _length(layer: Any) -> int | None:
    """Returns a layer's tokens; one of linear attention does not know."""
    return int(layer.get_seq_length()) if isinstance(layer, CacheLayerMixin) else None


def _is_elsewhere(layer: Any) -> bool:
    """Whether the length of a layer is on another device, which has to be waited for."""
    return getattr(layer, "is_initialized", False) and layer.device.type != "cpu"


def _go_back_to_start(layer: Any) -> None:
    if isinstance(layer, RotorQuantStaticLayer):
        layer.go_back_to_start()
    else:
        layer.reset()


def _check(quantization: RotorQuantConfig) -> None:
    if quantization.strict:
        raise ValueError("strict=True is for evaluation; use RotorQuantCache")
    if quantization.sliding == "packed":
        raise ValueError("a static cache keeps sliding layers exact; use RotorQuantCache")
