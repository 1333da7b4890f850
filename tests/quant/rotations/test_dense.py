# SPDX-License-Identifier: Apache-2.0
"""The dense rotation is Haar-distributed, not merely orthogonal."""

import math

import pytest
import torch

from rq_hf.quant.rotations.dense import DenseRotation
from rq_hf.quant.seeding import generator


@pytest.mark.parametrize("head_dim", [3, 8])
def test_entries_have_the_moments_of_haar(head_dim: int) -> None:
    stream, count = generator(0, "haar"), 4000
    drawn = torch.stack([DenseRotation(head_dim, stream).matrix() for _ in range(count)])
    # An entry is a coordinate of a uniform unit vector: moments 0, 1/D, 0, 3/(D (D + 2)). A Q whose
    # signs LAPACK chose has diagonal entries of mean far from 0.
    for power, moment in [(1, 0.0), (2, 1 / head_dim), (4, 3 / (head_dim * (head_dim + 2)))]:
        sample = drawn.double() ** power
        bound = 5 * sample.std(0) / math.sqrt(count)
        assert ((sample.mean(0) - moment).abs() <= bound).all()


def test_both_determinants_occur() -> None:
    stream = generator(0, "determinants")
    signs = [float(torch.linalg.det(DenseRotation(5, stream).matrix())) > 0 for _ in range(400)]
    # A fair coin thrown 400 times has standard deviation 10
    assert abs(sum(signs) - 200) <= 40
