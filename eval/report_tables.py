# SPDX-License-Identifier: Apache-2.0
"""Tables that only the report has: packing, several devices, and statistics frozen early."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.frozen_table import frozen_rows
from eval.statistics_table import statistics_tokens
from eval.tables import MIB, markdown, module_of, setting_title

Result = dict[str, Any]
Results = dict[Path, Result]
Rows = list[list[str]]

ENCODE_LEGEND = (
    "Time of a call that packs, or unpacks, keys and values of {heads} heads and {tokens:,} tokens "
    "(head_dim {head_dim}), and the bytes it has to read and write in that time."
)
DEVICES_LEGEND = (
    "Of {new_tokens} new tokens of each sequence, how many come before the first that differs from "
    "one device's; the gap between the best two logits there, and the largest difference of any "
    "logit up to there; bytes of the packed cache on each device."
)


def encode_table(path: Path, result: Result) -> str:
    """Returns a result of `eval.benchmark_encode` as a table with its source below."""
    return _table(encode_rows(result), ENCODE_LEGEND, path, result)


def devices_table(path: Path, result: Result) -> str:
    """Returns a result of `eval.multi_gpu` as a table with its source below."""
    return _table(devices_rows(result), DEVICES_LEGEND, path, result)


def encode_rows(result: Result) -> Rows:
    """Time and rate of packing and of unpacking, by setting, rotation and scale rule."""
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    for row in result["rows"]:
        key = (setting_title(row["setting"]), row["rotation"], row["scale"])
        micros = row["timing"]["us"]
        cells.setdefault(key, {})[row["operation"]] = (
            f"{micros:.0f} µs, {row['bytes'] / micros / 1e3:,.0f} GB/s"
        )
    times = [
        [*key, *(cell.get(name, "-") for name in ("encode", "decode"))]
        for key, cell in cells.items()
    ]
    return [["cache", "rotation", "scale", "packing", "unpacking"], *times]


def devices_rows(result: Result) -> Rows:
    """How far each way to run the model follows one device, with both kinds of cache."""
    table = [["model on", "cache", "tokens alike", "gap", "logits moved by", "packed, MiB"]]
    for way, run in result["results"].items():
        for kind, cache in (("tokens", "packed"), ("exact_tokens", "exact")):
            partings = run[f"{kind}_partings"]
            held = _held(run["held"]) if cache == "packed" else "-"
            columns = ("agreeing", "margin", "difference_before")
            table.append([way, cache, *(_numbers(partings, name) for name in columns), held])
    return table


def _numbers(partings: Sequence[Result], name: str) -> str:
    values = (parting[name] for parting in partings)
    return ", ".join("-" if value is None else f"{value:.3g}" for value in values)


def _held(held: dict[str, Any]) -> str:
    """Returns MiB by device; processes have theirs one level below."""
    parts = [
        _held(size) if isinstance(size, dict) else f"{where}: {size / MIB:.1f}"
        for where, size in held.items()
    ]
    return "; ".join(parts)


def frozen_sets(results: Results) -> list[Results]:
    """Returns the files that differ in nothing but how many tokens statistics come from.

    Each set has one model and one setting, and scores the same tokens.
    """
    sets: dict[tuple[Any, ...], Results] = {}
    for path, result in results.items():
        if module_of(result) == "perplexity" and len(result["summary"]) == 1:
            sets.setdefault(_measured(result), {})[path] = result
    return [
        files
        for files in sets.values()
        if len({statistics_tokens(result) for result in files.values()}) == len(files) > 1
    ]


def _measured(result: Result) -> tuple[Any, ...]:
    """Returns what a result of one setting measures, but for the tokens of its statistics."""
    config, (row,) = result["config"], result["summary"]
    texts = tuple(text["name"] for text in config["texts"])
    read = (config["mode"], config["window"], *config["scored"], row.get("tokens"))
    return config["model"]["name"], texts, row["setting"], *read


def frozen_table(files: Results) -> str:
    """Returns one table of a set of files, with their names below."""
    results = list(files.values())
    config, (row,) = results[0]["config"], results[0]["summary"]
    start, end = config["scored"]
    legend = (
        f"`{row['setting']}`, windows of {config['window']:,} tokens, {row['tokens']:,} tokens "
        f"scored; by eighths of the positions from {start:,} to {end:,}."
    )
    names = ", ".join(f"`{path.name}`" for path in files)
    return f"{markdown(frozen_rows(results))}\n\n{legend}\n\n{names}"


def _table(rows: Rows, legend: str, path: Path, result: Result) -> str:
    source = f"`{result['command']}`; {result['environment']['device']}; `{path.name}`"
    return f"{markdown(rows)}\n\n{legend.format_map(result['config'])}\n\n{source}"
