# SPDX-License-Identifier: Apache-2.0
"""Writes the tables of the README from result files.

python -m eval.tables            # rewrites README.md
python -m eval.tables --check    # says which tables differ, changes nothing

A table stands between `<!-- table: eval/results/NAME.json -->` and `<!-- end of table -->`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
TABLE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 if outdated")
    args = parser.parse_args()
    text = README.read_text()
    updated = fill(text)
    if args.check:
        sys.exit("README.md has tables that differ from the result files" if updated != text else 0)
    README.write_text(updated)


def fill(text: str) -> str:
    """Returns `text` with every table made anew from its file."""
    return TABLE.sub(lambda match: match[1] + make_table(ROOT / match[2]) + match[3], text)


def make_table(path: Path) -> str:
    """Returns a result file as a Markdown table with its command and hardware below."""
    result = json.loads(path.read_text())
    rows = _mse_rows(result) if "rows" in result else _perplexity_rows(result)
    lines = [" | ".join(row) for row in rows]
    lines.insert(1, " | ".join(["---"] * len(rows[0])))
    environment = result["environment"]
    versions = f"torch {environment['torch']}, transformers {environment['transformers']}"
    source = f"`{result['command']}`; {environment['device']}, {versions}; `{path.name}`"
    return "\n".join(f"| {line} |" for line in lines) + f"\n\n{source}\n"


def _perplexity_rows(result: dict[str, Any]) -> list[list[str]]:
    header = ["cache", "bits a number", "perplexity", "change", "mean KL", "top-1 agreement"]
    return [header] + [
        [
            f"`{row['setting']}`",
            f"{row['bits_nominal']:.2f}",
            f"{row['perplexity']:.2f} (exact {row['reference_perplexity']:.2f})",
            f"{row['delta_percent']:+.2f}% ± {row['delta_percent_error']:.2f}",
            f"{row['kl']:.4f}",
            f"{row['top1_agreement_percent']:.1f}%",
        ]
        for row in result["summary"]
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


if __name__ == "__main__":
    main()
