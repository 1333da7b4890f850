# SPDX-License-Identifier: Apache-2.0
"""Sign sketches of a residual (QJL): the matrices, and the weight that reads the signs back.

A sketch keeps only s = sign(S r). Both estimators rebuild the residual as w S^T s, and therefore
<q, r> as w <S q, s>, with one number w a vector; they differ in w alone, so whoever reads a record
needs to know neither the estimator nor the kind of sketch.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from rq_hf.quant.precision import no_autocast
from rq_hf.quant.seeding import generator


class Sketch(ABC):
    """A random matrix S, [M, D], with rows of mean square length D.

    Args:
        head_dim: D.
        sketch_size: M, the number of sign bits a vector.
        stream: Source of the matrix, on the CPU.
    """

    name: ClassVar[str]

    def __init__(self, head_dim: int, sketch_size: int, stream: torch.Generator) -> None:
        if head_dim < 1 or sketch_size < 1:
            raise ValueError(
                "a sketch needs head_dim >= 1 and sketch_size >= 1, "
                f"got head_dim={head_dim} and sketch_size={sketch_size}"
            )
        self.head_dim = head_dim
        self.sketch_size = sketch_size
        # a matrix first needed under inference mode must serve outside of it too
        with torch.inference_mode(False):
            self._exact = self._build(stream)
        self._copies: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    @abstractmethod
    def _build(self, stream: torch.Generator) -> Tensor:
        """S in float64, [M, D]."""

    @property
    @abstractmethod
    def unbiased_weight(self) -> float:
        """The w for which w S^T sign(S r) has the expectation r, where |r| = 1."""

    def matrix(
        self,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """S, [M, D], drawn once in float64 and rounded to `dtype`. Shared: do not write to it."""
        key = (torch.device(device or "cpu"), dtype)
        if key not in self._copies:
            with torch.inference_mode(False):
                self._copies[key] = self._exact.to(*key)
        return self._copies[key]

    def project(self, x: Tensor) -> Tensor:
        """S x for every vector of `x` [..., D], as [..., M], in the dtype of `x`."""
        with no_autocast(x.device):
            return x @ self.matrix(x.device, x.dtype).mT

    def signs(self, residual: Tensor) -> Tensor:
        """1 where S r is negative, else 0, for `residual` [..., D]: [..., M], uint8."""
        # zero counts as positive, so one bit suffices
        return (self.project(residual) < 0).to(torch.uint8)

    def expand(self, signs: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """S^T s for the stored `signs` [..., M], uint8, 1 = negative: [..., D] in `dtype`."""
        with no_autocast(signs.device):
            return unfold_signs(signs, dtype) @ self.matrix(signs.device, dtype)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(head_dim={self.head_dim}, sketch_size={self.sketch_size})"


class GaussianSketch(Sketch):
    """Independent entries N(0, 1): the sketch of QJL (arXiv 2406.03482), Definition 3.1."""

    name = "gaussian"

    def _build(self, stream: torch.Generator) -> Tensor:
        shape = (self.sketch_size, self.head_dim)
        return torch.randn(shape, generator=stream, dtype=torch.float64)

    @property
    def unbiased_weight(self) -> float:
        """sqrt(pi / 2) / M, from E |g| = sqrt(2 / pi) (QJL, Lemma 3.2)."""
        return math.sqrt(math.pi / 2) / self.sketch_size


class OrthogonalSketch(Sketch):
    """sqrt(D) times rows of Haar orthogonal matrices.

    Rows within a block of D are orthogonal to each other, which removes the repetition among
    Gaussian rows and with it more than half of the variance. M > D stacks independent blocks,
    M < D keeps the first M rows.
    """

    name = "orthogonal"

    def _build(self, stream: torch.Generator) -> Tensor:
        blocks = math.ceil(self.sketch_size / self.head_dim)
        stacked = torch.cat([_haar_orthogonal(self.head_dim, stream) for _ in range(blocks)])
        return math.sqrt(self.head_dim) * stacked[: self.sketch_size]

    @property
    def unbiased_weight(self) -> float:
        """1 / (M sqrt(D) E |u|), u being a coordinate of a uniform point of the unit sphere.

        E |u| = Gamma(D / 2) / (sqrt(pi) Gamma((D + 1) / 2)), so the weight is exact for every D
        and tends to that of the Gaussian sketch.
        """
        d = self.head_dim
        log_ratio = math.lgamma((d + 1) / 2) - math.lgamma(d / 2)
        return math.sqrt(math.pi / d) * math.exp(log_ratio) / self.sketch_size


SKETCHES: dict[str, type[Sketch]] = {
    sketch.name: sketch for sketch in (GaussianSketch, OrthogonalSketch)
}


@lru_cache(maxsize=256)
def make_sketch(
    name: str, head_dim: int, sketch_size: int, seed: int, *labels: str | int
) -> Sketch:
    """The sketch called `name`, drawn from the stream of `seed` and `labels`; cached."""
    if name not in SKETCHES:
        raise ValueError(f"sketch must be one of {', '.join(SKETCHES)}, got {name!r}")
    stream = generator(seed, "sketch", name, head_dim, *labels)
    return SKETCHES[name](head_dim, sketch_size, stream)


def unfold_signs(signs: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """+1 for 0 and -1 for 1, in `dtype`, same shape."""
    return 1 - 2 * signs.to(dtype)


def unbiased_weight(sketch: Sketch, residual: Tensor, signs: Tensor) -> Tensor:
    """|r| times the constant that makes the estimate exact in the mean over sketches, [...].

    See QJL (arXiv 2406.03482), Lemma 3.2, and TurboQuant (arXiv 2504.19874), Algorithm 2.
    """
    return sketch.unbiased_weight * torch.linalg.vector_norm(residual, dim=-1)


def mmse_weight(sketch: Sketch, residual: Tensor, signs: Tensor) -> Tensor:
    """<r, S^T s> / |S^T s|^2, the w of the least |r - w S^T s| for each vector, [...].

    It shrinks the estimate towards zero: a bias shared by all inner products, for less variance.
    """
    direction = sketch.expand(signs, residual.dtype)
    energy = direction.square().sum(-1)
    # S^T s vanishes only where rows of S cancel each other exactly; any weight is right there
    return (residual * direction).sum(-1) / torch.where(energy > 0, energy, 1)


Estimator = Callable[[Sketch, Tensor, Tensor], Tensor]

ESTIMATORS: dict[str, Estimator] = {"unbiased": unbiased_weight, "mmse": mmse_weight}


def _haar_orthogonal(size: int, stream: torch.Generator) -> Tensor:
    gaussian = torch.randn((size, size), generator=stream, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    # QR fixes the signs of R by convention; undoing that makes Q uniform (Mezzadri 2007)
    return q * torch.sign(torch.diagonal(r))
