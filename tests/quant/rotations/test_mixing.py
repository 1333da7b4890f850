# SPDX-License-Identifier: Apache-2.0
"""How evenly a rotation spreads its input, and what that means for a scalar codebook."""

import math
from functools import cache

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.special import gammaln
from torch import Tensor

from rq_hf.quant.rotations import ROTATIONS, make_rotation
from rq_hf.quant.seeding import generator

SPREADING = ["butterfly", "dense", "hadamard"]
HEAD_DIMS = [64, 80, 96, 128, 256]
AWKWARD = [3, 5, 7, 100, 112]

# Levels of the 3-bit Lloyd-Max quantizer of N(0, 1), and its mean squared error
HALF = [0.2451, 0.7560, 1.3439, 2.1520]
LEVELS = torch.tensor([-x for x in reversed(HALF)] + HALF, dtype=torch.float64)
BOUNDARIES = (LEVELS[1:] + LEVELS[:-1]) / 2
LLOYD_MAX = 0.03454


def squared_errors(unit_vectors: Tensor) -> Tensor:
    """Squared error of each coordinate times D, [..., D], after rounding to the nearest level."""
    scaled = (unit_vectors * unit_vectors.shape[-1] ** 0.5).contiguous()
    return (scaled - LEVELS[torch.bucketize(scaled, BOUNDARIES)]) ** 2


@cache
def sphere_distortion(head_dim: int) -> float:
    """Expected squared error of sqrt(D) times a coordinate of a uniform unit vector of R^D.

    The coordinate t has the density c (1 - t^2)^((D - 3) / 2), c = Gamma(D/2) / Gamma((D-1)/2) /
    sqrt(pi), lighter in its tails than the Gaussian: about 2 / D below its distortion.
    """
    log_c = gammaln(head_dim / 2) - gammaln((head_dim - 1) / 2) - math.log(math.pi) / 2
    edges = [-1.0, *(BOUNDARIES / math.sqrt(head_dim)).tolist(), 1.0]

    def integrand(t: float, level: float) -> float:
        density = math.exp(log_c + (head_dim - 3) / 2 * math.log1p(-t * t))
        return (math.sqrt(head_dim) * t - level) ** 2 * density

    pieces = zip(edges, edges[1:], LEVELS.tolist(), strict=False)
    return sum(quad(integrand, low, high, args=(level,))[0] for low, high, level in pieces)


def matrices(name: str, head_dim: int, count: int) -> Tensor:
    drawn = [make_rotation(name, head_dim, 0, i).matrix(dtype=torch.float64) for i in range(count)]
    return torch.stack(drawn)


def fourth_moment(name: str, head_dim: int) -> float:
    """Fourth moment of the entries times sqrt(D), over 16 matrices."""
    return float((matrices(name, head_dim, 16) ** 4).mean() * head_dim**2)


def haar_fourth_moment(head_dim: int) -> float:
    return 3 * head_dim / (head_dim + 2)


def sparse_inputs(head_dim: int) -> Tensor:
    """Unit vectors, [D, D], each with nearly all of its length in one coordinate."""
    noise = torch.randn(head_dim, head_dim, generator=generator(0, "sparse"), dtype=torch.float64)
    x = torch.eye(head_dim, dtype=torch.float64) + 0.1 / math.sqrt(head_dim) * noise
    return x / x.norm(dim=-1, keepdim=True)


def sparse_distortion(name: str, head_dim: int) -> float:
    x = sparse_inputs(head_dim)
    rotations = (make_rotation(name, head_dim, 0, i) for i in range(16))
    return float(np.mean([squared_errors(r.forward(x)).mean() for r in rotations]))


@pytest.mark.parametrize("name", SPREADING)
@pytest.mark.parametrize("head_dim", HEAD_DIMS + AWKWARD)
def test_every_output_depends_on_every_input(name: str, head_dim: int) -> None:
    # Paths through a butterfly may cancel in one matrix, but not in every one of 16, unless there
    # is no path
    drawn = matrices(name, head_dim, 16).abs()
    assert drawn.amax(0).min() > 1e-6
    if head_dim >= 64:
        assert (drawn < 1e-6).double().mean() < 0.1


