# SPDX-License-Identifier: Apache-2.0
"""Writes the tables of README.md and RESULTS.md from result files.

python -m eval.tables            # rewrites both
python -m eval.tables --check    # says which of them differs, changes nothing

A table stands between `<!-- table: eval/results/NAME.json -->` and `<!-- end of table -->`; a
name with `*` stands for the files of one comparison over numbers of tokens for statistics.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

from eval.frozen_table import frozen_rows
from eval.goals import PROD_OVER_MSE
from eval.needle_table import LEGEND, needle_rows
from eval.statistics_table import statistics_rows, statistics_tokens

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", ROOT / "RESULTS.md")
MIB = 1 << 20
# keys of `cache_rows.ROWS` begin so where nothing is packed
BF16_CACHES = ("dynamic", "static")
ERRORS = ("key", "value", "output")
TABLE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 if outdated")
    args = parser.parse_args()
    outdated = [page for page in PAGES if fill(page.read_text()) != page.read_text()]
    if args.check:
        names = " and ".join(page.name for page in outdated)
        sys.exit(f"{names}: tables differ from the result files" if outdated else 0)
    for page in outdated:
        page.write_text(fill(page.read_text()))


def fill(text: str) -> str:
    """Returns `text` with every table made anew from its file."""
    return TABLE.sub(lambda match: match[1] + _make(match[2]) + match[3], text)


def _make(name: str) -> str:
    if "*" in name:
        return make_statistics_table(name)
    return make_table(ROOT / name)


def make_table(path: Path) -> str:
    """Returns a result file as a Markdown table with its command and hardware below."""
    result = json.loads(path.read_text())
    module = module_of(result)
    legend = LEGENDS.get(module, "").format_map(result)
    source = f"`{result['command']}`; {_made_on(result)}; `{path.name}`"
    return f"{markdown(MAKERS[module](result))}\n\n{legend}{source}{_note(result)}\n"


def make_statistics_table(pattern: str) -> str:
    """Returns one table of several files, with the command of one and the hardware below."""
    results = [json.loads(path.read_text()) for path in sorted(ROOT.glob(pattern))]
    rows = frozen_rows(results) if "-frozen-" in pattern else statistics_rows(results)
    first = min(results, key=statistics_tokens)
    notes = "".join(dict.fromkeys(map(_note, results)))
    source = f"`{first['command']}`, and so on; {_made_on(first)}; `{Path(pattern).name}`{notes}"
    return f"{markdown(rows)}\n\n{source}\n"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Returns rows, the header first, as a Markdown table."""
    lines = [" | ".join(row) for row in rows]
    lines.insert(1, " | ".join(["---"] * len(rows[0])))
    return "\n".join(f"| {line} |" for line in lines)


def _made_on(result: dict[str, Any]) -> str:
    environment = result["environment"]
    versions = f"torch {environment['torch']}, transformers {environment['transformers']}"
    return f"{environment['device']}, {versions}"


def _note(result: dict[str, Any]) -> str:
    """Returns what a file says about how it was made beside its command."""
    return f". {result['note']}" if "note" in result else ""


def module_of(result: dict[str, Any]) -> str:
    """Returns the script that wrote a result: `perplexity` of `python -m eval.perplexity ...`."""
    return result["command"].split()[2].removeprefix("eval.")


def _perplexity_rows(result: dict[str, Any]) -> list[list[str]]:
    header = ["cache", "bits a number", "tokens", "perplexity", "change", "mean KL"]
    return [[*header, "top-1 agreement"]] + [
        [
            f"`{row['setting']}`",
            f"{row['bits_nominal']:.2f}",
            f"{row['tokens']:,}",
            f"{row['perplexity']:.2f} (exact {row['reference_perplexity']:.2f})",
            f"{row['delta_percent']:+.2f}% ± {row['delta_percent_error']:.2f}",
            f"{row['kl']:.4f}",
            f"{row['top1_agreement_percent']:.1f}%",
        ]
        for row in result["summary"]
        if row["windows"]
    ]


