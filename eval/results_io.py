# SPDX-License-Identifier: Apache-2.0
"""Result files: what was measured, of what, by which command, on what."""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).parents[1]


def environment(device: torch.device) -> dict[str, str]:
    """Returns versions, and the names of system and device."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "device": device_name(device),
    }


def device_name(device: torch.device) -> str:
    """Returns the product's name: of the GPU, or of the CPU as far as the system tells."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str | None:
    """Returns the commit of this checkout, with "-dirty" if tracked files differ from it.

    Outside of a checkout what the variable GIT_COMMIT says, or None.
    """
    head = _git("rev-parse", "HEAD")
    if head is None:
        return os.environ.get("GIT_COMMIT")
    return head + ("-dirty" if _git("status", "--porcelain", "--untracked-files=no") else "")


def _git(*arguments: str) -> str | None:
    try:
        run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return run.stdout.strip() if run.returncode == 0 else None


def command_line(module: str, argv: Sequence[str]) -> str:
    """Returns the command that was given, absolute paths cut down to their last name.

    Where a file lay concerns the machine; what it held is in the file's hash.
    """
    shown = [Path(word).name if Path(word).is_absolute() else word for word in argv]
    return shlex.join(["python", "-m", module, *shown])


def header(module: str, argv: Sequence[str], device: torch.device) -> dict[str, Any]:
    """Returns what every result file starts with."""
    return {
        "command": command_line(module, argv),
        "commit": commit(),
        "environment": environment(device),
    }


def write_json(path: Path, content: Any) -> None:
    """Writes `content` in one step: readers see the old file or the whole new one.

    Numbers that are not finite become null, as JSON has none.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(_finite(content), file, indent=1, allow_nan=False)
            file.write("\n")
        # mkstemp makes files for their owner alone
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _finite(thing: Any) -> Any:
    if isinstance(thing, dict):
        return {key: _finite(value) for key, value in thing.items()}
    if isinstance(thing, (list, tuple)):
        return [_finite(value) for value in thing]
    return None if isinstance(thing, float) and not math.isfinite(thing) else thing
