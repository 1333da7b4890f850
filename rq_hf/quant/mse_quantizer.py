# SPDX-License-Identifier: Apache-2.0
"""The quantizer of least squared error: rotate, then lay over a codebook."""

from collections.abc import Mapping

import torch
from torch import Tensor

from rq_hf.quant.codebooks import Codebook
from rq_hf.quant.packing import pack_codes, unpack_codes
from rq_hf.quant.precision import no_autocast
from rq_hf.quant.rotations import Rotation
from rq_hf.quant.scale_fit import SCALE_RULES, fit_codes, look_up, to_half
from rq_hf.quant.types import MSECodes, PackedVectors

# the plain order fills whole words with 32 vectors
_ROW_BLOCK = 32


class MSEQuantizer:
    """Least squared error: codebook indices of the rotated vector, and one scale.

    Implements TurboQuant (arXiv 2504.19874), Algorithm 1, for any rotation.

    Args:
        rotation: Rotation of R^D.
        codebook: Levels for a coordinate of a unit vector of R^D.
        scale: "norm" (the paper), "least_squares" or "search", see `scale_fit.fit_codes`.
        grade_bits: Bits for each grade of the multivectors that carry a vector. Only grade 1 holds
            anything, so {1: bits} is the one setting that means something.

    Raises:
        ValueError: Where rotation and codebook differ in head_dim, for an unknown scale rule, and
            for grade_bits that spend bits on an empty grade.
    """

    def __init__(
        self,
        rotation: Rotation,
        codebook: Codebook,
        *,
        scale: str = "least_squares",
        grade_bits: Mapping[int, int] | None = None,
    ) -> None:
        _check_parts(rotation, codebook, scale)
        _check_grade_bits(grade_bits, codebook.bits)
        self.rotation = rotation
        self.codebook = codebook
        self.scale: str = scale

    @property
    def head_dim(self) -> int:
        """D, the length of a vector."""
        return self.rotation.head_dim

    def quantize(self, x: Tensor) -> MSECodes:
        """Codes of the finite vectors `x`, [..., D], any floating dtype."""
        return self.quantize_rotated(self.rotation.forward(working_copy(x, self.head_dim)))

    def quantize_rotated(self, y: Tensor) -> MSECodes:
        """Codes of vectors that are rotated already, [..., D], float32 or float64."""
        codes, scale = fit_codes(y, self.codebook, self.scale)
        return MSECodes(codes, to_half(scale))

    def dequantize(
        self,
        record: MSECodes,
        *,
        rotated: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """The vectors, [..., D], computed in `dtype`; `rotated` leaves them rotated."""
        y = record.scale.to(dtype)[..., None] * look_up(record.codes, self.codebook, dtype)
        return y if rotated else self.rotation.inverse(y)

    def encode(self, x: Tensor) -> PackedVectors:
        """The packed record of `x`, [..., N, D]."""
        record = self.quantize(x)
        words = pack_rows(record.codes, self.codebook.bits)
        return PackedVectors(words, record.scale, length=x.shape[-2])

    def unpack(self, record: PackedVectors) -> MSECodes:
        """The codes behind a packed record, [..., N, D] and [..., N]."""
        codes = unpack_rows(record.words, self.codebook.bits, record.length, self.head_dim)
        return MSECodes(codes, record.scale)

    def decode(self, record: PackedVectors) -> Tensor:
        """The vectors of a packed record, [..., N, D], float32."""
        return self.dequantize(self.unpack(record))

    def inner_product(self, query: Tensor, record: PackedVectors) -> Tensor:
        """<q, x> of every query [..., L, D] with every vector of the record: [..., L, N].

        The query is rotated instead of the record. Float32; float64 for float64 queries.
        """
        q = self.rotation.forward(working_copy(query, self.head_dim))
        y = self.dequantize(self.unpack(record), rotated=True, dtype=q.dtype)
        with no_autocast(q.device):
            return q @ y.mT

    def __repr__(self) -> str:
        name, bits = type(self).__name__, self.codebook.bits
        return f"{name}({self.rotation!r}, bits={bits}, scale={self.scale!r})"


def working_copy(x: Tensor, head_dim: int) -> Tensor:
    """`x` in float32 at least, its last dimension checked."""
    if x.shape[-1:] != (head_dim,):
        raise ValueError(f"vectors must be [..., {head_dim}], got the shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"vectors must be floating-point numbers, got {x.dtype}")
    return x if x.dtype == torch.float64 else x.to(torch.float32)


def _check_parts(rotation: Rotation, codebook: Codebook, scale: str) -> None:
    if rotation.head_dim != codebook.head_dim:
        raise ValueError(
            f"the rotation is for head_dim {rotation.head_dim} and the codebook for "
            f"{codebook.head_dim}; build both for one head_dim"
        )
    if scale not in SCALE_RULES:
        raise ValueError(f"scale must be one of {', '.join(SCALE_RULES)}, got {scale!r}")


def _check_grade_bits(grade_bits: Mapping[int, int] | None, bits: int) -> None:
    if grade_bits is None:
        return
    if any(grade not in range(4) for grade in grade_bits):
        raise ValueError(f"multivectors of Cl(3,0) have the grades 0 to 3, got {dict(grade_bits)}")
    if any(grade_bits.get(grade, 0) for grade in (0, 2, 3)):
        raise ValueError(
            "grades 0, 2 and 3 of an embedded vector are zero before and after a rotor's sandwich, "
            f"so bits for them would store nothing; use {{1: {bits}}}, got {dict(grade_bits)}"
        )
    if grade_bits.get(1) != bits:
        raise ValueError(
            f"grade_bits must give grade 1 the bits of the codebook, {{1: {bits}}}, "
            f"got {dict(grade_bits)}"
        )


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Words of `codes` [..., N, C], N padded with zeros to whole words."""
    if codes.shape[-2] == 0:
        return codes.new_empty((*codes.shape[:-2], 0), dtype=torch.int32)
    padding = -codes.shape[-2] % _ROW_BLOCK
    return pack_codes(torch.nn.functional.pad(codes, (0, 0, 0, padding)), bits, "plain")


def unpack_rows(words: Tensor, bits: int, length: int, columns: int) -> Tensor:
    """The first `length` rows of packed codes, [..., N, C]: undoes `pack_rows`."""
    if length == 0:
        return words.new_empty((*words.shape[:-1], 0, columns), dtype=torch.uint8)
    padded = length + -length % _ROW_BLOCK
    return unpack_codes(words, bits, padded, columns, "plain")[..., :length, :]
