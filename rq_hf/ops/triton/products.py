# SPDX-License-Identifier: Apache-2.0
"""Matrix products of 16-bit tensor cores that are nearly as exact as float32, in kernels.

A float32 number is the sum of two of bfloat16 to 2**-17 of itself: its upper half, and the rest
rounded. So three products of halves give what one in float32 would to about 2**-16. 3xTF32 would
take twice their time and memory. The product with the matrix's lower half falls away where there
is none: a Hadamard matrix times sqrt(D) has entries +-1.
"""

import triton
import triton.language as tl


@triton.jit
def split(x, matrix):
    """High and low part of float32 `x`, to be multiplied by `matrix`."""
    if matrix.split:
        bits = x.to(tl.int32, bitcast=True)
        # no conversion of the upper half: those of single numbers are slow
        high = (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
        low = (x - (bits & -65536).to(tl.float32, bitcast=True)).to(tl.bfloat16)
        return high, low
    else:
        return x, x


@triton.jit
def multiply(parts, high, low, total, matrix):
    """total + x (high + low) for `parts` of x, and those of `matrix`."""
    if matrix.split:
        total = tl.dot(parts[1], high, total)
        if matrix.has_low:
            total = tl.dot(parts[0], low, total)
        return tl.dot(parts[0], high, total)
    else:
        return tl.dot(parts[0], high, total, input_precision="ieee")


@triton.jit
def multiply_exact(x, high, low, total, matrix):
    """total + x (high + low) for `x` that the type of `high` holds exactly."""
    if matrix.split:
        if matrix.has_low:
            total = tl.dot(x.to(high.dtype), low, total)
        return tl.dot(x.to(high.dtype), high, total)
    else:
        return tl.dot(x.to(tl.float32), high, total, input_precision="ieee")


@triton.jit
def load_parts(matrix, row, column, COLUMNS: tl.constexpr):
    """Both parts of some rows [K] and columns [N] of a matrix with `COLUMNS` columns."""
    at = row[:, None] * COLUMNS + column[None, :]
    high = tl.load(matrix.high + at)
    low = high
    if matrix.has_low:
        low = tl.load(matrix.low + at)
    return high, low
