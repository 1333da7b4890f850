# SPDX-License-Identifier: Apache-2.0
"""Softmax-weighted sums gathered piece by piece (online softmax, arXiv 1805.02867)."""

from __future__ import annotations

import torch
from torch import Tensor


class OnlineSoftmax:
    """The running maximum and total of softmax weights, and weighted sums of values.

    Sums of several kinds of values (exact, rotated) run side by side, each with its own share of
    the total.

    Args:
        like: Scores whose shape but the last dimension, dtype and device are the rows' `[...]`.
        kinds: Number of kinds of values.
        head_dim: Length of a value, D.
    """

    def __init__(self, like: Tensor, kinds: int, head_dim: int) -> None:
        rows = like.shape[:-1]
        self.maximum = like.new_full(rows, -torch.inf)
        self.shares = [like.new_zeros(rows) for _ in range(kinds)]
        self.sums = [like.new_zeros(*rows, head_dim) for _ in range(kinds)]
        self.extra = like.new_zeros(rows)

    def add(self, scores: Tensor, values: Tensor, kind: int) -> None:
        """Adds `scores` `[B, Hk, G, L, n]`, -inf where hidden, and `values` `[B, Hk, n, D]`."""
        if scores.shape[-1] == 0:
            return
        weights = self._weigh(scores)
        self.shares[kind] += weights.sum(-1)
        self.sums[kind] += grouped_product(weights, values)

    def add_logit(self, logits: Tensor) -> None:
        """Adds one weight `[...]` a row that has no value (an attention sink)."""
        self.extra += self._weigh(logits[..., None])[..., 0]

    def _weigh(self, scores: Tensor) -> Tensor:
        """Raises the maximum to that of `scores`, rescales, and returns their weights."""
        maximum = torch.maximum(self.maximum, scores.amax(-1))
        # while all is hidden the maximum is -inf: any finite stand-in gives weights of 0
        finite = maximum.masked_fill(maximum == -torch.inf, 0.0)
        shrink = (self.maximum - finite).exp()
        self.maximum = maximum
        self.extra *= shrink
        for share, total in zip(self.shares, self.sums, strict=True):
            share *= shrink
            total *= shrink[..., None]
        return (scores - finite[..., None]).exp()

    def finish(self) -> tuple[list[Tensor], list[Tensor]]:
        """Returns for each kind the weighted sum `[..., D]` and its share of the weight `[...]`.

        A row with everything hidden gives 0.
        """
        total = torch.stack(self.shares).sum(0) + self.extra
        factor = torch.where(total > 0, 1 / total, 0.0)
        sums = [total_of_kind * factor[..., None] for total_of_kind in self.sums]
        return sums, [share * factor for share in self.shares]


def grouped_product(rows: Tensor, matrix: Tensor) -> Tensor:
    """Returns `rows` `[B, Hk, G, L, a]` times the `matrix` `[B, Hk, a, b]` of their KV head."""
    # one product a KV head: broadcasting would copy the matrix for every query head
    return (rows.flatten(2, 3) @ matrix).unflatten(2, rows.shape[2:4])
