# SPDX-License-Identifier: Apache-2.0
"""Where two runs of greedy decoding part, and whether that was a tie.

Rounding changes every logit a little. Two runs part where the best two logits lie closer together
than that; from there on they read different texts, and nothing can be compared any more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Decoded(NamedTuple):
    """A run: its tokens, int64 `[steps]`, and the logits they were chosen by `[steps, vocabulary]`.

    Both are needed: of equal logits, any may have been taken.
    """

    tokens: Tensor
    logits: Tensor


@dataclass(frozen=True)
class Parting:
    """How far two runs go together; logits are those before any processing.

    Attributes:
        agreeing: Tokens from the start on that are the same.
        margin: Best logit less the second best, in the first run, where the runs part; None if
            they do not.
        difference_before: Largest difference of any logit up to there, over all steps if the runs
            do not part, 0 if they part at the first.
        difference_there: Largest difference at the step where they part, whose input is still the
            same; None if they do not.
        smaller_margins: Of the steps before, how many had a margin no larger than
            `2 * difference_before`, so that they could have gone the other way.
    """

    agreeing: int
    margin: float | None
    difference_before: float
    difference_there: float | None
    smaller_margins: int

    def __str__(self) -> str:
        line = f"{self.agreeing} tokens agree, logits within {self.difference_before:.2g}"
        if self.margin is None:
            return line
        return line + (
            f"; then the best two are {self.margin:.2g} apart, logits within "
            f"{self.difference_there:.2g}"
        )


def find_parting(first: Decoded, second: Decoded) -> Parting:
    """Compares two runs that begin alike.

    Raises:
        ValueError: The shapes differ.
    """
    if first.logits.shape != second.logits.shape:
        shapes = [list(run.logits.shape) for run in (first, second)]
        raise ValueError(f"logits must match, got {shapes[0]} and {shapes[1]}")
    steps = len(first.logits)
    parted = (first.tokens != second.tokens).nonzero()
    agreeing = int(parted[0]) if len(parted) else steps
    differences = (first.logits - second.logits).abs().amax(-1)
    before = float(differences[:agreeing].max()) if agreeing else 0.0
    best, other = first.logits.topk(2, -1).values.unbind(-1)
    margins = best - other
    there = agreeing < steps
    return Parting(
        agreeing=agreeing,
        margin=float(margins[agreeing]) if there else None,
        difference_before=before,
        difference_there=float(differences[agreeing]) if there else None,
        smaller_margins=int(torch.count_nonzero(margins[:agreeing] <= 2 * before)),
    )
