# SPDX-License-Identifier: Apache-2.0
"""What a program reads of a tile: words, scales, angles, terms of slow pairs (Gluon).

Words of the next tile are asked for as soon as those of this one are used. They wait in registers,
or in shared memory where registers are short. The little that a tile has besides is copied to
shared memory one tile ahead.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

# the names changed between Triton 3.6 and 3.9
async_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
barrier = getattr(gl, "barrier", None) or gl.thread_barrier


@gluon.jit
def load_once(pointer, WIDE: gl.constexpr):
    """Words [n, 4] that nobody reads again, each four at a multiple of 16 bytes.

    They take no place in the first cache, where what all tiles share is to stay. Those of 256
    dimensions do: this was no faster for them, which are asked for when they are due.
    """
    if WIDE:
        return gl.load(pointer, eviction_policy="evict_first")
    else:
        # a lane's four words lie side by side
        return gl.inline_asm_elementwise(
            "ld.global.L1::no_allocate.v4.b32 {$0, $1, $2, $3}, [$4];",
            "=r,=r,=r,=r,l,l,l,l",
            [pointer],
            dtype=gl.int32,
            is_pure=False,
            pack=4,
        )


@gluon.jit
def load_words(
    pointer, offsets, PLANE: gl.constexpr, BITS: gl.constexpr, WIDE: gl.constexpr
):  # three planes for 3 bits, else one and two stand-ins
    first = load_once(pointer + offsets, WIDE)
    if BITS == 3:
        second = load_once(pointer + offsets + PLANE, WIDE)
        return first, second, load_once(pointer + offsets + 2 * PLANE, WIDE)
    else:
        return first, first, first


@gluon.jit
def load_rows(pointer, row, width: gl.constexpr, stride: gl.constexpr, B: gl.constexpr):
    """int8 operand [width, 2H] of query rows that lie `stride` apart."""
    place = gl.arange(0, width, layout=gl.SliceLayout(1, B))[:, None]
    return gl.load(pointer + row[None, :] * stride + place)


@gluon.jit
def make_words(BLOCKS: gl.constexpr, PLANES: gl.constexpr, WORDS: gl.constexpr):
    """Shared memory for planes of WORDS words, those of a block side by side."""
    GRID: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    return gl.allocate_shared_memory(gl.int32, [BLOCKS * PLANES, WORDS // 4, 4], GRID)


@gluon.jit
def ask_for_words(
    memory,
    pointer,
    BLOCKS: gl.constexpr,
    BLOCK: gl.constexpr,
    PLANES: gl.constexpr,
    PLANE: gl.constexpr,
):
    """Begins to copy words: BLOCK words lie between blocks, PLANE between the planes of one."""
    for block in gl.static_range(BLOCKS):
        for plane in gl.static_range(PLANES):
            # past the caches of the first level, which are for what all tiles share
            async_load(
                memory.index(block * PLANES + plane),
                pointer + (block * BLOCK + plane * PLANE),
                cache_modifier=".cg",
            )


@gluon.jit
def staged_words(memory, block: gl.constexpr, PLANES: gl.constexpr, LOAD: gl.constexpr):
    """Words of a block as `load_words` gives them."""
    first = memory.index(block * PLANES).load(LOAD)
    if PLANES == 3:
        second = memory.index(block * PLANES + 1).load(LOAD)
        return first, second, memory.index(block * PLANES + 2).load(LOAD)
    else:
        return first, first, first


@gluon.jit
def make_stage(
    SCALE_ROWS: gl.constexpr,
    T: gl.constexpr,
    H: gl.constexpr,
    PAIRS: gl.constexpr,
    STEPS: gl.constexpr,
):
    """Shared memory for what two tiles have besides their words: scales, angles, terms.

    The last is for the coefficients of slow pairs, which all tiles share.
    """
    LINE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    GRID: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    scales = gl.allocate_shared_memory(gl.float16, [2 * SCALE_ROWS, T], LINE)
    # stand-ins for those that are not there
    angles, terms, coef = scales, scales, scales
    if PAIRS > 0:
        angles = gl.allocate_shared_memory(gl.float32, [4, PAIRS], LINE)
    if STEPS > 0:
        terms = gl.allocate_shared_memory(gl.float16, [2 * STEPS, 32, 8], GRID)
        coef = gl.allocate_shared_memory(gl.float16, [STEPS, 2 * H, 16], GRID)
    return scales, angles, terms, coef


@gluon.jit
def ask_for_scales(stage, half, scale_of, SCALE_ROWS: gl.constexpr, T: gl.constexpr):
    """Begins to copy a tile's scales to one half of the stage."""
    token = gl.arange(0, T, layout=gl.BlockedLayout([T // 32], [32], [1], [0]))
    for row in gl.static_range(SCALE_ROWS):
        async_load(stage.index(half * SCALE_ROWS + row), scale_of + row * T + token)


@gluon.jit
def ask_for_angles(stage, half, angles, PAIRS: gl.constexpr):
    """Begins to copy cos and sin at a tile's centre, float32 [2, PAIRS]."""
    WIDTH: gl.constexpr = 1 if PAIRS < 64 else PAIRS // 32
    pair = gl.arange(0, PAIRS, layout=gl.BlockedLayout([WIDTH], [32], [1], [0]))
    async_load(stage.index(2 * half), angles + pair)
    async_load(stage.index(2 * half + 1), angles + PAIRS + pair)


@gluon.jit
def ask_for_terms(stage, half, terms, STEPS: gl.constexpr):
    """Begins to copy a tile's terms of slow pairs, float16 [STEPS, 256]."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [32, 1], [1, 1], [1, 0])
    line = gl.arange(0, 32, layout=gl.SliceLayout(1, LAYOUT))[:, None] * 8
    place = gl.arange(0, 8, layout=gl.SliceLayout(0, LAYOUT))[None, :]
    for step in gl.static_range(STEPS):
        async_load(stage.index(half * STEPS + step), terms + step * 256 + line + place)


@gluon.jit
def ask_for_coefficients(stage, coef, H: gl.constexpr, STEPS: gl.constexpr):
    """Begins to copy the coefficients of slow pairs, float16 [STEPS, 2H, 16]."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [1, 1], [1, 0])
    column = gl.arange(0, 2 * H, layout=gl.SliceLayout(1, LAYOUT))[:, None] * 16
    place = gl.arange(0, 16, layout=gl.SliceLayout(0, LAYOUT))[None, :]
    for step in gl.static_range(STEPS):
        async_load(stage.index(step), coef + step * (32 * H) + column + place)


@gluon.jit
def staged_scales(stage, row, T: gl.constexpr, LN: gl.constexpr, LAYOUT: gl.constexpr):
    """Scales of a tile in the order of its tokens, [T] float32."""
    scales = stage.index(row).reshape([8, T // 8]).load(LN)
    scales = gl.reshape(gl.permute(scales, [1, 0]), [T])
    return gl.convert_layout(scales, LAYOUT).to(gl.float32)
