# SPDX-License-Identifier: Apache-2.0
"""Pictures of result files.

python -m eval.plot eval/results/perplexity.json
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


def plot_perplexity(result: dict[str, Any], path: Path) -> None:
    """Draws divergence against bits, and along the window, of a result of `eval.perplexity`."""
    # an exact cache diverges by 0, which has no place on a logarithmic axis
    rows = [row for row in result["summary"] if row["windows"] and row["kl"] > 0]
    config = result["config"]
    figure, (by_bits, by_position) = plt.subplots(1, 2, figsize=(11, 4.5))
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
        by_position.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _centres(config: dict[str, Any], row: dict[str, Any]) -> list[float]:
    start, stop = config["scored"]
    pieces = len(row["kl_by_piece"])
    return [start + (stop - start) * (i + 0.5) / pieces for i in range(pieces)]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path, help="files of eval.perplexity")
    for path in parser.parse_args(argv).results:
        plot_perplexity(json.loads(path.read_text()), path.with_suffix(".png"))


if __name__ == "__main__":
    main()
