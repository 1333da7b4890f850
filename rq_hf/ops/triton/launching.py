# SPDX-License-Identifier: Apache-2.0
"""Where and how kernels run."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from triton import knobs


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Context in which kernels are launched on `device`."""
    if device.type != "cuda" or torch.cuda.current_device() == device.index:
        return nullcontext()
    return torch.cuda.device(device)


def compute_dtype(device: torch.device, narrow: torch.dtype) -> torch.dtype:
    """`narrow`, or float32 in Triton's interpreter, whose products of bfloat16 are wrong."""
    return torch.float32 if interpreting() else narrow


@functools.cache
def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return bool(knobs.runtime.interpret)


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 for a CPU."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def generation(device: torch.device) -> int:
    """Major compute capability of a GPU; 9 for a CPU, where kernels are interpreted at most."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


@functools.cache
def chains(device: torch.device) -> bool:
    """Whether a launch can begin while the one before still runs."""
    if device.type != "cuda" or interpreting():
        return False
    # the instructions are known from there on
    return torch.cuda.get_device_capability(device) >= (9, 0)


class Launch(NamedTuple):
    """A kernel and what it is given.

    Attributes:
        kernel: A jitted function whose constants come last.
        grid: Programs.
        args: Tensors, integers and floats.
        constants: Its constants, in the order of the function.
        num_warps: Warps of a program.
        num_stages: Steps of a loop whose loads are under way together; None: Triton's default.
        chained: Whether it may begin while the launch before still runs (programmatic dependent
            launch): as soon as all programs of that have let it (`gdc_launch_dependents`) or have
            ended. What is not its own input it reads and writes behind `gdc_wait` alone.
    """

    kernel: Any
    grid: tuple[int, int]
    args: tuple
    constants: dict[str, Any]
    num_warps: int
    num_stages: int | None = None
    chained: bool = False


class Launched(NamedTuple):
    """A launch in the driver's terms.

    Attributes:
        compiled: The compiled kernel.
        grid: Programs.
        values: What its arguments are, constants included, with addresses for tensors.
    """

    compiled: Any
    grid: tuple[int, int]
    values: list[Any]

    def run(self, stream: int, values: list[Any]) -> None:
        """Launches the kernel, with `values` of the same kind as its own (`kind_of`)."""
        compiled = self.compiled
        # the three None: metadata and hooks of profilers
        compiled.run(
            *self.grid,
            1,
            stream,
            compiled.function,
            compiled.packed_metadata,
            None,
            None,
            None,
            *values,
        )


# kernels that have run, by what they were compiled for
_compiled: dict[tuple, Any] = {}


def launch(wanted: Launch) -> Launched | None:
    """Launches a kernel on the current device and stream.

    A kernel that has run for arguments of the same kind is launched as it was compiled. Triton's
    own way inspects every argument anew, which takes longer than a small kernel.

    Returns:
        What ran, to be run again; None in Triton's interpreter.
    """
    kernel, grid, args, constants, num_warps, num_stages, chained = wanted
    if interpreting():
        kernel[grid](*args, **constants)
        return None
    device = torch.cuda.current_device()
    values, kinds = _inspect(args, _specialized(kernel))
    values.extend(constants.values())
    key = (kernel.__name__, device, num_warps, num_stages, chained, kinds, *constants.values())
    compiled = _compiled.get(key)
    if compiled is None:
        options: dict[str, Any] = {} if num_stages is None else {"num_stages": num_stages}
        if chained:
            options["launch_pdl"] = True
        compiled = kernel[grid](*args, **constants, num_warps=num_warps, **options)
        _compiled[key] = compiled
        return Launched(compiled, grid, values)
    launched = Launched(compiled, grid, values)
    launched.run(current_stream(), values)
    return launched


def current_stream() -> int:
    """The current stream of the current device, as the driver knows it."""
    return torch._C._cuda_getCurrentRawStream(torch.cuda.current_device())


def kind_of(number: int) -> object:
    """What Triton looks at of an integer argument when it compiles."""
    return 1 if number == 1 else (number % 16 == 0, number > 0x7FFFFFFF)


@functools.cache
def _specialized(kernel: Any) -> frozenset[int]:
    """Places of the arguments whose values Triton looks at when it compiles."""
    return frozenset(p.num for p in kernel.params if not p.do_not_specialize)


def _inspect(args: tuple, specialized: frozenset[int]) -> tuple[list, tuple]:
    """Returns arguments with addresses for tensors, and what a kernel is compiled for.

    That is types, alignment of addresses, and divisibility of integers.
    """
    values: list[Any] = []
    kinds: list[Any] = []
    for place, argument in enumerate(args):
        if isinstance(argument, torch.Tensor):
            address = argument.data_ptr()
            values.append(address)
            kinds.append(argument.dtype if address % 16 == 0 else (argument.dtype, "unaligned"))
            continue
        values.append(argument)
        if place in specialized and isinstance(argument, int):
            kinds.append(kind_of(argument))
    return values, tuple(kinds)
