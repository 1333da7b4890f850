# SPDX-License-Identifier: Apache-2.0
"""Bit planes along the rows: the order for any number of columns. Drawn in `packing`."""

import torch
from torch import Tensor

from rq_hf.quant.bit_fields import join_fields, split_fields


def fits(rows: int, columns: int, bits: int) -> bool:
    """Whether a matrix of codes can be stored in plain order."""
    return 1 <= bits <= 8 and rows > 0 and rows % 32 == 0 and columns > 0


def pack(codes: Tensor, bits: int) -> Tensor:
    """Words in plain order, int32 [..., R * C * bits // 32], of codes, uint8 [..., R, C]."""
    *batch, rows, columns = codes.shape
    groups = codes.reshape(*batch, rows // 32, 32, columns)
    planes = [join_fields((groups >> plane) & 1, 1, dim=-2) for plane in range(bits)]
    return torch.stack(planes, -1).reshape(*batch, rows * columns * bits // 32)


def unpack(words: Tensor, bits: int, rows: int, columns: int) -> Tensor:
    """Codes, uint8 [..., R, C], of words in plain order: undoes `pack`."""
    batch = words.shape[:-1]
    planes = words.reshape(*batch, rows // 32, columns, bits)
    codes = split_fields(planes[..., 0], 1, dim=-2)
    for plane in range(1, bits):
        codes |= split_fields(planes[..., plane], 1, dim=-2) << plane
    return codes.reshape(*batch, rows, columns)
