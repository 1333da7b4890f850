# SPDX-License-Identifier: Apache-2.0
"""Constant tables of the attention kernels, made once for each codec, RoPE table and device."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from scipy import special
from torch import Tensor
from torch.utils._pytree import tree_leaves

from rq_hf.quant.codebooks import Codebook
from rq_hf.quant.mse_quantizer import MSEQuantizer
from rq_hf.quant.rope import RopeTable
from rq_hf.quant.tiles import TileCodec

# angles are tabulated for so many tiles more than asked for
_SPARE_TILES = 256
# radians from a tile's centre to its end up to which a pair is slow: 2 J_8(1.6) = 8e-6
_SLOW = 1.6
_TERMS = 8


@dataclass(frozen=True, eq=False)
class Matrix:
    """A matrix as the sum of two in float16.

    Attributes:
        parts: float16 [2, D, D], the nearest numbers, and what these leave; both times sqrt(D),
            with which a Hadamard matrix has no second part.
        has_low: Whether the second part has anything but zeros.
    """

    parts: Tensor
    has_low: bool

    @classmethod
    def of(cls, exact: Tensor, device: torch.device) -> Matrix:
        """Splits a float64 matrix."""
        high = exact.half()
        low = (exact - high.double()).half()
        parts = torch.stack([high, low]).contiguous().to(device)
        return cls(parts, bool(low.any()))


@dataclass(frozen=True, eq=False)
class CodecTables:
    """What the kernels need to know of a codec.

    Attributes:
        key_rotation: Transposed, see `Matrix`.
        value_rotation: As it is.
        sketched: Sketch times key rotation, transposed; the key rotation again without sketch.
        key_levels: float32 levels, [2**bits].
        value_levels: The same for values.
        key_words: The integer levels as four words of bytes, see `level_words`.
        value_words: The same for values.
        key_step: Value of an integer level's unit.
        value_step: The same for values.
    """

    key_rotation: Matrix
    value_rotation: Matrix
    sketched: Matrix
    key_levels: Tensor
    value_levels: Tensor
    key_words: tuple[int, int, int, int]
    value_words: tuple[int, int, int, int]
    key_step: float
    value_step: float


@dataclass(frozen=True, eq=False)
class RopeOperands:
    """Cosines and sines as the kernels read them. PAIRS: half of rotary_dim, padded with zeros.

    The inner product of a row with RoPE_n(mean) is a sum of a cos(n w) + b sin(n w) over the pairs.
    Within a tile of T tokens, positions from the tile's centre are u T / 2 with -1 < u < 1.

    * Fast pairs, the first 4 `halves`: two columns of a table, cos and sin of the positions.
    * Slow pairs, which turn little within a tile: cos(x u) and sin(x u) with x = w T / 2 are sums
      of the first eight Chebyshev polynomials (coefficients 2 (-1)^(k // 2) J_k(x), half for k = 0;
      the rest is below 1e-5), so that all slow pairs together take eight columns.

    Attributes:
        halves: Groups of four fast pairs; odd if there are slow ones, else even.
        operands: float16, the table in the order of tensor-core operands.
        rows: float32 [T, 2, PAIRS], cos and sin of positions from the centre, as plain rows.
        tiles: float32 [tiles, 2, PAIRS], cos and sin of the tiles' centres.
        turned_terms: float16 [tiles, steps, 256]: what cos and sin of a slow pair, counted from
            the first token on, add to the polynomials of each tile. Eight pairs a step, high and
            low parts, in operand order; zero beyond the table's own pairs.
        origin: float32 [2, PAIRS], cos and sin of the first packed position.
    """

    halves: int
    operands: Tensor
    rows: Tensor
    tiles: Tensor
    turned_terms: Tensor
    origin: Tensor

    @property
    def steps(self) -> int:
        """Groups of eight slow pairs."""
        return self.turned_terms.shape[1]


_codecs: WeakKeyDictionary[TileCodec, dict[torch.device, CodecTables]] = WeakKeyDictionary()
_ropes: dict[tuple, RopeOperands] = {}
# a model has a table or two, a process a few models
_MOST_ROPES = 64
# those that CUDA graphs read, which may be run for as long as the process lives
_in_graphs: dict[int, Tensor | RopeOperands] = {}


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
    """Returns tables for tiles of `length` tokens, the first of which starts at `start`."""
    key = (rope.digest, start, length, device)
    kept = _ropes.get(key)
    if kept is None or kept.tiles.shape[0] < tiles:
        if len(_ropes) >= _MOST_ROPES:
            _ropes.pop(next(iter(_ropes)))
        with torch.inference_mode(False):
            kept = _make_rope_operands(rope, start, length, tiles + _SPARE_TILES, device)
        _ropes[key] = kept
    return kept


def keep_for_graphs(tables: Any, device: torch.device) -> None:
    """Keeps tables for good if a CUDA graph is being captured, which then reads them.

    Args:
        tables: Tensors and `RopeOperands`, in tuples and dicts; all else there is passed over.
        device: Where they are.
    """
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        return
    for table in tree_leaves(tables):
        if isinstance(table, (Tensor, RopeOperands)):
            _in_graphs[id(table)] = table


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
    key_rotation = key.rotation.matrix(None, torch.float64) * codec.head_dim**0.5
    sketched = key_rotation
    if not isinstance(key, MSEQuantizer):
        sketched = key.sketch.matrix(None, torch.float64) @ key_rotation
    value_rotation = value.rotation.matrix(None, torch.float64) * codec.head_dim**0.5
    return CodecTables(
        key_rotation=Matrix.of(key_rotation.T, device),
        value_rotation=Matrix.of(value_rotation, device),
        sketched=Matrix.of(sketched.T, device),
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
    position = torch.arange(length, dtype=torch.float64) - (length - 1) / 2
    rows = _angles(rope, position, pairs)
    halves, slow = _split_pairs(rope, length)
    centre = torch.arange(tiles) * length + (length - 1) / 2
    return RopeOperands(
        halves=halves,
        operands=_in_operand_order(rows, position / (length / 2), halves, slow).to(
            device, torch.float16
        ),
        rows=rows.to(device, torch.float32),
        tiles=_angles(rope, centre, pairs).to(device, torch.float32),
        turned_terms=_turned_terms(rope, length, centre, 4 * halves).to(device),
        origin=_angles(rope, torch.tensor([start]), pairs)[0].to(device, torch.float32),
    )


def _split_pairs(rope: RopeTable, length: int) -> tuple[int, bool]:
    """Groups of four fast pairs, and whether slow pairs are left."""
    turns = rope.inv_freq.double().cpu().abs() * (length / 2)
    fast = int((turns > _SLOW).nonzero().max()) + 1 if bool((turns > _SLOW).any()) else 0
    pairs = len(turns)
    for halves in range(-(-fast // 4), -(-pairs // 4) + 2):
        slow = 4 * halves < pairs
        if (halves + slow) % 2 == 0 and halves + slow > 0:
            return halves, slow
    raise AssertionError("two groups in a row have one of even number")


def _angles(rope: RopeTable, position: Tensor, pairs: int) -> Tensor:
    """cos and sin, float64 `[n, 2, pairs]`, zero beyond the table's own pairs."""
    angle = position.double()[:, None] * rope.inv_freq.double().cpu()
    table = torch.stack([angle.cos(), angle.sin()], 1)
    return torch.nn.functional.pad(table, (0, pairs - angle.shape[1]))


def _chebyshev(turns: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients of cos(x u) and sin(x u), float64 `[TERMS, pairs]` (Jacobi, Anger 1836)."""
    order = torch.arange(_TERMS)[:, None]
    bessel = torch.from_numpy(special.jv(order.numpy(), turns.numpy()[None, :]))
    weight = torch.where(order == 0, 1.0, 2.0) * torch.where(order // 2 % 2 == 0, 1.0, -1.0)
    even = torch.where(order % 2 == 0, weight, 0.0) * bessel
    odd = torch.where(order % 2 == 1, weight, 0.0) * bessel
    return even, odd


def _turned_terms(rope: RopeTable, length: int, centre: Tensor, fast: int) -> Tensor:
    """See `RopeOperands.turned_terms`; `fast` pairs are left out."""
    inv_freq = rope.inv_freq.double().cpu()[fast:]
    even, odd = _chebyshev(inv_freq * (length / 2))
    angle = centre.double()[:, None, None] * inv_freq
    cos, sin = angle.cos(), angle.sin()
    terms = torch.stack([cos * even - sin * odd, sin * even + cos * odd], -1)
    # tile k pair j
    terms = torch.nn.functional.pad(terms, (0, 0, 0, -len(inv_freq) % 8))
    high = terms.half()
    parts = torch.stack([high, (terms - high.double()).half()])
    grid = parts.unflatten(3, (-1, 2, 4))  # part tile k step hi t j
    return grid.permute(1, 3, 2, 5, 4, 0, 6).flatten(2).contiguous()


def _in_operand_order(rows: Tensor, u: Tensor, halves: int, slow: bool) -> Tensor:
    """Columns of the table as `mean_term.rope_table` reads them.

    [T, 2, PAIRS] and positions `[T]` -> [blocks, T / 16, 8, 4, 2, 2, 2]. Sixteen columns are a
    block: two halves, each four pairs of (cos, sin), or the Chebyshev polynomials 0 to 7.
    """
    length, _, pairs = rows.shape
    table = torch.nn.functional.pad(rows, (0, max(0, 4 * halves - pairs)))[:, :, : 4 * halves]
    columns = [table.transpose(1, 2).reshape(length, 8 * halves)]
    if slow:
        columns.append(torch.cos(torch.arange(_TERMS) * torch.arccos(u)[:, None]))
    # mt h g | block hi t j
    grid = torch.cat(columns, 1).reshape(length // 16, 2, 8, -1, 2, 4, 2)
    return grid.permute(3, 0, 2, 5, 4, 1, 6).contiguous()
