# SPDX-License-Identifier: Apache-2.0
"""One Markdown page with pictures from all result files of a folder.

python -m eval.report --results eval/results --out report

Writes OUT/report.md and the pictures beside it. Files that no section knows are named at its end.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from eval import report_memory, report_plots, report_tables
from eval.needle_plot import plot_needle
from eval.plot import plot_attention
from eval.tables import make_table, markdown, module_of

Results = dict[Path, dict[str, Any]]
PAGE = "report.md"


def read_results(folder: Path) -> Results:
    """Returns the content of every result file in a folder.

    Raises:
        ValueError: There is none.
    """
    results = {path: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    if not results:
        raise ValueError(f"no result files (*.json) in {folder}")
    return results


def _picture(title: str, name: str) -> str:
    return f"![{title}]({name})"


def _quality(results: Results, out: Path) -> Iterator[str]:
    """Divergence and perplexity against bits, then the tables of all files."""
    panels = report_plots.collect(list(results.values()))
    if panels:
        report_plots.plot_quality(panels, out / "quality.png")
        yield _picture("KL and perplexity against bits", "quality.png")
    yield from _tables(results)


def _needle(results: Results, out: Path) -> Iterator[str]:
    for path, result in results.items():
        plot_needle(result, out / f"{path.stem}.png")
        yield f"### {path.stem}"
        yield _picture("share of facts found by context and depth", f"{path.stem}.png")
        yield make_table(path)


def _attention(results: Results, out: Path) -> Iterator[str]:
    for path, result in results.items():
        plot_attention(result, out / f"{path.stem}.png")
        yield _picture("time of attention against tokens", f"{path.stem}.png")
    yield from _tables(results)


def _steps(results: Results, out: Path) -> Iterator[str]:
    for path, result in results.items():
        report_plots.plot_steps(result, out / f"{path.stem}.png")
        yield _picture("time of a decode step", f"{path.stem}.png")
    yield from _tables(results)


def _frozen(results: Results, out: Path) -> Iterator[str]:
    for files in report_tables.frozen_sets(results):
        yield report_tables.frozen_table(files)


def _packing(results: Results, out: Path) -> Iterator[str]:
    for path, result in results.items():
        yield f"### {path.stem}"
        yield report_tables.encode_table(path, result)


def _devices(results: Results, out: Path) -> Iterator[str]:
    for path, result in results.items():
        yield f"### {path.stem}"
        yield report_tables.devices_table(path, result)


def _only_tables(results: Results, out: Path) -> Iterator[str]:
    yield from _tables(results)


def _tables(results: Results) -> Iterator[str]:
    for path in results:
        yield f"### {path.stem}"
        yield make_table(path)


# stands for the files of `perplexity` that make a section of their own
FROZEN = "frozen"
# heading and maker of a section, by the script that wrote its files
SECTIONS: dict[str, tuple[str, Callable[[Results, Path], Iterator[str]]]] = {
    "perplexity": ("Quality", _quality),
    FROZEN: ("Statistics frozen early", _frozen),
    "fidelity": ("Errors layer by layer", _only_tables),
    "needle": ("Needle in a haystack", _needle),
    "benchmark_attention": ("Speed of attention", _attention),
    "benchmark_generate": ("A decode step in generate()", _steps),
    "benchmark_encode": ("Speed of packing", _packing),
    "multi_gpu": ("Several devices", _devices),
    "rotation_mse": ("Rotations", _only_tables),
    "sensitivity": ("Sensitivity along a window", _only_tables),
}


def memory_section(out: Path) -> Iterator[str]:
    """What fits into cards of several sizes, computed."""
    yield "## Memory"
    report_memory.plot_memory(out / "memory.png")
    yield _picture("weights and cache against tokens", "memory.png")
    yield (
        "The largest context of one sequence beside weights in 16 bits, "
        f"{report_memory.RESERVE / report_memory.GB:g} GB left free; computed from sizes, not "
        "measured:"
    )
    yield markdown(report_memory.context_rows())


def make_page(results: Results, out: Path) -> str:
    """Draws all pictures into a folder and returns the page."""
    frozen = {path for files in report_tables.frozen_sets(results) for path in files}
    by_module: dict[str, Results] = {}
    for path, result in results.items():
        module = FROZEN if path in frozen else module_of(result)
        by_module.setdefault(module, {})[path] = result
    parts = ["# Results"]
    for module, (heading, make) in tqdm(SECTIONS.items(), unit="section", disable=None):
        if module in by_module:
            parts += [f"## {heading}", *make(by_module.pop(module), out)]
    parts += memory_section(out)
    rest = [path.name for files in by_module.values() for path in files]
    if rest:
        parts += ["## Files without a section", "\n".join(f"- `{name}`" for name in rest)]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("eval/results"))
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args(argv)
    results = read_results(args.results)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / PAGE).write_text(make_page(results, args.out))
    print(f"{len(results)} files in {args.out / PAGE}")


if __name__ == "__main__":
    main()
