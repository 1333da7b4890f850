# SPDX-License-Identifier: Apache-2.0
"""One result file from those of a measurement that was split over processes with --shard.

python -m eval.needle ... --shard 1/2 --out one.json &
python -m eval.needle ... --shard 2/2 --out two.json; wait
python -m eval.merge one.json two.json --out needle.json

The whole names the command without --shard: given with the same --out, it goes on from there.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.needle_run import NeedleRun
from eval.run import Run
from eval.tables import module_of

RUNS = {"perplexity": Run, "needle": NeedleRun}
HEAD = ("command", "commit", "environment")


def merge(paths: Sequence[Path], out: Path) -> Run:
    """Writes what several result files hold into one; what is in more than one counts once.

    Raises:
        ValueError: The files are of different measurements, or such as have no parts.
    """
    parts = {path: json.loads(path.read_text()) for path in paths}
    first = parts[paths[0]]
    kind = module_of(first)
    if kind not in RUNS:
        raise ValueError(f"results of eval.{kind} have no parts, only those of {', '.join(RUNS)}")
    head = {name: first[name] for name in HEAD} | {"command": whole_command(first, out)}
    whole = RUNS[kind](out, head, first["config"])
    for path, part in parts.items():
        if whole_command(part, out) != head["command"]:
            raise ValueError(f"{path} was made by another command than {paths[0]}")
        # made for what it refuses: other environments and configurations
        RUNS[kind](path, head, first["config"])
        _add(whole.content, path, part)
    whole.save()
    return whole


def _add(whole: dict[str, Any], path: Path, part: dict[str, Any]) -> None:
    for label, options in part["settings"].items():
        if whole["settings"].setdefault(label, options) != options:
            raise ValueError(f"{path} holds {label} with other options")
    whole["skipped"] |= part["skipped"]
    whole["records"] += [record for record in part["records"] if record not in whole["records"]]


def whole_command(result: dict[str, Any], out: Path) -> str:
    """Returns the command of a part without --shard, and with `out` as its file."""
    words = iter(shlex.split(result["command"]))
    kept: list[str] = []
    for word in words:
        if word == "--shard":
            next(words)
        elif word == "--out":
            next(words)
            kept += [word, out.name]
        else:
            kept.append(word)
    return shlex.join(kept)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="+", type=Path, help="result files of one measurement")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write or continue")
    args = parser.parse_args(argv)
    whole = merge(args.parts, args.out)
    print(f"{len(whole.content['records'])} records in {args.out}")


if __name__ == "__main__":
    main()
