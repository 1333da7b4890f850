# SPDX-License-Identifier: Apache-2.0
"""No rotation: the baseline that the others are measured against."""

import torch
from torch import Tensor

from rq_hf.quant.rotations.base import Rotation


class NoRotation(Rotation):
    """The identity. `forward` and `inverse` return their argument itself."""

    name = "none"

    def _build(self, generator: torch.Generator) -> Tensor:
        return torch.eye(self.head_dim, dtype=torch.float64, device="cpu")

    def _multiply(self, x: Tensor, *, inverse: bool) -> Tensor:
        self._check(x)
        return x
