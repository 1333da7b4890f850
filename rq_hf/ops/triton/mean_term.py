# SPDX-License-Identifier: Apache-2.0
"""What the keys' mean before RoPE adds to the scores of a tile, by tensor cores (Gluon)."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2


@gluon.jit
def mean_products(
    ROPE,
    coef,
    angles,
    terms,
    slow_coef,
    tile_half,
    start,
    T: gl.constexpr,
    H: gl.constexpr,
    PAIRS: gl.constexpr,
    HALVES: gl.constexpr,
    STEPS: gl.constexpr,
    HELD: gl.constexpr,
    M: gl.constexpr,
):
    """q . RoPE_n(pre_mean), [T, 2H] float32 in high and low parts, for the tokens of a tile.

    Products with one table for all tiles, see `tables.RopeOperands`: the coefficients of a row are
    turned to the tile's centre before.

    Args:
        ROPE: float16 table in operand order.
        coef: Coefficients of cos and of sin of the rows: where they are, float32 [2, H, PAIRS], or
            `fast_coefficients` of it.
        angles: Shared memory, float32 [4, PAIRS]: cos and sin at the centres of two tiles.
        terms: Shared memory, float16 [2 STEPS, 32, 8]: `tables.RopeOperands.turned_terms` of two
            tiles.
        slow_coef: Shared memory, float16 [STEPS, 2H, 16]: coefficients of slow pairs.
        tile_half: Which of the two tiles.
        start: float32 [2H], what is added to every token's products.
        HELD: Whether `coef` is `fast_coefficients`.
    """
    TABLE: gl.constexpr = gl.DotOperandLayout(0, M, 2)
    ROWS: gl.constexpr = gl.DotOperandLayout(1, M, 2)
    L: gl.constexpr = gl.BlockedLayout([1, 1], [8, 4], [1, 1], [1, 0])
    LB: gl.constexpr = gl.BlockedLayout([1, 1, 2], [8, 4, 1], [1, 1, 1], [2, 1, 0])
    LT: gl.constexpr = gl.BlockedLayout([1, 8], [32, 1], [1, 1], [1, 0])
    column = gl.arange(0, 2 * H, layout=gl.SliceLayout(1, L))[:, None]
    cos = angles.index(2 * tile_half)
    sin = angles.index(2 * tile_half + 1)
    low = column % 2 == 1
    WORDS: gl.constexpr = T * 16 // 8
    offset = (
        gl.arange(0, WORDS, layout=gl.SliceLayout(1, LT))[:, None] * 8
        + gl.arange(0, 8, layout=gl.SliceLayout(0, LT))[None, :]
    )
    sums = gl.full([T, 2 * H], 0.0, gl.float32, layout=M) + start[None, :]
    for block in gl.static_range((HALVES + 1) // 2):
        first = fast_half(coef, cos, sin, low, 2 * block, H, PAIRS, HELD, L, LB)
        if 2 * block + 1 < HALVES:
            second = fast_half(coef, cos, sin, low, 2 * block + 1, H, PAIRS, HELD, L, LB)
        else:
            second = slow_half(terms, slow_coef, tile_half, H, STEPS, LB, M)
        rows = operand_rows(first, second, H, ROWS)
        sums = mma_v2(rope_table(ROPE, offset, block, T, TABLE), rows, sums)
    return sums


@gluon.jit
def fast_coefficients(coef, H: gl.constexpr, PAIRS: gl.constexpr, HALVES: gl.constexpr):
    """Coefficients that all tiles share: of cos and of sin [2H, 4], for each four fast pairs."""
    L: gl.constexpr = gl.BlockedLayout([1, 1], [8, 4], [1, 1], [1, 0])
    found = ()
    for half in gl.static_range(HALVES):
        found += (four_coefficients(coef, half, H, PAIRS, L),)
    return found


@gluon.jit
def four_coefficients(
    coef, half: gl.constexpr, H: gl.constexpr, PAIRS: gl.constexpr, L: gl.constexpr
):
    """Coefficients of cos and of sin of four pairs, of float32 [2, H, PAIRS]: two [2H, 4]."""
    row = gl.arange(0, 2 * H, layout=gl.SliceLayout(1, L))[:, None] // 2
    pair = gl.arange(0, 4, layout=gl.SliceLayout(0, L))[None, :] + half * 4
    at = coef + row * PAIRS + pair
    return gl.load(at), gl.load(at + H * PAIRS)


@gluon.jit
def fast_half(
    coef,
    cosines,
    sines,
    low,
    half: gl.constexpr,
    H: gl.constexpr,
    PAIRS: gl.constexpr,
    HELD: gl.constexpr,
    L: gl.constexpr,
    LB: gl.constexpr,
):
    """Coefficients of four pairs turned to the tile, float16 [2H, 4, 2]."""
    if HELD:
        a, b = coef[half]
    else:
        a, b = four_coefficients(coef, half, H, PAIRS, L)
    cos = cosines.slice(half * 4, 4).load(gl.SliceLayout(0, L))[None, :]
    sin = sines.slice(half * 4, 4).load(gl.SliceLayout(0, L))[None, :]
    of_cos = one_part(a * cos + b * sin, low)
    of_sin = one_part(b * cos - a * sin, low)
    return gl.convert_layout(gl.join(of_cos, of_sin), LB)


@gluon.jit
def slow_half(
    terms, coef, tile_half, H: gl.constexpr, STEPS: gl.constexpr, LB: gl.constexpr, M: gl.constexpr
):
    """Coefficients of a tile's polynomials, float16 [2H, 4, 2]: slow pairs turned to the tile."""
    TERMS: gl.constexpr = gl.DotOperandLayout(0, M, 2)
    ROWS: gl.constexpr = gl.DotOperandLayout(1, M, 2)
    sums = gl.full([16, 2 * H], 0.0, gl.float32, layout=M)
    for step in gl.static_range(STEPS):
        table = terms.index(tile_half * STEPS + step).load(
            gl.BlockedLayout([1, 8], [32, 1], [1, 1], [1, 0])
        )
        rows = coef.index(step).load(gl.BlockedLayout([1, 4], [8, 4], [1, 1], [1, 0]))
        rows = gl.permute(gl.reshape(rows, [2 * H, 4, 2, 2]), [2, 1, 3, 0])  # hi t j | column
        rows = gl.convert_layout(gl.reshape(rows, [16, 2 * H]), ROWS)
        sums = mma_v2(in_operand(table, 16, TERMS), rows, sums)
    # products of all parts of terms with all parts of coefficients
    sums = gl.sum(gl.sum(gl.reshape(sums, [2, 8, H, 2]), 3), 0)  # k, row
    basis = gl.reshape(gl.permute(sums, [1, 0]), [H, 4, 2])
    basis = gl.permute(gl.join(basis, basis), [0, 3, 1, 2])
    basis = gl.convert_layout(gl.reshape(basis, [2 * H, 4, 2]), LB)
    column = gl.arange(0, 2 * H, layout=gl.SliceLayout(1, gl.SliceLayout(2, LB)))[:, None, None]
    return one_part(basis, column % 2 == 1)


