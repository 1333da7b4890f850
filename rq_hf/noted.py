# SPDX-License-Identifier: Apache-2.0
"""Tokens of a cache that kernels have found not finite: taken back out of all layers, and told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from rq_hf.cropping import INSTEAD, crop_obstacle, holds_nothing
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
    """Takes back the tokens from the first one noted on, out of layers ahead in a pass too.

    Args:
        layers: All layers of a cache.
        new_tokens: Whether others are to be stored, for the message.

    Raises:
        ValueError: One is noted. Where a layer cannot give it back, all layers are as they were.
    """
    packed = _packed(layers)
    if not is_noted(packed):
        return
    wait_for_notes(packed)
    place, where = _first_noted(packed)
    back = where.get_seq_length() - place
    obstacle = _obstacle(layers, place)
    if obstacle is None:
        for layer in layers:
            if isinstance(layer, RotorQuantLayer):
                layer.take_back(place)
            elif _removal(layer, place):
                layer.crop(_removal(layer, place))
    raise late_error(where.name, place, back, obstacle, new_tokens)


def can_take_back(layers: Sequence[Any], refusing: int) -> bool:
    """Whether a token of an earlier pass is noted, which `refuse_noted` can take back.

    Waits for all kernels so far.

    Args:
        layers: All layers of a cache.
        refusing: Number of the one that has refused the tokens of this pass.
    """
    packed = _packed(layers)
    wait_for_notes(packed)
    if not is_noted(packed) or not isinstance(layers[refusing], CacheLayerMixin):
        return False
    place, _ = _first_noted(packed)
    return place < layers[refusing].get_seq_length() and _obstacle(layers, place) is None


def _packed(layers: Sequence[Any]) -> list[RotorQuantLayer]:
    return [layer for layer in layers if isinstance(layer, RotorQuantLayer)]


def _first_noted(layers: Sequence[RotorQuantLayer]) -> tuple[int, RotorQuantLayer]:
    """Returns the first token noted, and the first layer in which it is."""
    noted = [(layer.watch.first, layer) for layer in layers]
    return min(((at, x) for at, x in noted if at is not None), key=lambda pair: pair[0])


def _removal(layer: Any, length: int) -> int:
    """Returns what `crop` of a layer takes to leave `length` tokens; 0 where it holds no more."""
    if not isinstance(layer, CacheLayerMixin):
        # of linear attention, or one that stores nothing: neither counts tokens
        return 0
    return min(0, length - int(layer.get_seq_length()))


def _obstacle(layers: Sequence[Any], length: int) -> str | None:
    for i, layer in enumerate(layers):
        obstacle = _obstacle_of(layer, length)
        if obstacle is not None:
            return f"layer {i}: {obstacle}"
    return None


def _obstacle_of(layer: Any, length: int) -> str | None:
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        # what a convolution records is gone with the next crop
        return None if holds_nothing(layer) else f"it cannot go back some steps; {INSTEAD}"
    removal = _removal(layer, length)
    return crop_obstacle(layer, removal) if removal else None
