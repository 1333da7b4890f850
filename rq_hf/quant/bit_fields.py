# SPDX-License-Identifier: Apache-2.0
"""Fields of a few bits each, side by side in 32-bit words."""

import torch
from torch import Tensor


def join_fields(fields: Tensor, width: int, dim: int = -1) -> Tensor:
    """Words that hold field i of `fields` in bits `width * i` and up.

    Args:
        fields: Values below `2**width`, uint8, with `32 // width` entries along `dim`.
        width: Bits of a field; divides 32.
        dim: The dimension of `fields` that the words replace.

    Returns:
        int32, the shape of `fields` without `dim`. The last field reaches the sign bit.
    """
    words = fields.select(dim, 0).to(torch.int32)
    for index in range(1, 32 // width):
        words |= fields.select(dim, index).to(torch.int32) << (width * index)
    return words


def split_fields(words: Tensor, width: int, dim: int = -1) -> Tensor:
    """Fields of int32 words, uint8, along the new dimension `dim`: undoes `join_fields`."""
    # the shift copies the sign bit downwards; the mask removes the copies
    mask = (1 << width) - 1
    return torch.stack(
        [((words >> shift) & mask).to(torch.uint8) for shift in range(0, 32, width)], dim
    )
