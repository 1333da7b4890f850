# SPDX-License-Identifier: Apache-2.0
"""Pictures of result files.

python -m eval.plot eval/results/perplexity.json
python -m eval.plot eval/results/attention-speed.json eval/results/generate-speed.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, StrMethodFormatter

from eval.report_plots import DPI, plot_steps
from eval.shapes import parse_shape
from eval.tables import module_of, setting_title


def plot_perplexity(result: dict[str, Any], path: Path) -> None:
    """Draws divergence against bits, and along the window, of a result of `eval.perplexity`."""
    # an exact cache diverges by 0, which has no place on a logarithmic axis
    rows = [row for row in result["summary"] if row["windows"] and row["kl"] > 0]
    config = result["config"]
    figure, (by_bits, by_position) = plt.subplots(1, 2, figsize=(12, 4.5))
    for row in rows:
        (line,) = by_position.plot(_centres(config, row), row["kl_by_piece"], label=row["setting"])
        by_bits.errorbar(
            row["bits_nominal"], row["kl"], yerr=row["kl_error"], fmt="o", color=line.get_color()
        )
    by_bits.set(xlabel="bits a number, scales included", ylabel="KL(unquantised || setting), nats")
    by_position.set(xlabel="position in the window", title=f"mode {config['mode']}")
    by_bits.set_title(f"{config['model']['name']}, {config['texts'][0]['name']}")
    for axes in (by_bits, by_position):
        axes.set_yscale("log")
        axes.grid(alpha=0.3, which="both")
    if config["switch_at"] is not None:
        by_position.axvline(config["switch_at"], color="grey", linestyle=":")
    if rows:
        by_position.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=DPI, pil_kwargs={"optimize": True})
    plt.close(figure)


def _centres(config: dict[str, Any], row: dict[str, Any]) -> list[float]:
    start, stop = config["scored"]
    pieces = len(row["kl_by_piece"])
    return [start + (stop - start) * (i + 0.5) / pieces for i in range(pieces)]


def plot_attention(result: dict[str, Any], path: Path) -> None:
    """Draws time against tokens of one sequence, of a result of `eval.benchmark_attention`.

    Of the first model in it. All bf16 kernels make one line, that of the fastest.
    """
    lines, model = _attention_lines(result)
    figure, axes = plt.subplots(figsize=(6.5, 4.5))
    for name, times in lines.items():
        style = {"color": "black", "linestyle": "--"} if name == "fastest bf16" else {}
        axes.plot(*zip(*sorted(times.items()), strict=True), marker="o", label=name, **style)
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="µs a layer and step")
    axes.set_title(f"{model}, one sequence, {result['environment']['device']}")
    ticks = sorted({tokens for times in lines.values() for tokens in times})
    axes.set_xticks(ticks, [f"{tokens / 1024:g}k" for tokens in ticks], minor=False)
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.grid(alpha=0.3, which="both")
    if lines:
        axes.legend(fontsize="small")
    _save(figure, path)


def _attention_lines(result: dict[str, Any]) -> tuple[dict[str, dict[int, float]], str]:
    """Returns times by number of tokens for each line, and the model that they are of."""
    model = parse_shape(result["rows"][0]["shape"]).model
    lines: dict[str, dict[int, float]] = {}
    for row in result["rows"]:
        shape = parse_shape(row["shape"])
        if row["timing"] is None or shape.model != model or shape.case.batch != 1:
            continue
        name = setting_title(row["attention"]) if row["packed"] else "fastest bf16"
        times, us = lines.setdefault(name, {}), row["timing"]["us"]
        times[shape.case.context] = min(us, times.get(shape.case.context, us))
    return lines, model


PLOTS = {
    "perplexity": plot_perplexity,
    "benchmark_attention": plot_attention,
    "benchmark_generate": plot_steps,
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    files = "files of eval.perplexity, eval.benchmark_attention or eval.benchmark_generate"
    parser.add_argument("results", nargs="+", type=Path, help=files)
    for path in parser.parse_args(argv).results:
        result = json.loads(path.read_text())
        PLOTS[module_of(result)](result, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
