# SPDX-License-Identifier: Apache-2.0
"""Divergence along a window with statistics frozen early, out of several result files.

The files are those of `eval.perplexity` with the same options but --model and --stats-tokens, so
that every row scores the same tokens; those without --stats-tokens have statistics of the window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eval.paired import PIECES
from eval.statistics_table import statistics_tokens


def frozen_rows(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    """KL by pieces of the scored part, and what it is of that with the latest statistics."""
    header = ["model", "statistics of the first"]
    table = [[*header, *(f"{i + 1}/{PIECES}" for i in range(PIECES)), "mean KL"]]
    for model in sorted({_model(result) for result in results}):
        mine = sorted((r for r in results if _model(r) == model), key=statistics_tokens)
        *earlier, latest = mine
        table += [[model, _tokens(result), *_divergence(result)] for result in mine]
        for result in earlier:
            name = f"{_tokens(result)} / {_tokens(latest)}"
            table.append([model, name, *_ratios(result, latest)])
    return table


def _model(result: dict[str, Any]) -> str:
    return result["config"]["model"]["name"]


def _tokens(result: dict[str, Any]) -> str:
    return f"{statistics_tokens(result):,}"


def _divergence(result: dict[str, Any]) -> list[str]:
    (row,) = result["summary"]
    pieces = [f"{kl:.4f}" for kl in row["kl_by_piece"]]
    return [*pieces, f"{row['kl']:.4f} ± {row['kl_error']:.4f}"]


def _ratios(result: dict[str, Any], other: dict[str, Any]) -> list[str]:
    (mine,), (its,) = result["summary"], other["summary"]
    pairs = zip([*mine["kl_by_piece"], mine["kl"]], [*its["kl_by_piece"], its["kl"]], strict=True)
    return [f"{kl / other_kl:.2f}x" for kl, other_kl in pairs]
