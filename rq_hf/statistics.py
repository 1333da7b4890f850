# SPDX-License-Identifier: Apache-2.0
"""What is learnt from queries and masks until a layer's statistics are frozen."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class QueryStatistics:
    """Mean square of the queries by channel, and the left padding of each sequence."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.count: Tensor | None = None
        self.padding: Tensor | None = None

    @property
    def power(self) -> Tensor | None:
        """Mean square `[B, Hk, D]`, heads of a group averaged; None while no query was seen."""
        if self.total is None or self.count is None:
            return None
        return self.total / self.count.clamp_min(1)[:, None, None]

    def observe(self, query: Tensor, kv_heads: int, valid: Tensor | None) -> None:
        """Adds queries `[B, Hq, L, D]`, those that are `valid` `[B, L]` (all if None)."""
        square = query.detach().float().square()
        if valid is not None:
            square = square.masked_fill(~valid[:, None, :, None], 0.0)
        batch, heads, rows = square.shape[:3]
        total = square.unflatten(1, (kv_heads, -1)).sum((2, 3))
        seen = square.new_full((batch,), rows) if valid is None else valid.sum(1).float()
        count = seen * (heads // kv_heads)
        self.total = total if self.total is None else self.total + total
        self.count = count if self.count is None else self.count + count

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Applies `function` to every tensor, all batch first."""
        for name in ("total", "count", "padding"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, function(tensor))


def padding_of_mask(mask: Tensor | None, batch: int) -> Tensor | None:
    """Returns the left padding `[B]` that a prompt's mask `[B | 1, any, t, t]` shows; None for none.

    Every token of the prompt sees itself, so the first columns that no query sees are padding.
    """
    if mask is None:
        return None
    heads = mask[:, 0]
    visible = heads if heads.dtype == torch.bool else heads > torch.finfo(heads.dtype).min / 2
    return _leading(~visible.any(-2), batch)


def padding_of_weights(weights: Tensor) -> Tensor | None:
    """Returns the left padding `[B]` that a prompt's attention weights `[B, Hq, t, t]` show.

    A query that may see nothing sees everything alike: the softmax of equal numbers.
    """
    if weights.shape[-1] == 1:
        return None
    constant = weights.amax(-1) == weights.amin(-1)
    return _leading(constant.all(1), weights.shape[0])


def _leading(hidden: Tensor, batch: int) -> Tensor | None:
    """Returns how many True each row `[B | 1, t]` starts with; None if no row does."""
    count = hidden.long().cumprod(-1).sum(-1).expand(batch)
    # a row with nothing visible tells nothing
    count = count.masked_fill(hidden.all(-1).expand(batch), 0)
    return count.clone() if bool(count.any()) else None
