# SPDX-License-Identifier: Apache-2.0
"""Layers of the host in caches that must hold the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rq_hf import RotorQuantCache
from rq_hf.layers import RotorQuantLayer


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Returns what a layer's attributes hold, each by its name."""
    if isinstance(value, dict):
        return {k: x for key in value for k, x in flat(value[key], f"{name}.{key}").items()}
    return {name: value}


def assert_same_host_layers(a: RotorQuantCache, b: RotorQuantCache) -> None:
    for mine, theirs in zip(a.layers, b.layers, strict=True):
        assert type(mine) is type(theirs)
        if isinstance(mine, RotorQuantLayer):
            continue
        left, right = flat(vars(mine)), flat(vars(theirs))
        assert left.keys() == right.keys()
        for name, value in left.items():
            if isinstance(value, Tensor):
                other = right[name]
                assert (value.dtype, value.device) == (other.dtype, other.device), name
                assert torch.equal(value, other), name
            else:
                assert value == right[name], name
