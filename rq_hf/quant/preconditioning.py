# SPDX-License-Identifier: Apache-2.0
"""Means and a balance of channels that make keys and values easy to quantize.

Measured once for each sequence and KV head (`rq_hf.quant.measurement`), then frozen. With n the
index of a token in the cache,

    mean_n = RoPE_n(pre_mean) + post_mean
    key    k' = balance * (k - mean_n)        q . k = (q / balance) . k' + q . mean_n
    value  v' = v - value_mean

and of pre_mean and post_mean at most one is not zero. Sequences whose positions differ from the
indices by a constant (left padding) need nothing special: the constant turn goes into pre_mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rq_hf.quant.rope import RopeTable

SPAN = 1024  # tokens worked on at a time


@dataclass(frozen=True, eq=False)
class Preconditioner:
    """Frozen statistics and the two maps they define; all tensors `[B, Hk, D]`, float32.

    Args:
        pre_mean: Mean of the keys before RoPE, zero where it is not used.
        post_mean: Mean of the keys as cached, zero where it is not used.
        balance: Positive factor of each key channel.
        value_mean: Mean of the values.
        rope: How keys were turned, of known convention; None if no head has a `pre_mean`.
    """

    pre_mean: Tensor
    post_mean: Tensor
    balance: Tensor
    value_mean: Tensor
    rope: RopeTable | None = None

    @classmethod
    def identity(cls, like: Tensor) -> Preconditioner:
        """Changes nothing about keys and values like these, `[B, Hk, n, D]`."""
        batch, heads, _, dim = like.shape
        zero = torch.zeros(batch, heads, dim, dtype=torch.float32, device=like.device)
        return cls(zero, zero, torch.ones_like(zero), zero)

    def key_mean(self, start: int, count: int) -> Tensor:
        """mean_n for n = `start` .. `start + count - 1`: float32 `[B, Hk, count, D]`."""
        post = self.post_mean[:, :, None]
        if self.rope is None:
            return post.expand(-1, -1, count, -1)
        return self.rope.rotate(self.pre_mean[:, :, None], start, count) + post

    def mean_scores(self, query: Tensor, start: int, count: int) -> Tensor:
        """q . mean_n for n = `start` .. `start + count - 1`.

        Args:
            query: `[B, Hk, G, L, D]`, float32 or float64, any number of rows for a KV head.
            start: Index of the first key.
            count: Number of keys.

        Returns:
            `[B, Hk, G, L, count]`; the last dimension is 1 where all keys have one mean.
        """
        post = (query * self.post_mean[:, :, None, None].to(query.dtype)).sum(-1, keepdim=True)
        if self.rope is None:
            return post
        pre = self.pre_mean[:, :, None, None]
        return self.rope.inner_products(query, pre, start, count) + post

    def precondition_keys(self, keys: Tensor, start: int) -> Tensor:
        """k' = balance * (k - mean_n).

        Args:
            keys: Keys as cached `[B, Hk, n, D]`, any floating dtype.
            start: Index in the cache of the first row.

        Returns:
            float32, same shape.
        """
        balance = self.balance[:, :, None]
        out = torch.empty(keys.shape, dtype=torch.float32, device=keys.device)
        for rows, mean in self._means(start, keys.shape[2]):
            torch.sub(keys[:, :, rows].float(), mean, out=out[:, :, rows]).mul_(balance)
        return out

    def restore_keys(self, keys: Tensor, start: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """k = k' / balance + mean_n: the inverse of `precondition_keys`, in `dtype`."""
        balance = self.balance[:, :, None]
        out = torch.empty(keys.shape, dtype=dtype, device=keys.device)
        for rows, mean in self._means(start, keys.shape[2]):
            out[:, :, rows] = (keys[:, :, rows].float() / balance).add_(mean)
        return out

    def _means(self, start: int, count: int) -> Iterator[tuple[slice, Tensor]]:
        """Yields spans of rows and their mean_n; all of mean_n would be as large as the keys."""
        if self.rope is not None:
            self.rope.cos_sin(start, count, self.pre_mean.device)
        for a in range(0, count, SPAN):
            b = min(a + SPAN, count)
            yield slice(a, b), self.key_mean(start + a, b - a)

    def center_values(self, values: Tensor) -> Tensor:
        """v' = v - value_mean for values `[B, Hk, n, D]`, as float32."""
        return values.float() - self.value_mean[:, :, None]

    def restore_values(self, values: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """v = v' + value_mean: the inverse of `center_values`, in `dtype`."""
        return (values.float() + self.value_mean[:, :, None]).to(dtype)

    def map(self, function: Callable[[Tensor], Tensor]) -> Preconditioner:
        """Applies `function` to every tensor, all batch first: to reorder, repeat, select, move."""
        return replace(
            self,
            pre_mean=function(self.pre_mean),
            post_mean=function(self.post_mean),
            balance=function(self.balance),
            value_mean=function(self.value_mean),
        )