def _mse_rows(result: dict[str, Any]) -> list[list[str]]:
    """Relative error by rotation, states and bits, norms stored."""
    rows = [row for row in result["rows"] if row["scale"] == "norm"]
    bits = sorted({row["bits"] for row in rows})
    kinds = list(dict.fromkeys(row["input"] for row in rows))
    header = ["rotation", *(f"{kind}, {b} bits" for kind in kinds for b in bits)]
    table = [header]
    for rotation in dict.fromkeys(row["rotation"] for row in rows):
        cells = {
            (r["input"], r["bits"]): r["relative_mse"] for r in rows if r["rotation"] == rotation
        }
        table.append([rotation, *(f"{cells[kind, b]:.4f}" for kind in kinds for b in bits)])
    gaussian = [f"{result['gaussian'][str(b)]:.4f}" for _ in kinds for b in bits]
    return [*table, ["(Gaussian source)", *gaussian]]


def _fidelity_rows(result: dict[str, Any]) -> list[list[str]]:
    """Mean over layers of each error."""
    errors = {"keys": "key_error", "values": "value_error"}
    errors |= {"logits": "logit_error", "outputs": "output_error"}
    return [["cache", *errors]] + [
        [f"`{row['setting']}`", *(f"{row['mean'][name]:.4f}" for name in errors.values())]
        for row in result["rows"]
    ]


def _attention_rows(result: dict[str, Any]) -> list[list[str]]:
    """Time of the fastest bf16 kernel and of each packed setting, by shape."""
    settings = list(dict.fromkeys(row["attention"] for row in result["rows"] if row["packed"]))
    table = [["model, batch x tokens", "fastest bf16", *map(setting_title, settings)]]
    for shape in dict.fromkeys(row["shape"] for row in result["rows"]):
        rows = {r["attention"]: r for r in result["rows"] if r["shape"] == shape}
        packed = [_packed_cell(rows[name], rows.get("3")) for name in settings]
        table.append([shape.replace(":", ", "), _dense_cell(rows), *packed])
    return table


def setting_title(name: str) -> str:
    """Returns what a packed setting of `eval.benchmark_attention` is called."""
    return "3 bits, Prod keys" if name == "prod" else f"{name} bits"


def _dense_cell(rows: dict[str, dict[str, Any]]) -> str:
    timed = [row for row in rows.values() if not row["packed"] and row["timing"]]
    if not timed:
        return "none ran"
    best = min(timed, key=lambda row: row["timing"]["us"])
    return f"{_time_and_rate(best)} ({best['attention']})"


def _packed_cell(row: dict[str, Any], mse: dict[str, Any] | None) -> str:
    if row["timing"] is None:
        return _failure(row)
    cell = _time_and_rate(row)
    if row["ratio"] is not None:
        cell += f"; {row['ratio']:.2f}x of {row['byte_ceiling']:.1f}x"
    if row["goal"] is not None:
        cell += f" (goal {row['goal']}x)"
    if row["attention"] == "prod" and mse is not None and mse["timing"]:
        over = row["timing"]["us"] / mse["timing"]["us"]
        cell += f"; {over:.2f} of MSE's time (goal {PROD_OVER_MSE:.2f})"
    return cell


def _time_and_rate(row: dict[str, Any]) -> str:
    eager = " eager" if row["timing"]["method"] == "eager" else ""
    return f"{row['timing']['us']:.1f} µs{eager}, {row['read_rate_percent']:.0f}%"


def _failure(row: dict[str, Any]) -> str:
    return "not run: " + shorten(row["error"].replace("|", "/"), 60, placeholder=" ...")


