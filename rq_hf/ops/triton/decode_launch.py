# SPDX-License-Identifier: Apache-2.0
"""Launch of the decode kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rq_hf.ops.triton.arguments import Rows
from rq_hf.ops.triton.decode import decode_kernel
from rq_hf.ops.triton.launching import compute_dtype, on_device
from rq_hf.ops.triton.plans import plan_levels, plan_sketch, shape_of
from rq_hf.quant.prod_quantizer import ProdQuantizer
from rq_hf.quant.tiles import TileCodec

# numbers that a program decodes
_NUMBERS_EACH = 8192


# launches are not for torch.compile to look into
@torch.compiler.disable
def decode_rotated(
    codec: TileCodec, records: Tensor, scales: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Returns rotated keys and values `[B, Hk, n * T, D]` in `dtype`, of one launch."""
    length = codec.layout.tile_length
    grid = records.shape[:3]
    shape = (*grid[:2], grid[2] * length, codec.head_dim)
    keys, values = (torch.empty(shape, dtype=dtype, device=records.device) for _ in range(2))
    if keys.numel():
        with on_device(records.device):
            arguments, options = decode_arguments(codec, records, scales, keys, values)
            blocks = grid[2] * length // arguments["ROWS"]
            decode_kernel[blocks, grid[0] * grid[1], 2](**arguments, **options)
    return keys, values


def decode_arguments(
    codec: TileCodec, records: Tensor, scales: Tensor, keys: Tensor, values: Tensor
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns arguments of `decode_kernel` and options of its launch."""
    layout, device = codec.layout, records.device
    if records.stride(3) != 1:
        records = records.contiguous()
    if scales.stride()[3:] != (layout.tile_length, 1):
        scales = scales.contiguous()
    key_quantizer, narrow = codec.key_quantizer, compute_dtype(device, torch.bfloat16)
    shape = shape_of(layout)
    arguments = {
        "records": Rows(records, *records.stride()[:3]),
        "scales": Rows(scales, *scales.stride()[:3]),
        "keys": keys,
        "values": values,
        "key_levels": plan_levels(key_quantizer.codebook, device),
        "value_levels": plan_levels(codec.value_quantizer.codebook, device),
        "sketch": plan_sketch(key_quantizer, False, narrow, device)
        if isinstance(key_quantizer, ProdQuantizer)
        else None,
        "heads": records.shape[1],
        "shape": shape,
        "KEY_BITS": layout.key_bits,
        "VALUE_BITS": layout.value_bits,
        "ROWS": max(16, min(64, _NUMBERS_EACH // shape.padded.value)),
    }
    return arguments, {"num_warps": 4, "num_stages": 1}
