# SPDX-License-Identifier: Apache-2.0
"""The single layer of rotors is the sandwich product, group by group."""

import math

import pytest
import torch

from rq_hf.quant.clifford import embed, extract, norm, sandwich
from rq_hf.quant.rotations.rotor import RotorRotation
from rq_hf.quant.seeding import generator

HEAD_DIMS = [1, 2, 3, 4, 5, 7, 64, 80, 96, 100, 112, 128, 256]
EPS = torch.finfo(torch.float64).eps


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_rotation_is_embed_sandwich_extract(head_dim: int) -> None:
    rotation = RotorRotation(head_dim, generator(0))
    x = torch.randn(20, head_dim, generator=generator(0, "vectors"), dtype=torch.float64)
    turned = sandwich(rotation.rotors, embed(x))
    # Two products of 8 terms, see the tests of the algebra, and a matrix product of 3
    bound = 64 * EPS * x.norm(dim=-1, keepdim=True)
    assert ((rotation.forward(x) - extract(turned, head_dim)).abs() <= bound).all()
    # Nothing leaks into the padding
    assert (norm(turned).norm(dim=-1) - extract(turned, head_dim).norm(dim=-1)).abs().max() <= (
        bound.max()
    )


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_rotors_are_unit_and_even(head_dim: int) -> None:
    rotors = RotorRotation(head_dim, generator(0)).rotors
    assert rotors.shape == (math.ceil(head_dim / 3), 8)
    assert rotors.dtype == torch.float64
    assert (norm(rotors) - 1).abs().max() <= 4 * EPS
    assert (rotors[:, [1, 2, 3, 7]] == 0).all()


@pytest.mark.parametrize("head_dim", [3, 64, 80, 96])
def test_groups_do_not_mix(head_dim: int) -> None:
    matrix = RotorRotation(head_dim, generator(0)).matrix(dtype=torch.float64)
    group = torch.arange(head_dim) // 3
    same = group[:, None] == group
    assert (matrix[~same] == 0).all()
    assert (matrix[same] != 0).all()


def test_two_left_over_turn_in_their_plane() -> None:
    rotors = [RotorRotation(5, generator(0, i)).rotors[-1] for i in range(2)]
    assert (torch.stack(rotors)[:, [5, 6]] == 0).all()
    assert abs(rotors[0][4]) > 0.01
    assert not torch.equal(*rotors)


def test_one_left_over_stays() -> None:
    matrix = RotorRotation(7, generator(0)).matrix(dtype=torch.float64)
    assert matrix[6, 6] == 1
    assert (matrix[6, :6] == 0).all()
