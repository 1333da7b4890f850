# SPDX-License-Identifier: Apache-2.0
"""The cache that goes into `model.generate(past_key_values=...)`."""

from __future__ import annotations

import os
import weakref
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)

from rq_hf.attention import register
from rq_hf.config import RotorQuantConfig
from rq_hf.counting import count_memory
from rq_hf.cropping import crop_obstacle, holds_nothing
from rq_hf.description import describe_layer
from rq_hf.layers import RotorQuantLayer
from rq_hf.memory import CacheMemory
from rq_hf.model_layers import make_layer, make_layers
from rq_hf.noted import is_noted, refuse_noted, wait_for_notes
from rq_hf.pass_cache import PassCache
from rq_hf.places import Places, place_layers
from rq_hf.validation import check_dtype, check_exact, check_finite, looks_at_once
from rq_hf.watched_states import APPENDED_FIRST

# the name can be set on a model as soon as there is a cache for it
register()


class RotorQuantCache(PassCache):
    """A `transformers.Cache` that keeps keys and values packed to 2-4 bits a number.

    Full-attention layers are packed, and with `sliding="packed"` those with a sliding window or
    attention in chunks. Linear-attention, convolution and hybrid layers keep the host's own
    classes, exact, as do all layers of models with multi-head latent attention, or with values of
    another size than the keys.

    Args:
        config: The model's config; it tells the kind of every layer. Without it all layers count
            as full attention, made at their first update.
        quantization: How to store, in full.
        preset: A named method to start from: "near-lossless" (default), "rotorquant" or
            "turboquant", see `RotorQuantConfig.from_preset`.
        offloading: Keep layers on the CPU while they are not in use, as in `DynamicCache`.
        offload_only_non_sliding: Leave sliding layers where they are.
        revertible: Copy the states of linear attention before every pass, so that a refused pass
            can be taken back out of them too. That takes their memory once more.
        **settings: Fields of `RotorQuantConfig`, in place of the preset's: `nbits=4`, ...

    Raises:
        ValueError: A setting is out of range or given beside `quantization`, `layer_bits` names a
            layer that the model does not have, or `config` is of an encoder-decoder model.

    Attributes:
        quantization: How to store, resolved.
        exact_because: Why no layer of this model is packed; None if some are.
        packs: Whether a layer has packed tokens in the pass under way.

    Example:
        >>> cache = RotorQuantCache(config=model.config, nbits=3)
        >>> model.generate(**inputs, past_key_values=cache)
        >>> print(cache.memory())
    """

    def __init__(
        self,
        config: PreTrainedConfig | None = None,
        *,
        quantization: RotorQuantConfig | None = None,
        preset: str | None = None,
        offloading: bool = False,
        offload_only_non_sliding: bool = True,
        revertible: bool = False,
        **settings: Any,
    ) -> None:
        self.quantization = _resolve(quantization, preset, settings)
        self.exact_because: str | None = None
        layers = None
        if config is not None:
            layers, self.exact_because = make_layers(config, self.quantization)
        factory: Any = partial(make_layer, self.quantization) if layers is None else None
        super().__init__(
            revertible=revertible,
            layers=layers,
            layer_class_to_replicate=factory,
            offloading=offloading,
            offload_only_non_sliding=offload_only_non_sliding,
        )

    @torch.compiler.disable(reason="the host stores; RotorQuantStaticCache has steps to compile")
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stores the new states of one layer; see `RotorQuantLayer.update`.

        Raises:
            ValueError: The states cannot be stored, or the cache was made for a model with other
                layers; this layer is as it was. If the layers before it have stored the same
                tokens already, these are taken back, and the layers are as they were, statistics
                included. Where that cannot be done (behind linear attention, without
                `revertible=True`) the message says that only `reset` helps. The other cache of an
                `EncoderDecoderCache` keeps what it has: reset the pair.

                A step of up to 32 tokens on a GPU may turn out to hold NaN or infinity after its
                attention has run. The first layer of a later pass tells, before it stores anything:
                the tokens from there on, beside the host's windows or linear attention all tokens
                of that pass, are taken back out of all layers, or the message says that only
                `reset` helps. See `check_steps`.

                The pass before broke off between two layers, by an interrupt or in the model's own
                code, or was of a model with fewer layers: its tokens were taken back.
        """
        held, new = len(self.layers), key_states.shape[-2] if key_states.dim() > 1 else 0
        self._append_layers(layer_idx + 1)
        layer: Any = self._layer_for_keys(layer_idx)
        packed = isinstance(layer, RotorQuantLayer)
        self._go_on(layer_idx, int(layer.get_seq_length()), new)
        if packed:
            # by a weak reference, so that memory is free as soon as nobody has the cache
            layer.holder = weakref.ref(self)
        try:
            self._check_in_step(layer_idx, new)
            if not packed:
                self._check_exact(key_states, value_states, layer_idx)
                if self.offloading:
                    # the pass before may not have come to where the host does so
                    layer.prefetch()
            states = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        except Exception as error:
            self._refused(error, layer_idx, held)
            raise
        if not packed:
            self._note_window(layer_idx, states, new)
        self._updates += 1
        return states

    def _layer_for_keys(self, layer_idx: int) -> Any:
        """Returns a layer that stores keys and values."""
        if layer_idx >= len(self.layers):
            self._refuse_layer(layer_idx)
        layer = self.layers[layer_idx]
        if not isinstance(layer, CacheLayerMixin):
            self._refuse_kind(layer_idx, "a place for keys and values")
        return layer

    def _check_exact(self, key: Tensor, value: Tensor, layer_idx: int) -> None:
        """Refuses states that do not continue those of an exact layer, as packed layers do.

        The host would find out too late, or store what the packed layers behind refuse.
        """
        layer: Any = self.layers[layer_idx]
        # the host's other kinds may hold states of other shapes
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            return
        name = f"layer {layer_idx}"
        if layer.keys is not None and layer.keys.numel():
            device = layer.device if self.offloading else layer.keys.device
            check_exact(key, value, (layer.keys, layer.values), device, name)
            if key.dtype != layer.keys.dtype and self.packed_layers:
                # with exact layers alone the host may go on in the wider dtype
                check_dtype(key, layer.keys.dtype, name)
        many = key.shape[-2] > APPENDED_FIRST
        if self.exact_because is None and (many or looks_at_once(key.device)):
            check_finite(key, value, name, end=layer.get_seq_length())

    def prefetch(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Fetches the next offloaded layer from `layer_idx` on, on a stream of its own."""
        if not any(_is_offloadable(layer, only_non_sliding) for layer in self.layers):
            return
        # transformers 5.17 does not wait here: the layer would be copied into memory that was an
        # earlier one's, which attention on the default stream may still read
        self.prefetch_stream.wait_stream(torch.cuda.default_stream())
        super().prefetch(layer_idx, only_non_sliding)

    def _append_layers(self, count: int) -> None:
        """Appends layers while there is no config that says how many there are."""
        if self.layer_class_to_replicate is None or len(self.layers) >= count:
            return
        if self.layers and self._updates > len(self.layers):
            # before the first pass is through, an encoder-decoder stores twice in a layer
            raise ValueError(
                f"layer {len(self.layers) - 1} was updated twice before layer {count - 1}: an "
                "encoder-decoder model needs a cache for each attention, "
                "EncoderDecoderCache(RotorQuantCache(), DynamicCache())"
            )
        while len(self.layers) < count:
            self.layers.append(self.layer_class_to_replicate(layer_idx=len(self.layers)))

    def to(self, device: Places) -> RotorQuantCache:
        """Moves all packed layers and host attention layers; returns the cache.

        Args:
            device: Where to; for a model spread over devices, the device of every layer by its
                index.

        Raises:
            ValueError: A layer is not among those given, or `check_steps` finds something; nothing
                is moved then.
        """
        places = place_layers(device, len(self.layers))
        self._close_pass()
        for layer, place in zip(self.layers, places, strict=True):
            if isinstance(layer, RotorQuantLayer):
                layer.to(place)
            elif isinstance(layer, DynamicLayer) and layer.keys is not None:
                assert layer.values is not None
                layer.keys, layer.values = layer.keys.to(place), layer.values.to(place)
                layer.device = layer.keys.device
        return self

    def crop(self, tokens_to_remove: int) -> None:
        """Drops the newest tokens of every layer; see `RotorQuantLayer.crop`.

        Raises:
            ValueError: A layer cannot be cropped so far, packed or the host's; the cache is as it
                was. Or tokens that would stay were found not to be finite, in a cache whose windows
                could not go back later: they were taken back, see `check_steps`.
        """
        for layer in self.packed_layers:
            layer.check_crop(tokens_to_remove)
        layers: list[Any] = self.layers
        for i, layer in enumerate(layers):
            obstacle = crop_obstacle(layer, int(tokens_to_remove))
            if obstacle is not None:
                raise ValueError(f"layer {i}: {obstacle}")
        wait_for_notes(self.packed_layers)
        noted = is_noted(self.packed_layers)
        if noted and self._history.start is not None:
            self._refuse_crop(int(tokens_to_remove))
        for layer in layers:
            # some of the host's fail where there is nothing to drop
            if isinstance(layer, RotorQuantLayer) or not holds_nothing(layer):
                layer.crop(tokens_to_remove)
        self._history.forget()
        self._end_pass()
        if noted:
            # behind a bad key, queries of other layers are bad too
            for layer in self.packed_layers:
                layer.statistics.go_back(layer.get_seq_length())

    def _refuse_crop(self, tokens_to_remove: int) -> None:
        """Tells of tokens that were not finite and would stay, while they can be taken back."""
        first = min(x.watch.first for x in self.packed_layers if x.watch.first is not None)
        if first < self.packed_layers[0].get_seq_length() + tokens_to_remove:
            refuse_noted(self.layers, self._history, new_tokens=False)

    def reset(self, keep_statistics: bool = False) -> None:
        """Forgets all tokens; the next prompt may have another batch size, dtype or device.

        Args:
            keep_statistics: Keep the statistics of layers that have packed something, and pack the
                next prompt with them, see `RotorQuantLayer.reset`. For many prompts of one kind:
                nothing is measured again. They must have the same batch size, on the same device.
        """
        self._forget_passes()
        for i, layer in enumerate(self.layers):
            if isinstance(layer, RotorQuantLayer):
                layer.reset(keep_statistics)
            else:
                self._make_anew(i)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keeps the sequences `beam_idx`, int64 `[B]`, in that order."""
        self._close_pass()
        super().reorder_cache(beam_idx)  # type: ignore[arg-type] # the host's stub is narrower

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the sequences `indices`, integer `[B']` or boolean `[B]`."""
        self._close_pass()
        super().batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every sequence `repeats` times, copies side by side."""
        self._close_pass()
        super().batch_repeat_interleave(repeats)

    def _settle(self) -> None:
        for layer in self.packed_layers:
            layer.settle()

    def memory(self) -> CacheMemory:
        """Counts the bytes of every storage that the cache holds."""
        self._settle()
        return count_memory(self.layers, self._history.tensors())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the packed cache to a safetensors file, in one step; see `serialization`.

        Raises:
            ValueError: A layer is of a kind that cannot be saved, `check_steps` finds something, or
                the last pass broke off. Nothing is written then.
        """
        self._check_last_pass()
        self.check_steps()
        # loading imports this module
        from rq_hf.serialization import save_cache

        save_cache(self, path)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        config: PreTrainedConfig | None = None,
        *,
        device: Places = "cpu",
        revertible: bool = False,
    ) -> RotorQuantCache:
        """Returns the cache that `save` wrote; generation goes on as if it had never stopped.

        Args:
            path: The file.
            config: The model's config, to check that the file is of such a model.
            device: Where the buffers go, as in `to`.
            revertible: As for a new cache.

        Raises:
            ValueError: The file is damaged, foreign, newer, or of another model, or a layer is not
                among the devices given.
        """
        from rq_hf.serialization import load_cache

        return load_cache(path, config, device=device, revertible=revertible)

    def describe(self) -> str:
        """Returns one line a layer: what is stored how, and what attention reads."""
        self._settle()
        lines = [describe_layer(i, layer) for i, layer in enumerate(self.layers)]
        if self.exact_because is not None:
            lines.append(f"nothing is packed: {self.exact_because}")
        return "\n".join(lines)


def _resolve(
    quantization: RotorQuantConfig | None, preset: str | None, settings: dict[str, Any]
) -> RotorQuantConfig:
    given = [*settings, *(["preset"] if preset else [])]
    if quantization is not None and given:
        raise ValueError(
            f"give either quantization or single settings, got both: {', '.join(given)}"
        )
    known = [field.name for field in fields(RotorQuantConfig)]
    unknown = [name for name in settings if name not in known]
    if unknown:
        raise ValueError(f"unknown settings: {', '.join(unknown)}; accepted are {', '.join(known)}")
    return quantization or RotorQuantConfig.from_preset(preset or "near-lossless", **settings)


def _is_offloadable(layer: Any, only_non_sliding: bool) -> bool:
    """Whether the host moves a layer to the CPU while it is not in use."""
    attention = isinstance(layer, CacheLayerMixin)
    linear = isinstance(layer, LinearAttentionCacheLayerMixin)
    return attention and not linear and not (only_non_sliding and layer.is_sliding)