def _generate_rows(result: dict[str, Any]) -> list[list[str]]:
    """Step, goal, prefill and memory of each cache, by case."""
    header = ["batch x tokens", "cache", "ms a step", "of it GPU", "goal", "speed, bf16 = 1"]
    table = [[*header, "prefill, s", "cache, MiB", "peak in prefill, MiB", "peak in decoding, MiB"]]
    best = _best_steps(result["rows"])
    for row in result["rows"]:
        cells = _generate_cells(row, best.get(row["case"]))
        table.append([row["case"], result["labels"][row["row"]], *cells])
    return table


def _best_steps(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Returns the shortest step of transformers' bf16 caches, in ms, by case."""
    best: dict[str, float] = {}
    for row in rows:
        if row["error"] is None and row["row"].startswith(BF16_CACHES):
            best[row["case"]] = min(row["step_ms"], best.get(row["case"], row["step_ms"]))
    return best


def _generate_cells(row: dict[str, Any], best_ms: float | None) -> list[str]:
    if row["error"] is not None:
        return [_failure(row), *["-"] * 7]
    bf16 = best_ms is None or row["row"].startswith(BF16_CACHES)
    sizes = (row[f"{name}_bytes"] for name in ("cache", "prefill_peak", "decode_peak"))
    return [
        f"{row['step_ms']:.2f}",
        "-" if row.get("queued_ms") is None else f"{row['queued_ms']:.2f}",
        "-" if row["goal_ms"] is None else f"{row['goal_ms']}",
        "-" if bf16 else f"{best_ms / row['step_ms']:.2f}x",
        f"{row['prefill_s']:.3f}",
        *("-" if size is None else f"{size / MIB:,.0f}" for size in sizes),
    ]


def _sensitivity_rows(result: dict[str, Any]) -> list[list[str]]:
    """Divergence with noise, then errors of caches, by pieces of the window."""
    lines = [
        (f"KL, noise of {row['energy']:g} in {_layers(row['layers'])}", row["kl_by_piece"])
        for row in result["noise"]
    ]
    for row in result["errors"]:
        of = f"`{row['setting']}`, layer {row['layer']}"
        lines += [(f"error of {what}s, {of}", row[f"{what}_error"]) for what in ERRORS]
    pieces = len(lines[0][1])
    table = [["", *(f"{i + 1}/{pieces}" for i in range(pieces)), "last / first"]]
    for name, values in lines:
        table.append([name, *(f"{x:.4f}" for x in values), f"{values[-1] / values[0]:.2f}"])
    return table


def _layers(layers: list[int]) -> str:
    several = "layers" if len(layers) > 1 else "layer"
    return f"{several} {', '.join(map(str, layers))}"


MAKERS = {
    "perplexity": _perplexity_rows,
    "fidelity": _fidelity_rows,
    "needle": needle_rows,
    "rotation_mse": _mse_rows,
    "sensitivity": _sensitivity_rows,
    "benchmark_attention": _attention_rows,
    "benchmark_generate": _generate_rows,
}
LEGENDS = {
    "fidelity": (
        "Mean over layers, of one window of {config[tokens]} tokens. Keys, values and outputs of "
        "attention: squared error by squared length; logits: root mean square error.\n\n"
    ),
    "needle": LEGEND,
    "sensitivity": (
        "By eighths of windows of {config[window]} tokens, of the first {config[windows]} windows; "
        "errors of the last of these, squared by squared length.\n\n"
    ),
    "benchmark_attention": (
        "Time of one step of one layer; the rate at which it reads the cache, of the measured read "
        "rate of memory ({read_rate_gb_per_s:.0f} GB/s); how many times faster than the fastest "
        "bf16 kernel, of how many times fewer bytes, and the goal where there is one; Prod keys "
        "also beside plain 3-bit keys.\n\n"
    ),
    "benchmark_generate": (
        "Median time of a decode step inside `generate()`; of recorded steps, what the GPU takes "
        "when the host waits for none; speed in multiples of that with the fastest bf16 cache of "
        "the same case; what the cache's buffers hold, and what is allocated at most on top of the "
        "weights.\n\n"
    ),
}


if __name__ == "__main__":
    main()
