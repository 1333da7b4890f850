# SPDX-License-Identifier: Apache-2.0
"""Launch of the encode kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rq_hf.ops.triton.arguments import Matrix, Rows
from rq_hf.ops.triton.encode import encode_kernel
from rq_hf.ops.triton.launching import (
    compute_dtype,
    generation,
    interpreting,
    on_device,
    processors,
)
from rq_hf.ops.triton.means import Pairing, key_mean, rotated_mean, turns
from rq_hf.ops.triton.plans import (
    plan_book,
    plan_input_scales,
    plan_rotation,
    plan_sketch,
    shape_of,
)
from rq_hf.quant.preconditioning import Preconditioner
from rq_hf.quant.prod_quantizer import ProdQuantizer
from rq_hf.quant.tiles import TileCodec

# registers of a thread at most, where that lets a third program onto a processor
REGISTERS = 168
# major compute capabilities whose products read both operands from shared memory, and which have
# room there for three programs
_ROOMY = (9, 10)
# programs for a processor, at least: enough to even out their times
_PROGRAMS_EACH = 12
# a program loads a matrix as large as two to four tiles: more tiles than these share no better
_MOST_TILES = 8


# launches are not for torch.compile to look into
@torch.compiler.disable
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
    tiles, programs = records.shape[2], 2 * records.shape[:3].numel()
    tiles_each = programs // (_PROGRAMS_EACH * processors(keys.device))
    constants, options = codec_arguments(
        codec, values.dtype, Pairing.of(preconditioner.rope), keys.device
    )
    value_mean = preconditioner.value_mean.contiguous()
    if constants["CENTER_LAST"]:
        value_mean = rotated_mean(
            preconditioner, codec.value_quantizer.rotation, constants["value_rotation"]
        )
    arguments = {
        "keys": rows_of(keys),
        "values": rows_of(values),
        "key_mean": key_mean(preconditioner),
        "turns": turns(preconditioner.rope, start, tiles, codec, keys.device),
        "value_mean": value_mean,
        "records": records,
        "scales": scales,
        "heads": records.shape[1],
        "tiles": tiles,
        "tiles_each": max(1, min(_MOST_TILES, tiles, tiles_each)),
        **constants,
    }
    if not interpreting() and _three_fit(constants, keys.device):
        options["maxnreg"] = REGISTERS
    return arguments, options


def _three_fit(constants: dict[str, Any], device: torch.device) -> bool:
    """Whether shared memory has room for three programs on a processor."""
    small = _small(constants["key_rotation"], constants["value_rotation"])
    return small and generation(device) in _ROOMY


def _small(*matrices: Matrix) -> bool:
    """Whether matrices leave most of the shared memory to rows."""
    return all(x.high.shape[0] <= 128 and not x.has_low.value for x in matrices)


def codec_arguments(
    codec: TileCodec, values: torch.dtype, pairing: Pairing, device: torch.device
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the arguments that do not depend on what is encoded, and options of the launch.

    Args:
        codec: How to pack.
        values: Type of the values.
        pairing: Pairs that RoPE turns.
        device: Where it runs.
    """
    layout = codec.layout
    fragment = layout.order == "fragment"
    narrow = compute_dtype(device, torch.bfloat16)
    # values of 16 bits are rotated as they are, by a matrix of their type
    exact = values in (torch.bfloat16, torch.float16)
    value_dtype = compute_dtype(device, values) if exact else narrow
    keys = codec.key_quantizer
    key_rotation = plan_rotation(keys.rotation, pairing, fragment, narrow, device)
    value_rotation = plan_rotation(codec.value_quantizer.rotation, None, False, value_dtype, device)
    # values of 32 bits are rotated in two parts
    wide = _small(key_rotation, value_rotation) and (exact or generation(device) in _ROOMY)
    constants = {
        "key_rotation": key_rotation,
        "value_rotation": value_rotation,
        "key_book": plan_book(keys.codebook, device),
        "value_book": plan_book(codec.value_quantizer.codebook, device),
        "sketch": plan_sketch(keys, fragment, narrow, device)
        if isinstance(keys, ProdQuantizer)
        else None,
        "input_scales": plan_input_scales(device),
        "shape": shape_of(layout, wide=wide),
        "RULE": codec.value_quantizer.scale,
        "CENTER_LAST": exact,
    }
    return constants, {"num_warps": 8 if codec.head_dim > 128 else 4, "num_stages": 1}


def rows_of(states: Tensor) -> Rows:
    """Returns states as kernels take them."""
    if states.stride(3) != 1:
        states = states.contiguous()
    return Rows(states, *states.stride()[:3])
