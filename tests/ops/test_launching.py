# SPDX-License-Identifier: Apache-2.0
"""How the attention kernels are launched, seen from a driver that takes note and does nothing."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from support.compile import outside_interpreter

pytest.importorskip("triton")

# head_dim and settings: tiles in fragment order, twice; in plain order; with signs
CASES: list[tuple[int, dict[str, Any]]] = [
    (128, {}),
    (256, {"nbits": 4}),
    (80, {}),
    (64, {"key_codec": "prod"}),
]


class Compiled:
    """Stands for a compiled kernel; `run` notes the names of what it is given."""

    function, packed_metadata = None, ()

    def __init__(self, names: list[str], notes: list[tuple[str, list[str]]], kernel: str) -> None:
        self.names, self.notes, self.kernel = names, notes, kernel

    def run(self, *given: Any) -> None:
        grid, arguments = given[:3], given[9:]
        assert len(grid) == 3 and all(isinstance(size, int) for size in grid)
        assert len(arguments) == len(self.names)
        wrong = [name for name, x in zip(self.names, arguments, strict=True) if is_wrong(name, x)]
        self.notes.append((self.kernel, wrong))


def is_wrong(name: str, argument: Any) -> bool:
    """Whether an argument is not of the kind that its place has: addresses are upper case."""
    if isinstance(argument, torch.Tensor):
        return True
    return name in ("QUERY", "RECORDS", "PARTIAL", "OUT") and not argument > 1 << 16


def relaunched() -> list[tuple[str, list[str]]]:
    """Attends three times in each case, and returns what the second and third launches show."""
    from ops.test_attend_kernels import make_query, make_view
    from triton.runtime.jit import JITFunction

    from rq_hf.ops.triton.attend import attend

    notes: list[tuple[str, list[str]]] = []

    def first_run(self: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> Compiled:
        names = list(self.arg_names)
        constants = [name for name in named if name not in ("num_warps", "num_stages")]
        assert names[len(args) :] == constants
        return Compiled(names, notes, self.__name__)

    with (
        mock.patch.object(torch.cuda, "current_device", lambda: 0),
        mock.patch.object(torch._C, "_cuda_getCurrentRawStream", lambda _: 0, create=True),
        mock.patch.object(JITFunction, "run", first_run),
    ):
        for head_dim, settings in CASES:
            view = make_view(700, head_dim, torch.device("cpu"), batch=1, **settings)
            for _ in range(3):
                attend(make_query(view, 4, 1), view, scale=0.1)
    return notes


def test_later_launches_pass_the_same_arguments_by_address() -> None:
    notes = outside_interpreter("ops.test_launching:relaunched")
    packed = ["attend_plain" if head_dim == 80 else "attend_tiles" for head_dim, _ in CASES]
    launched = [kernel for kernel, _ in notes]
    for kernel in set(packed):
        # memory may come to lie at an address of another alignment: that is a first run again
        assert launched.count(kernel) >= packed.count(kernel)
    assert launched.count("prepare") >= len(CASES) and launched.count("combine") >= len(CASES)
    assert not [name for _, wrong in notes for name in wrong]
