# SPDX-License-Identifier: Apache-2.0
"""The needle test as a table: a row for each kind of prompt and cache."""

from __future__ import annotations

from typing import Any

from eval.needle_paired import by_cell, pairs
from eval.needle_run import EXACT

LEGEND = (
    "Share of facts that greedy decoding gives in full, over all depths; log p: mean "
    "log-probability of a whole answer. Fewer, more: prompts with fewer and with more facts found "
    "than with the exact cache, of the same prompts (p: two-sided sign test).\n\n"
)


def needle_rows(result: dict[str, Any]) -> list[list[str]]:
    """Share of facts found by context, and on how many prompts that differs from the exact cache.

    Every row is over the prompts that its own cache has read; only what is compared with the exact
    cache is over those that both have.
    """
    rows = [row for row in result["summary"] if row["prompts"]]
    cells = [cell for row in rows for cell in row["cells"]]
    contexts = sorted({cell["context"] for cell in cells})
    header = ["facts", "cache", "bits a number", *(f"{n:,} tokens" for n in contexts), "log p"]
    table = [[*header, "prompts", "fewer, more"]]
    for kind in dict.fromkeys(cell["kind"] for cell in cells):
        for row in rows:
            mine = [cell for cell in row["cells"] if cell["kind"] == kind]
            if mine:
                name, bits = f"`{row['setting']}`", f"{row['bits_nominal']:.2f}"
                scores = [_found([c for c in mine if c["context"] == n]) for n in contexts]
                log_p, prompts = f"{_mean(mine, 'logprob'):.2f}", str(_prompts(mine))
                differ = _differ(result, row["setting"], kind)
                table.append([kind, name, bits, *scores, log_p, prompts, differ])
    return table


def _found(cells: list[dict[str, Any]]) -> str:
    return f"{100 * _mean(cells, 'score'):.1f}%" if cells else "-"


def _prompts(cells: list[dict[str, Any]]) -> int:
    return sum(cell["prompts"] for cell in cells)


def _mean(cells: list[dict[str, Any]], name: str) -> float:
    """Mean over the prompts of some cells."""
    return sum(cell[name] * cell["prompts"] for cell in cells) / _prompts(cells)


def _differ(result: dict[str, Any], setting: str, kind: str) -> str:
    by_kind = by_cell(pairs(result.get("records", []), setting), lambda record: record["kind"])
    if setting == EXACT or kind not in by_kind:
        return "-"
    one = by_kind[kind]
    return f"{one.fewer}, {one.more} (p {one.p:.2g})"
