# SPDX-License-Identifier: Apache-2.0
"""Queries, keys and values of a real forward, as attention gets them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rq_hf import RotorQuantCache

NAME = "rq_hf_capture"


@dataclass(frozen=True)
class LayerStates:
    """What one layer's attention was given, position embedding applied.

    Attributes:
        layer: Index of the layer.
        query: `[1, Hq, n, D]`.
        key: `[1, Hk, n, D]`.
        value: Same shape as `key`.
        scaling: Factor of the inner products.
    """

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float


@torch.no_grad()
def capture(model: PreTrainedModel, tokens: Tensor) -> list[LayerStates]:
    """Runs tokens `[1, n]` through the decoder and returns the states of its packed layers.

    These are the layers with full, causal attention that `RotorQuantCache` packs.
    """
    states: dict[int, LayerStates] = {}

    def record(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        factor = query.shape[-1] ** -0.5 if scaling is None else scaling
        states[module.layer_idx] = LayerStates(module.layer_idx, query, key, value, factor)
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )

    AttentionInterface.register(NAME, record)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        model.get_decoder()(tokens, use_cache=False)
    finally:
        model.set_attn_implementation(before)
    packed = RotorQuantCache(config=model.config).packed_layers
    return [states[layer.layer_idx] for layer in packed]
