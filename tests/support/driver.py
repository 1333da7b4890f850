# SPDX-License-Identifier: Apache-2.0
"""A driver that takes note of launches and does nothing; where Triton does not interpret."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch


class Note(NamedTuple):
    """A launch.

    Attributes:
        kernel: Its name.
        compiled: What was launched, which differs where it was compiled for something else.
        grid: Programs.
        arguments: By name, with addresses for tensors; constants too.
        first: Whether it was compiled for this launch.
    """

    kernel: str
    compiled: int
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    first: bool


class Compiled:
    """Stands for a compiled kernel."""

    function, packed_metadata = None, ()

    def __init__(self, kernel: Any, notes: list[Note]) -> None:
        self.kernel, self.notes = kernel, notes

    def run(self, *given: Any) -> None:
        grid, arguments = given[:3], given[9:]
        assert len(grid) == 3 and all(isinstance(size, int) for size in grid)
        self.note(grid, arguments, first=False)

    def note(self, grid: tuple[int, ...], arguments: tuple, *, first: bool) -> None:
        named = dict(zip(self.kernel.arg_names, arguments, strict=True))
        self.notes.append(Note(self.kernel.__name__, id(self), grid, named, first))


@contextmanager
def fake_driver() -> Iterator[list[Note]]:
    """Context in which tensors of any device are launched on; yields the notes."""
    from triton.runtime.jit import JITFunction

    notes: list[Note] = []

    def first_run(self: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> Compiled:
        constants = {k: v for k, v in named.items() if k not in ("num_warps", "num_stages")}
        assert list(self.arg_names)[len(args) :] == list(constants)
        compiled = Compiled(self, notes)
        values = tuple(x.data_ptr() if isinstance(x, torch.Tensor) else x for x in args)
        compiled.note((*grid, 1), (*values, *constants.values()), first=True)
        return compiled

    with (
        mock.patch.object(torch.cuda, "current_device", lambda: 0),
        mock.patch.object(torch._C, "_cuda_getCurrentRawStream", lambda _: 0, create=True),
        mock.patch.object(JITFunction, "run", first_run),
    ):
        yield notes
