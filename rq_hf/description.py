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
        kept = "" if layer.kept is None else f"; {_statistics(layer)}"
        return f"packed, nothing stored yet{kept}"
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
    statistics = layer.preconditioner or layer.kept
    if statistics is None:
        return "statistics open"
    means = {"pre-RoPE": statistics.pre_mean, "post-RoPE": statistics.post_mean}
    used = [name for name, mean in means.items() if bool(mean.any())]
    return f"key mean {' and '.join(used) or 'none'}, {_balance(layer)}"


def _balance(layer: RotorQuantLayer) -> str:
    if layer.kept is not None:
        # which queries it was made from was forgotten with that prompt
        switch = "on" if layer.config.balance else "off"
        return f"balance {switch}, both kept from an earlier prompt"
    if not layer.config.balance:
        return "balance off"
    return f"balance from {'keys alone' if layer.statistics.power is None else 'queries'}"
