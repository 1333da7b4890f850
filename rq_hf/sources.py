# SPDX-License-Identifier: Apache-2.0
"""What handles stand for: a prompt that attends to itself, or a view of the store."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from rq_hf.ops import LayerView, chooses_triton, reference
from rq_hf.ops.attend import attend_with
from rq_hf.ops.dispatch import MAX_QUERIES
from rq_hf.statistics import padding_of_mask, padding_of_weights

if TYPE_CHECKING:
    from rq_hf.handle import Role
    from rq_hf.layers import RotorQuantLayer


class ViewSource:
    """All tokens of a layer, as they were when the view was taken.

    Args:
        view: Keys and values.
        layer: The layer, which counts the calls.
        new_tokens: The newest tokens, whose queries will come.
        observed: Whether the layer still wants to see queries.
    """

    def __init__(
        self, view: LayerView, layer: RotorQuantLayer, new_tokens: int, observed: bool
    ) -> None:
        keys = view.sinks.keys
        batch, heads, _, head_dim = keys.shape
        self.shape = (batch, heads, view.length, head_dim)
        self.dtype, self.device = keys.dtype, keys.device
        self.view = view
        self.layer = layer
        self.new_tokens = new_tokens
        self.observed = observed
        # noted once the weights have shown the padding
        self._query: Tensor | None = None
        self._dense: tuple[Tensor, Tensor] | None = None

    def count(self, door: str) -> None:
        self.layer.count(door)

    def sdpa(
        self,
        query: Tensor,
        *,
        mask: Tensor | None,
        dropout: float,
        causal: bool,
        scale: float | None,
    ) -> Tensor | None:
        if dropout or _wants_gradient(query):
            return None
        if causal and query.shape[2] not in (1, self.view.length):
            # the host counts is_causal from the first key, which is right for square scores only
            return None
        return self.attend(query, mask=mask, causal=causal, scale=scale, door="sdpa")

    def attend(
        self,
        query: Tensor,
        *,
        mask: Tensor | None,
        causal: bool,
        scale: float | None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        door: str,
    ) -> Tensor:
        """Returns attention from the packed store, and counts the call under `door`."""
        kernels = self._chooses_kernels(query)
        self.count(f"{door} by kernels" if kernels else door)
        if self.observed:
            before = self.view.length - self.new_tokens
            fits = mask is not None and mask.shape[2] == self.new_tokens
            self._observe(query, padding_of_mask(mask, before) if fits else None)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        stores = kernels and self.layer.waits_for(self.view)
        result = attend_with(
            kernels,
            query,
            self.view,
            scale=scale,
            mask=mask,
            causal=causal,
            softcap=softcap,
            sinks=sinks,
            stores_newest=stores,
            not_finite=self.layer.watch.by_attention() if stores else None,
        )
        if stores:
            self.layer.note_stored()
        else:
            self._settle()
        return result

    def _settle(self) -> None:
        """Stores a token that has waited for an attention that does not store it."""
        if self.layer.waits_for(self.view):
            self.layer.settle()

    def _chooses_kernels(self, query: Tensor) -> bool:
        """Whether kernels run: many queries are matrix products, which torch has."""
        wanted = self.layer.config.impl
        if query.shape[2] > MAX_QUERIES:
            wanted = "reference"
        return chooses_triton(query, self.view, wanted)

    def scores(self, query: Tensor) -> Tensor | None:
        if _wants_gradient(query):
            return None
        self.count("eager")
        self._query = query if self.observed else None
        return reference.scores(query, self.view).to(query.dtype)

    def mix(self, weights: Tensor) -> Tensor | None:
        if _wants_gradient(weights):
            return None
        if self._query is not None:
            self._observe(self._query, padding_of_weights(weights))
            self._query = None
        self._settle()
        return reference.mix(weights, self.view).to(weights.dtype)

    def dense(self, role: Role) -> Tensor:
        if self._dense is None:
            self._dense = self.view.dense()
        return self._dense[0 if role == "key" else 1]

    def _observe(self, query: Tensor, padding: Tensor | None) -> None:
        # one token's queries may come as rows: the group of a KV head
        rows = query.shape[2] if query.shape[2] == self.new_tokens else 1
        self.layer.observe(query, padding, rows)


class PromptSource:
    """The first tokens of a layer, exact: attention is the host's own, at full speed.

    It sees the queries, which the layer needs before it can pack; what comes after the attention
    reads the packed store. In strict mode the queries already read decoded tokens.

    Args:
        key: The prompt's keys `[B, Hk, t, D]`.
        value: Its values.
        layer: The layer that stores them.
    """

    def __init__(self, key: Tensor, value: Tensor, layer: RotorQuantLayer) -> None:
        batch, heads, tokens, head_dim = key.shape
        self.shape = (batch, heads, tokens, head_dim)
        self.dtype, self.device = key.dtype, key.device
        self.key, self.value = key, value
        self.layer = layer
        self._stored: ViewSource | None = None
        self._query: Tensor | None = None

    def count(self, door: str) -> None:
        # until it is stored, decoding costs nothing and is not worth a note
        if self.strict:
            self.layer.count(door)

    @property
    def strict(self) -> bool:
        """Whether the prompt itself reads decoded tokens."""
        return self.layer.config.strict

    def sdpa(
        self,
        query: Tensor,
        *,
        mask: Tensor | None,
        dropout: float,
        causal: bool,
        scale: float | None,
    ) -> Tensor | None:
        self.observe(query, mask)
        options = {"dropout": dropout, "causal": causal, "scale": scale}
        if self.strict:
            return self.stored().sdpa(query, mask=mask, **options)  # type: ignore[arg-type]
        self.layer.count("prompt")
        grouped = query.shape[1] != self.key.shape[1]
        result = F.scaled_dot_product_attention(
            query, self.key, self.value, mask, dropout, causal, scale=scale, enable_gqa=grouped
        )
        self.layer.settle()
        return result

    def observe(self, query: Tensor, mask: Tensor | None) -> None:
        """Takes note of the prompt's queries."""
        self.layer.observe(query, padding_of_mask(mask, 0), query.shape[2])

    def scores(self, query: Tensor) -> Tensor | None:
        if self.strict:
            self.layer.observe(query, None, query.shape[2])
            return self.stored().scores(query)
        self.layer.count("prompt")
        # noted once the weights have shown the padding
        self._query = query
        return query @ _repeat(self.key, query).transpose(2, 3)

    def mix(self, weights: Tensor) -> Tensor | None:
        if self.strict:
            return self.stored().mix(weights)
        result = weights @ _repeat(self.value, weights)
        if self._query is not None:
            padding = padding_of_weights(weights)
            self.layer.observe(self._query, padding, weights.shape[2])
            self._query = None
        self.layer.settle()
        return result

    def dense(self, role: Role) -> Tensor:
        if self.strict:
            return self.stored().dense(role)
        # model code may count on the memory format that a concatenation would have
        return (self.key if role == "key" else self.value).contiguous()

    def stored(self) -> ViewSource:
        """Stores the prompt and returns what is read of it from then on."""
        if self._stored is None:
            self.layer.settle()
            tokens = self.shape[2]
            self._stored = ViewSource(self.layer.view(), self.layer, tokens, observed=False)
        return self._stored


def _repeat(states: Tensor, like: Tensor) -> Tensor:
    """Returns `states` with the heads and the dtype of `like`."""
    repeats = like.shape[1] // states.shape[1]
    states = states.to(like.dtype)
    return states if repeats == 1 else states.repeat_interleave(repeats, 1)


def _wants_gradient(tensor: Tensor) -> bool:
    return torch.is_grad_enabled() and tensor.requires_grad
