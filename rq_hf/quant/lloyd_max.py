# SPDX-License-Identifier: Apache-2.0
"""Lloyd-Max scalar quantizers, in float64, for the two densities a rotated coordinate can have.

A Lloyd-Max quantizer minimises the mean squared error: every level is the mean of its cell, and
every boundary is the midpoint of two levels (S. P. Lloyd, "Least squares quantization in PCM", IEEE
Trans. Inf. Theory 28, 1982). TurboQuant (arXiv 2504.19874, section 3.1) quantizes the coordinates
of a randomly rotated unit vector this way.

Both densities are even and log-concave, so the quantizer is unique and symmetric (A. V. Trushkin,
IEEE Trans. Inf. Theory 28, 1982): only the levels above zero are solved for. The moments of a cell
have closed forms, and Newton's method on a tridiagonal system replaces Lloyd's slow iteration.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray
from scipy import special
from scipy.linalg import solve_banded

Floats = NDArray[np.float64]

TOLERANCE = 1e-12
"""Largest last Newton step of a solution, in standard deviations of the density."""

_MAX_STEPS = 500


class Density(ABC):
    """An even, log-concave density. All methods take points of its non-negative half."""

    std: float
    edge: float
    """Right end of the support, possibly infinite."""

    @abstractmethod
    def pdf(self, x: Floats) -> Floats:
        """Density at x."""

    @abstractmethod
    def mass(self, low: Floats, high: Floats) -> Floats:
        """Probability of [low, high]."""

    @abstractmethod
    def first_moment(self, low: Floats, high: Floats) -> Floats:
        """Integral of x pdf(x) over [low, high]."""

    @abstractmethod
    def spread(self, fraction: Floats) -> Floats:
        """Points below which lie these fractions of the positive half of pdf^(1/3), normalised.

        Many-level quantizers place their levels with this density (P. F. Panter and W. Dite,
        Proc. IRE 39, 1951), so it gives the solver its first guess.
        """


class Gaussian(Density):
    """N(0, 1), the limit of a unit vector's coordinate times sqrt(D)."""

    std = 1.0
    edge = np.inf

    def pdf(self, x: Floats) -> Floats:
        return np.exp(-0.5 * x * x) / np.sqrt(2 * np.pi)

    def mass(self, low: Floats, high: Floats) -> Floats:
        # erf keeps the relative precision of small cells near zero, erfc that of the tail
        near = special.erf(high / np.sqrt(2)) - special.erf(low / np.sqrt(2))
        far = special.erfc(low / np.sqrt(2)) - special.erfc(high / np.sqrt(2))
        return 0.5 * np.where(low < 0.5, near, far)

    def first_moment(self, low: Floats, high: Floats) -> Floats:
        # expm1, since the difference of two nearby densities would cancel
        return self.pdf(low) * -np.expm1(0.5 * (low - high) * (low + high))

    def spread(self, fraction: Floats) -> Floats:
        return np.sqrt(3.0) * special.ndtri(0.5 * (1 + fraction))


class UnitSphere(Density):
    """One coordinate of a uniformly distributed unit vector of R^D.

    Its density on [-1, 1] is proportional to (1 - x^2)^((D - 3) / 2): x^2 follows a
    Beta(1/2, (D - 1)/2) law. See TurboQuant (arXiv 2504.19874), lemma 1.

    Args:
        head_dim: Dimension D of the vector, at least 3.

    Raises:
        ValueError: For D below 3, where the density grows without bound towards -1 and 1 (D = 2) or
            is two points (D = 1), and the theory above does not apply.
    """

    edge = 1.0

    def __init__(self, head_dim: int) -> None:
        if head_dim < 3:
            raise ValueError(
                f"the Beta density of a unit vector's coordinate needs head_dim >= 3, got "
                f"{head_dim}: below, it is not log-concave and its quantizer not unique; "
                "use distribution='gaussian'"
            )
        self.head_dim = head_dim
        self.std = head_dim**-0.5
        self._half = 0.5 * (head_dim - 1)
        self._height = _height_at_zero(head_dim)

    def pdf(self, x: Floats) -> Floats:
        return self._height * np.exp((self._half - 1) * np.log1p(-x * x))

    def mass(self, low: Floats, high: Floats) -> Floats:
        near = special.betainc(0.5, self._half, high**2) - special.betainc(0.5, self._half, low**2)
        far = special.betaincc(0.5, self._half, low**2) - special.betaincc(0.5, self._half, high**2)
        return 0.5 * np.where(low < 0.5 * self.std, near, far)

    def first_moment(self, low: Floats, high: Floats) -> Floats:
        with np.errstate(divide="ignore"):
            # the ratio (1 - high^2) / (1 - low^2), which is zero at the edge
            log_ratio = np.log1p((low - high) * (low + high) / ((1 - low) * (1 + low)))
        weight = np.exp(self._half * np.log1p(-low * low)) * -np.expm1(self._half * log_ratio)
        return self._height * weight / (2 * self._half)

    def spread(self, fraction: Floats) -> Floats:
        return np.sqrt(special.betaincinv(0.5, 0.5 + self.head_dim / 6, fraction))


