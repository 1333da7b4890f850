# SPDX-License-Identifier: Apache-2.0
"""A share of the work for each of several processes; `eval.merge` puts their files together."""

from __future__ import annotations

import argparse
from typing import NamedTuple


class Shard(NamedTuple):
    """Part `index` of `count`, counted from 1."""

    index: int
    count: int

    def takes(self, item: int) -> bool:
        """Tells whether item number `item`, counted from 0, is in this part."""
        return item % self.count == self.index - 1


WHOLE = Shard(1, 1)


def add_shard_option(parser: argparse.ArgumentParser) -> None:
    """Adds --shard."""
    parser.add_argument(
        "--shard",
        type=parse_shard,
        default=WHOLE,
        metavar="I/N",
        help="measure only part I of N, 1 to N; see eval/merge.py",
    )


def parse_shard(word: str) -> Shard:
    """Returns the part that a word such as "2/4" names.

    Raises:
        argparse.ArgumentTypeError: It names none.
    """
    index, _, count = word.partition("/")
    if index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count):
        return Shard(int(index), int(count))
    raise argparse.ArgumentTypeError(f"expected a part of a number of parts, as 2/4, got {word!r}")
