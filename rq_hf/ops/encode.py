# SPDX-License-Identifier: Apache-2.0
"""Keys and values to packed tiles: the public function and its reference."""

from __future__ import annotations

import torch
from torch import Tensor

from rq_hf.ops.dispatch import device_obstacle, use_triton
from rq_hf.quant.precision import no_autocast
from rq_hf.quant.preconditioning import Preconditioner
from rq_hf.quant.rope import RopeTable
from rq_hf.quant.tiles import TileCodec

# tiles whose preconditioned copies the reference holds at a time
_TILES_AT_ONCE = 64

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# products of larger rotations do not fit on the chip
_LARGEST_HEAD_DIM = 256


def encode(
    codec: TileCodec,
    preconditioner: Preconditioner,
    keys: Tensor,
    values: Tensor,
    start: int,
    *,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Returns packed records and scales of whole tiles of tokens.

    Kernels and reference agree but for coordinates that lie within about 2**-15 of a row's norm
    from a boundary of two codes.

    Args:
        codec: How to pack.
        preconditioner: What keys and values are freed of before.
        keys: Keys as cached `[B, Hk, n * T, D]`, any floating dtype, any strides.
        values: The same shape.
        start: Index in the sequence of the first row.
        impl: "auto" (kernels on a GPU, where they can run), "reference" or "triton".

    Returns:
        records `[B, Hk, n, W]`, int32, and scales `[B, Hk, n, S, T]`, float16, as
        `TileCodec.encode` makes them.

    Raises:
        ValueError: Shapes do not match, or kernels were asked for and cannot run.
    """
    _check(codec, preconditioner, keys, values)
    # on a CPU kernels are interpreted: for tests that ask for it
    if impl == "auto" and keys.device.type == "cpu":
        impl = "reference"
    with no_autocast(keys.device):
        if use_triton(impl, why_not(codec, preconditioner, keys, values), keys.device):
            from rq_hf.ops.triton.encode_launch import encode_tiles

            return encode_tiles(codec, preconditioner, keys, values, start)
        return encode_reference(codec, preconditioner, keys, values, start)


def encode_reference(
    codec: TileCodec, preconditioner: Preconditioner, keys: Tensor, values: Tensor, start: int
) -> tuple[Tensor, Tensor]:
    """See `encode`. Temporary memory does not grow with the number of tiles."""
    layout = codec.layout
    grid = (*keys.shape[:2], keys.shape[2] // layout.tile_length)
    records = keys.new_empty(*grid, layout.record_words, dtype=torch.int32)
    scales = keys.new_empty(*grid, layout.scale_rows, layout.tile_length, dtype=torch.float16)
    for first in range(0, grid[2], _TILES_AT_ONCE):
        tiles = slice(first, first + _TILES_AT_ONCE)
        at = first * layout.tile_length
        rows = slice(at, at + _TILES_AT_ONCE * layout.tile_length)
        records[:, :, tiles], scales[:, :, tiles] = codec.encode(
            preconditioner.precondition_keys(keys[:, :, rows], start + at),
            preconditioner.center_values(values[:, :, rows]),
        )
    return records, scales


def why_not(
    codec: TileCodec, preconditioner: Preconditioner, keys: Tensor, values: Tensor
) -> str | None:
    """Why kernels cannot encode these inputs; None if they can."""
    layout, rope = codec.layout, preconditioner.rope
    obstacle = device_obstacle(keys.device)
    if obstacle is not None:
        return obstacle
    if keys.dtype not in _DTYPES or values.dtype not in _DTYPES:
        return f"it takes float32, bfloat16 and float16, got {keys.dtype} and {values.dtype}"
    if layout.head_dim % 2 or layout.head_dim > _LARGEST_HEAD_DIM:
        return f"it takes even head_dim up to {_LARGEST_HEAD_DIM}, got {layout.head_dim}"
    if rope is not None and not _turns_pairs(rope, layout.head_dim):
        return "the table of RoPE does not fit the keys"
    if layout.order == "fragment" and (layout.tile_length, layout.sketch_size) == (64, 64):
        return "it cannot pack 64 signs a key in tiles of 64 tokens"
    return None


def _turns_pairs(rope: RopeTable, head_dim: int) -> bool:
    return rope.interleaved is not None and rope.rotary_dim <= head_dim


def _check(codec: TileCodec, preconditioner: Preconditioner, keys: Tensor, values: Tensor) -> None:
    length = codec.layout.tile_length
    if keys.dim() != 4 or keys.shape[2] % length or keys.shape[3] != codec.head_dim:
        raise ValueError(
            f"keys must be [B, Hk, n * {length}, {codec.head_dim}]: whole tiles of {length} "
            f"tokens, got {list(keys.shape)}"
        )
    if values.shape != keys.shape or values.device != keys.device:
        raise ValueError(
            f"values must be {list(keys.shape)} on {keys.device} like the keys, got "
            f"{list(values.shape)} on {values.device}"
        )
    expected = (*keys.shape[:2], codec.head_dim)
    if tuple(preconditioner.balance.shape) != expected:
        raise ValueError(
            f"the preconditioner is for {list(preconditioner.balance.shape)}, "
            f"but the keys need {list(expected)}"
        )
