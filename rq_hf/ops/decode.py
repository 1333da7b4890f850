# SPDX-License-Identifier: Apache-2.0
"""Packed tiles to dense keys and values."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rq_hf.ops.dispatch import device_obstacle, use_triton
from rq_hf.quant.precision import no_autocast
from rq_hf.quant.tiles import TileCodec

# rotated numbers of keys that are held in float32 at a time
_NUMBERS_AT_ONCE = 1 << 24


def decode(
    codec: TileCodec,
    records: Tensor,
    scales: Tensor,
    *,
    dtype: torch.dtype,
    rotated: bool,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Returns keys and values `[B, Hk, n * T, D]` in `dtype`, computed in float32.

    Args:
        codec: What packed them.
        records: Packed words, int32 `[B, Hk, n, W]`.
        scales: float16 `[B, Hk, n, S, T]`.
        dtype: Floating dtype of the result.
        rotated: Leave keys and values in the rotated coordinates of their quantizers.
        impl: "auto" (kernels on a GPU), "reference" or "triton".

    Raises:
        ValueError: Shapes do not match, or kernels were asked for and cannot run.
    """
    _check(codec, records, scales)
    with no_autocast(records.device):
        if not use_triton(impl, why_not(records, dtype), records.device):
            return codec.decode(records, scales, dtype=dtype, rotated=rotated)
        from rq_hf.ops.triton.decode_launch import decode_rotated

        if rotated:
            return decode_rotated(codec, records, scales, dtype)
        return _decode_parts(codec, records, scales, dtype)


def why_not(records: Tensor, dtype: torch.dtype) -> str | None:
    """Why kernels cannot decode these records; None if they can."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it decodes to float32, bfloat16 or float16, not {dtype}"
    return device_obstacle(records.device)


def _decode_parts(
    codec: TileCodec, records: Tensor, scales: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Decodes some tiles at a time with the kernel, and rotates them back."""
    from rq_hf.ops.triton.decode_launch import decode_rotated

    length = codec.layout.tile_length
    batch, heads, tiles = records.shape[:3]
    keys = records.new_empty(batch, heads, tiles * length, codec.head_dim, dtype=dtype)
    values = torch.empty_like(keys)
    for part in _parts(tiles, batch * heads * length * codec.head_dim):
        rows = slice(part.start * length, part.stop * length)
        key, value = decode_rotated(codec, records[:, :, part], scales[:, :, part], torch.float32)
        keys[:, :, rows] = codec.key_quantizer.rotation.inverse(key)
        values[:, :, rows] = codec.value_quantizer.rotation.inverse(value)
    return keys, values


def _parts(tiles: int, numbers: int) -> Iterator[slice]:
    """Yields ranges of tiles, each of so many `numbers`, that fit the working memory."""
    step = max(1, _NUMBERS_AT_ONCE // max(1, numbers))
    return (slice(start, min(start + step, tiles)) for start in range(0, tiles, step))


def _check(codec: TileCodec, records: Tensor, scales: Tensor) -> None:
    layout = codec.layout
    if records.dim() != 4 or records.shape[3] != layout.record_words:
        raise ValueError(
            f"records must be [B, Hk, n, {layout.record_words}], got {list(records.shape)}"
        )
    expected = (*records.shape[:3], layout.scale_rows, layout.tile_length)
    if tuple(scales.shape) != expected or scales.device != records.device:
        raise ValueError(
            f"scales must be {list(expected)} on {records.device}, got {list(scales.shape)} on "
            f"{scales.device}"
        )
