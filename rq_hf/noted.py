# SPDX-License-Identifier: Apache-2.0
"""Tokens of a cache that kernels have found not finite: taken back out of all layers, and told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers.cache_utils import CacheLayerMixin

from rq_hf.cropping import crop_obstacle, holds_nothing
from rq_hf.layers import RotorQuantLayer
from rq_hf.validation import late_error


def is_noted(layers: Sequence[RotorQuantLayer]) -> bool:
    """Whether kernels have noted anything so far. Waits for nothing."""
    return any(layer.watch.first is not None for layer in layers)


def wait_for_notes(layers: Sequence[RotorQuantLayer]) -> None:
    """Stores what waits for its attention of a step, and waits for all kernels so far."""
    for layer in layers:
        layer.settle_step()
    watches = {layer.watch.device: layer.watch for layer in layers}
    for watch in watches.values():
        watch.wait()


def refuse_to_pack(layers: Sequence[RotorQuantLayer]) -> None:
    """Waits for all kernels so far; for layers in the midst of a pass.

    Raises:
        ValueError: A token is noted.
    """
    wait_for_notes(layers)
    if is_noted(layers):
        place, where = _first_noted(layers)
        back = where.get_seq_length() - place
        raise late_error(where.name, place, back, "crop() or reset() the cache", True)


def refuse_noted(layers: Sequence[Any], new_tokens: bool) -> None:
    """Takes back the tokens from the first one noted on; for layers between two passes.

    Args:
        layers: All layers of a cache.
        new_tokens: Whether others are to be stored, for the message.

    Raises:
        ValueError: One is noted. Where a layer cannot give it back, all layers are as they were.
    """
    packed = [layer for layer in layers if isinstance(layer, RotorQuantLayer)]
    if not is_noted(packed):
        return
    wait_for_notes(packed)
    place, where = _first_noted(packed)
    back = where.get_seq_length() - place
    removals = [_removal(layer, place, back) for layer in layers]
    obstacle = _obstacle(layers, removals)
    if obstacle is None:
        for layer, removal in zip(layers, removals, strict=True):
            if isinstance(layer, RotorQuantLayer):
                layer.take_back(place)
            elif removal and not holds_nothing(layer):
                layer.crop(removal)
    raise late_error(where.name, place, back, obstacle, new_tokens)


def _first_noted(layers: Sequence[RotorQuantLayer]) -> tuple[int, RotorQuantLayer]:
    """Returns the first token noted, and the first layer in which it is."""
    noted = [(layer.watch.first, layer) for layer in layers]
    return min(((at, x) for at, x in noted if at is not None), key=lambda pair: pair[0])


def _removal(layer: Any, length: int, otherwise: int) -> int:
    """Returns what `crop` of a layer takes to leave `length` tokens."""
    if not isinstance(layer, CacheLayerMixin):
        # linear attention does not count
        return -otherwise
    return min(0, length - int(layer.get_seq_length()))


def _obstacle(layers: Sequence[Any], removals: list[int]) -> str | None:
    for i, (layer, removal) in enumerate(zip(layers, removals, strict=True)):
        obstacle = crop_obstacle(layer, removal) if removal else None
        if obstacle is not None:
            return f"layer {i}: {obstacle}"
    return None
