# SPDX-License-Identifier: Apache-2.0
"""Packed words to tensor-core operands, in registers (Gluon).

`rq_hf.quant.packing` draws where the bits lie. A word is looked up four codes at a time: `prmt`
picks four bytes of a table of int8 levels, and these are one register of an `mma.m16n8k32` operand.

Words travel as int32, since 8-bit tensors take a register for every byte. Each word is joined with
itself to four equal elements; the assembly reads the first, and writes four int8 for every output.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def in_lanes(word):
    """The same word, in a register of every lane.

    The compiler keeps what all lanes share in uniform registers, which `prmt` cannot read: it would
    copy a table for every look-up. It does not see that no lane is below itself.
    """
    return gl.inline_asm_elementwise(
        """{ .reg .b32 a, b;
        mov.u32 a, %lanemask_lt; mov.u32 b, %lanemask_eq;
        and.b32 a, a, b; xor.b32 $0, $1, a; }""",
        "=r,r",
        [word],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def look_up_2(word, table):
    """Four int8 tensors, operands 0 to 3, of codes of 2 bits."""
    return gl.inline_asm_elementwise(
        """{ .reg .b32 a, b, c, d;
        and.b32 a, $4, 0x33333333; shr.u32 b, $4, 2; and.b32 b, b, 0x33333333;
        shr.u32 c, a, 16; shr.u32 d, b, 16;
        prmt.b32 $0, $8, $8, a; prmt.b32 $1, $8, $8, c;
        prmt.b32 $2, $8, $8, b; prmt.b32 $3, $8, $8, d; }""",
        "=r,=r,=r,=r,r,r,r,r,r,r,r,r",
        [word, table],
        dtype=(gl.int8, gl.int8, gl.int8, gl.int8),
        is_pure=True,
        pack=4,
    )


@gluon.jit
def look_up_4(word, table0, table1, table2, table3):
    """Two uint7 tensors (level + 64), operands 0 and 1, of codes of 4 bits.

    A selector with its top bit set gives the sign of a byte, which is 0 for 7-bit numbers: so each
    half of the table answers for its own codes alone, and the two answers are or-ed.
    """
    return gl.inline_asm_elementwise(
        """{ .reg .b32 x, a, b, c, d;
        xor.b32 x, $2, 0x88888888; shr.u32 a, $2, 16; shr.u32 b, x, 16;
        prmt.b32 $0, $6, $10, $2; prmt.b32 c, $14, $18, x; or.b32 $0, $0, c;
        prmt.b32 $1, $6, $10, a; prmt.b32 d, $14, $18, b; or.b32 $1, $1, d; }""",
        "=r,=r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
        [word, table0, table1, table2, table3],
        dtype=(gl.int8, gl.int8),
        is_pure=True,
        pack=4,
    )


@gluon.jit
def look_up_3(plane0, plane1, plane2, table0, table1):
    """Eight int8 tensors, halves 0 and 1 of operands 0 to 3, of codes of 3 bits."""
    return gl.inline_asm_elementwise(
        """{ .reg .b32 a, b, c, e;
        and.b32 a, $8, 0x77777777; shr.u32 e, a, 16;
        prmt.b32 $0, $20, $24, a; prmt.b32 $1, $20, $24, e;
        and.b32 b, $12, 0x77777777; shr.u32 e, b, 16;
        prmt.b32 $2, $20, $24, b; prmt.b32 $3, $20, $24, e;
        and.b32 c, $16, 0x77777777; shr.u32 e, c, 16;
        prmt.b32 $4, $20, $24, c; prmt.b32 $5, $20, $24, e;
        shr.u32 a, $8, 3; and.b32 a, a, 0x11111111;
        shr.u32 b, $12, 2; and.b32 b, b, 0x22222222; or.b32 a, a, b;
        shr.u32 c, $16, 1; and.b32 c, c, 0x44444444; or.b32 a, a, c; shr.u32 e, a, 16;
        prmt.b32 $6, $20, $24, a; prmt.b32 $7, $20, $24, e; }""",
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
        [plane0, plane1, plane2, table0, table1],
        dtype=(gl.int8, gl.int8, gl.int8, gl.int8, gl.int8, gl.int8, gl.int8, gl.int8),
        is_pure=True,
        pack=4,
    )


@gluon.jit
def look_up_1(word, table):
    """Eight int8 tensors, halves 0 and 1 of operands 0 to 3, of codes of 1 bit."""
    return gl.inline_asm_elementwise(
        """{ .reg .b32 a, b, e;
        and.b32 a, $8, 0x11111111; shr.u32 e, a, 16;
        prmt.b32 $0, $12, $12, a; prmt.b32 $1, $12, $12, e;
        shr.u32 b, $8, 1; and.b32 a, b, 0x11111111; shr.u32 e, a, 16;
        prmt.b32 $2, $12, $12, a; prmt.b32 $3, $12, $12, e;
        shr.u32 b, $8, 2; and.b32 a, b, 0x11111111; shr.u32 e, a, 16;
        prmt.b32 $4, $12, $12, a; prmt.b32 $5, $12, $12, e;
        shr.u32 b, $8, 3; and.b32 a, b, 0x11111111; shr.u32 e, a, 16;
        prmt.b32 $6, $12, $12, a; prmt.b32 $7, $12, $12, e; }""",
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r",
        [word, table],
        dtype=(gl.int8, gl.int8, gl.int8, gl.int8, gl.int8, gl.int8, gl.int8, gl.int8),
        is_pure=True,
        pack=4,
    )


@gluon.jit
def four_times(words):
    """Every word as four equal elements of a new last dimension [..., 2, 2]."""
    words = gl.join(words, words)
    return gl.join(words, words)


@gluon.jit
def spread_plane(words, ROWS: gl.constexpr):
    """Words of a plane, [ROWS, 4] as loaded -> [ROWS, 16], a word for every four columns."""
    words = gl.reshape(four_times(words), [ROWS // 32, 8, 4, 2, 2, 4])  # mp, g, t, mlo, h, j
    return gl.reshape(gl.permute(words, [0, 3, 4, 1, 2, 5]), [ROWS, 16])  # mp mlo h g | t j


@gluon.jit
def spread_pairs(words, ROWS: gl.constexpr, WIDTH: gl.constexpr, OPERAND: gl.constexpr):
    """Words of 2 or 4 bits, [ROWS * WIDTH / 16, 4] as loaded -> [ROWS, WIDTH]."""
    words = four_times(words)
    words = gl.reshape(words, [ROWS // 16, WIDTH // 32, 8, 4, 2, 2, 4])  # mt ks g t h kk j
    words = gl.permute(words, [0, 4, 2, 1, 5, 3, 6])  # mt h g | ks kk t j
    return gl.convert_layout(gl.reshape(words, [ROWS, WIDTH]), OPERAND)


@gluon.jit
def join_halves(lower, upper, ROWS: gl.constexpr, OPERAND: gl.constexpr):
    """Two [ROWS, 16] halves (kk = 0, 1) -> one [ROWS, 32] operand."""
    joined = gl.permute(gl.join(lower, upper), [0, 2, 1])
    return gl.convert_layout(gl.reshape(joined, [ROWS, 32]), OPERAND)


@gluon.jit
def operands_1(words, table, ROWS: gl.constexpr, OPERAND: gl.constexpr):
    """Four [ROWS, 32] operands of codes of 1 bit."""
    a, b, c, d, e, f, g, h = look_up_1(spread_plane(words, ROWS), table)
    return (
        join_halves(a, b, ROWS, OPERAND),
        join_halves(c, d, ROWS, OPERAND),
        join_halves(e, f, ROWS, OPERAND),
        join_halves(g, h, ROWS, OPERAND),
    )


@gluon.jit
def operands_3(plane0, plane1, plane2, table0, table1, ROWS: gl.constexpr, OPERAND: gl.constexpr):
    """Four [ROWS, 32] operands of codes of 3 bits."""
    a, b, c, d, e, f, g, h = look_up_3(
        spread_plane(plane0, ROWS),
        spread_plane(plane1, ROWS),
        spread_plane(plane2, ROWS),
        table0,
        table1,
    )
    return (
        join_halves(a, b, ROWS, OPERAND),
        join_halves(c, d, ROWS, OPERAND),
        join_halves(e, f, ROWS, OPERAND),
        join_halves(g, h, ROWS, OPERAND),
    )


@gluon.jit
def operands(
    words0,
    words1,
    words2,
    table0,
    table1,
    table2,
    table3,
    ROWS: gl.constexpr,
    WIDTH: gl.constexpr,
    BITS: gl.constexpr,
    OPERAND: gl.constexpr,
):
    """The int8 operands of a block of packed words: four, or two (each twice) for 4 bits."""
    if BITS == 1:
        return operands_1(words0, table0, ROWS, OPERAND)
    elif BITS == 2:
        return look_up_2(spread_pairs(words0, ROWS, WIDTH, OPERAND), table0)
    elif BITS == 3:
        return operands_3(words0, words1, words2, table0, table1, ROWS, OPERAND)
    else:
        spread = spread_pairs(words0, ROWS, WIDTH, OPERAND)
        even, odd = look_up_4(spread, table0, table1, table2, table3)
        return even, odd, even, odd
