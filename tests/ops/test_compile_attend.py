# SPDX-License-Identifier: Apache-2.0
"""What the attention kernels take of GPUs that are not there: registers, spills, shared memory.

Kernels for up to four rows are those of generation. For eight rows `attend_tiles` holds twice the
sums and operands, and keeps the next tile's words in shared memory; it spills no more for that, but
with heads of 256.
"""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import Any, NamedTuple

import pytest
from support.compile import compile_kernel, outside_interpreter

triton = pytest.importorskip("triton")

# bytes of shared memory that a program can have
SHARED = {90: 227 * 1024, 89: 99 * 1024, 80: 163 * 1024}
# over what was measured, for changes that do not matter
MARGIN = 1.2
# the assembler of Triton 3.6 and 3.7 spills up to 400 bytes more, and of all registers gives this
# kernel 32 where it reads a mask: right, but slow
OLDER = 416 if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8) else 0
SPOILED = {("plain, wide", 80)} if OLDER else set()


class Variant(NamedTuple):
    """A kernel with constants beside `DEFAULTS`.

    `stack`: capabilities to compile it for, and bytes that a thread then spills: the larger number
    of those measured with Triton 3.8 and 3.9.
    """

    kernel: str
    constants: dict[str, Any]
    stack: dict[int, int]


ALL_OFF = {"PADDED": False, "CAUSAL": False, "MASKED": 0, "CAPPED": False, "COUNTED": False}
ALL_ON = {"PADDED": True, "CAUSAL": True, "MASKED": 1, "CAPPED": True, "COUNTED": True}
CODEC = {"T": 128, "KEY_BITS": 3, "VALUE_BITS": 3, "SKETCH": False, "H": 4}
EXACT = {"N": 64, "H": 4, "PLAIN": False, "PACKED": True, "PRECONDITIONED": True}
TURNS = {
    "PAIRS": 64,
    "TURNED": 64,
    "INTERLEAVED": False,
    "STEPS": 6,
    "SLOW_WIDTH": 64,
    "FIRST_SLOW": 20,
}
PARTS = {"H": 4, "PARTS": 256, "BLOCK": 32, "PRECONDITIONED": True, "SINK": False}
DEFAULTS: dict[str, dict[str, Any]] = {
    "attend_tiles": {
        **CODEC,
        **ALL_OFF,
        "D": 128,
        "PAIRS": 64,
        "HALVES": 5,
        "STEPS": 6,
        "STAGED": False,
    },
    "attend_plain": {**CODEC, **ALL_OFF, "D": 80, "DP": 128, "PAIRS": 64},
    "prepare": {
        **{**EXACT, **TURNS, **ALL_OFF},
        **{"D": 128, "DP": 128, "SKETCH": False, "HAS_LOW": False},
    },
    "combine": {**PARTS, "ROWS": 1, "D": 128, "DP": 128, "PACKED": True, "HAS_LOW": False},
    "combine_few": {**PARTS, "WIDTH": 32, "D": 128, "DP": 128, "PACKED": True, "HAS_LOW": False},
    "look_kernel": {"D": 128, "DP": 128, "ROWS": 8},
}
TWO = {"KEY_BITS": 2, "VALUE_BITS": 2}
FOUR = {"KEY_BITS": 4, "VALUE_BITS": 4, "T": 64}
SKETCH = {"KEY_BITS": 2, "SKETCH": True}
# halves of a tile lie side by side
NARROW = {"D": 64, "PAIRS": 32, "HALVES": 3, "STEPS": 3}
WIDE = {"D": 256, "PAIRS": 128, "HALVES": 9, "STEPS": 12}
WIDE_ROWS = {"D": 256, "DP": 256, "H": 8}
WIDE_EXACT = {
    **WIDE_ROWS,
    "N": 32,
    "PAIRS": 128,
    "TURNED": 128,
    "FIRST_SLOW": 36,
    "STEPS": 12,
    "SLOW_WIDTH": 128,
}

