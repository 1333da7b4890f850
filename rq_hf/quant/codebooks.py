# SPDX-License-Identifier: Apache-2.0
"""Scalar codebooks for the coordinates of a rotated unit vector.

Levels can be rounded to int8 times one step. The rounded levels then ARE the codebook: boundaries
and distortion belong to them, and integer and floating-point implementations agree to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from rq_hf.quant.codebook_store import CodebookKey, Distribution, load_levels
from rq_hf.quant.lloyd_max import Floats, distortion

Rounding = Literal["int8", "none"]

MAX_ROUNDING_LOSS = 0.02
"""Largest relative increase of the distortion for which int8 levels are accepted."""


@dataclass(frozen=True, eq=False)
class Codebook:
    """A symmetric scalar codebook for one coordinate of a unit vector of R^D.

    Such a coordinate has standard deviation 1/sqrt(D). Use get_codebook to make one.

    Attributes:
        bits: Width b of a code.
        distribution: What the levels are optimal for: "gaussian" for N(0, 1/D), or "beta" for the
            exact density of the coordinate.
        head_dim: D.
        rounding: "int8" or "none".
        levels: [2**b], float32, ascending, on the CPU; level of code c at position c.
        boundaries: [2**b - 1], float32, the midpoints of neighbouring levels.
        int_levels: [2**b], int8, with levels == step * int_levels; None for rounding "none".
            At most 127 in magnitude, or 63 for 4 bits, so that a level plus 64 is a 7-bit number
            and two 8-entry byte tables can be combined by a bitwise or.
        step: A float32 number; None for rounding "none".
        distortion: Expected squared error of nearest and lookup, as a fraction of the variance
            1/D, for a coordinate that follows `distribution`.
    """

    bits: int
    distribution: Distribution
    head_dim: int
    rounding: Rounding
    levels: Tensor
    boundaries: Tensor
    int_levels: Tensor | None
    step: float | None
    distortion: float
    _on_device: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = field(
        default_factory=dict, repr=False
    )

    def nearest(self, y: Tensor) -> Tensor:
        """Code of the nearest level, uint8, in the shape of y; of two equally near, the lower.

        Args:
            y: Coordinates of unit vectors, any shape, any floating dtype; compared in float32, or
                in float64 if that is what they are.
        """
        wide = y if y.dtype == torch.float64 else y.float()
        _, boundaries = self._tables(wide.device, wide.dtype)
        return torch.bucketize(wide.contiguous(), boundaries, out_int32=True).to(torch.uint8)

    def lookup(self, codes: Tensor) -> Tensor:
        """Levels of codes, float32, in the shape of codes (any integer dtype)."""
        levels, _ = self._tables(codes.device, torch.float32)
        # several times as fast as indexing on a CPU
        return levels.index_select(0, codes.reshape(-1).int()).view(codes.shape)

    def _tables(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if (device, dtype) not in self._on_device:
            with torch.inference_mode(False):
                tables = (self.levels.to(device, dtype), self.boundaries.to(device, dtype))
            self._on_device[device, dtype] = tables
        return self._on_device[device, dtype]


def get_codebook(
    bits: int,
    head_dim: int,
    *,
    distribution: Distribution = "gaussian",
    rounding: Rounding = "int8",
) -> Codebook:
    """The codebook for these settings; one object a process, its levels kept on disk.

    Args:
        bits: 1 to 8.
        head_dim: Dimension D of the vectors, from 1 up ("beta": from 3 up).
        distribution: "gaussian" or "beta"; the two approach each other as D grows.
        rounding: "int8" for levels that are integers times a step, "none" for float32 levels.

    Raises:
        ValueError: For values outside these ranges, and for rounding="int8" where the rounded
            levels would coincide or lose more than 2% of distortion (from about 6 bits on).
    """
    if isinstance(head_dim, bool) or not isinstance(head_dim, int) or head_dim < 1:
        raise ValueError(f"head_dim must be an integer from 1 up, got {head_dim!r}")
    if rounding not in get_args(Rounding):
        raise ValueError(f"rounding must be one of int8, none, got {rounding!r}")
    key = CodebookKey(bits, distribution, None if distribution == "gaussian" else head_dim)
    return _build(key, head_dim, rounding)


@cache
def _build(key: CodebookKey, head_dim: int, rounding: Rounding) -> Codebook:
    exact = load_levels(key)
    density = key.density()
    # from units of the stored density to those of a coordinate of a unit vector
    scale = head_dim**-0.5 / density.std
    integers, step = _round(exact, key.bits, scale) if rounding == "int8" else (None, None)
    levels = _float32(exact * scale) if integers is None else _float32(integers) * step
    loss = distortion(density, levels.astype(np.float64) / scale)
    if integers is not None:
        _check_rounding(integers, loss / distortion(density, exact) - 1, key)
    # codebooks outlive the inference mode or default device under which they may be first asked for
    with torch.inference_mode(False):
        return Codebook(
            bits=key.bits,
            distribution=key.distribution,
            head_dim=head_dim,
            rounding=rounding,
            levels=torch.from_numpy(levels),
            boundaries=torch.from_numpy((levels[1:] + levels[:-1]) / np.float32(2)),
            int_levels=None if integers is None else torch.from_numpy(integers),
            step=None if step is None else float(step),
            distortion=loss,
        )


def _float32(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32)


def _round(exact: Floats, bits: int, scale: float) -> tuple[np.ndarray, np.float32]:
    """Nearest integer levels, [2**bits] int8, and the step that makes them levels."""
    largest = 63 if bits == 4 else 127
    integers = np.rint(exact / exact[-1] * largest).astype(np.int8)
    return integers, np.float32(exact[-1] * scale / largest)


def _check_rounding(integers: np.ndarray, loss: float, key: CodebookKey) -> None:
    collide = bool((np.diff(integers) == 0).any())
    if not collide and loss <= MAX_ROUNDING_LOSS:
        return
    reason = "make levels coincide" if collide else f"raise the distortion by {loss:.1%}"
    raise ValueError(
        f"rounding='int8' would {reason} for {key.bits} bits of distribution="
        f"{key.distribution!r}; use rounding='none' or fewer bits"
    )
