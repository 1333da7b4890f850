# SPDX-License-Identifier: Apache-2.0
"""The quantizer for inner products: an MSE record, and signs of what it leaves over."""

import torch
from torch import Tensor

from rq_hf.quant.codebooks import Codebook
from rq_hf.quant.mse_quantizer import MSEQuantizer, pack_rows, unpack_rows, working_copy
from rq_hf.quant.precision import no_autocast
from rq_hf.quant.qjl import ESTIMATORS, Sketch, unfold_signs
from rq_hf.quant.rotations import Rotation
from rq_hf.quant.scale_fit import to_half
from rq_hf.quant.types import MSECodes, PackedVectors, ProdCodes


class ProdQuantizer:
    """Inner products: an MSE record, and the signs of a sketch of its residual.

    Implements TurboQuant (arXiv 2504.19874), Algorithm 2. The residual is what the *stored* record
    leaves, float16 scale included, in rotated coordinates, where the sketch acts too.

    Args:
        rotation: Rotation of R^D.
        codebook: Levels for b - 1 bits; the sign is the b-th.
        sketch: Sketch of R^D.
        scale: Scale rule of the MSE record.
        estimator: "unbiased" (the papers) or "mmse", see `rq_hf.quant.qjl`.

    Raises:
        ValueError: Where the parts differ in head_dim, or a name is unknown.
    """

    def __init__(
        self,
        rotation: Rotation,
        codebook: Codebook,
        sketch: Sketch,
        *,
        scale: str = "least_squares",
        estimator: str = "mmse",
    ) -> None:
        if sketch.head_dim != rotation.head_dim:
            raise ValueError(
                f"the sketch is for head_dim {sketch.head_dim} and the rotation for "
                f"{rotation.head_dim}; build both for one head_dim"
            )
        if estimator not in ESTIMATORS:
            raise ValueError(f"estimator must be one of {', '.join(ESTIMATORS)}, got {estimator!r}")
        self.mse = MSEQuantizer(rotation, codebook, scale=scale)
        self.sketch = sketch
        self.estimator = estimator

    @property
    def rotation(self) -> Rotation:
        """The rotation of the MSE record."""
        return self.mse.rotation

    @property
    def codebook(self) -> Codebook:
        """The codebook of the MSE record."""
        return self.mse.codebook

    @property
    def head_dim(self) -> int:
        """D, the length of a vector."""
        return self.mse.head_dim

    def quantize(self, x: Tensor) -> ProdCodes:
        """Codes of the finite vectors `x`, [..., D], any floating dtype."""
        return self.quantize_rotated(self.rotation.forward(working_copy(x, self.head_dim)))

    def quantize_rotated(self, y: Tensor) -> ProdCodes:
        """Codes of vectors that are rotated already, [..., D], float32 or float64."""
        record = self.mse.quantize_rotated(y)
        residual = y - self.mse.dequantize(record, rotated=True, dtype=y.dtype)
        signs = self.sketch.signs(residual)
        weight = ESTIMATORS[self.estimator](self.sketch, residual, signs)
        return ProdCodes(*record, signs, to_half(weight))

    def dequantize(
        self,
        record: ProdCodes,
        *,
        rotated: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """The vectors, [..., D], computed in `dtype`; `rotated` leaves them rotated."""
        y = self.mse.dequantize(_mse_part(record), rotated=True, dtype=dtype)
        weight = record.residual_scale.to(dtype)[..., None]
        y = y + weight * self.sketch.expand(record.signs, dtype)
        return y if rotated else self.rotation.inverse(y)

    def encode(self, x: Tensor) -> PackedVectors:
        """The packed record of `x`, [..., N, D]."""
        record = self.quantize(x)
        return PackedVectors(
            pack_rows(record.codes, self.codebook.bits),
            record.scale,
            pack_rows(record.signs, 1),
            record.residual_scale,
            x.shape[-2],
        )

    def unpack(self, record: PackedVectors) -> ProdCodes:
        """The codes behind a packed record, [..., N, D], [..., N], [..., N, M] and [..., N].

        Raises:
            ValueError: For a record without signs.
        """
        if record.sign_words is None or record.residual_scale is None:
            raise ValueError("the record has no signs: it was encoded by an MSEQuantizer; use that")
        mse = self.mse.unpack(record)
        signs = unpack_rows(record.sign_words, 1, record.length, self.sketch.sketch_size)
        return ProdCodes(*mse, signs, record.residual_scale)

    def decode(self, record: PackedVectors) -> Tensor:
        """The vectors of a packed record, [..., N, D], float32."""
        return self.dequantize(self.unpack(record))

    def inner_product(self, query: Tensor, record: PackedVectors) -> Tensor:
        """<q, x> of every query [..., L, D] with every vector of the record: [..., L, N].

        The sum of <q, s l(c)> and w <S q, s>, q rotated: neither part rebuilds a residual.
        """
        codes = self.unpack(record)
        q = self.rotation.forward(working_copy(query, self.head_dim))
        y = self.mse.dequantize(_mse_part(codes), rotated=True, dtype=q.dtype)
        with no_autocast(q.device):
            signed = self.sketch.project(q) @ unfold_signs(codes.signs, q.dtype).mT
            return q @ y.mT + codes.residual_scale.to(q.dtype)[..., None, :] * signed

    def __repr__(self) -> str:
        parts = f"{self.mse!r}, {self.sketch!r}, estimator={self.estimator!r}"
        return f"{type(self).__name__}({parts})"


def _mse_part(record: ProdCodes) -> MSECodes:
    return MSECodes(record.codes, record.scale)