def _height_at_zero(head_dim: int) -> float:
    """Gamma(D/2) / (sqrt(pi) Gamma((D - 1)/2)), the density of UnitSphere at zero.

    By its recurrence over D, as the quotient of two large Gamma values would lose digits.
    """
    dims = np.arange(2 + head_dim % 2, head_dim, 2, dtype=np.float64)
    return float(np.prod(dims / (dims - 1))) * (0.5 if head_dim % 2 else 1 / np.pi)


def solve(density: Density, bits: int) -> Floats:
    """Levels of the Lloyd-Max quantizer, [2**bits] float64, ascending, exactly symmetric.

    Newton's method on "level = mean of its cell". A Newton step that does not shrink the residual
    is replaced by a step of Lloyd's own iteration, which always descends, so that the solution is
    found from any start. Ends when a Newton step is below TOLERANCE standard deviations.

    Raises:
        ArithmeticError: If that does not happen within 500 steps.
    """
    count = 2 ** (bits - 1)
    levels = density.spread((np.arange(count) + 0.5) / count)
    for _ in range(_MAX_STEPS):
        means = cell_means(density, levels)
        newton = levels + _newton_step(density, levels, means)
        if np.abs(newton - levels).max() < TOLERANCE * density.std:
            return np.concatenate([-newton[::-1], newton])
        levels = newton if _improves(density, newton, means - levels) else means
    raise ArithmeticError(f"Lloyd-Max did not converge for {bits} bits of {density!r}")


def cell_means(density: Density, levels: Floats) -> Floats:
    """Mean of the cell of each positive level, [n] float64; the lowest cell begins at zero."""
    low, high = _cells(density, levels)
    return density.first_moment(low, high) / density.mass(low, high)


def distortion(density: Density, levels: Floats) -> float:
    """Expected squared error over the variance, for any symmetric levels [2**bits], ascending.

    The cells end at the midpoints of the given levels, which need not be optimal.
    """
    positive = levels[len(levels) // 2 :]
    low, high = _cells(density, positive)
    mass, moment = density.mass(low, high), density.first_moment(low, high)
    # both halves count, hence the two
    return float(1 + 2 * np.sum(positive * (positive * mass - 2 * moment)) / density.std**2)


def _cells(density: Density, levels: Floats) -> tuple[Floats, Floats]:
    inner = 0.5 * (levels[1:] + levels[:-1])
    return np.concatenate([[0.0], inner]), np.concatenate([inner, [density.edge]])


def _newton_step(density: Density, levels: Floats, means: Floats) -> Floats:
    """Solves (I - d means / d levels) step = means - levels, a tridiagonal system."""
    low, high = _cells(density, levels)
    mass, height = density.mass(low, high), density.pdf(high[:-1])
    # a boundary moves by half of what either of its two levels moves
    from_high = 0.5 * height * (high[:-1] - means[:-1]) / mass[:-1]
    from_low = 0.5 * height * (means[1:] - low[1:]) / mass[1:]
    bands = np.zeros((3, len(levels)))
    bands[0, 1:] = -from_high
    bands[1] = 1.0
    bands[1, :-1] -= from_high
    bands[1, 1:] -= from_low
    bands[2, :-1] = -from_low
    return solve_banded((1, 1), bands, means - levels)


def _improves(density: Density, levels: Floats, residual: Floats) -> bool:
    """Whether levels are valid and their residual is smaller than the given one."""
    ladder = np.concatenate([[0.0], levels, [density.edge]])
    if not np.all(np.diff(ladder) > 0):
        return False
    change = cell_means(density, levels) - levels
    return bool(np.abs(change).max() < np.abs(residual).max())
