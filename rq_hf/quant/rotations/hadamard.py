# SPDX-License-Identifier: Apache-2.0
"""A Hadamard matrix behind random signs, extended to dimensions that are not powers of two."""

import math

import torch
from torch import Tensor

from rq_hf.quant.rotations.base import Rotation


class HadamardRotation(Rotation):
    """Random signs, then Hadamard(2^k) kron Hartley(m), where D = 2^k m and m is odd.

    For a power of two that is Sylvester's matrix, and all entries are +-1/sqrt(D). The orthogonal
    Hartley matrix of odd order has no zeros (the cosine transform has some), so that every output
    depends on every input; no entry exceeds sqrt(2/D).

    All images of one basis vector lie at +-1/sqrt(D) when m = 1. A codebook without a level there
    serves such inputs badly unless their scale is fitted; `butterfly` and `dense` have no such
    weak spot.
    """

    name = "hadamard"

    def _build(self, generator: torch.Generator) -> Tensor:
        signs = 2 * torch.randint(2, (self.head_dim,), generator=generator, device="cpu") - 1
        odd = self.head_dim // (self.head_dim & -self.head_dim)
        return torch.kron(_sylvester(self.head_dim // odd), _hartley(odd)) * signs


def _sylvester(order: int) -> Tensor:
    """Hadamard matrix over sqrt(order), for a power of two; float64."""
    step = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64, device="cpu")
    matrix = torch.ones(1, 1, dtype=torch.float64, device="cpu")
    while len(matrix) < order:
        matrix = torch.kron(step, matrix)
    return matrix / math.sqrt(order)


def _hartley(order: int) -> Tensor:
    """(cos + sin)(2 pi i j / order) / sqrt(order), orthogonal and symmetric; float64."""
    index = torch.arange(order, device="cpu")
    # Reduced as integers, because a small angle has the smaller rounding error
    angle = (torch.outer(index, index) % order).double() * (2 * math.pi / order)
    return (angle.cos() + angle.sin()) / math.sqrt(order)
