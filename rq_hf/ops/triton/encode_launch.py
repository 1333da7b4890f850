# SPDX-License-Identifier: Apache-2.0
"""Launch of the encode kernel."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rq_hf.ops.triton.arguments import KeyMean, Matrix, Rows, Turns
from rq_hf.ops.triton.encode import encode_kernel
from rq_hf.ops.triton.launching import compute_dtype, on_device, processors
from rq_hf.ops.triton.plans import (
    Pairing,
    plan_book,
    plan_input_scales,
    plan_rotation,
    plan_sketch,
    shape_of,
)
from rq_hf.quant.preconditioning import Preconditioner
from rq_hf.quant.prod_quantizer import ProdQuantizer
from rq_hf.quant.rope import RopeTable
from rq_hf.quant.tiles import TileCodec

# programs for a processor, at least: enough to even out their times
_PROGRAMS_EACH = 8
# a program loads a matrix as large as two to four tiles: more tiles than these share no better
_MOST_TILES = 8


def encode_tiles(
    codec: TileCodec, preconditioner: Preconditioner, keys: Tensor, values: Tensor, start: int
) -> tuple[Tensor, Tensor]:
    """See `rq_hf.ops.encode`."""
    layout = codec.layout
    grid = (*keys.shape[:2], keys.shape[2] // layout.tile_length)
    records = torch.empty(*grid, layout.record_words, dtype=torch.int32, device=keys.device)
    shape = (*grid, layout.scale_rows, layout.tile_length)
    scales = torch.empty(shape, dtype=torch.float16, device=keys.device)
    if records.numel():
        with on_device(keys.device):
            arguments, options = encode_arguments(
                codec, preconditioner, keys, values, start, records, scales
            )
            launch_grid = (-(-grid[2] // arguments["tiles_each"]), grid[0] * grid[1], 2)
            encode_kernel[launch_grid](**arguments, **options)
    return records, scales


def encode_arguments(
    codec: TileCodec,
    preconditioner: Preconditioner,
    keys: Tensor,
    values: Tensor,
    start: int,
    records: Tensor,
    scales: Tensor,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns arguments of `encode_kernel` and options of its launch."""
    layout, device = codec.layout, keys.device
    fragment = layout.order == "fragment"
    narrow = compute_dtype(device, torch.bfloat16)
    # values of 16 bits are rotated as they are, by a matrix of their type
    exact = values.dtype in (torch.bfloat16, torch.float16)
    value_dtype = compute_dtype(device, values.dtype) if exact else narrow
    pairing = Pairing.of(preconditioner.rope)
    key_quantizer = codec.key_quantizer
    key_rotation = plan_rotation(key_quantizer.rotation, pairing, fragment, narrow, device)
    value_rotation = plan_rotation(
        codec.value_quantizer.rotation, None, False, value_dtype, device
    )
    value_mean = preconditioner.value_mean.contiguous()
    if exact:
        value_mean = _rotated_mean(codec, value_mean, value_rotation)
    tiles, programs = records.shape[2], 2 * records.shape[:3].numel()
    tiles_each = programs // (_PROGRAMS_EACH * processors(device))
    arguments = {
        "keys": _rows(keys),
        "values": _rows(values),
        "key_mean": _key_mean(preconditioner, pairing),
        "turns": _turns(preconditioner.rope, start, tiles, codec, device),
        "value_mean": value_mean,
        "key_rotation": key_rotation,
        "value_rotation": value_rotation,
        "key_book": plan_book(key_quantizer.codebook, device),
        "value_book": plan_book(codec.value_quantizer.codebook, device),
        "sketch": plan_sketch(key_quantizer, fragment, narrow, device)
        if isinstance(key_quantizer, ProdQuantizer)
        else None,
        "input_scales": plan_input_scales(device),
        "records": records,
        "scales": scales,
        "heads": records.shape[1],
        "tiles": tiles,
        "tiles_each": max(1, min(_MOST_TILES, tiles, tiles_each)),
        "shape": shape_of(layout),
        "RULE": codec.value_quantizer.scale,
        "CENTER_LAST": exact,
    }
    return arguments, {"num_warps": 8 if codec.head_dim > 128 else 4, "num_stages": 1}


def _rows(states: Tensor) -> Rows:
    if states.stride(3) != 1:
        states = states.contiguous()
    return Rows(states, *states.stride()[:3])


def _key_mean(preconditioner: Preconditioner, pairing: Pairing) -> KeyMean:
    dims = pairing.dims(preconditioner.balance.shape[-1]).to(preconditioner.balance.device)
    pre, post, balance = (
        x[..., dims]
        for x in (preconditioner.pre_mean, preconditioner.post_mean, preconditioner.balance)
    )
    return KeyMean(
        pre=(balance * pre).contiguous(),
        cross=(balance * pre.flip(-2)).contiguous(),
        post=(balance * post).contiguous(),
        balance=balance.contiguous(),
    )


def _turns(
    rope: RopeTable | None, start: int, tiles: int, codec: TileCodec, device: torch.device
) -> Turns | None:
    """Angles of the tiles' first rows, and of the rows from there on."""
    if rope is None:
        return None
    length = codec.layout.tile_length
    return Turns(
        *_cos_sin(rope, start, tiles, length, codec.head_dim, device),
        *_row_cos_sin(rope, length, codec.head_dim, device),
        pairs=_pairs(Pairing.of(rope), codec.head_dim, device),
    )


@lru_cache(maxsize=64)
def _row_cos_sin(
    rope: RopeTable, length: int, head_dim: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    return _cos_sin(rope, 0, length, 1, head_dim, device)


def _cos_sin(
    rope: RopeTable, start: int, count: int, step: int, head_dim: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and sines at every `step`-th position from `start`: float32 [count, D / 2].

    Pairs that do not turn have the angle 0. Angles are float64, as in `RopeTable`.
    """
    inv_freq = rope.inv_freq.to(device=device, dtype=torch.float64)
    inv_freq = F.pad(inv_freq, (0, head_dim // 2 - inv_freq.shape[0]))
    position = start + step * torch.arange(count, dtype=torch.float64, device=device)
    angle = position[:, None] * inv_freq
    return angle.cos().float(), angle.sin().float()


@lru_cache(maxsize=64)
def _pairs(pairing: Pairing, head_dim: int, device: torch.device) -> Tensor | None:
    if pairing.is_halves(head_dim):
        return None
    return pairing.dims(head_dim).to(device=device, dtype=torch.int32).contiguous()


def _rotated_mean(codec: TileCodec, mean: Tensor, rotation: Matrix) -> Tensor:
    """The mean of the values as their rotated rows have it, float32 [B, Hk, D padded]."""
    exact = codec.value_quantizer.rotation.matrix(mean.device, torch.float64)
    rotated = (mean.double() @ exact.T / rotation.unscale).float()
    return F.pad(rotated, (0, rotation.high.shape[-1] - codec.head_dim))
