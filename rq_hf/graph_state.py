# SPDX-License-Identifier: Apache-2.0
"""What a step of one token changes in a static cache, on the device and on the host."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    LinearAttentionCacheLayerMixin,
    StaticIndexedLayer,
    StaticLayer,
)

from rq_hf.memory import reachable_tensors
from rq_hf.static_cache import RotorQuantStaticCache
from rq_hf.static_exact import ExactStaticLayer
from rq_hf.static_layer import RotorQuantStaticLayer
from rq_hf.static_ops import recipe_of

# what the host counts itself, by the name of a layer's attribute
_CALLS, _LENGTH = "calls", "cumulative_length_int"


class CacheState:
    """The layers of a cache, seen as what a recorded step reads and writes.

    A CUDA graph repeats what the device does, at the addresses of its recording. What the host
    does beside it is here: it counts, and takes other ways as soon as a sliding window is full.

    Args:
        cache: The cache.

    Raises:
        ValueError: A layer keeps more than can be told here.

    Attributes:
        counts_on_host: Whether masks made inside a step would depend on what the host counts.
    """

    def __init__(self, cache: RotorQuantStaticCache) -> None:
        layers: list[Any] = cache.layers
        indexed = [i for i, layer in enumerate(layers) if isinstance(layer, StaticIndexedLayer)]
        if indexed:
            raise ValueError(
                f"layers {indexed} of the cache keep an index of their keys beside them, which a "
                "CUDA graph would not take along; run the model without cuda_graph"
            )
        self._packed = [x for x in layers if isinstance(x, RotorQuantStaticLayer)]
        self._host = [x for x in layers if not isinstance(x, RotorQuantStaticLayer)]
        self._counting = [x for x in self._host if hasattr(x, _LENGTH)]
        self._linear = [x for x in self._host if isinstance(x, LinearAttentionCacheLayerMixin)]
        self.counts_on_host = bool(self._counting)
        self._places: list[tuple[dict, Any, Tensor]] = []

    @property
    def takes_steps(self) -> bool:
        """Whether every layer has its buffers and has stored its prompt."""
        packed = all(layer.takes_steps for layer in self._packed)
        return packed and all(_is_ready(layer) for layer in self._host)

    def way(self) -> tuple[Any, ...]:
        """Returns what the host's part of a step depends on; equal for equal calls."""
        return (
            tuple(layer.recipe for layer in self._packed),
            tuple(getattr(x, _LENGTH) >= x.max_cache_len for x in self._counting),
            tuple(tuple(layer.has_previous_state.values()) for layer in self._linear),
        )

    def hold(self) -> None:
        """Takes note of where the host's layers lie now, for `return_to_places`."""
        if not self._places:
            self._places = [place for layer in self._host for place in _places(layer)]

    @property
    def has_moved(self) -> bool:
        """Whether other tensors are where those of `hold` were."""
        return any(holder[name] is not tensor for holder, name, tensor in self._places)

    def return_to_places(self) -> None:
        """Copies tensors that were put in place of those of `hold` into these.

        The host reorders beams so. Packed layers are reordered where they are.
        """
        for holder, name, tensor in self._places:
            now = holder[name]
            if now is not tensor:
                tensor.copy_(now)
                holder[name] = tensor

    def count_step(self) -> None:
        """Counts on the host a step that the device has done."""
        for packed in self._packed:
            packed.count("step")
        for layer in self._counting:
            setattr(layer, _LENGTH, getattr(layer, _LENGTH) + 1)

    def tables(self) -> list[Tensor]:
        """Returns what steps read beside the cache, and others may replace by newer ones."""
        read = [(recipe_of(layer.recipe), layer.preconditioner) for layer in self._packed]
        return reachable_tensors(read)

    def save(self) -> Saved:
        """Returns a copy of what a step changes."""
        kept = [t for layer in self._packed for t in layer.static.changed_by_steps]
        kept += [t for layer in self._host for t in _changed(layer)]
        return Saved(self, kept)

    def numbers(self) -> list[tuple[Any, str, Any]]:
        """Returns copies of what the host counts: layer, attribute, value."""
        return [
            *((layer, _CALLS, copy.copy(layer.calls)) for layer in self._packed),
            *((layer, _LENGTH, getattr(layer, _LENGTH)) for layer in self._counting),
        ]

    def places(self) -> list[tuple[dict, Any, Tensor]]:
        """Returns where the tensors of the host's layers are held: container, key, tensor."""
        return [place for layer in self._host for place in _places(layer)]


class Saved:
    """A copy of what a step changes in a cache.

    Rows and tiles behind those that count are free: a step that runs again from the same state
    writes the same there, so nobody needs the old ones.

    Args:
        state: Of the cache.
        tensors: What of it steps change.
    """

    def __init__(self, state: CacheState, tensors: list[Tensor]) -> None:
        with torch.no_grad():
            self._tensors = [(tensor, tensor.clone()) for tensor in tensors]
        self._numbers, self._places = state.numbers(), state.places()

    def restore(self) -> None:
        """Makes the cache what it was."""
        with torch.no_grad():
            for tensor, copied in self._tensors:
                tensor.copy_(copied)
        for layer, name, value in self._numbers:
            setattr(layer, name, copy.copy(value))
        for holder, name, tensor in self._places:
            holder[name] = tensor


def _is_ready(layer: Any) -> bool:
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        # those that hold nothing stand for layers without attention
        begun = any(layer.has_previous_state.values()) or not any(True for _ in _places(layer))
        return begun and bool(getattr(layer, "is_initialized", True))
    return bool(layer.is_initialized)


def _places(layer: Any) -> Iterator[tuple[dict, Any, Tensor]]:
    """Yields the tensors of one of the host's layers, each with its container and key there."""
    attributes = vars(layer)
    holders = [attributes, *(x for x in attributes.values() if isinstance(x, dict))]
    for holder in holders:
        yield from ((holder, name, x) for name, x in holder.items() if isinstance(x, Tensor))


def _changed(layer: Any) -> list[Tensor]:
    if type(layer) in (StaticLayer, ExactStaticLayer):
        # large, and no row of it changes but a free one
        return [layer.cumulative_length]
    return [tensor for _, _, tensor in _places(layer)]