VARIANTS: dict[str, Variant] = {
    "2 bits": Variant("attend_tiles", TWO, {90: 0}),
    # two tables in registers of every lane, for which others make room
    "3 bits": Variant("attend_tiles", {}, {90: 40, 89: 0, 80: 0}),
    "4 bits": Variant("attend_tiles", FOUR, {90: 0, 89: 0, 80: 0}),
    "sketch": Variant("attend_tiles", SKETCH, {90: 40}),
    "narrow": Variant("attend_tiles", NARROW, {90: 0}),
    "wide": Variant("attend_tiles", WIDE, {90: 24, 80: 0}),
    "wide, staged": Variant("attend_tiles", {**WIDE, "STAGED": True}, {90: 0, 89: 0}),
    "all on": Variant("attend_tiles", ALL_ON, {90: 40}),
    "2 bits, 8 rows": Variant("attend_tiles", {**TWO, "H": 8, "STAGED": True}, {90: 8}),
    "3 bits, 8 rows": Variant("attend_tiles", {"H": 8, "STAGED": True}, {90: 40}),
    "4 bits, 8 rows": Variant("attend_tiles", {**FOUR, "H": 8, "STAGED": True}, {90: 0}),
    "sketch, 8 rows": Variant(
        "attend_tiles", {**SKETCH, "H": 8, "STAGED": True}, {90: 56, 89: 48, 80: 0}
    ),
    "narrow, 8 rows": Variant("attend_tiles", {**NARROW, "H": 8, "STAGED": True}, {90: 0}),
    "wide, 8 rows": Variant("attend_tiles", {**WIDE, "H": 8, "STAGED": True}, {90: 184, 89: 144}),
    "all on, 8 rows": Variant("attend_tiles", {**ALL_ON, "H": 8, "STAGED": True}, {90: 72, 80: 0}),
    "prepare": Variant("prepare", {}, {90: 0, 80: 8}),
    # rows of 256 numbers are rotated whole, once a call
    "prepare, wide": Variant(
        "prepare", {**WIDE_EXACT, **ALL_ON, "SKETCH": True, "HAS_LOW": True}, {90: 272, 89: 224}
    ),
    "combine": Variant("combine", {}, {90: 0, 80: 0}),
    "combine, all rows": Variant("combine", {"ROWS": 4, "PARTS": 16, "BLOCK": 8}, {90: 0}),
    "combine, wide": Variant(
        "combine",
        {**WIDE_ROWS, "PARTS": 512, "BLOCK": 32, "SINK": True, "HAS_LOW": True},
        {90: 24, 89: 152, 80: 8},
    ),
    "combine, few": Variant("combine_few", {"BLOCK": 64}, {90: 0, 80: 0}),
    "combine, few, wide": Variant(
        "combine_few", {**WIDE_ROWS, "SINK": True, "HAS_LOW": True}, {90: 0, 89: 0}
    ),
    "combine, few, all columns": Variant(
        "combine_few", {**WIDE_ROWS, "WIDTH": 64, "HAS_LOW": True}, {90: 0}
    ),
    "plain": Variant("attend_plain", {}, {90: 32, 89: 32, 80: 0}),
    # sums of 16 rows of up to 256 numbers, for sizes that few models have
    "plain, wide": Variant(
        "attend_plain",
        {**WIDE_ROWS, **ALL_ON, "D": 192, "PAIRS": 128, "SKETCH": True},
        {90: 928, 80: 904},
    ),
    "look": Variant("look_kernel", {}, {90: 0, 80: 0}),
}
FLOATS = {"score_factor", "cap", "key_step", "value_step"}
POINTERS = {
    "fp16": {"SCALES", "ROPE", "KEY_ROTATION", "VALUE_ROTATION", "SKETCHED", "TERMS", "SLOW_COEF"},
    "bf16": {
        "KEY",
        "VALUE",
        "QUERY",
        "SINK_KEY",
        "SINK_VALUE",
        "KEY0",
        "VALUE0",
        "KEY1",
        "VALUE1",
        "OUT",
    },
    "i1": {"MASK"},
    "i8": {"ROWS8"},
    "i32": {"RECORDS", "COUNTS", "NOT_FINITE"},
    "i64": {"PADDING"},
}
ALIGNED_STRIDE = re.compile(r"(record|scale|query|sink)_(batch|head|query)|(batch|head)[01]")


def compiled_usage(capability: int, names: list[str]) -> dict[str, dict[str, int]]:
    """What variants take of a GPU; called where Triton does not interpret."""
    return {name: asdict(compile_variant(VARIANTS[name], capability)) for name in names}


def compile_variant(variant: Variant, capability: int) -> Any:
    import triton.language as tl

    from rq_hf.ops.triton.attend_plain import attend_plain
    from rq_hf.ops.triton.attend_tiles import attend_tiles
    from rq_hf.ops.triton.combine import combine
    from rq_hf.ops.triton.combine_few import combine_few
    from rq_hf.ops.triton.look import look_kernel
    from rq_hf.ops.triton.prepare import prepare

    constants = {**DEFAULTS[variant.kernel], **variant.constants}
    wide = constants["D"] > 128
    kernel, num_warps = {
        "attend_tiles": (attend_tiles, 1),
        "attend_plain": (attend_plain, 8 if wide else 4),
        "prepare": (prepare, 8),
        "combine": (combine, 8 if wide else 4),
        "combine_few": (combine_few, 4),
        "look_kernel": (look_kernel, 4),
    }[variant.kernel]
    if kernel is prepare:
        constants.update(COMPUTE=tl.bfloat16, STORED=True, NOTED=True)
    if kernel not in (attend_plain, look_kernel):
        # as `launching.chains`
        constants["CHAINED"] = capability >= 90
    names = list(kernel.arg_names)
    return compile_kernel(
        kernel,
        {name: "constexpr" if name in constants else type_of(name) for name in names},
        constants,
        num_warps=num_warps,
        num_stages=1 if kernel is attend_plain else 3,
        capability=capability,
        gluon=kernel is attend_tiles,
        attributes={
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if name not in constants and (name.isupper() or ALIGNED_STRIDE.fullmatch(name))
        },
    )


def type_of(name: str) -> str:
    """Type of an argument by its name: pointers are upper case."""
    if name.isupper():
        return "*" + next((kind for kind, names in POINTERS.items() if name in names), "fp32")
    if name.startswith("mask_") or ALIGNED_STRIDE.fullmatch(name):
        return "i64"
    return "fp32" if name in FLOATS else "i32"


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED)
def test_compiles_within_limits(capability: int) -> None:
    """Variants share a process, which takes seconds to start."""
    names = [name for name, variant in VARIANTS.items() if capability in variant.stack]
    usage = outside_interpreter("ops.test_compile_attend:compiled_usage", capability, names)
    assert list(usage) == names
    bounded = {name: taken for name, taken in usage.items() if (name, capability) not in SPOILED}
    beyond = {
        name: taken
        for name, taken in bounded.items()
        if taken["registers"] > 255
        or taken["stack"] > VARIANTS[name].stack[capability] * MARGIN + OLDER
        or taken["spills"] > 0
        or taken["shared"] > SHARED[capability]
    }
    assert not beyond
    # launches that begin early wait once, and write nothing before
    for name, taken in usage.items():
        begins_early = capability >= 90 and VARIANTS[name].kernel in (
            "attend_tiles",
            "combine",
            "combine_few",
        )
        assert (taken["waits"], taken["early_stores"]) == (int(begins_early), 0), name
