# SPDX-License-Identifier: Apache-2.0
"""The cache that goes into `model.generate(past_key_values=...)`."""

from __future__ import annotations

import copy
import os
import warnings
import weakref
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    get_layer_types_and_kwargs,
)

from rq_hf.attention import register
from rq_hf.config import EXACT_BITS, RotorQuantConfig
from rq_hf.layers import RotorQuantLayer
from rq_hf.memory import CacheMemory, reachable_tensors, storage_bytes
from rq_hf.quant.rope import RopeTable
from rq_hf.rope import rope_tables

# the name can be set on a model as soon as there is a cache for it
register()

BF16_BYTES = 2
# attention implementations that take keys and values as handles; others get dense tensors
HANDLE_IMPLEMENTATIONS = (None, "sdpa", "eager", "rotorquant")


class RotorQuantCache(Cache):
    """A `transformers.Cache` that keeps keys and values packed to 2-4 bits a number.

    Full-attention layers are packed. Sliding-window and chunked layers, which are short, and
    linear-attention, convolution and hybrid layers keep the host's own classes, exact.

    Args:
        config: The model's config; it tells the kind of every layer. Without it all layers count
            as full attention, made at their first update.
        quantization: How to store, in full.
        preset: A named method to start from: "near-lossless" (default), "rotorquant" or
            "turboquant", see `RotorQuantConfig.from_preset`.
        offloading: Keep layers on the CPU while they are not in use, as in `DynamicCache`.
        offload_only_non_sliding: Leave sliding layers where they are.
        **settings: Fields of `RotorQuantConfig`, in place of the preset's: `nbits=4`, ...

    Raises:
        ValueError: A setting is out of range or given beside `quantization`, `layer_bits` names a
            layer that the model does not have, or `config` is of an encoder-decoder model.

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
        **settings: Any,
    ) -> None:
        self.quantization = _resolve(quantization, preset, settings)
        self._updates = 0
        layers = None if config is None else _make_layers(config, self.quantization)
        self._empty_layers = {
            i: copy.deepcopy(layer)
            for i, layer in enumerate(layers or [])
            if not isinstance(layer, RotorQuantLayer)
        }
        make_layer: Any = partial(_make_layer, self.quantization) if layers is None else None
        super().__init__(
            layers=layers,
            layer_class_to_replicate=make_layer,
            offloading=offloading,
            offload_only_non_sliding=offload_only_non_sliding,
        )

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stores the new states of one layer; see `RotorQuantLayer.update`.

        Raises:
            ValueError: The states cannot be stored, or the cache was made for a model with fewer
                layers. The cache is as it was.
        """
        if self.layer_class_to_replicate is None and layer_idx >= len(self.layers):
            raise ValueError(
                f"layer {layer_idx}: the cache was made for a model with {len(self.layers)} "
                "layers; make a new one with this model's config"
            )
        held = len(self.layers)
        self._append_layers(layer_idx + 1)
        try:
            states = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        except ValueError:
            del self.layers[held:]
            raise
        self._updates += 1
        return states

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

    def to(self, device: torch.device | str) -> RotorQuantCache:
        """Moves all packed layers and host attention layers to a device; returns the cache."""
        for layer in self.layers:
            if isinstance(layer, RotorQuantLayer):
                layer.to(device)
            elif isinstance(layer, DynamicLayer) and layer.keys is not None:
                assert layer.values is not None
                layer.keys, layer.values = layer.keys.to(device), layer.values.to(device)
                layer.device = layer.keys.device
        return self

    def reset(self) -> None:
        """Forgets all tokens; the next prompt may have another batch size, dtype or device."""
        for i, layer in enumerate(self.layers):
            if isinstance(layer, RotorQuantLayer):
                layer.reset()
            else:
                # the host's own reset keeps shapes, and in transformers 5.17 lengths
                self.layers[i] = copy.deepcopy(self._empty_layers.get(i, DynamicLayer()))

    def _settle(self) -> None:
        for layer in self.packed_layers:
            layer.settle()

    @property
    def packed_layers(self) -> list[RotorQuantLayer]:
        """The layers that are packed."""
        return [layer for layer in self.layers if isinstance(layer, RotorQuantLayer)]

    def memory(self) -> CacheMemory:
        """Counts the bytes of every storage that the cache holds."""
        self._settle()
        packed: list[Any] = [layer for layer in self.packed_layers if layer.store is not None]
        host = [layer for layer in self.layers if not isinstance(layer, RotorQuantLayer)]
        host_tensors = reachable_tensors(host)
        numbers = [_numbers(layer) for layer in packed]
        stored = sum(all_numbers for _, all_numbers in numbers)
        host_numbers = sum(t.numel() for t in host_tensors)
        item_bytes = packed[0].dtype.itemsize if packed else BF16_BYTES
        return CacheMemory(
            packed_bytes=storage_bytes(t for x in packed for t in x.store.tiles.tensors),
            exact_bytes=storage_bytes(t for x in packed for t in x.store.exact.tensors),
            statistics_bytes=storage_bytes(
                reachable_tensors([(x.preconditioner, x.statistics, x.padding) for x in packed])
            ),
            host_bytes=storage_bytes(host_tensors),
            constant_bytes=storage_bytes(reachable_tensors([x.codec for x in packed])),
            packed_numbers=sum(packed_numbers for packed_numbers, _ in numbers),
            nominal_bits=_nominal_bits(packed),
            dense_bytes=stored * item_bytes + storage_bytes(host_tensors),
            dense_bf16_bytes=(stored + host_numbers) * BF16_BYTES,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the packed cache to a safetensors file, in one step; see `serialization`.

        Raises:
            ValueError: A layer is of a kind that cannot be saved.
        """
        # loading imports this module
        from rq_hf.serialization import save_cache

        save_cache(self, path)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        config: PreTrainedConfig | None = None,
        *,
        device: str | torch.device = "cpu",
    ) -> RotorQuantCache:
        """Returns the cache that `save` wrote; generation goes on as if it had never stopped.

        Args:
            path: The file.
            config: The model's config, to check that the file is of such a model.
            device: Where the buffers go.

        Raises:
            ValueError: The file is damaged, foreign, newer, or of another model.
        """
        from rq_hf.serialization import load_cache

        return load_cache(path, config, device=device)

    def describe(self) -> str:
        """Returns one line a layer: what is stored how, and what attention reads."""
        self._settle()
        return "\n".join(_describe(i, layer) for i, layer in enumerate(self.layers))


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


def _make_layer(
    quantization: RotorQuantConfig,
    layer_idx: int,
    rope: RopeTable | None = None,
    gives_handles: Callable[[], bool] = lambda: True,
) -> CacheLayerMixin:
    """Returns a packed layer, or the host's exact one where the settings ask for it."""
    of_layer = quantization.for_layer(layer_idx)
    if of_layer is None:
        return DynamicLayer()
    return RotorQuantLayer(of_layer, layer_idx, rope, gives_handles)


def _make_layers(config: PreTrainedConfig, quantization: RotorQuantConfig) -> list[Any]:
    """Returns a layer for each of the model's, of the kind that its config names."""
    if config.is_encoder_decoder:
        raise ValueError(
            "an encoder-decoder model needs a cache for each attention: "
            "EncoderDecoderCache(RotorQuantCache(), DynamicCache()), without config"
        )
    decoder = config.get_text_config(decoder=True)
    types, options = get_layer_types_and_kwargs(decoder)
    unknown = [i for i in quantization.layer_bits or () if i >= len(types)]
    if unknown:
        raise ValueError(f"layer_bits names layers {unknown}, the model caches {len(types)} layers")
    exact = [
        i
        for i, bits in (quantization.layer_bits or {}).items()
        if types[i] != "full_attention" and bits != EXACT_BITS
    ]
    if exact:
        raise ValueError(f"layer_bits names layers {exact}, which are not of full attention")
    # transformers 5.17 gives one dict for all layers
    options = [options] * len(types) if isinstance(options, dict) else options
    ropes = rope_tables(decoder)
    gives_handles = partial(_takes_handles, weakref.ref(decoder))
    latent = getattr(decoder, "kv_lora_rank", None) is not None
    if latent:
        warnings.warn(
            "multi-head latent attention is cached exactly: its latents are compressed already",
            stacklevel=3,
        )
    return [
        _make_layer(quantization, i, ropes[i] if i < len(ropes) else None, gives_handles)
        if kind == "full_attention" and not latent
        else DYNAMIC_LAYER_TYPE_MAPPING[kind](**option)
        for i, (kind, option) in enumerate(zip(types, options, strict=True))
    ]


def _takes_handles(config: weakref.ref[PreTrainedConfig]) -> bool:
    """Whether the attention that the model uses now takes handles."""
    decoder = config()
    # the modules of the model hold this very object, so a later switch shows here
    return getattr(decoder, "_attn_implementation", None) in HANDLE_IMPLEMENTATIONS


def _numbers(layer: RotorQuantLayer) -> tuple[int, int]:
    """Returns how many numbers a layer holds packed, and in all."""
    assert layer.store is not None
    batch, heads, _, head_dim = layer.store.exact.tensors[0].shape
    a_token = 2 * batch * heads * head_dim
    return layer.store.packed_length * a_token, layer.store.length * a_token


def _nominal_bits(layers: list[Any]) -> float:
    """Returns the bits a number by layout, averaged over the packed numbers."""
    # while nothing is packed, layers count alike
    weights = [_numbers(layer)[0] for layer in layers]
    weights = weights if any(weights) else [1] * len(layers)
    bits = [layer.codec.layout.nominal_bits for layer in layers]
    total = sum(b * w for b, w in zip(bits, weights, strict=True))
    return total / sum(weights) if layers else float("nan")


def _describe(index: int, layer: Any) -> str:
    if not isinstance(layer, RotorQuantLayer):
        kind = "exact" if isinstance(layer, CacheLayerMixin) else "state"
        window = getattr(layer, "sliding_window", None)
        name = type(layer).__name__ + (f", window {window}" if window else "")
        return f"layer {index}: {kind} ({name})"
    if layer.store is None or layer.codec is None:
        return f"layer {index}: packed, nothing stored yet"
    store, layout, config = layer.store, layer.codec.layout, layer.config
    calls = ", ".join(f"{door} {count}x" for door, count in sorted(layer.calls.items()))
    return (
        f"layer {index}: {store.sinks} exact sinks | {store.packed_length} tokens packed in "
        f"{store.tiles.length} tiles of {layout.tile_length} ({config.key_codec} keys "
        f"{config.key_bits} bits, values {config.value_bits} bits, {config.rotation} rotation, "
        f"{layout.order} order; {_describe_statistics(layer)}) | {store.tail} exact tail; "
        f"attention: {calls or 'not called yet'}"
    )


def _describe_statistics(layer: RotorQuantLayer) -> str:
    statistics = layer.preconditioner
    if statistics is None:
        return "statistics open"
    means = {"pre-RoPE": statistics.pre_mean, "post-RoPE": statistics.post_mean}
    used = [name for name, mean in means.items() if bool(mean.any())]
    balance = "queries" if layer.statistics.power is not None else "keys alone"
    return (
        f"key mean {' and '.join(used) or 'none'}, "
        f"balance {f'from {balance}' if layer.config.balance else 'off'}"
    )
