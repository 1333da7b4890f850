# SPDX-License-Identifier: Apache-2.0
"""What the keys' mean before RoPE adds to scores, as numbers of a query row (Triton).

q . RoPE_n(pre_mean) is a sum of a cos(n w) + b sin(n w) over the pairs that RoPE turns; see
`tables.RopeOperands` for fast and slow pairs.
"""

import triton
import triton.language as tl


@triton.jit
def coefficients(
    queries_at,
    exists,
    PRE,
    ORIGIN,
    factor,
    p,
    PAIRS: tl.constexpr,
    TURNED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """a, b [16, n] of q . RoPE_n(pre_mean) = sum a cos + b sin, n counted from the first token.

    Args:
        p: The pairs [n]; 0 for those beyond the table's own.
    """
    real = p < TURNED
    if INTERLEAVED:
        first, second = 2 * p, 2 * p + 1
    else:
        first, second = p, p + TURNED
    mask = exists[:, None] & real[None, :]
    x1 = tl.load(queries_at[:, None] + first[None, :], mask=mask, other=0.0).to(tl.float32) * factor
    x2 = (
        tl.load(queries_at[:, None] + second[None, :], mask=mask, other=0.0).to(tl.float32) * factor
    )
    m1 = tl.load(PRE + first, mask=real, other=0.0)
    m2 = tl.load(PRE + second, mask=real, other=0.0)
    cos = tl.load(ORIGIN + p, mask=real, other=0.0)
    sin = tl.load(ORIGIN + PAIRS + p, mask=real, other=0.0)
    v1 = (m1 * cos - m2 * sin)[None, :]
    v2 = (m2 * cos + m1 * sin)[None, :]
    return x1 * v1 + x2 * v2, x2 * v1 - x1 * v2


@triton.jit
def store_coefficients(a, b, COEF, H: tl.constexpr, PAIRS: tl.constexpr):
    """Stores the coefficients of all pairs, float32 [2, H, PAIRS]."""
    r = tl.arange(0, 16)[:, None]
    p = tl.arange(0, PAIRS)[None, :]
    place = COEF + r * PAIRS + p
    tl.store(place, a, mask=(r < H) & (p >= 0))
    tl.store(place + H * PAIRS, b, mask=(r < H) & (p >= 0))


@triton.jit
def store_slow_coefficients(a, b, SLOW_COEF, H: tl.constexpr, STEPS: tl.constexpr, n):
    """Stores the coefficients of slow pairs as tensor-core operands, float16 [STEPS, 2H, 16].

    Eight pairs are a step; a row is twice there, in high and low parts.

    Args:
        n: Which slow pairs these are.
    """
    r = tl.arange(0, 16)[:, None]
    step = (n // 8)[None, :]
    # columns of an operand: t hi j
    column = (n % 4 * 4 + n // 4 % 2 * 2)[None, :]
    valid = (r < H) & (step < STEPS)
    place = SLOW_COEF + (step * (2 * H) + 2 * r) * 16 + column
    a_high, b_high = a.to(tl.float16), b.to(tl.float16)
    tl.store(place, a_high, mask=valid)
    tl.store(place + 1, b_high, mask=valid)
    tl.store(place + 16, a - a_high.to(tl.float32), mask=valid)
    tl.store(place + 17, b - b_high.to(tl.float32), mask=valid)
