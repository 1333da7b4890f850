# SPDX-License-Identifier: Apache-2.0
"""Rows of keys and values, preconditioned and rotated, in kernels.

Rows of keys come in two slices of half the dimensions, whose elements i are the pairs that RoPE
turns: a mean before RoPE then needs no shuffle. mean_n is turned in two steps, to the tile's start
and from there on, so that one table of a tile's rows serves all tiles.
"""

import triton
import triton.language as tl

from rq_hf.ops.triton.products import load_parts, multiply, multiply_exact, split


@triton.jit
def resident_slices(rotation, step: tl.constexpr, shape):
    """All slices of a rotation's rows, if they are few enough to stay."""
    if shape.padded > 128:
        return (0,)
    elif shape.padded == step:
        return (_load_slice(rotation, 0, step, shape),)
    else:
        return (_load_slice(rotation, 0, step, shape), _load_slice(rotation, 1, step, shape))


@triton.jit
def _matrix_slice(rotation, resident, k: tl.constexpr, step: tl.constexpr, shape):
    if shape.padded > 128:
        return _load_slice(rotation, k, step, shape)
    else:
        return resident[k]


@triton.jit
def _load_slice(rotation, k: tl.constexpr, step: tl.constexpr, shape):
    """The k-th `step` rows of a rotation, as high and low part."""
    row = tl.arange(0, step) + k * step
    return load_parts(rotation, row, tl.arange(0, shape.padded), shape.padded)


@triton.jit
def _dims(turns, i, inside, first, shape):
    """Dimensions of pairs `i`, numbered behind `first`: 0 for the firsts, D / 2 for the seconds."""
    if turns is None or turns.halves:
        return i + first
    else:
        return tl.load(turns.pairs + first + i, mask=inside, other=0)


@triton.jit
def _slice(numbers, i, inside):
    return tl.load(numbers + i, mask=inside, other=0.0)


@triton.jit
def rotated_keys(rows, s, tile, mean, turns, rotation, resident, shape):
    """balance * (k - mean_n) of the block `s` of a tile, rotated: [64, D padded]."""
    y = tl.zeros([rows.shape[0], shape.padded], tl.float32)
    for k in tl.static_range(shape.padded // 2 // shape.key_step):
        i = tl.arange(0, shape.key_step) + k * shape.key_step
        inside = i < shape.half
        angles = _angles(turns, s, tile, i, inside, rows.shape[0], shape)
        x_0 = _key_slice(rows, i, inside, 0, mean, turns, angles, shape)
        x_1 = _key_slice(rows, i, inside, 1, mean, turns, angles, shape)
        x = tl.reshape(tl.join(x_0, x_1), [rows.shape[0], 2 * shape.key_step])
        matrix = _matrix_slice(rotation, resident, k, 2 * shape.key_step, shape)
        y = multiply(split(x, rotation), matrix[0], matrix[1], y, rotation)
    return y


@triton.jit
def _angles(turns, s, tile, i, inside, ROWS: tl.constexpr, shape):
    """Cosines and sines of pairs `i`: to the tile's start [step], from there on [64, step]."""
    if turns is None:
        return (0,)
    else:
        at = turns.tile + tile * 2 * shape.half + i
        tile_cos = tl.load(at, mask=inside, other=1.0)
        tile_sin = tl.load(at + shape.half, mask=inside, other=0.0)
        first = turns.row + s * (ROWS * 2 * shape.half)
        at = first + tl.arange(0, ROWS)[:, None] * (2 * shape.half) + i[None, :]
        cos = tl.load(at, mask=inside[None, :], other=1.0)
        sin = tl.load(at + shape.half, mask=inside[None, :], other=0.0)
        return tile_cos, tile_sin, cos, sin


@triton.jit
def _key_slice(rows, i, inside, SECOND: tl.constexpr, mean, turns, angles, shape):
    """balance * (k - mean_n) of the firsts or seconds of pairs `i`: float32 [64, step]."""
    at = i + SECOND * shape.half
    dims = _dims(turns, i, inside, SECOND * shape.half, shape)
    x = tl.load(rows + dims[None, :], mask=inside[None, :], other=0.0).to(tl.float32)
    # what depends on `inside` keeps the compiler from working on rows in the operand's layout,
    # where every vector would have to be exchanged between threads
    balance = tl.where(inside, _masked(mean.balance, at, inside), 0.0)
    post = _masked(mean.post, at, inside)
    x = x * balance[None, :] - post[None, :]
    if turns is not None:
        own, other = _masked(mean.pre, at, inside), _masked(mean.cross, at, inside)
        if SECOND:
            x -= (own * angles[0] + other * angles[1])[None, :] * angles[2]
            x -= (other * angles[0] - own * angles[1])[None, :] * angles[3]
        else:
            x -= (own * angles[0] - other * angles[1])[None, :] * angles[2]
            x += (other * angles[0] + own * angles[1])[None, :] * angles[3]
    return x


@triton.jit
def _masked(numbers, at, inside):
    return tl.load(numbers + at, mask=inside, other=0.0)


@triton.jit
def rotated_values(rows, mean, rotation, resident, shape, CENTER_LAST: tl.constexpr):
    """v - mean, rotated: [64, D padded]."""
    y = tl.zeros([rows.shape[0], shape.padded], tl.float32)
    for k in tl.static_range(shape.padded // shape.value_step):
        i = tl.arange(0, shape.value_step) + k * shape.value_step
        inside = i < shape.head_dim
        matrix = _matrix_slice(rotation, resident, k, shape.value_step, shape)
        x = tl.load(rows + i[None, :], mask=inside[None, :], other=0.0)
        if CENTER_LAST:
            y = multiply_exact(x, matrix[0], matrix[1], y, rotation)
        else:
            x = x.to(tl.float32) - _masked(mean, i, inside)[None, :]
            y = multiply(split(x, rotation), matrix[0], matrix[1], y, rotation)
    if CENTER_LAST:
        y -= tl.load(mean + tl.arange(0, shape.padded))[None, :]
    return y
