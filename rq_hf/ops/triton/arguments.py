# SPDX-License-Identifier: Apache-2.0
"""What the encode and decode kernels are given: records of tensors, numbers and constants."""

from __future__ import annotations

from typing import Any, NamedTuple

# Members that kernels are compiled for come as `tl.constexpr`.


class Rows(NamedTuple):
    """Tokens [B, Hk, N, D] with unit stride in the last dimension; strides in numbers."""

    data: Any
    batch: int
    head: int
    row: int


class Shape(NamedTuple):
    """Sizes, all constant.

    head_dim: D.
    half: D / 2, the pairs that RoPE may turn.
    key_step, value_step: Pairs of keys, dimensions of values rotated at a time.
    padded: D as a power of two.
    length: Tokens of a tile.
    words: Words of a record.
    scale_rows: Scales of a token.
    fragment: Whether records are in fragment order.
    """

    head_dim: Any
    half: Any
    key_step: Any
    value_step: Any
    padded: Any
    length: Any
    words: Any
    scale_rows: Any
    fragment: Any


class KeyMean(NamedTuple):
    """What keys are freed of, float32 [B, Hk, 2, D / 2], in pairs.

    pre: Mean before RoPE, multiplied by the balance.
    cross: The same of the other of a pair: pre[1] balance[0] and pre[0] balance[1].
    post: Mean after RoPE, multiplied by the balance.
    balance: Factor of the keys.
    """

    pre: Any
    cross: Any
    post: Any
    balance: Any


class Statistics(NamedTuple):
    """Tensors of a `Preconditioner`, float32 [B, Hk, D] each."""

    pre_mean: Any
    post_mean: Any
    balance: Any
    value_mean: Any


class Turns(NamedTuple):
    """Cosines and sines that RoPE turns pairs by, float32; and the pairs themselves.

    tile: To the first row of each tile, [n, 2, D / 2].
    row: From there to each row, [T, 2, D / 2].
    pairs: Dimensions of the pairs, int32 [2, D / 2].
    halves: Constant: whether the pairs are (i, D / 2 + i).
    """

    tile: Any
    row: Any
    pairs: Any
    halves: Any


class Matrix(NamedTuple):
    """A matrix as the sum of two in 16 bits, or one in float32.

    high, low: Both parts, of one shape and type.
    split: Constant: whether there are parts of 16 bits.
    has_low: Constant: whether the lower part has anything but zeros.
    unscale: What undoes the factor that the matrix comes with.
    """

    high: Any
    low: Any
    split: Any
    has_low: Any
    unscale: float


class Book(NamedTuple):
    """A codebook.

    table: Beyond 4 bits: 2**(b-1) positive edges (the last unused) and as many levels, float32.
    bits: Constant.
    edges, units: Constant, up to 4 bits: positive boundaries, and levels over `step`.
    tagged: Constant, up to 4 bits: `units` and 2**-16 times their codes.
    step: Constant: unit of the levels.
    """

    table: Any
    bits: Any
    edges: Any
    units: Any
    tagged: Any
    step: Any


class InputScales(NamedTuple):
    """Input scales that "search" tries, float32, and their constant number."""

    factor: Any
    count: Any


class SketchPlan(NamedTuple):
    """A sketch of the keys' residuals.

    forward: Transposed sketch [D padded, M padded].
    back: The sketch [M padded, D padded].
    size, padded: Constant: M, and that as a multiple of 32.
    mmse: Constant: whether weights are those of least squares.
    one_energy: Constant: whether |S^T s|^2 is the same for all s.
    weight: The unbiased weight of a unit residual.
    energy: |S^T s|^2, if it is the same for all s.
    """

    forward: Matrix
    back: Matrix
    size: Any
    padded: Any
    mmse: Any
    one_energy: Any
    weight: float
    energy: float
