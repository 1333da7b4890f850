# SPDX-License-Identifier: Apache-2.0
"""What every rotation offers: its matrix, and the way there and back."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from rq_hf.quant.precision import no_autocast


class Rotation(ABC):
    """Orthogonal map of R^D. A subclass says how its matrix is drawn.

    Args:
        head_dim: Number of coordinates D.
        generator: CPU generator that the matrix is drawn from.

    Raises:
        ValueError: If `head_dim` is not positive.
    """

    name: ClassVar[str]

    def __init__(self, head_dim: int, generator: torch.Generator) -> None:
        if head_dim < 1:
            raise ValueError(f"head_dim must be at least 1, got {head_dim}")
        self.head_dim = head_dim
        # A matrix first needed under inference mode must serve outside of it too
        with torch.inference_mode(False):
            self._exact = self._build(generator)
        self._copies: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    @abstractmethod
    def _build(self, generator: torch.Generator) -> Tensor:
        """The matrix, [D, D], float64 on the CPU."""

    def matrix(
        self,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Matrix [D, D] whose rows are the new coordinates: y = x @ matrix.T.

        Built once in float64 and rounded to `dtype`. The tensor is shared: do not write to it.

        Args:
            device: Where the matrix is to lie; None means the CPU.
            dtype: Any floating point type.
        """
        key = (_with_index(torch.device(device or "cpu")), dtype)
        if key not in self._copies:
            with torch.inference_mode(False):
                self._copies[key] = self._exact.to(*key)
        return self._copies[key]

    def forward(self, x: Tensor) -> Tensor:
        """Rotated coordinates, [..., D], of vectors `x`, [..., D].

        Computed in the type of `x`; half types are computed in float32 and rounded once.

        Raises:
            ValueError: If the last dimension is not D or the numbers are not floating point.
        """
        return self._multiply(x, inverse=False)

    def inverse(self, y: Tensor) -> Tensor:
        """Original coordinates, [..., D], of rotated vectors `y`, [..., D]; see `forward`."""
        return self._multiply(y, inverse=True)

    def _multiply(self, x: Tensor, *, inverse: bool) -> Tensor:
        self._check(x)
        wide = torch.promote_types(x.dtype, torch.float32)
        matrix = self.matrix(x.device, wide)
        with no_autocast(x.device):
            return (x.to(wide) @ (matrix if inverse else matrix.T)).to(x.dtype)

    def _check(self, x: Tensor) -> None:
        if x.ndim == 0 or x.shape[-1] != self.head_dim:
            raise ValueError(
                f"this rotation is for vectors of {self.head_dim} coordinates, "
                f"got shape {tuple(x.shape)}"
            )
        if not x.is_floating_point():
            raise ValueError(f"expected floating point numbers, got {x.dtype}; convert them")


def _with_index(device: torch.device) -> torch.device:
    """The device with its index: `cuda` is whichever card is current."""
    if device.type == "cpu" or device.index is not None:
        return device
    return torch.empty(0, device=device).device
