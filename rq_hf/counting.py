# SPDX-License-Identifier: Apache-2.0
"""The bytes of all layers of a cache, counted on their storages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from rq_hf.layers import RotorQuantLayer
from rq_hf.memory import CacheMemory, reachable_tensors, storage_bytes

BF16_BYTES = 2


def count_memory(layers: Sequence[Any], earlier: Iterable[Tensor]) -> CacheMemory:
    """Counts the bytes of every storage that layers hold, packed ones and the host's.

    Args:
        layers: All layers of a cache.
        earlier: What the host's held before, as far as that is kept.
    """
    quantized = [layer for layer in layers if isinstance(layer, RotorQuantLayer)]
    packed: list[Any] = [layer for layer in quantized if layer.store is not None]
    host = [layer for layer in layers if not isinstance(layer, RotorQuantLayer)]
    host_tensors = reachable_tensors(host)
    numbers = [_numbers(layer) for layer in packed]
    stored = sum(all_numbers for _, all_numbers in numbers)
    host_numbers = sum(t.numel() for t in host_tensors)
    item_bytes = packed[0].dtype.itemsize if packed else BF16_BYTES
    return CacheMemory(
        packed_bytes=storage_bytes(t for x in packed for t in x.store.tiles.tensors),
        exact_bytes=storage_bytes(t for x in packed for t in x.store.exact.tensors),
        statistics_bytes=storage_bytes(
            reachable_tensors(
                [(x.preconditioner, x.kept, x.statistics, x.padding) for x in quantized]
            )
        ),
        host_bytes=storage_bytes([*host_tensors, *earlier]),
        constant_bytes=storage_bytes(reachable_tensors([x.codec for x in packed])),
        packed_numbers=sum(packed_numbers for packed_numbers, _ in numbers),
        nominal_bits=_nominal_bits(packed),
        dense_bytes=stored * item_bytes + storage_bytes(host_tensors),
        dense_bf16_bytes=(stored + host_numbers) * BF16_BYTES,
    )


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
