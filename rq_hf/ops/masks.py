# SPDX-License-Identifier: Apache-2.0
"""Hiding keys: the model's mask, left padding, and causality, for any set of keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class KeyMask:
    """Which keys each query may see.

    Attributes:
        mask: `[B | 1, Hq | 1, L | 1, N]`, bool (True: visible) or additive float; None: all.
        causal: Query `i` of `L` sees keys up to index `length - L + i`.
        queries: L.
        length: Tokens of a sequence, N. Columns of `mask` beyond it are ignored.
        heads: KV heads, Hk.
    """

    mask: Tensor | None
    causal: bool
    queries: int
    length: int
    heads: int

    def apply(self, scores: Tensor, index: Tensor, hidden_before: Tensor | None = None) -> Tensor:
        """Returns `scores` with hidden keys at -inf.

        Args:
            scores: `[B, Hk, G, L, n]`, float32.
            index: Place of each key in the sequence, `[n]` or `[B, n]`.
            hidden_before: Index `[B]` before which keys are hidden.
        """
        if self.mask is not None:
            columns = self._columns(index)
            if columns.dtype == torch.bool:
                scores = scores.masked_fill(~columns, -torch.inf)
            else:
                scores = scores + columns.float()
        if self.causal and self.queries > 1:
            last = torch.arange(self.length - self.queries, self.length, device=index.device)
            later = index[..., None, :] > last[:, None]
            later = later[:, None, None] if later.dim() == 3 else later
            scores = scores.masked_fill(later, -torch.inf)
        if hidden_before is not None:
            hidden = index < hidden_before[:, None]
            scores = scores.masked_fill(hidden[:, None, None, None], -torch.inf)
        return scores

    def _columns(self, index: Tensor) -> Tensor:
        """Returns the mask's columns `index` as `[B | 1, Hk | 1, G | 1, L | 1, n]`."""
        assert self.mask is not None
        if index.dim() == 1:
            columns = self.mask[..., index]
        else:
            mask = self.mask.expand(index.shape[0], *self.mask.shape[1:])
            at = index[:, None, None].expand(*mask.shape[:-1], -1)
            columns = mask.gather(-1, at)
        if columns.shape[1] == 1:
            return columns[:, :, None]
        return columns.unflatten(1, (self.heads, -1))
