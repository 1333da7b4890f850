# SPDX-License-Identifier: Apache-2.0
"""Heatmaps of the needle test, the caches side by side.

python -m eval.needle_plot eval/results/needle.json [--value logprob]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.image import AxesImage

from eval.needle_prompts import KINDS
from eval.plot import DPI

TITLES = {"score": "share of facts found", "logprob": "log-probability of the answer"}
Cells = list[dict[str, Any]]


def plot_needle(result: dict[str, Any], path: Path, value: str = "score") -> None:
    """Draws a row for each kind of prompt and a column for each cache of `eval.needle`'s result.

    Args:
        result: The file's content.
        path: Picture to write.
        value: "score" or "logprob".

    Raises:
        ValueError: The result holds no prompt.
    """
    rows = [row for row in result["summary"] if row["prompts"]]
    if not rows:
        raise ValueError("nothing to draw: the result holds no prompt")
    found = {cell["kind"] for row in rows for cell in row["cells"]}
    kinds = [kind for kind in KINDS if kind in found]
    size = (2.2 + 2.6 * len(rows), 1.2 + 2.4 * len(kinds))
    figure, grid = plt.subplots(
        len(kinds), len(rows), figsize=size, squeeze=False, layout="constrained"
    )
    limits = _limits(rows, value)
    for axes_of_kind, kind in zip(grid, kinds, strict=True):
        # of all caches: one that was cut short may have none
        every = [cell for row in rows for cell in row["cells"] if cell["kind"] == kind]
        places = [sorted({cell[name] for cell in every}) for name in ("depth", "context")]
        for axes, row in zip(axes_of_kind, rows, strict=True):
            cells = [cell for cell in row["cells"] if cell["kind"] == kind]
            image = _draw(axes, cells, places, value, limits)
            axes.set_title(f"{row['setting']}\n{kind}, mean {_mean(cells, value)}", fontsize=9)
        axes_of_kind[0].set_ylabel("depth, %")
    for axes in grid[-1]:
        axes.set_xlabel("context, tokens")
    figure.colorbar(image, ax=grid, label=TITLES[value], shrink=0.8)
    figure.suptitle(f"{result['config']['model']['name']}", fontsize=10)
    figure.savefig(path, dpi=DPI, pil_kwargs={"optimize": True})
    plt.close(figure)


def _limits(rows: Sequence[dict[str, Any]], value: str) -> tuple[float, float]:
    """Returns the ends of the colours, the same for all caches."""
    if value == "score":
        return 0.0, 1.0
    return min(cell[value] for row in rows for cell in row["cells"]), 0.0


def _draw(
    axes: Axes,
    cells: Cells,
    places: Sequence[Sequence[float]],
    value: str,
    limits: tuple[float, float],
) -> AxesImage:
    depths, contexts = places
    values = np.full((len(depths), len(contexts)), np.nan)
    for cell in cells:
        values[depths.index(cell["depth"]), contexts.index(cell["context"])] = cell[value]
    low, high = limits
    image = axes.imshow(values, vmin=low, vmax=high, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(contexts)), [_tokens(n) for n in contexts], fontsize=8)
    axes.set_yticks(range(len(depths)), [f"{100 * depth:g}" for depth in depths], fontsize=8)
    for (i, j), number in np.ndenumerate(values):
        if np.isfinite(number):
            # both ends of the colours are dark
            middle = 0.2 < (number - low) / ((high - low) or 1) < 0.8
            style = {"fontsize": 7, "color": "black" if middle else "white"}
            axes.text(j, i, f"{number:.2f}", ha="center", va="center", **style)
    return image


def _tokens(count: int) -> str:
    return f"{count // 1024}k" if count % 1024 == 0 else str(count)


def _mean(cells: Cells, value: str) -> str:
    return f"{np.mean([cell[value] for cell in cells]):.2f}" if cells else "-"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path, help="files of eval.needle")
    parser.add_argument("--value", choices=TITLES, default="score")
    args = parser.parse_args(argv)
    for path in args.results:
        suffix = ".png" if args.value == "score" else f"-{args.value}.png"
        plot_needle(json.loads(path.read_text()), path.with_name(path.stem + suffix), args.value)


if __name__ == "__main__":
    main()