@gluon.jit
def one_part(x, low):
    """float16 part of x: the nearest number, or what that leaves (where `low`)."""
    high = x.to(gl.float16)
    rest = (x - high.to(gl.float32)).to(gl.float16)
    return gl.where(low, rest, high)


@gluon.jit
def operand_rows(first, second, H: gl.constexpr, OPERAND: gl.constexpr):
    """Two halves [2H, 4, 2] -> float16 operand [16, 2H]."""
    halves = gl.permute(gl.join(first, second), [3, 1, 2, 0])  # hi t j | column
    return gl.convert_layout(gl.reshape(halves, [16, 2 * H]), OPERAND)


@gluon.jit
def rope_table(ROPE, offset, part, T: gl.constexpr, OPERAND: gl.constexpr):
    """Part of the table as float16 operand [T, 16]."""
    return in_operand(gl.load(ROPE + part * (T * 16) + offset), T, OPERAND)


@gluon.jit
def in_operand(table, ROWS: gl.constexpr, OPERAND: gl.constexpr):
    """A table in operand order, eight numbers a lane -> float16 operand [ROWS, 16]."""
    table = gl.reshape(table, [ROWS // 16, 8, 4, 2, 2, 2])  # mt g t hi h j
    table = gl.permute(table, [0, 4, 1, 3, 2, 5])  # mt h g | hi t j
    return gl.convert_layout(gl.reshape(table, [ROWS, 16]), OPERAND)
