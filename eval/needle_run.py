# SPDX-License-Identifier: Apache-2.0
"""The results file of a needle test: every prompt's scores, and their means by cell."""

from __future__ import annotations

from dataclasses import asdict
from statistics import fmean
from typing import Any

from eval.needle_prompts import Case
from eval.run import Run

# what the others are compared with, where it is among the caches
EXACT = "dynamic"


class NeedleRun(Run):
    """A results file, filled in prompt by prompt; see `Run` for what is kept and refused."""

    def holds(self, case: Case, label: str) -> bool:
        """Tells whether this prompt was read with this cache."""
        wanted = asdict(case)
        return any(_case_of(r) == wanted and r["setting"] == label for r in self._of(label))

    def _of(self, label: str) -> list[dict[str, Any]]:
        return [r for r in self.content["records"] if r["setting"] == label]

    def _summarise(self, label: str) -> dict[str, Any]:
        records = self._of(label)
        if not records:
            return {"setting": label, "prompts": 0}
        exact = {case_key(r): r for r in self._of(EXACT)}
        paired = [(r, exact[case_key(r)]) for r in records if case_key(r) in exact]
        return {
            "setting": label,
            "prompts": len(records),
            "bits_nominal": records[-1]["bits_nominal"],
            "score": _mean(records, "score"),
            "logprob": _mean(records, "logprob"),
            "paired_prompts": len(paired),
            "score_change": _mean_change(paired, "score"),
            "logprob_change": _mean_change(paired, "logprob"),
            "least_packed_tokens": min(r["packed_tokens"] for r in records),
            "seconds_per_prompt": _mean(records, "seconds"),
            "cells": _cells(records),
        }


def _case_of(record: dict[str, Any]) -> dict[str, Any]:
    return {name: record[name] for name in Case.__dataclass_fields__}


def case_key(record: dict[str, Any]) -> tuple[Any, ...]:
    """Returns what tells a record's prompt from others."""
    return tuple(_case_of(record).values())


def _mean(records: list[dict[str, Any]], name: str) -> float:
    return fmean(record[name] for record in records)


def _mean_change(pairs: list[tuple[dict[str, Any], dict[str, Any]]], name: str) -> float | None:
    """Returns the mean difference on the prompts that both read; None where there are none."""
    return fmean(mine[name] - exact[name] for mine, exact in pairs) if pairs else None


def _cells(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns means over the seeds, by kind, context and depth."""
    groups: dict[tuple[str, int, float], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["kind"], record["context"], record["depth"]), []).append(record)
    return [
        {
            "kind": kind,
            "context": context,
            "depth": depth,
            "prompts": len(group),
            "score": _mean(group, "score"),
            "logprob": _mean(group, "logprob"),
        }
        for (kind, context, depth), group in sorted(groups.items())
    ]
