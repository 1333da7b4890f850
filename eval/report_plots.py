# SPDX-License-Identifier: Apache-2.0
"""Pictures that put several result files together: quality against bits, time of a decode step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from eval.settings import LADDER

Result = dict[str, Any]
DPI = 100  # pictures live in the repository
GOAL_STYLE = {"color": "black", "linestyle": ":", "linewidth": 2}


class Panel(NamedTuple):
    """Measurements that may be compared: one model, one way to read windows, the same positions.

    Attributes:
        model: Its name.
        texts: Their names.
        window: Tokens of a window.
        mode: "strict" or "generate".
        first: Tokens of the first forward, which statistics come from.
        start: First position of a window that is scored.
        tokens: How many are scored in all windows.
    """

    model: str
    texts: tuple[str, ...]
    window: int
    mode: str
    first: int
    start: int
    tokens: int

    def __str__(self) -> str:
        after = f", first {self.first}" if self.first < self.window else ""
        read = f"{self.mode}, windows of {self.window}{after}"
        scored = f"{self.tokens:,} tokens scored, from position {self.start:,}"
        return f"{self.model}, {' then '.join(self.texts)}\n{read}\n{scored}"


class Point(NamedTuple):
    """One setting's result."""

    bits: float
    kl: float
    change: float


def collect(results: Sequence[Result]) -> dict[Panel, dict[str, list[Point]]]:
    """Returns points by panel and method, of results of `eval.perplexity`.

    Settings that change single fields are left out, and so are panels with a single number of
    bits: neither makes a line. Where methods were compared, panels with one alone are left out.
    Of several measurements of one setting on the same positions the first counts.
    """
    panels: dict[Panel, dict[str, dict[float, Point]]] = {}
    for result in results:
        config = result["config"]
        first = config["first_forwards"][0][1]
        texts = tuple(text["name"] for text in config["texts"])
        read = (config["model"]["name"], texts, config["window"], config["mode"], first)
        for row in result["summary"]:
            method, _, bits = row["setting"].partition(":")
            if row["windows"] and bits.isdigit() and method not in LADDER:
                panel = Panel(*read, config["scored"][0], row["tokens"])
                point = Point(row["bits_nominal"], row["kl"], row["delta_percent"])
                panels.setdefault(panel, {}).setdefault(method, {}).setdefault(point.bits, point)
    drawn = {
        panel: {method: list(points.values()) for method, points in lines.items()}
        for panel, lines in sorted(panels.items())
        if len({bits for points in lines.values() for bits in points}) > 1
    }
    compared = {panel: lines for panel, lines in drawn.items() if len(lines) > 1}
    return compared or drawn


def plot_quality(panels: dict[Panel, dict[str, list[Point]]], path: Path) -> None:
    """Draws divergence and change in perplexity against bits, a column for each panel."""
    size = (1 + 4.2 * len(panels), 7)
    figure, grid = plt.subplots(2, len(panels), figsize=size, squeeze=False, layout="constrained")
    methods = sorted({method for lines in panels.values() for method in lines})
    colours = {method: f"C{i % 10}" for i, method in enumerate(methods)}
    for (panel, by_method), (top, bottom) in zip(panels.items(), grid.T, strict=True):
        for method, points in by_method.items():
            bits, kl, change = zip(*sorted(points), strict=True)
            style = {"marker": "o", "label": method, "color": colours[method]}
            top.plot(bits, kl, **style)
            bottom.plot(bits, change, **style)
        top.set_title(str(panel), fontsize=8)
        top.set_yscale("log")
        # a change has a sign; below one percent the scale is linear
        bottom.set_yscale("symlog", linthresh=1)
        bottom.set_xlabel("bits a number, scales included")
        for axes in (top, bottom):
            axes.grid(alpha=0.3, which="both")
    grid[0][0].set_ylabel("KL from the exact cache, nats")
    grid[1][0].set_ylabel("change in perplexity, %")
    lines = [Line2D([], [], color=colours[method], marker="o") for method in methods]
    figure.legend(lines, methods, loc="outside lower center", ncols=6, fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_steps(result: Result, path: Path) -> None:
    """Draws the time of a decode step by case and cache, of a result of `benchmark_generate`."""
    timed = [row for row in result["rows"] if row["error"] is None]
    cases = list(dict.fromkeys(row["case"] for row in timed))
    names = list(dict.fromkeys(row["row"] for row in timed))
    figure, axes = plt.subplots(figsize=(2 + 1.8 * len(cases), 4.5), layout="constrained")
    width = 0.8 / max(1, len(names))
    for i, name in enumerate(names):
        rows = {cases.index(row["case"]): row for row in timed if row["row"] == name}
        places = np.array(list(rows)) + (i - (len(names) - 1) / 2) * width
        heights = [row["step_ms"] for row in rows.values()]
        axes.bar(places, heights, width, label=result["labels"][name].replace("`", ""))
        _mark_goals(axes, list(rows.values()), places, width)
    axes.set_xticks(range(len(cases)), cases)
    axes.set(xlabel="sequences x tokens", ylabel="ms a decode step")
    axes.set_title(result["environment"]["device"])
    axes.grid(alpha=0.3, axis="y")
    if names:
        handles, labels = axes.get_legend_handles_labels()
        if any(row["goal_ms"] is not None for row in timed):
            handles.append(Line2D([], [], **GOAL_STYLE))
            labels.append("goal")
        axes.legend(handles, labels, fontsize="small")
    figure.savefig(path, dpi=DPI, pil_kwargs={"optimize": True})
    plt.close(figure)


def _mark_goals(axes: Axes, rows: Sequence[Result], places: Sequence[float], width: float) -> None:
    """Draws each row's goal across its bar."""
    for row, place in zip(rows, places, strict=True):
        if row["goal_ms"] is not None:
            axes.hlines(row["goal_ms"], place - width / 2, place + width / 2, **GOAL_STYLE)
