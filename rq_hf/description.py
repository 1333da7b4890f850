# SPDX-License-Identifier: Apache-2.0
"""One line about a cache layer: what it stores how, and what attention read of it."""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import CacheLayerMixin

from rq_hf.layers import RotorQuantLayer
from rq_hf.sliding import RotorQuantSlidingLayer
from rq_hf.static_layer import RotorQuantStaticLayer


def describe_layer(index: int, layer: Any) -> str:
    """Returns one line about the layer at place `index`."""
    if isinstance(layer, RotorQuantLayer):
        return f"layer {index}: {_packed(layer)}"
    kind = "exact" if isinstance(layer, CacheLayerMixin) else "state"
    window = getattr(layer, "sliding_window", None)
    name = type(layer).__name__ + (f", window {window}" if window else "")
    return f"layer {index}: {kind} ({name})"


def _packed(layer: RotorQuantLayer) -> str:
    if layer.store is None or layer.codec is None:
        return "packed, nothing stored yet"
    store, layout, config = layer.store, layer.codec.layout, layer.config
    calls = ", ".join(f"{door} {count}x" for door, count in sorted(layer.calls.items()))
    start = f"{store.sinks} exact sinks"
    if isinstance(layer, RotorQuantSlidingLayer):
        start = f"window {layer.sliding_window}, {store.dropped} tokens dropped"
    room = ""
    if isinstance(layer, RotorQuantStaticLayer):
        room = f" | room for {layer.max_cache_len} tokens"
    return (
        f"{start} | {store.packed_length} tokens packed in "
        f"{store.tiles.length} tiles of {layout.tile_length} ({config.key_codec} keys "
        f"{config.key_bits} bits, values {config.value_bits} bits, {config.rotation} rotation, "
        f"{layout.order} order; {_statistics(layer)}) | {store.tail} exact tail{room}; "
        f"attention: {calls or 'not called yet'}"
    )


def _statistics(layer: RotorQuantLayer) -> str:
    statistics = layer.preconditioner
    if statistics is None:
        return "statistics open"
    means = {"pre-RoPE": statistics.pre_mean, "post-RoPE": statistics.post_mean}
    used = [name for name, mean in means.items() if bool(mean.any())]
    seen = layer.statistics.power is not None or layer.kept is not None
    balance = "queries" if seen else "keys alone"
    text = (
        f"key mean {' and '.join(used) or 'none'}, "
        f"balance {f'from {balance}' if layer.config.balance else 'off'}"
    )
    return text if layer.kept is None else f"{text}, both kept from an earlier prompt"
