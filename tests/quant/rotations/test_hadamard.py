# SPDX-License-Identifier: Apache-2.0
"""Entries of the Hadamard rotation, for powers of two and for other dimensions."""

import math

import pytest
import torch

from rq_hf.quant.rotations.hadamard import HadamardRotation
from rq_hf.quant.seeding import generator

EPS = torch.finfo(torch.float64).eps


@pytest.mark.parametrize("head_dim", [1, 2, 64, 128, 256])
def test_powers_of_two_have_entries_of_one_size(head_dim: int) -> None:
    matrix = HadamardRotation(head_dim, generator(0)).matrix(dtype=torch.float64)
    assert (matrix.abs() * math.sqrt(head_dim) - 1).abs().max() <= 4 * EPS


@pytest.mark.parametrize("head_dim", [3, 5, 7, 80, 96, 100, 112])
def test_other_dimensions_have_small_entries_and_no_zeros(head_dim: int) -> None:
    odd = head_dim
    while odd % 2 == 0:
        odd //= 2
    sizes = HadamardRotation(head_dim, generator(0)).matrix(dtype=torch.float64).abs()
    assert sizes.max() <= math.sqrt(2 / head_dim) * (1 + 4 * EPS)
    # cos a + sin a = sqrt(2) sin(a + pi / 4), and a + pi / 4 stays pi / (4 m) away from multiples
    # of pi, because a = 2 pi n / m with m odd
    assert sizes.min() >= math.sqrt(2 / head_dim) * math.sin(math.pi / (4 * odd)) * (1 - 1e-9)


def test_signs_are_random_and_fair() -> None:
    first_rows = torch.stack(
        [HadamardRotation(64, generator(0, i)).matrix()[0].sign() for i in range(64)]
    )
    # 4096 signs; their mean has standard deviation 1 / 64
    assert abs(first_rows.mean()) <= 4 / 64
    assert len(first_rows.unique(dim=0)) == 64
