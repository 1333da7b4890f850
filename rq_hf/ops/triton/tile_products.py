# SPDX-License-Identifier: Apache-2.0
"""Integer products of one tile by tensor cores (Gluon)."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2


@gluon.jit
def stack_halves(lower, upper, ROWS: gl.constexpr, COLUMNS: gl.constexpr, M: gl.constexpr):
    """[ROWS, COLUMNS] twice -> [2 ROWS, COLUMNS]: tokens of a tile with halves side by side."""
    stacked = gl.permute(gl.join(lower, upper), [2, 0, 1])
    return gl.convert_layout(gl.reshape(stacked, [2 * ROWS, COLUMNS]), M)


@gluon.jit
def block_products(
    k0, k1, k2, k3, q0, q1, q2, q3, start, FOUR: gl.constexpr, JOINED: gl.constexpr, M: gl.constexpr
):
    """Integer products [T, 2H] of a block of columns, added to `start`."""
    if JOINED:
        lower = mma_v2(k1, q1, mma_v2(k0, q0, start))
        upper = mma_v2(k3, q1, mma_v2(k2, q0, start))
        return stack_halves(lower, upper, start.shape[0], start.shape[1], M)
    elif FOUR:
        products = mma_v2(k1, q1, mma_v2(k0, q0, start))
        return mma_v2(k3, q3, mma_v2(k2, q2, products))
    else:
        return mma_v2(k1, q1, mma_v2(k0, q0, start))


@gluon.jit
def high_low(products, ROWS: gl.constexpr, H: gl.constexpr):
    """[ROWS, 2H] products with high and low bytes -> [ROWS, H] with 16-bit integers, float32."""
    high, low = gl.split(gl.reshape(products, [ROWS, H, 2]))
    return (high * 256 + low).to(gl.float32)
