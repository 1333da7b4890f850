# SPDX-License-Identifier: Apache-2.0
"""What is learnt from queries and masks until a layer's statistics are frozen."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor

# steps whose tokens may still have to be taken back, as far as their memory is worth it
_MOST_MARKS = 16


class QueryStatistics:
    """Mean square of the queries by channel, and the left padding of each sequence."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.count: Tensor | None = None
        self.padding: Tensor | None = None
        self._marks: list[tuple[int, Tensor | None, Tensor | None, Tensor | None]] = []

    def mark(self, length: int) -> None:
        """Notes what is known when there are `length` tokens, for `go_back`."""
        self._unmark(length)
        self._marks.append((length, self.total, self.count, self.padding))
        del self._marks[:-_MOST_MARKS]

    def go_back(self, length: int) -> None:
        """Forgets queries of all passes with tokens behind the first `length`, back to a mark.

        Where no mark is old enough and queries were not finite, all so far are forgotten. Waits for
        the device then.
        """
        oldest = self._marks[0] if self._marks else None
        self._unmark(length + 1)
        mark = self._marks[-1] if self._marks else oldest
        if mark is not None:
            _, self.total, self.count, self.padding = mark
        if self._marks:
            return
        if self.total is not None and not bool(torch.isfinite(self.total).all()):
            self.total = self.count = None

    def forget_marks(self) -> None:
        """Lets go of what was marked: nothing is measured any more."""
        self._marks.clear()

    def _unmark(self, length: int) -> None:
        """Forgets the marks of `length` tokens and more."""
        while self._marks and self._marks[-1][0] >= length:
            self._marks.pop()

    @property
    def power(self) -> Tensor | None:
        """Mean square `[B, Hk, D]`, heads of a group averaged; None while no query was seen."""
        if self.total is None or self.count is None:
            return None
        return self.total / self.count.clamp_min(1)[:, None, None]

    def observe(self, query: Tensor, kv_heads: int, valid: Tensor | None) -> None:
        """Adds queries `[B, Hq, L, D]`, those that are `valid` `[B, L]` (all if None)."""
        query = query.detach()
        if valid is not None:
            query = query.masked_fill(~valid[:, None, :, None], 0.0)
        batch, heads, rows = query.shape[:3]
        # without squares of all queries in memory
        square = torch.linalg.vector_norm(query, dim=2, dtype=torch.float32).square()
        total = square.unflatten(1, (kv_heads, -1)).sum(2)
        seen = square.new_full((batch,), rows) if valid is None else valid.sum(1).float()
        count = seen * (heads // kv_heads)
        self.total = total if self.total is None else self.total + total
        self.count = count if self.count is None else self.count + count

    def extend_padding(self, count: Tensor | None, before: int) -> None:
        """Notes that `count` `[B]` tokens behind `before` others are padding, if all those were."""
        if count is None:
            return
        padding = torch.zeros_like(count) if self.padding is None else self.padding
        self.padding = torch.where(padding == before, padding + count, padding)

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Applies `function` to every tensor, all batch first; what was marked is forgotten."""
        self.forget_marks()
        for name in ("total", "count", "padding"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, function(tensor))


def padding_of_mask(mask: Tensor | None, before: int) -> Tensor | None:
    """Returns how many of the new tokens a mask shows to be left padding.

    A token that no query of these sees, not even its own, is padding; windows and chunks hide older
    tokens only.

    Args:
        mask: `[B, any, L, N]` for L new tokens behind `before` old ones, N at least their sum,
            bool (True: visible) or additive float; None shows none.
        before: Tokens before the new ones.

    Returns:
        int64 `[B]`: new tokens at the start of each sequence that are padding; None for none.
    """
    if mask is None:
        return None
    if mask.is_inference():
        # such a tensor does not count its changes
        return _padding_of_mask(mask, before)
    global _last
    known, version = _last, mask._version
    if known is None or known[0]() is not mask or known[1:3] != (version, before):
        known = _last = weakref.ref(mask), version, before, _padding_of_mask(mask, before)
    return known[3]


# the layers of a model ask about one mask in turn, and a GPU has to be waited for
_last: tuple[weakref.ref[Tensor], int, int, Tensor | None] | None = None


def _padding_of_mask(mask: Tensor, before: int) -> Tensor | None:
    new = mask[:, :, :, before:]
    # what one head alone does not see is no padding
    hidden = ~_shows(new.diagonal(dim1=-2, dim2=-1)).any(1)
    count = _leading(hidden)
    if count is None:
        return None
    # few columns are looked at whole
    hidden = hidden[:, : int(count.max())]
    columns = new[..., : hidden.shape[1]]
    seen = columns.any(2) if columns.dtype == torch.bool else _shows(columns.amax(2))
    return _leading(hidden & ~seen.any(1))


def _shows(mask: Tensor) -> Tensor:
    """Where a mask shows a key."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def padding_of_weights(weights: Tensor) -> Tensor | None:
    """Returns how many of the new tokens their attention weights `[B, Hq, L, N]` show as padding.

    A query that may see nothing sees everything alike: the softmax of equal numbers.
    """
    if weights.shape[-1] == 1:
        return None
    return _leading((weights.amax(-1) == weights.amin(-1)).all(1))


def _leading(hidden: Tensor) -> Tensor | None:
    """Returns how many True each row `[B, L]` starts with; None if no row does."""
    count = hidden.long().cumprod(-1).sum(-1)
    return count if bool(count.any()) else None
