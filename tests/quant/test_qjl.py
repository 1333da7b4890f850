# SPDX-License-Identifier: Apache-2.0
"""Tests of the sign sketches: their matrices, and mean, variance and error of the estimators."""

import math
from collections.abc import Iterator
from functools import cache

import pytest
import torch
from torch import Tensor

from rq_hf.quant.qjl import ESTIMATORS, SKETCHES, Sketch, make_sketch, unfold_signs
from rq_hf.quant.seeding import generator

DIM = 16
FRESH = 2000


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Thousands of tiny products: threads would spend their time on waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pair(correlation: float, dim: int = DIM) -> tuple[Tensor, Tensor]:
    """A query of length 1.7 and a residual of length 0.6 with that cosine, float64, [1, D]."""
    stream = generator(5, "pair")
    q, _ = torch.linalg.qr(torch.randn(dim, 2, generator=stream, dtype=torch.float64))
    residual = 0.6 * q[:, 0]
    query = 1.7 * (correlation * q[:, 0] + math.sqrt(1 - correlation**2) * q[:, 1])
    return query[None], residual[None]


@cache
def fresh_sketches(name: str, size: int) -> list[Sketch]:
    return [SKETCHES[name](DIM, size, generator(draw, "fresh", name)) for draw in range(FRESH)]


def estimates(name: str, size: int, query: Tensor, residual: Tensor) -> Tensor:
    """Unbiased estimates of <query, residual> from fresh sketches, [FRESH], float64."""
    out = []
    for sketch in fresh_sketches(name, size):
        signs = sketch.signs(residual)
        weight = ESTIMATORS["unbiased"](sketch, residual, signs)
        out.append(weight * (sketch.project(query) * unfold_signs(signs, query.dtype)).sum(-1))
    return torch.cat(out)


def gaussian_variance(size: int, query: Tensor, residual: Tensor) -> float:
    """Of one estimate: each row of S adds an independent <g, q> sign(<g, r>), whose mean square
    is |q|^2 and whose mean is sqrt(2 / pi) <q, r> / |r|.
    """
    along = (query * residual).sum().item() / residual.norm().item()
    one_row = query.square().sum().item() - 2 / math.pi * along**2
    return math.pi / 2 * residual.square().sum().item() / size * one_row


def orthogonal_variance(size: int, query: Tensor, residual: Tensor) -> float:
    """Of one estimate for M <= D. v = S^T s / sqrt(D M) is a unit vector. With Haar rows
    E <v, r>^2 / |r|^2 = (1 + (M - 1) 2 / pi) / D, and what is not along r points anywhere
    across r with equal probability.
    """
    dim = query.shape[-1]
    mean = math.sqrt(size / math.pi) * math.exp(math.lgamma(dim / 2) - math.lgamma((dim + 1) / 2))
    mean_square = (1 + (size - 1) * 2 / math.pi) / dim
    along = (query * residual).sum().item() ** 2 / residual.square().sum().item()
    across = query.square().sum().item() - along
    spread = along * (mean_square - mean**2) + across * (1 - mean_square) / (dim - 1)
    return residual.square().sum().item() / mean**2 * spread


@pytest.mark.parametrize("name", SKETCHES)
def test_matrix_has_the_shape_the_stream_decides_and_the_dtype_asked_for(name: str) -> None:
    sketch = make_sketch(name, 12, 20, 3, "layer", 1)
    assert sketch.matrix().shape == (20, 12)
    assert sketch.matrix().dtype == torch.float32
    assert torch.equal(sketch.matrix(), sketch.matrix("cpu", torch.float64).float())
    make_sketch.cache_clear()
    again = make_sketch(name, 12, 20, 3, "layer", 1)
    assert again is not sketch
    assert torch.equal(again.matrix(), sketch.matrix())
    for other in (make_sketch(name, 12, 20, 3, "layer", 2), make_sketch(name, 12, 20, 4)):
        assert not torch.isclose(other.matrix(), sketch.matrix()).any()


@pytest.mark.parametrize(("size", "dim"), [(1, 7), (24, 24), (10, 24), (60, 24), (64, 64)])
def test_orthogonal_rows_are_orthogonal_within_blocks_of_head_dim(size: int, dim: int) -> None:
    matrix = make_sketch("orthogonal", dim, size, 0).matrix(dtype=torch.float64)
    for block in matrix.split(dim):
        gram = block @ block.mT / dim
        expected = torch.eye(len(block), dtype=torch.float64)
        # a Householder QR is orthogonal to a small multiple of D eps
        torch.testing.assert_close(gram, expected, rtol=0, atol=4 * dim * 2.3e-16)
    if size >= 2 * dim:
        overlap = matrix[:dim] @ matrix[dim : 2 * dim].mT / dim
        assert overlap.abs().amax() > 0.1, "blocks repeat or vanish"


def test_zero_counts_as_positive() -> None:
    sketch = make_sketch("gaussian", 8, 16, 0)
    for zero in (torch.zeros(2, 8), -torch.zeros(2, 8)):
        assert torch.equal(sketch.signs(zero), torch.zeros(2, 16, dtype=torch.uint8))
    expected = sketch.matrix().sum(0).expand(2, 8)
    # 16 terms of order 1 summed in some order
    torch.testing.assert_close(sketch.expand(sketch.signs(torch.zeros(2, 8))), expected)