@pytest.mark.parametrize("name", SPREADING)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_no_entry_is_large(name: str, head_dim: int) -> None:
    # Of n standard normals the largest stays below sqrt(2 ln(2 n / p)) but for a chance of p
    chance = 1e-3
    drawn = matrices(name, head_dim, 4)
    bound = math.sqrt(2 * math.log(2 * drawn.numel() / chance))
    assert math.sqrt(head_dim) * drawn.abs().max() <= bound
    single_layer = matrices("rotor", head_dim, 4)
    assert math.sqrt(head_dim) * single_layer.abs().max() > bound


@pytest.mark.parametrize("head_dim", [*HEAD_DIMS, 100, 112])
def test_butterfly_has_no_heavier_tails_than_dense(head_dim: int) -> None:
    expected = haar_fourth_moment(head_dim)
    # The fourth power of a normal has variance 96; entries of one matrix are nearly independent
    noise = 4 * math.sqrt(96 / (16 * head_dim**2))
    assert abs(fourth_moment("dense", head_dim) - expected) <= noise
    # Sums of a few signed products of thirds lie between two signs (moment 1) and normal numbers;
    # a tenth for the spread between 16 draws
    assert 1.0 < fourth_moment("butterfly", head_dim) <= 1.1 * expected
    # Haar rotors: each row has 3 entries, of fourth moment 1/5, hence D^2 / D * 3/5 = 3 D / 5
    assert fourth_moment("rotor", head_dim) > 5 * expected


@pytest.mark.parametrize("name", ROTATIONS)
@pytest.mark.parametrize("head_dim", [*HEAD_DIMS, 100, 112])
def test_random_unit_vectors_reach_the_lloyd_max_error(name: str, head_dim: int) -> None:
    x = torch.randn(2**20 // head_dim, head_dim, generator=generator(0, "unit"))
    x = x / x.norm(dim=-1, keepdim=True)
    y = make_rotation(name, head_dim, 0).forward(x).double()
    of_each_vector = squared_errors(y).mean(-1)
    expected = sphere_distortion(head_dim)
    sampling_error = float(of_each_vector.std()) / math.sqrt(len(x))
    assert abs(float(of_each_vector.mean()) - expected) <= 4 * sampling_error
    assert 4 * sampling_error < 0.02 * expected
    # A sphere is lighter in its tails than the Gaussian by terms of the order 1 / D
    assert abs(expected - LLOYD_MAX) <= max(0.02, 2.2 / head_dim) * LLOYD_MAX


@pytest.mark.parametrize("name", SPREADING)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_gaussian_vectors_reach_the_lloyd_max_error(name: str, head_dim: int) -> None:
    x = torch.randn(2**20 // head_dim, head_dim, generator=generator(0, "gaussian"))
    y = make_rotation(name, head_dim, 0).forward(x / head_dim**0.5).double()
    assert abs(float(squared_errors(y).mean()) - LLOYD_MAX) <= 0.02 * LLOYD_MAX


@pytest.mark.parametrize("name", ["butterfly", "dense"])
@pytest.mark.parametrize("head_dim", [*HEAD_DIMS, 100, 112])
def test_sparse_vectors_reach_it_after_mixing(name: str, head_dim: int) -> None:
    # An upper bound: bounded entries quantize better than Gaussian ones
    assert 0.75 * LLOYD_MAX <= sparse_distortion(name, head_dim) <= 1.02 * LLOYD_MAX


@pytest.mark.parametrize("name", ["rotor", "none"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_sparse_vectors_do_not_reach_it_without(name: str, head_dim: int) -> None:
    assert sparse_distortion(name, head_dim) > 3 * LLOYD_MAX
