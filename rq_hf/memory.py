# SPDX-License-Identifier: Apache-2.0
"""What a cache really holds: bytes counted on its storages, beside the nominal figures."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

MIB = 1 << 20


@dataclass(frozen=True)
class CacheMemory:
    """Bytes held by a cache, every storage counted once and in full.

    Attributes:
        packed_bytes: Buffers of packed tiles, spare room included.
        exact_bytes: Buffers of exact sinks and tails, spare room included.
        statistics_bytes: Means and balances of the sequences.
        host_bytes: Layers that stay exact in the host's own classes.
        constant_bytes: Rotations, sketches and codebooks.
        packed_numbers: Numbers in packed tiles, keys and values together.
        nominal_bits: Bits a packed number by the layout, codes and scales; the mean over layers.
        dense_bytes: What the same tokens take uncompressed in the model's dtype.
        dense_bf16_bytes: The same in bfloat16.
    """

    packed_bytes: int
    exact_bytes: int
    statistics_bytes: int
    host_bytes: int
    constant_bytes: int
    packed_numbers: int
    nominal_bits: float
    dense_bytes: int
    dense_bf16_bytes: int

    @property
    def held_bytes(self) -> int:
        """All bytes held."""
        parts = (self.packed_bytes, self.exact_bytes, self.statistics_bytes, self.host_bytes)
        return sum(parts) + self.constant_bytes

    @property
    def bits_per_number(self) -> float:
        """Bits really held for a packed number; nan while nothing is packed."""
        if self.packed_numbers == 0:
            return float("nan")
        return 8 * self.packed_bytes / self.packed_numbers

    @property
    def _held_bits(self) -> str:
        return f"{self.bits_per_number:.3f}" if self.packed_numbers else "none"

    def __str__(self) -> str:
        rows = [
            ("packed tiles", f"{self.packed_bytes / MIB:.3f} MiB"),
            (
                "  bits a number",
                f"{self._held_bits} held, {self.nominal_bits:.3f} nominal",
            ),
            ("exact sinks and tails", f"{self.exact_bytes / MIB:.3f} MiB"),
            ("means and balances", f"{self.statistics_bytes / MIB:.3f} MiB"),
            ("layers kept exact", f"{self.host_bytes / MIB:.3f} MiB"),
            ("rotations, codebooks", f"{self.constant_bytes / MIB:.3f} MiB"),
            ("held in all", f"{self.held_bytes / MIB:.3f} MiB"),
            ("the same in bfloat16", f"{self.dense_bf16_bytes / MIB:.3f} MiB"),
        ]
        return "\n".join(f"{name:<24}{text}" for name, text in rows)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Returns the bytes of the storages behind `tensors`, a shared one once."""
    sizes: dict[tuple[str, int], int] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        sizes[(str(tensor.device), storage.data_ptr())] = storage.nbytes()
    return sum(sizes.values())


def reachable_tensors(thing: object, seen: set[int] | None = None) -> list[Tensor]:
    """Returns every tensor reachable from `thing` through attributes and containers."""
    seen = set() if seen is None else seen
    if id(thing) in seen:
        return []
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        return [thing]
    return [tensor for child in _children(thing) for tensor in reachable_tensors(child, seen)]


def _children(thing: object) -> Iterable[object]:
    if isinstance(thing, dict):
        return list(thing.values())
    if isinstance(thing, (list, tuple, set, frozenset)):
        return list(thing)
    if isinstance(thing, type) or not hasattr(thing, "__dict__"):
        return []
    return list(vars(thing).values())
