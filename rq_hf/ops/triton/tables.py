# SPDX-License-Identifier: Apache-2.0
"""Constant tables of the attention kernels, made once for each codec, RoPE table and device."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from rq_hf.quant.codebooks import Codebook
from rq_hf.quant.mse_quantizer import MSEQuantizer
from rq_hf.quant.rope import RopeTable
from rq_hf.quant.tiles import TileCodec

# angles are tabulated for so many tiles more than asked for
_SPARE_TILES = 256


@dataclass(frozen=True, eq=False)
class CodecTables:
    """What the kernels need to know of a codec.

    Attributes:
        key_rotation: float32 [D, D].
        value_rotation: float32 [D, D].
        sketched: Sketch times key rotation, float32 [M, D]; the key rotation again without sketch.
        key_levels: float32 levels, [2**bits].
        value_levels: The same for values.
        key_words: The integer levels as four words of bytes, see `level_words`.
        value_words: The same for values.
        key_step: Value of an integer level's unit.
        value_step: The same for values.
    """

    key_rotation: Tensor
    value_rotation: Tensor
    sketched: Tensor
    key_levels: Tensor
    value_levels: Tensor
    key_words: tuple[int, int, int, int]
    value_words: tuple[int, int, int, int]
    key_step: float
    value_step: float


@dataclass(frozen=True, eq=False)
class RopeOperands:
    """Cosines and sines as the kernels read them. PAIRS: half of rotary_dim, padded with zeros.

    Attributes:
        operands: float16, cos and sin of 0 .. T - 1 positions, in the order of tensor-core operands.
        rows: float32 [T, 2, PAIRS], the same as plain rows.
        tiles: float32 [tiles, 2, PAIRS], cos and sin of multiples of T positions.
        origin: float32 [2, PAIRS], cos and sin of the first packed position.
    """

    operands: Tensor
    rows: Tensor
    tiles: Tensor
    origin: Tensor


_codecs: WeakKeyDictionary[TileCodec, dict[torch.device, CodecTables]] = WeakKeyDictionary()
_ropes: WeakKeyDictionary[RopeTable, dict[tuple, RopeOperands]] = WeakKeyDictionary()


def codec_tables(codec: TileCodec, device: torch.device) -> CodecTables:
    """Returns the tables of `codec` on a device."""
    kept = _codecs.setdefault(codec, {})
    if device not in kept:
        with torch.inference_mode(False):
            kept[device] = _make_codec_tables(codec, device)
    return kept[device]


def rope_operands(
    rope: RopeTable, *, start: int, length: int, tiles: int, device: torch.device
) -> RopeOperands:
    """Returns tables for tiles of `length` tokens, of which the first starts at position `start`."""
    kept = _ropes.setdefault(rope, {})
    key = (start, length, device)
    if key not in kept or kept[key].tiles.shape[0] < tiles:
        with torch.inference_mode(False):
            kept[key] = _make_rope_operands(rope, start, length, tiles + _SPARE_TILES, device)
    return kept[key]


def padded_pairs(rope: RopeTable) -> int:
    """Pairs in the tables: a power of two, at least 16."""
    return max(16, 1 << (rope.inv_freq.shape[0] - 1).bit_length())


def level_words(codebook: Codebook) -> tuple[int, int, int, int]:
    """The integer levels as bytes of four int32 words; of 4 bits plus 64, so that all are 7-bit."""
    if codebook.int_levels is None:
        return (0, 0, 0, 0)
    offset = 64 if codebook.bits == 4 else 0
    levels = [int(level) + offset for level in codebook.int_levels]
    return struct.unpack("<4i", struct.pack("16b", *(levels + [0] * (16 - len(levels)))))


def _make_codec_tables(codec: TileCodec, device: torch.device) -> CodecTables:
    key, value = codec.key_quantizer, codec.value_quantizer
    key_rotation = key.rotation.matrix(device).contiguous()
    sketched = key_rotation
    if not isinstance(key, MSEQuantizer):
        exact = key.sketch.matrix(None, torch.float64) @ key.rotation.matrix(None, torch.float64)
        sketched = exact.to(device, torch.float32).contiguous()
    return CodecTables(
        key_rotation=key_rotation,
        value_rotation=value.rotation.matrix(device).contiguous(),
        sketched=sketched,
        key_levels=key.codebook.levels.to(device),
        value_levels=value.codebook.levels.to(device),
        key_words=level_words(key.codebook),
        value_words=level_words(value.codebook),
        key_step=key.codebook.step or 1.0,
        value_step=value.codebook.step or 1.0,
    )


def _make_rope_operands(
    rope: RopeTable, start: int, length: int, tiles: int, device: torch.device
) -> RopeOperands:
    pairs = padded_pairs(rope)
    rows = _angles(rope, torch.arange(length), pairs)
    return RopeOperands(
        operands=_in_operand_order(rows).to(device, torch.float16),
        rows=rows.to(device, torch.float32),
        tiles=_angles(rope, torch.arange(tiles) * length, pairs).to(device, torch.float32),
        origin=_angles(rope, torch.tensor([start]), pairs)[0].to(device, torch.float32),
    )


def _angles(rope: RopeTable, position: Tensor, pairs: int) -> Tensor:
    """cos and sin, float64 `[n, 2, pairs]`, zero beyond the table's own pairs."""
    angle = position.double()[:, None] * rope.inv_freq.double().cpu()
    table = torch.stack([angle.cos(), angle.sin()], 1)
    return torch.nn.functional.pad(table, (0, pairs - angle.shape[1]))


def _in_operand_order(rows: Tensor) -> Tensor:
    """[T, 2, PAIRS] -> [PAIRS / 16, 2, T / 16, 8, 4, 2, 2, 2] as `attend_tiles.rope_table` reads it.

    Lane 4 g + t takes pairs t PAIRS / 4 onwards, four for each product of 16 columns.
    """
    length, _, pairs = rows.shape
    # mt h g | cos or sin | t block hi j
    grid = rows.reshape(length // 16, 2, 8, 2, 4, pairs // 16, 2, 2)
    return grid.permute(5, 3, 0, 2, 4, 6, 1, 7).contiguous()
