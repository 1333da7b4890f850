# SPDX-License-Identifier: Apache-2.0
"""Compiles kernels for GPUs that are not there, and reads what they would use of one."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel takes.

    Attributes:
        registers: Of a thread.
        stack: Bytes of a thread's stack; spilled registers lie there.
        spills: Bytes of a thread's local memory beside it.
        shared: Bytes of shared memory of a program.
        waits: How often it waits for the launch before (programmatic dependent launch).
        early_stores: How often it writes to global memory before that.
    """

    registers: int
    stack: int
    spills: int
    shared: int
    waits: int = 0
    early_stores: int = 0


def compile_kernel(
    kernel: Any,
    signature: Mapping[str, Any],
    constexprs: Mapping[Any, Any],
    *,
    num_warps: int,
    capability: int = 90,
    gluon: bool = False,
    attributes: Mapping[tuple[int, ...], Any] | None = None,
    **options: int,
) -> Usage:
    """Compiles a kernel; where Triton does not interpret, see `outside_interpreter`.

    Args:
        kernel: A `triton.jit` or `gluon.jit` function.
        signature: Type of each argument ("*fp32", "i32", "constexpr", ..), tuples for tuples.
        constexprs: Constants by name, or by path (argument, member, ..).
        num_warps: Warps of a program.
        capability: Of the GPU: 80, 90, ..
        gluon: Whether it is a Gluon kernel.
        attributes: By path; None: all pointers are aligned to 16 bytes.
        **options: More options of the launch: num_stages, maxnreg.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    names = list(kernel.arg_names)
    paths = {
        (names.index(key),) if isinstance(key, str) else key: value
        for key, value in constexprs.items()
    }
    types = {name: signature[name] for name in names}
    if attributes is None:
        attributes = {
            path: [["tt.divisibility", 16]]
            for path, kind in _leaves(tuple(types.values()))
            if str(kind).startswith("*")
        }
    source = _source_class(gluon)(kernel, types, constexprs=paths, attrs=dict(attributes))
    options["num_warps"] = num_warps
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return _usage(compiled)


def compile_call(
    kernel: Any, arguments: Mapping[str, Any], *, capability: int = 90, **options: int
) -> Usage:
    """Compiles a kernel as a call with these arguments would, tensors on any device."""
    names = list(kernel.arg_names)
    declared = {p.name for p in kernel.params if p.is_constexpr}
    signature: dict[str, Any] = {}
    constexprs: dict[Any, Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for number, name in enumerate(names):
        value = arguments[name]
        if name in declared:
            signature[name], constexprs[number,] = "constexpr", value
        else:
            signature[name] = _describe(value, (number,), constexprs, attributes)
    return compile_kernel(
        kernel, signature, constexprs, capability=capability, attributes=attributes, **options
    )


def outside_interpreter(function: str, *arguments: Any) -> Any:
    """Result of `module:function`, called in a process where Triton compiles; all of it JSON."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), str(ROOT / "tests"), environment.get("PYTHONPATH", "")]
    )
    command = [sys.executable, "-W", "ignore", "-m", "support.compile", function]
    run = subprocess.run(
        [*command, json.dumps(arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


def _describe(
    value: Any,
    path: tuple[int, ...],
    constexprs: dict[Any, Any],
    attributes: dict[tuple[int, ...], Any],
) -> Any:
    """Type of an argument; notes constants and what is divisible by 16, as a launch does."""
    import triton.language as tl
    from triton.runtime.jit import type_canonicalisation_dict

    if isinstance(value, tuple):
        members = (
            _describe(member, (*path, i), constexprs, attributes) for i, member in enumerate(value)
        )
        return type(value)(*members) if hasattr(value, "_fields") else tuple(members)
    if isinstance(value, torch.Tensor):
        attributes[path] = [["tt.divisibility", 16]]
        return "*" + type_canonicalisation_dict[str(value.dtype).removeprefix("torch.")]
    if isinstance(value, float):
        return "fp32"
    if value is None or isinstance(value, tl.constexpr) or value == 1:
        constexprs[path] = getattr(value, "value", value)
        return "constexpr"
    if value % 16 == 0:
        attributes[path] = [["tt.divisibility", 16]]
    return "i32" if abs(value) < 2**31 else "i64"


def _leaves(types: tuple[Any, ...], path: tuple[int, ...] = ()) -> Iterator[tuple[Any, Any]]:
    for i, kind in enumerate(types):
        if isinstance(kind, tuple):
            yield from _leaves(kind, (*path, i))
        else:
            yield (*path, i), kind


def _source_class(gluon: bool) -> Any:
    if gluon:
        from triton.experimental.gluon._runtime import GluonASTSource

        return GluonASTSource
    from triton.compiler import ASTSource

    return ASTSource


def _usage(compiled: Any) -> Usage:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {key: int(number) for key, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    before, *behind = compiled.asm["ptx"].split("griddepcontrol.wait")
    stores = len(re.findall(r"\b(?:st|red|atom)\.global", before)) if behind else 0
    shared = compiled.metadata.shared
    return Usage(found["REG"], found["STACK"], found["LOCAL"], shared, len(behind), stores)


def main() -> None:
    """Calls `module:function` with arguments in JSON and prints its result as JSON."""
    module, _, name = sys.argv[1].partition(":")
    result = getattr(importlib.import_module(module), name)(*json.loads(sys.argv[2]))
    sys.stdout.write("\n" + json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