@pytest.mark.parametrize("name", SKETCHES)
def test_signs_and_expansion_follow_the_formula(name: str) -> None:
    sketch = make_sketch(name, 24, 40, 0)
    x = torch.randn(3, 5, 24, generator=generator(0, "x"), dtype=torch.float64)
    matrix = sketch.matrix(dtype=torch.float64)
    projected = torch.einsum("md,abd->abm", matrix, x)
    torch.testing.assert_close(sketch.project(x), projected)
    signs = sketch.signs(x)
    assert signs.dtype == torch.uint8
    assert torch.equal(signs.bool(), projected < 0)
    expanded = torch.einsum("md,abm->abd", matrix, projected.sign())
    torch.testing.assert_close(sketch.expand(signs, torch.float64), expanded)
    assert sketch.expand(signs).dtype == torch.float32


@pytest.mark.parametrize("name", SKETCHES)
@pytest.mark.parametrize("size", [DIM, 10, 40])
def test_unbiased_over_fresh_sketches(name: str, size: int) -> None:
    query, residual = pair(correlation=0.6)
    sample = estimates(name, size, query, residual)
    truth = (query * residual).sum().item()
    tolerance = 4 * sample.std().item() / math.sqrt(FRESH)
    assert abs(sample.mean().item() - truth) <= tolerance
    # otherwise the test could not tell the estimator from one that is 10% off
    assert tolerance < 0.1 * truth


@pytest.mark.parametrize("correlation", [0.0, 0.6, 1.0])
def test_variance_agrees_with_theory_and_orthogonal_rows_have_less(correlation: float) -> None:
    query, residual = pair(correlation)
    gaussian = estimates("gaussian", DIM, query, residual).var().item()
    orthogonal = estimates("orthogonal", DIM, query, residual).var().item()
    # Var(s^2) = sigma^4 (2 + excess kurtosis) / n, up to 1 / n^2. A row of the Gaussian sketch adds
    # a half-normal (excess kurtosis 0.87) and a normal part, an estimate the mean of M of them.
    tolerance = 4 * math.sqrt((2 + 0.87 / DIM) / (FRESH - 1))
    in_theory = gaussian_variance(DIM, query, residual)
    assert abs(gaussian / in_theory - 1) <= tolerance
    # nearly Gaussian by symmetry across r, a sum of D coordinates along it: excess well below 1
    tolerance = 4 * math.sqrt((2 + 1) / (FRESH - 1))
    assert abs(orthogonal / orthogonal_variance(DIM, query, residual) - 1) <= tolerance
    assert orthogonal < 0.5 * gaussian


@pytest.mark.parametrize("name", SKETCHES)
@pytest.mark.parametrize("size", [24, 10, 60])
def test_mmse_is_the_least_squares_weight_of_each_vector(name: str, size: int) -> None:
    sketch = make_sketch(name, 24, size, 1)
    residual = torch.randn(500, 24, generator=generator(1, "residual"), dtype=torch.float64)
    signs = sketch.signs(residual)
    direction = sketch.expand(signs, torch.float64)
    weight = ESTIMATORS["mmse"](sketch, residual, signs)
    left = residual - weight[:, None] * direction
    # the normal equation, to rounding of D products
    bound = 24 * 2.3e-16 * residual.norm(dim=-1) * direction.norm(dim=-1)
    assert ((left * direction).sum(-1).abs() <= bound).all()
    unbiased = ESTIMATORS["unbiased"](sketch, residual, signs)
    for other in (unbiased, 0.9 * weight, 1.1 * weight, torch.zeros_like(weight)):
        error = (residual - other[:, None] * direction).norm(dim=-1)
        assert (left.norm(dim=-1) < error).all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", SKETCHES)
def test_zero_residual_has_zero_weight_and_others_do_not(name: str, estimator: str) -> None:
    sketch = make_sketch(name, 24, 24, 1)
    residual = torch.cat([torch.zeros(1, 24), torch.ones(1, 24)])
    weight = ESTIMATORS[estimator](sketch, residual, sketch.signs(residual))
    assert weight[0] == 0
    assert weight[1] > 0


@pytest.mark.parametrize("name", SKETCHES)
def test_autocast_and_inference_mode_change_nothing(name: str) -> None:
    x = torch.randn(4, 16, generator=generator(2, "x"))
    make_sketch.cache_clear()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        sketch: Sketch = make_sketch(name, 16, 16, 7)
        inside = sketch.project(x), sketch.expand(sketch.signs(x))
    assert torch.equal(inside[0], sketch.project(x))
    assert torch.equal(inside[1], sketch.expand(sketch.signs(x)))
    assert not sketch.matrix().is_inference()


def test_refused_settings_say_what_is_accepted() -> None:
    with pytest.raises(ValueError, match="gaussian, orthogonal"):
        make_sketch("fourier", 8, 8, 0)
    with pytest.raises(ValueError, match="sketch_size >= 1"):
        make_sketch("gaussian", 8, 0, 0)
