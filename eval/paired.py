# SPDX-License-Identifier: Apache-2.0
"""Sums over scored positions that add up over windows, and the metrics they give."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from eval.scoring import Scores

# the scored part of a window is cut into so many pieces of equal length
PIECES = 8


@dataclass(frozen=True)
class PairedSums:
    """Sums over positions that were scored with and without quantisation.

    Attributes:
        tokens: Positions.
        reference_nll: Sum of -log p without quantisation.
        difference: Sum of d = -log p(setting) + log p(unquantised).
        difference_squares: Sum of d^2.
        kl: Sum of KL(unquantised || setting).
        kl_squares: Sum of its squares.
        agreeing: Positions where both put the same token first.
        piece_tokens: Positions in each eighth of a window's scored part.
        piece_kl: Sum of KL in each of them.
    """

    tokens: int
    reference_nll: float
    difference: float
    difference_squares: float
    kl: float
    kl_squares: float
    agreeing: int
    piece_tokens: list[int]
    piece_kl: list[float]

    @classmethod
    def of(cls, scores: Scores) -> PairedSums:
        """Returns the sums over one window."""
        reference, nll, kl = (x.double() for x in scores[:3])
        difference = nll - reference
        pieces = kl.tensor_split(PIECES)
        return cls(
            tokens=len(kl),
            reference_nll=float(reference.sum()),
            difference=float(difference.sum()),
            difference_squares=float(difference.square().sum()),
            kl=float(kl.sum()),
            kl_squares=float(kl.square().sum()),
            agreeing=int(scores.agrees.sum()),
            piece_tokens=[len(piece) for piece in pieces],
            piece_kl=[float(piece.sum()) for piece in pieces],
        )

    @classmethod
    def total(cls, parts: Sequence[PairedSums]) -> PairedSums:
        """Returns the sums over all windows."""
        columns = {f.name: [getattr(part, f.name) for part in parts] for f in fields(cls)}
        return cls(**{name: _add(values) for name, values in columns.items()})

    def metrics(self) -> dict[str, Any]:
        """Returns perplexities and divergences.

        Standard errors are over positions, taken as independent.
        """
        mean = self.difference / self.tokens
        ratio = math.exp(mean)
        reference = math.exp(self.reference_nll / self.tokens)
        error = _standard_error(self.difference, self.difference_squares, self.tokens)
        pieces = zip(self.piece_kl, self.piece_tokens, strict=True)
        return {
            "tokens": self.tokens,
            "reference_perplexity": reference,
            "perplexity": reference * ratio,
            "delta_percent": 100 * (ratio - 1),
            "delta_percent_error": 100 * ratio * error,
            "kl": self.kl / self.tokens,
            "kl_error": _standard_error(self.kl, self.kl_squares, self.tokens),
            "top1_agreement_percent": 100 * self.agreeing / self.tokens,
            "kl_by_piece": [kl / count if count else float("nan") for kl, count in pieces],
        }


def _add(values: Sequence[Any]) -> Any:
    if isinstance(values[0], list):
        return [sum(column) for column in zip(*values, strict=True)]
    return sum(values)


def _standard_error(total: float, squares: float, count: int) -> float:
    if count < 2:
        return float("nan")
    variance = max(0.0, squares - total * total / count) / (count - 1)
    return math.sqrt(variance / count)
