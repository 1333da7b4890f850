# SPDX-License-Identifier: Apache-2.0
"""A uniformly random orthogonal matrix, the rotation of TurboQuant."""

import torch
from torch import Tensor

from rq_hf.quant.rotations.base import Rotation


class DenseRotation(Rotation):
    """Haar-distributed orthogonal matrix; the determinant is +1 or -1.

    See TurboQuant (arXiv 2504.19874), Algorithm 1. The Q of a Gaussian matrix is Haar only if the
    diagonal of its R is positive: Mezzadri, arXiv math-ph/0609050.
    """

    name = "dense"

    def _build(self, generator: torch.Generator) -> Tensor:
        shape = (self.head_dim, self.head_dim)
        gaussian = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
        q, r = torch.linalg.qr(gaussian)
        return torch.where(r.diagonal() < 0, -q, q)
