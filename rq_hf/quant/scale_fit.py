# SPDX-License-Identifier: Apache-2.0
"""Codes and scale of rotated vectors: how a vector is laid over the levels of a codebook."""

from typing import NamedTuple

import torch
from torch import Tensor

from rq_hf.quant.codebooks import Codebook

SCALE_RULES = ("norm", "least_squares", "search")

# how far a unit vector is stretched before its levels are chosen; 1 is what "least_squares" does
INPUT_SCALES = (0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15, 1.2, 1.3)

# beyond 4 bits one binary search is cheaper than a comparison for every boundary
_COMPARED_BITS = 4
_LARGEST_HALF = 65504.0


class Fit(NamedTuple):
    """codes [..., D], uint8, and scale [...] in the working dtype, before any rounding."""

    codes: Tensor
    scale: Tensor


def fit_codes(y: Tensor, codebook: Codebook, rule: str) -> Fit:
    """Codes and unrounded scale of rotated vectors `y`, [..., D], float32 or float64.

    With z = y / |y| and l(c) the levels of the codes c:

    * "norm": c nearest to z, scale |y| (TurboQuant, arXiv 2504.19874, Algorithm 1);
    * "least_squares": the same c, scale <y, l(c)> / |l(c)|^2, the best for these codes;
    * "search": c nearest to a z for the a of `INPUT_SCALES` with the least squared error, and the
      least-squares scale of those.

    A zero vector has the scale 0. `rule` is one of `SCALE_RULES`, checked by the caller.
    """
    norm = _norm(y)
    z = y / torch.where(norm > 0, norm, 1)[..., None]
    if rule == "search":
        codes = nearest_codes(z * _best_input_scale(z, codebook)[..., None], codebook)
    else:
        codes = nearest_codes(z, codebook)
    if rule == "norm":
        return Fit(codes, norm)
    levels = look_up(codes, codebook, y.dtype)
    return Fit(codes, norm * ((z * levels).sum(-1) / levels.square().sum(-1)))


def nearest_codes(z: Tensor, codebook: Codebook) -> Tensor:
    """The number of boundaries below each coordinate, uint8; equal to `codebook.nearest(z)`."""
    if codebook.bits > _COMPARED_BITS:
        return codebook.nearest(z)
    first, *others = codebook.boundaries.tolist()
    # bytes add several times faster than a mixture of bytes and bools
    codes = (z > first).view(torch.uint8)
    for boundary in others:
        codes += (z > boundary).view(torch.uint8)
    return codes


def look_up(codes: Tensor, codebook: Codebook, dtype: torch.dtype = torch.float32) -> Tensor:
    """The levels of `codes` [..., D], uint8, in `dtype`; equal to `codebook.lookup(codes)`."""
    return codebook.lookup(codes).to(dtype)


def to_half(scale: Tensor) -> Tensor:
    """`scale` in float16; what float16 cannot hold becomes its largest number, not infinity."""
    return scale.clamp(-_LARGEST_HALF, _LARGEST_HALF).to(torch.float16)


def _norm(y: Tensor) -> Tensor:
    """|y| of the last dimension, also where the squares would overflow or vanish."""
    peak = y.abs().amax(-1)
    shrunk = y / torch.where(peak > 0, peak, 1)[..., None]
    return peak * torch.linalg.vector_norm(shrunk, dim=-1)


def _best_input_scale(z: Tensor, codebook: Codebook) -> Tensor:
    """For each unit vector the a whose levels, least-squares scaled, come closest to it, [...].

    The squared error is 1 - <z, l>^2 / |l|^2. The codebook is symmetric, so magnitudes suffice:
    half of the comparisons, and no codes.
    """
    magnitudes = z.abs()
    best = torch.ones(z.shape[:-1], dtype=z.dtype, device=z.device)
    if codebook.bits == 1:
        # one magnitude: the codes are the signs, whatever the scale
        return best
    explained = torch.full_like(best, -1)
    for a in INPUT_SCALES:
        levels = _level_magnitudes(magnitudes * a, codebook)
        gain = (magnitudes * levels).sum(-1).square_().div_(levels.square_().sum(-1))
        best = torch.where(gain > explained, a, best)
        explained = torch.maximum(gain, explained)
    return best


def _level_magnitudes(magnitudes: Tensor, codebook: Codebook) -> Tensor:
    """|l| of the level nearest to each magnitude, same shape and dtype."""
    if codebook.bits > _COMPARED_BITS:
        return look_up(nearest_codes(magnitudes, codebook), codebook, magnitudes.dtype)
    half = 2 ** (codebook.bits - 1)
    levels = codebook.levels.double()[half:].tolist()
    boundaries = codebook.boundaries.double()[half:].tolist()
    out = torch.full_like(magnitudes, levels[0])
    above = torch.empty_like(magnitudes)
    for boundary, lower, upper in zip(boundaries, levels[:-1], levels[1:], strict=True):
        out.add_(torch.gt(magnitudes, boundary, out=above), alpha=upper - lower)
    return out
