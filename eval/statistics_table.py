# SPDX-License-Identifier: Apache-2.0
"""Divergence against the number of tokens that statistics come from, out of several result files.

The files are those of `eval.perplexity` with the same options but --model and --stats-tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

SETTINGS = ("near-lossless:3", "near-lossless:3,balance=False")
# whatever it is measured on, nothing of it is used
NEUTRAL = "near-lossless:3,key_mean=none,balance=False,value_mean=False"


def statistics_rows(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Mean KL of `SETTINGS`, a row for each number of tokens and one without statistics."""
    found: dict[tuple[str, int, str], dict[str, Any]] = {}
    for result in results:
        model, tokens = result["config"]["model"]["name"], statistics_tokens(result)
        found |= {(model, tokens, row["setting"]): row for row in result["summary"]}
    models, counts = (sorted({key[i] for key in found}) for i in (0, 1))
    columns = [(model, setting) for model in models for setting in SETTINGS]
    table = [["tokens", *(f"{model}, `{setting}`" for model, setting in columns)]]
    for count in counts:
        table.append([str(count), *(_cell(found.get((m, count, s))) for m, s in columns)])
    neutral = {model: row for (model, _, setting), row in found.items() if setting == NEUTRAL}
    last = [_cell(neutral.get(model)) if s == SETTINGS[0] else "-" for model, s in columns]
    return [*table, ["none", *last]]


def statistics_tokens(result: dict[str, Any]) -> int:
    """Returns how many tokens statistics were measured on: those of the first forward."""
    return result["config"]["first_forwards"][0][1]


def _cell(row: dict[str, Any] | None) -> str:
    return "-" if row is None else f"{row['kl']:.4f} ± {row['kl_error']:.4f}"
