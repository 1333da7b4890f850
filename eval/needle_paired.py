# SPDX-License-Identifier: Apache-2.0
"""Caches of the needle test beside the exact one, on the prompts that both have read.

python -m eval.needle_paired eval/results/needle.json --settings near-lossless:3

Prints for each kind and context how many prompts lose facts and how many gain some, and the
two-sided sign test: how likely so uneven a split is if either is as likely as the other.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from math import comb
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from eval.needle_run import EXACT, case_key

Record = dict[str, Any]
Pair = tuple[Record, Record]


class Comparison(NamedTuple):
    """Some prompts with a cache and with the exact one.

    Attributes:
        prompts: How many both have read.
        fewer: In how many of them the cache finds fewer facts.
        more: In how many it finds more.
        score_change: Mean change of the share of facts found.
        logprob_change: Mean change of an answer's log-probability.
    """

    prompts: int
    fewer: int
    more: int
    score_change: float
    logprob_change: float

    @property
    def p(self) -> float:
        """Sign test over the prompts that differ."""
        return sign_test(self.fewer, self.more)


def sign_test(one: int, other: int) -> float:
    """Returns the two-sided probability of a split as uneven as this, both sides as likely."""
    count, least = one + other, min(one, other)
    return min(1.0, 2 * sum(comb(count, i) for i in range(least + 1)) / 2**count)


def pairs(records: Sequence[Record], setting: str) -> list[Pair]:
    """Returns each record of a cache with that of the exact cache for the same prompt."""
    exact = {case_key(r): r for r in records if r["setting"] == EXACT}
    mine = (r for r in records if r["setting"] == setting)
    return [(r, exact[case_key(r)]) for r in mine if case_key(r) in exact]


def compare(some: Sequence[Pair]) -> Comparison:
    """Compares the cache's records with the exact ones.

    Raises:
        ValueError: There are none.
    """
    if not some:
        raise ValueError("nothing to compare: no prompt was read with both caches")
    changes = [mine["score"] - exact["score"] for mine, exact in some]
    return Comparison(
        prompts=len(some),
        fewer=sum(change < 0 for change in changes),
        more=sum(change > 0 for change in changes),
        score_change=fmean(changes),
        logprob_change=fmean(mine["logprob"] - exact["logprob"] for mine, exact in some),
    )


def by_cell(some: Iterable[Pair], key: Callable[[Record], Any]) -> dict[Any, Comparison]:
    """Returns a comparison for each value of `key`, in order."""
    groups: dict[Any, list[Pair]] = {}
    for pair in some:
        groups.setdefault(key(pair[0]), []).append(pair)
    return {cell: compare(group) for cell, group in sorted(groups.items())}


def _line(name: str, one: Comparison) -> str:
    return (
        f"  {name:<22}{one.prompts:>5} prompts, {one.fewer:>3} fewer, {one.more:>3} more, "
        f"p {one.p:<7.2g} score {one.score_change:+.3f}, log p {one.logprob_change:+.3f}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path, help="file of eval.needle")
    parser.add_argument("--settings", nargs="+", help="all but the exact one if left out")
    args = parser.parse_args(argv)
    records = json.loads(args.result.read_text())["records"]
    known = [name for name in dict.fromkeys(r["setting"] for r in records) if name != EXACT]
    for setting in args.settings or known:
        some = pairs(records, setting)
        print(setting)
        print(_line("all", compare(some)))
        for kind, one in by_cell(some, lambda r: r["kind"]).items():
            print(_line(kind, one))
        for (kind, context), one in by_cell(some, lambda r: (r["kind"], r["context"])).items():
            print(_line(f"{kind}, {context}", one))


if __name__ == "__main__":
    main()
