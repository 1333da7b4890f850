# SPDX-License-Identifier: Apache-2.0
"""The Lloyd-Max solver against closed forms, numerical integration and known distortions."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import special
from scipy.integrate import quad

from rq_hf.quant import lloyd_max
from rq_hf.quant.lloyd_max import (
    TOLERANCE,
    Density,
    Floats,
    Gaussian,
    UnitSphere,
    cell_means,
    distortion,
    solve,
)

DENSITIES = {
    "gaussian": Gaussian(),
    **{f"beta{dim}": UnitSphere(dim) for dim in (3, 4, 5, 64, 80, 128, 256, 4096)},
}
# relative error that quad is asked for below, and a factor for its own estimate being one
QUAD = 1e-11


def integral(density: Density, power: int, low: float, high: float) -> float:
    """Integral of x^power pdf(x), without the closed forms."""
    # quad would miss a narrow density in a wide interval; beyond 40 std nothing is left
    end = min(high, 40 * density.std, density.edge)
    value, _ = quad(
        lambda x: x**power * float(density.pdf(np.float64(x))),
        low,
        end,
        epsabs=0,
        epsrel=QUAD / 10,
        limit=500,
    )
    return value


# J. Max (IRE Trans. Inf. Theory 6, 1960) printed 0.03454 and 0.009497 for the last two
@pytest.mark.parametrize(
    ("bits", "expected"), [(1, "0.3634"), (2, "0.1175"), (3, "0.03455"), (4, "0.009501")]
)
def test_gaussian_distortion_is_the_known_one(bits: int, expected: str) -> None:
    assert f"{distortion(Gaussian(), solve(Gaussian(), bits)):.4g}" == expected


def test_one_gaussian_bit_has_its_closed_form() -> None:
    levels = solve(Gaussian(), 1)
    np.testing.assert_allclose(levels, np.sqrt(2 / np.pi) * np.array([-1, 1]), rtol=1e-15)
    assert distortion(Gaussian(), levels) == pytest.approx(1 - 2 / np.pi, rel=1e-14)


@pytest.mark.parametrize("bits", range(1, 9))
def test_three_dimensions_are_uniform(bits: int) -> None:
    # Archimedes: a coordinate of a point on the sphere is uniform on [-1, 1]
    density = UnitSphere(3)
    levels = solve(density, bits)
    expected = (2 * np.arange(2**bits) + 1) / 2**bits - 1
    np.testing.assert_allclose(levels, expected, rtol=0, atol=TOLERANCE)
    # 1 - 2 (...) cancels down to 4^-bits, so the error is absolute: some eps
    assert distortion(density, levels) == pytest.approx(4.0**-bits, rel=0, abs=1e-14)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("name", DENSITIES)
def test_levels_are_symmetric_ascending_means_of_their_cells(name: str, bits: int) -> None:
    density = DENSITIES[name]
    levels = solve(density, bits)
    assert levels.shape == (2**bits,) and levels.dtype == np.float64
    assert np.array_equal(levels, -levels[::-1])
    assert np.all(np.diff(levels) > 0) and levels[-1] < density.edge
    positive = levels[2 ** (bits - 1) :]
    # the residual is the Newton step times I - J, whose row sums are below 2
    np.testing.assert_allclose(
        cell_means(density, positive), positive, rtol=0, atol=2 * TOLERANCE * density.std
    )


@pytest.mark.parametrize("name", DENSITIES)
def test_moments_match_numerical_integration(name: str) -> None:
    density = DENSITIES[name]
    points = np.array([0.0, 1e-3, 0.02, 0.3, 0.49, 0.51, 1.2, 1.5]) * density.std
    low, high = points, np.append(points[1:], density.edge)
    cells = list(zip(low, high, strict=True))
    expected_mass = [integral(density, 0, *cell) for cell in cells]
    expected_moment = [integral(density, 1, *cell) for cell in cells]
    # a mass is a difference of numbers below 1/2, each rounded to some eps: 1e-15 in all
    np.testing.assert_allclose(density.mass(low, high), expected_mass, rtol=QUAD, atol=1e-15)
    np.testing.assert_allclose(density.first_moment(low, high), expected_moment, rtol=QUAD)
    assert density.mass(low, high).sum() == pytest.approx(0.5, rel=1e-14)


@pytest.mark.parametrize("name", DENSITIES)
def test_density_has_the_stated_variance(name: str) -> None:
    density = DENSITIES[name]
    assert 2 * integral(density, 2, 0, density.edge) == pytest.approx(density.std**2, rel=QUAD)


@pytest.mark.parametrize("start", [3.0, 10.0, 30.0])
def test_gaussian_tail_keeps_its_relative_precision(start: float) -> None:
    # E[x | x > a] by the scaled complementary error function, which never underflows
    expected = np.sqrt(2 / np.pi) / special.erfcx(start / np.sqrt(2))
    low, high = np.array([start]), np.array([np.inf])
    mean = Gaussian().first_moment(low, high) / Gaussian().mass(low, high)
    # exp(-a^2/2) multiplies the rounding error of its argument by that argument
    np.testing.assert_allclose(mean, expected, rtol=2 * start**2 * np.finfo(np.float64).eps)


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("name", ["gaussian", "beta4", "beta128"])
def test_distortion_matches_numerical_integration_for_any_levels(name: str, bits: int) -> None:
    density = DENSITIES[name]
    # coarsely rounded, so that the levels are not the means of their cells
    levels = np.round(solve(density, bits) / density.std, 1) * density.std
    positive = levels[2 ** (bits - 1) :]
    ends = [0.0, *(positive[1:] + positive[:-1]) / 2, density.edge]
    error = 0.0
    for level, low, high in zip(positive, ends[:-1], ends[1:], strict=True):
        moments = [integral(density, power, low, high) for power in range(3)]
        error += 2 * (moments[2] - 2 * level * moments[1] + level**2 * moments[0])
    # the moments cancel by up to their ratio to the error
    slack = 10 * QUAD
    assert distortion(density, levels) == pytest.approx(error / density.std**2, rel=0, abs=slack)
    assert distortion(density, levels) > distortion(density, solve(density, bits))


def test_coordinates_of_random_unit_vectors_have_the_distortion() -> None:
    dim, bits = 5, 2
    x = np.random.default_rng(0).standard_normal((200_000, dim))
    coordinate = x[:, 0] / np.linalg.norm(x, axis=1)
    levels = solve(UnitSphere(dim), bits)
    squared = np.abs(coordinate[:, None] - levels).min(axis=1) ** 2 * dim
    bound = 4 * squared.std() / np.sqrt(len(squared))
    assert abs(squared.mean() - distortion(UnitSphere(dim), levels)) <= bound


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_beta_approaches_gaussian_as_one_over_the_dimension(bits: int) -> None:
    gaussian = solve(Gaussian(), bits)
    error = [np.abs(solve(UnitSphere(d), bits) * d**0.5 - gaussian).max() for d in (256, 4096)]
    # to first order in 1/D the ratio is 16; the second order moves it by O(1/256)
    assert error[0] / error[1] == pytest.approx(16, rel=0.1)


class BadStart(Gaussian):
    """A Gaussian whose first guess is far from the solution."""

    def __init__(self, width: float) -> None:
        self.width = width

    def spread(self, fraction: Floats) -> Floats:
        return self.width * fraction


@pytest.mark.parametrize("width", [1e-3, 0.1, 6.0])
def test_a_bad_start_leads_to_the_same_levels(width: float) -> None:
    # each of the two is within a Newton step of the solution
    np.testing.assert_allclose(
        solve(BadStart(width), 4), solve(Gaussian(), 4), rtol=0, atol=2 * TOLERANCE
    )


def test_too_few_steps_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lloyd_max, "_MAX_STEPS", 2)
    with pytest.raises(ArithmeticError, match="4 bits"):
        solve(Gaussian(), 4)


@pytest.mark.parametrize("dim", [-1, 0, 1, 2])
def test_fewer_than_three_dimensions_are_refused(dim: int) -> None:
    with pytest.raises(ValueError, match=r"head_dim >= 3.*gaussian"):
        UnitSphere(dim)
