# SPDX-License-Identifier: Apache-2.0
"""Codes in the order of 8-bit tensor-core operands. Drawn in `packing`, with the same letters."""

from math import prod

import torch
from torch import Tensor

from rq_hf.quant.bit_fields import join_fields, split_fields

# Axes of the nibbles as they follow one another in the matrix and in the words, where the last
# two number the nibbles of a word.
_PLANES = ("mp mlo h g block x kk t j", "block x mp g t mlo h kk j")
_PAIRS = ("mt h g block x ks kk t j", "block mt ks g t h kk x j")
_AXES = {1: _PLANES, 2: _PAIRS, 3: _PLANES, 4: _PAIRS}

_ROW_STEP = {1: 32, 2: 16, 3: 32, 4: 16}
_OPERANDS = {1: 4, 2: 4, 3: 4, 4: 2}
# Nibbles that together hold one code of every operand.
_NIBBLES = {1: 1, 2: 2, 3: 3, 4: 2}


def fits(rows: int, columns: int, bits: int) -> bool:
    """Whether a matrix of codes can be stored in fragment order."""
    if bits not in _AXES or rows <= 0 or columns <= 0:
        return False
    if columns != 64 and columns % 128:
        return False
    return rows % (_ROW_STEP[bits] * _halves(columns, bits)) == 0


def pack(codes: Tensor, bits: int) -> Tensor:
    """Words in fragment order, int32 [..., R * C * bits // 32], of codes, uint8 [..., R, C]."""
    *batch, rows, columns = codes.shape
    matrix_axes, word_axes = _AXES[bits]
    joined = _join_halves(codes & ((1 << bits) - 1), _halves(columns, bits))
    nibbles = _to_nibbles(joined.reshape(_operand_shape(prod(batch), rows, columns, bits)), bits)
    grid = nibbles.reshape(prod(batch), *_sizes(matrix_axes, rows, columns, bits))
    fields = grid.permute(_permutation(matrix_axes, word_axes)).flatten(-2)
    return join_fields(fields, 4).reshape(*batch, rows * columns * bits // 32)


def unpack(words: Tensor, bits: int, rows: int, columns: int) -> Tensor:
    """Codes, uint8 [..., R, C], of words in fragment order: undoes `pack`."""
    batch = words.shape[:-1]
    matrix_axes, word_axes = _AXES[bits]
    fields = split_fields(words, 4)
    grid = fields.reshape(prod(batch), *_sizes(word_axes, rows, columns, bits))
    nibbles = grid.permute(_permutation(word_axes, matrix_axes))
    count, lines, _, width = _operand_shape(prod(batch), rows, columns, bits)
    operands = _from_nibbles(nibbles.reshape(count, lines, _NIBBLES[bits], width), bits)
    halves = _halves(columns, bits)
    return _split_halves(operands.reshape(*batch, rows // halves, columns * halves), halves)


def _block_columns(columns: int, bits: int) -> int:
    return 64 if bits == 4 and columns == 64 else 128


def _halves(columns: int, bits: int) -> int:
    """2 where the lower half of the rows is stored beside the upper half, else 1."""
    return max(1, _block_columns(columns, bits) // columns)


def _sizes(axes: str, rows: int, columns: int, bits: int) -> list[int]:
    """Sizes of axes given by their letters in the drawing."""
    halves, block = _halves(columns, bits), _block_columns(columns, bits)
    rows, columns = rows // halves, columns * halves
    sizes = {"mp": rows // 32, "mt": rows // 16, "mlo": 2, "h": 2, "g": 8}
    sizes |= {"block": columns // block, "x": _NIBBLES[bits]}
    sizes |= {"ks": block // _OPERANDS[bits] // 32, "kk": 2, "t": 4, "j": 4}
    return [sizes[axis] for axis in axes.split()]


def _operand_shape(count: int, rows: int, columns: int, bits: int) -> tuple[int, int, int, int]:
    """Matrices, rows of all their blocks, operands, columns of an operand."""
    block = _block_columns(columns, bits)
    return count, rows * columns // block, _OPERANDS[bits], block // _OPERANDS[bits]


def _permutation(source: str, target: str) -> list[int]:
    """Order for `Tensor.permute`, behind a leading batch dimension."""
    axes = source.split()
    return [0, *(1 + axes.index(axis) for axis in target.split())]


def _join_halves(codes: Tensor, halves: int) -> Tensor:
    """[..., R, C] -> [..., R / halves, halves * C]."""
    if halves == 1:
        return codes
    return torch.cat(codes.chunk(halves, -2), -1)


def _split_halves(codes: Tensor, halves: int) -> Tensor:
    if halves == 1:
        return codes
    return torch.cat(codes.chunk(halves, -1), -2)


def _to_nibbles(operands: Tensor, bits: int) -> Tensor:
    """[..., operands, width] codes -> [..., nibbles, width] nibbles that hold all of them."""
    if bits == 3:
        planes = [(operands[..., 3, :] >> plane) & 1 for plane in range(3)]
        return operands[..., :3, :] | torch.stack(planes, -2) << 3
    first, *others = operands.split(_NIBBLES[bits], -2)
    for index, codes in enumerate(others, 1):
        first = first | codes << (bits * index)
    return first


def _from_nibbles(nibbles: Tensor, bits: int) -> Tensor:
    if bits == 3:
        planes = nibbles >> 3
        last = planes[..., 0, :] | planes[..., 1, :] << 1 | planes[..., 2, :] << 2
        return torch.cat([nibbles & 7, last[..., None, :]], -2)
    mask = (1 << bits) - 1
    return torch.cat([(nibbles >> shift) & mask for shift in range(0, 4, bits)], -2)
