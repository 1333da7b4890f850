# SPDX-License-Identifier: Apache-2.0
"""A long continuation reads a packed history piece by piece: no dense copy of a layer is made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rq_hf import RotorQuantConfig
from rq_hf.handle import Handle
from rq_hf.layers import RotorQuantLayer
from rq_hf.ops import reference


class LargestTensor(TorchDispatchMode):
    """Notes the bytes of the largest memory that any operation asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = {_address(x) for x in tree_leaves((args, kwargs)) if _is_plain(x)}
        result = func(*args, **kwargs)
        fresh = [x for x in tree_leaves(result) if _is_plain(x) and _address(x) not in known]
        self.bytes = max(self.bytes, *(x.untyped_storage().nbytes() for x in fresh), 0)
        return result


def _is_plain(thing: Any) -> bool:
    return isinstance(thing, Tensor) and not isinstance(thing, Handle)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def filled(history: int, shape: tuple[int, int, int], **where: Any) -> RotorQuantLayer:
    """Returns a layer with a packed history; `shape` is batch, KV heads and head_dim."""
    batch, heads, head_dim = shape
    layer = RotorQuantLayer(RotorQuantConfig())
    states = torch.randn(2, batch, heads, history, head_dim, **where)
    layer.update(*states)
    layer.settle()
    return layer


def continue_with(layer: RotorQuantLayer, states: Tensor, query: Tensor, mask: Tensor) -> Tensor:
    """Stores `states` `[2, B, Hk, t, D]` and returns attention of their queries."""
    key, value = layer.update(*states)
    return F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)


def causal(new: int, total: int, device: str) -> Tensor:
    mask = torch.ones(new, total, dtype=torch.bool, device=device)
    return mask.tril(total - new)[None, None]


@pytest.mark.parametrize("tokens", [33, 64, 200])
def test_no_tensor_is_as_large_as_the_layer(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    history, shape = 8192, (1, 2, 64)
    layer = filled(history, shape)
    states = torch.randn(2, 1, 2, tokens, 64)
    query = torch.randn(1, 4, tokens, 64)
    mask = causal(tokens, history + tokens, "cpu")
    # what a step works on at once, as small against this history as usual against a long one
    monkeypatch.setattr(reference, "_NUMBERS_AT_ONCE", 1 << 17)
    with LargestTensor() as largest:
        continue_with(layer, states, query, mask)
    # keys alone; a larger buffer for packed keys and values takes a fifth of it
    dense = history * 2 * 64 * 4
    assert largest.bytes < dense / 4
    with LargestTensor() as everything:
        layer.keys  # noqa: B018
    assert everything.bytes >= dense


@pytest.mark.gpu
def test_peak_of_a_continuation_is_far_below_a_dense_copy() -> None:
    history, tokens, (batch, heads, head_dim) = 32_768, 1024, (2, 32, 128)
    where: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    layer = filled(history, (batch, heads, head_dim), **where)
    states = torch.randn(2, batch, heads, tokens, head_dim, **where)
    query = torch.randn(batch, heads, tokens, head_dim, **where)
    mask = causal(tokens, history + tokens, "cuda")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    continue_with(layer, states, query, mask)
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    dense = 2 * batch * heads * history * head_dim * 2
    # a fifth for packed tiles in a larger buffer; queries and sums of 1024 tokens in float32
    assert extra < 0.6 * dense, f"{extra / dense:.2f} of a dense copy"
