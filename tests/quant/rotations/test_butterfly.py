# SPDX-License-Identifier: Apache-2.0
"""Layers of equalised rotors: their entries, their number and the shuffles between them."""

import math

import pytest
import torch
from torch import Tensor

from rq_hf.quant.clifford import norm, rotor_to_matrix
from rq_hf.quant.rotations.butterfly import (
    ButterflyRotation,
    equalised_rotors,
    layer_count,
    perfect_shuffle,
)
from rq_hf.quant.seeding import generator

EPS = torch.finfo(torch.float64).eps


def reached(head_dim: int, layers: int) -> Tensor:
    """Which inputs each output depends on, followed with sets along the groups of every layer."""
    sources = [{i} for i in range(head_dim)]
    for layer in range(layers):
        if layer:
            sources = [sources[i] for i in perfect_shuffle(head_dim)]
        groups = [range(start, min(start + 3, head_dim)) for start in range(0, head_dim, 3)]
        sources = [set().union(*(sources[i] for i in group)) for group in groups for _ in group]
    return torch.tensor([len(s) for s in sources])


def test_equalised_rotors_have_thirds_for_entries() -> None:
    rotors = equalised_rotors(1000, generator(0))
    assert (norm(rotors) - 1).abs().max() <= 4 * EPS
    thirds = 3 * rotor_to_matrix(rotors)
    assert (thirds - thirds.round()).abs().max() <= 3 * 32 * EPS
    assert set(thirds.round().flatten().tolist()) == {-2.0, -1.0, 1.0, 2.0}
    # Sixteen rotations, each with two rotors; a thousand draws miss none of them
    assert len(thirds.round().flatten(1).unique(dim=0)) == 16
    assert len(rotors.unique(dim=0)) == 32


@pytest.mark.parametrize("head_dim", [1, 2, 3, 4, 5, 7, 64, 80, 96, 100, 112, 128, 192, 256])
def test_layers_are_as_many_as_needed(head_dim: int) -> None:
    layers = layer_count(head_dim)
    assert (reached(head_dim, layers) == head_dim).all()
    assert layers == 1 or (reached(head_dim, layers - 1) < head_dim).any()
    assert layers <= math.ceil(math.log(max(head_dim, 3), 3)) + 2


def test_layers_of_usual_head_dims() -> None:
    counts = {64: 5, 80: 5, 96: 5, 128: 6, 256: 7}
    assert {head_dim: layer_count(head_dim) for head_dim in counts} == counts


@pytest.mark.parametrize("head_dim", [3, 64, 80, 96])
def test_shuffle_is_a_permutation(head_dim: int) -> None:
    assert sorted(perfect_shuffle(head_dim)) == list(range(head_dim))


def test_shuffle_deals_groups_out() -> None:
    assert perfect_shuffle(9) == [0, 3, 6, 1, 4, 7, 2, 5, 8]
    assert perfect_shuffle(7) == [3, 6, 1, 4, 2, 5, 0]


@pytest.mark.parametrize("head_dim", [3, 27, 96])
def test_entries_are_multiples_of_a_power_of_a_third(head_dim: int) -> None:
    layers = layer_count(head_dim)
    scaled = 3**layers * ButterflyRotation(head_dim, generator(0)).matrix(dtype=torch.float64)
    assert (scaled - scaled.round()).abs().max() <= 3**layers * 32 * layers * EPS
    assert scaled.round().abs().max() >= 1
