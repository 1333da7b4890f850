# SPDX-License-Identifier: Apache-2.0
"""Orthogonal changes of coordinates that spread every input over all coordinates."""

from functools import lru_cache

from rq_hf.quant.rotations.base import Rotation
from rq_hf.quant.rotations.butterfly import ButterflyRotation
from rq_hf.quant.rotations.dense import DenseRotation
from rq_hf.quant.rotations.hadamard import HadamardRotation
from rq_hf.quant.rotations.identity import NoRotation
from rq_hf.quant.rotations.rotor import RotorRotation
from rq_hf.quant.seeding import generator

__all__ = ["ROTATIONS", "Rotation", "make_rotation"]

ROTATIONS: dict[str, type[Rotation]] = {
    kind.name: kind
    for kind in (RotorRotation, ButterflyRotation, DenseRotation, HadamardRotation, NoRotation)
}


@lru_cache(maxsize=256)
def make_rotation(name: str, head_dim: int, seed: int, *labels: str | int) -> Rotation:
    """Rotation of the given kind, drawn from the stream of `seed` and `labels`.

    Equal arguments give the same object, so that layers share its matrices.

    Args:
        name: A key of `ROTATIONS`.
        head_dim: Number of coordinates D.
        seed: Seed of the whole cache.
        labels: What the rotation is for, for example `"key"` and the index of the layer.

    Raises:
        ValueError: If the name is unknown or `head_dim` is not positive.
    """
    if name not in ROTATIONS:
        raise ValueError(f"unknown rotation {name!r}; choose one of {', '.join(ROTATIONS)}")
    return ROTATIONS[name](head_dim, generator(seed, "rotation", name, head_dim, *labels))
