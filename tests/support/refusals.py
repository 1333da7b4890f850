# SPDX-License-Identifier: Apache-2.0
"""Layers that refuse states, and what they hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rq_hf import RotorQuantConfig, watched_states
from rq_hf.layers import RotorQuantLayer
from rq_hf.sliding import RotorQuantSlidingLayer

CONFIG = RotorQuantConfig(residual_length=32, sink_length=4)
NAN, INF = float("nan"), float("inf")


def let_few_tokens_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens are looked at by nobody, as in compiled steps on a GPU, on whatever device."""
    monkeypatch.setattr(watched_states, "looks_at_once", lambda device: False)
    monkeypatch.setattr(watched_states, "is_compiling", lambda: True)


def make_states(tokens: int, seed: int = 0) -> Tensor:
    """Returns keys and values `[2, 2, 2, tokens, 64]`."""
    return torch.randn(2, 2, 2, tokens, 64, generator=torch.Generator().manual_seed(seed))


def make_layer(window: int | None = None) -> RotorQuantLayer:
    if window is None:
        return RotorQuantLayer(CONFIG, layer_idx=5)
    return RotorQuantSlidingLayer(CONFIG, window, layer_idx=5)


def contents(layer: RotorQuantLayer) -> list[Any]:
    """Everything that a layer holds."""
    layer.settle()
    store, means = layer.store, layer.preconditioner
    assert store is not None
    held = [*store.exact.view(), *store.tiles.view()]
    held += [] if means is None else [means.pre_mean, means.post_mean, means.balance]
    lengths = (store.packed_length, store.dropped, layer.get_seq_length())
    return [*(tensor.clone() for tensor in held), torch.tensor(lengths)]


def assert_holds(layer: RotorQuantLayer, expected: list[Any]) -> None:
    found = contents(layer)
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)
