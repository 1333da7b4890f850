# SPDX-License-Identifier: Apache-2.0
"""Tokens of a cache that kernels have found not finite: taken back out of all layers, and told."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from transformers.cache_utils import CacheLayerMixin

from rq_hf.host_history import HostHistory, is_kept
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


def refuse_noted(layers: Sequence[Any], history: HostHistory, new_tokens: bool) -> None:
    """Takes back the tokens from the first one noted on, out of layers ahead in a pass too.

    Where layers of the host cannot drop single tokens, all those of its pass go.

    Args:
        layers: All layers of a cache.
        history: What the host's held before the last pass.
        new_tokens: Whether others are to be stored, for the message.

    Raises:
        ValueError: One is noted. Where a layer cannot give it back, all layers are as they were.
    """
    packed = packed_in(layers)
    if not is_noted(packed):
        return
    wait_for_notes(packed)
    place, where = _first_noted(packed)
    length = _length_before(place, layers, history)
    back = where.get_seq_length() - length
    obstacle = _obstacle(layers, history, length)
    if obstacle is None:
        for i, layer in enumerate(layers):
            if isinstance(layer, RotorQuantLayer):
                layer.take_back(length)
            else:
                history.put_back(i, layer, length)
    raise late_error(where.name, place, back, obstacle, new_tokens)


def can_take_back(layers: Sequence[Any], refusing: int, history: HostHistory) -> bool:
    """Whether a token of an earlier pass is noted, which `refuse_noted` can take back.

    Waits for all kernels so far.

    Args:
        layers: All layers of a cache.
        refusing: Number of the one that has refused the tokens of this pass.
        history: What the host's held before the last pass.
    """
    packed = packed_in(layers)
    wait_for_notes(packed)
    if not is_noted(packed) or not isinstance(layers[refusing], CacheLayerMixin):
        return False
    place, _ = _first_noted(packed)
    length = _length_before(place, layers, history)
    before = place < layers[refusing].get_seq_length()
    return before and _obstacle(layers, history, length) is None


def packed_in(layers: Iterable[Any]) -> list[RotorQuantLayer]:
    """Returns those of all kinds of layers that are packed."""
    return [layer for layer in layers if isinstance(layer, RotorQuantLayer)]


def _first_noted(layers: Sequence[RotorQuantLayer]) -> tuple[int, RotorQuantLayer]:
    """Returns the first token noted, and the first layer in which it is."""
    noted = [(layer.watch.first, layer) for layer in layers]
    return min(((at, x) for at, x in noted if at is not None), key=lambda pair: pair[0])


def _length_before(place: int, layers: Sequence[Any], history: HostHistory) -> int:
    """Returns how many tokens are left where that at `place` is taken back."""
    start = history.start
    if start is not None and start <= place and any(map(is_kept, layers)):
        return start
    return place


def _obstacle(layers: Sequence[Any], history: HostHistory, length: int) -> str | None:
    for i, layer in enumerate(layers):
        if isinstance(layer, RotorQuantLayer):
            obstacle = layer.crop_obstacle(min(0, length - layer.get_seq_length()))
        else:
            obstacle = history.obstacle(i, layer, length)
        if obstacle is not None:
            return f"layer {i}: {obstacle}"
    return None
