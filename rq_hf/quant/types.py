# SPDX-License-Identifier: Apache-2.0
"""Typed records of quantized vectors, as codes and as packed words."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class MSECodes(NamedTuple):
    """Codebook indices and one scale a vector.

    codes: Index of the level of each rotated coordinate, [..., D], uint8.
    scale: Factor of the levels, [...], float16.
    """

    codes: Tensor
    scale: Tensor


class ProdCodes(NamedTuple):
    """An MSE record followed by one sign bit for every row of the sketch of its residual.

    codes: Index of the level of each rotated coordinate, [..., D], uint8.
    scale: Factor of the levels, [...], float16.
    signs: 1 where the sketched residual is negative, else 0, [..., M], uint8.
    residual_scale: Factor of S^T (±1) in the reconstruction of the residual, [...], float16.
    """

    codes: Tensor
    scale: Tensor
    signs: Tensor
    residual_scale: Tensor


@dataclass(frozen=True, eq=False)
class PackedVectors:
    """`length` quantized vectors in bits, in the plain order of `rq_hf.quant.packing`.

    words: Packed codes, [..., w], int32.
    scale: Factors of the levels, [..., N], float16.
    sign_words: Packed signs of the sketched residual, [..., v], int32; None without a sketch.
    residual_scale: Factors of the reconstructed residual, [..., N], float16, or None.
    length: N. The words themselves are padded to a multiple of 32 vectors.
    """

    words: Tensor
    scale: Tensor
    sign_words: Tensor | None = None
    residual_scale: Tensor | None = None
    length: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes held by all tensors of the record, padding included."""
        tensors = (self.words, self.scale, self.sign_words, self.residual_scale)
        return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))
