# SPDX-License-Identifier: Apache-2.0
"""Devices of layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import torch

Place: TypeAlias = str | torch.device
# one device for all layers, or that of every layer by its index
Places: TypeAlias = Place | Mapping[int, Place]


def place_layers(places: Places, layers: int) -> list[Place]:
    """Returns the device of each of so many layers.

    Raises:
        ValueError: A layer has none.
    """
    if not isinstance(places, Mapping):
        return [places] * layers
    missing = [i for i in range(layers) if i not in places]
    if missing:
        raise ValueError(
            f"no device is given for layers {missing}; give one for each of {layers} layers"
        )
    return [places[i] for i in range(layers)]
