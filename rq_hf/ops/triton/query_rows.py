# SPDX-License-Identifier: Apache-2.0
"""Query rows: which they are, their product with a matrix, and how they are stored (Triton)."""

import triton
import triton.language as tl


@triton.jit
def row_of(unit, kv_heads, group, queries, H: tl.constexpr):
    """Sequence, KV head, and for 16 rows head in group, query and whether the row exists."""
    blocks = (group * queries + H - 1) // H
    head = unit // blocks
    r = tl.arange(0, 16)
    row = (unit % blocks) * H + r
    exists = (r < H) & (row < group * queries)
    row = tl.minimum(row, group * queries - 1)
    return head // kv_heads, head % kv_heads, row // queries, row % queries, exists


@triton.jit
def load_rows(queries_at, exists, factor, D: tl.constexpr, DP: tl.constexpr):
    """The rows times `factor`, float32 [16, DP]; zeros where there is none."""
    d = tl.arange(0, DP)
    inside = exists[:, None] & (d < D)[None, :]
    return tl.load(queries_at[:, None] + d[None, :], mask=inside, other=0.0).to(tl.float32) * factor


@triton.jit
def balanced(rows, BALANCE, D: tl.constexpr):
    """Rows [16, DP] for keys that were multiplied by the balance [D]."""
    d = tl.arange(0, rows.shape[1])
    return rows / tl.load(BALANCE + d, mask=d < D, other=1.0)[None, :]


@triton.jit
def multiply(x, MATRIX, D: tl.constexpr, DP: tl.constexpr, HAS_LOW: tl.constexpr):
    """x [16, DP] times a matrix given as float16 parts, float32.

    Products of float16 halves leave an error of 2**-22, and are many times as fast as float32.

    Args:
        MATRIX: float16 [2, D, D], `tables.Matrix.parts`, with its factor of sqrt(D).
    """
    peak = tl.maximum(tl.max(tl.abs(x), 1), 1e-30)
    x = x / peak[:, None]
    high = x.to(tl.float16)
    low = (x - high.to(tl.float32)).to(tl.float16)
    if DP > 128:
        # half of the columns at a time, for the matrix to fit on the chip
        left = product_of_halves(high, low, MATRIX, 0, D, DP, DP // 2, HAS_LOW)
        right = product_of_halves(high, low, MATRIX, DP // 2, D, DP, DP // 2, HAS_LOW)
        product = tl.reshape(tl.permute(tl.join(left, right), [0, 2, 1]), [16, DP])
    else:
        product = product_of_halves(high, low, MATRIX, 0, D, DP, DP, HAS_LOW)
    return product * (peak * (1.0 / D**0.5))[:, None]


@triton.jit
def product_of_halves(
    high,
    low,
    MATRIX,
    first,
    D: tl.constexpr,
    DP: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_LOW: tl.constexpr,
):
    """(high + low) times the columns `first` to `first + WIDTH - 1` of a matrix of two parts."""
    k = tl.arange(0, DP)
    column = first + tl.arange(0, WIDTH)
    square = (k < D)[:, None] & (column < D)[None, :]
    place = MATRIX + k[:, None] * D + column[None, :]
    matrix = tl.load(place, mask=square, other=0.0)
    product = tl.dot(low, matrix)
    if HAS_LOW:
        product = tl.dot(high, tl.load(place + D * D, mask=square, other=0.0), product)
    return tl.dot(high, matrix, product)


@triton.jit
def split_bytes(x, step):
    """High and low byte of x / step, rounded to an integer of 16 bits."""
    whole = tl.floor(x / step[:, None] + 0.5).to(tl.int32)
    high = (whole + 128) >> 8
    return high.to(tl.int8), (whole - high * 256).to(tl.int8)


@triton.jit
def store_rows(
    rotated, ROWS8, ROW_SCALES, ROWS, side, D: tl.constexpr, H: tl.constexpr, PLAIN: tl.constexpr
):
    """Stores rotated rows [16, DP] of a unit: as float32 (PLAIN), or as bytes and their steps."""
    r = tl.arange(0, 16)
    d = tl.arange(0, rotated.shape[1])
    valid = (r < H)[:, None] & (d < D)[None, :]
    if PLAIN:
        tl.store(ROWS + (side * H + r)[:, None] * D + d[None, :], rotated, mask=valid)
    else:
        step = tl.maximum(tl.max(tl.abs(rotated), 1), 1e-30) / 32512.0
        high, low = split_bytes(rotated, step)
        place = ROWS8 + (side * 2 * H + 2 * r)[:, None] * D + d[None, :]
        tl.store(place, high, mask=valid)
        tl.store(place + D, low, mask=valid)
        tl.store(ROW_SCALES + side * H + r, step, mask=r < H)
