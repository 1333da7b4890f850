# SPDX-License-Identifier: Apache-2.0
"""The attention implementation "rotorquant" and its mask.

Models run without it: handles answer the calls of `sdpa` and `eager` attention. Set with
`model.set_attn_implementation("rotorquant")` it saves work: softcap and attention sinks go to the
packed kernel, and a plain causal mask is never built.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from rq_hf.handle import Handle
from rq_hf.sources import PromptSource, ViewSource
from rq_hf.static_handle import StaticHandle

NAME = "rotorquant"


def rotorquant_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention for handles and, through the host's own functions, for plain tensors.

    Args:
        module: The attention module.
        query: `[B, Hq, L, D]`.
        key: `[B, Hk, N, D]`, a handle or a tensor.
        value: The same.
        attention_mask: As made by `rotorquant_mask`: None means causal, the newest query sees all.
        dropout: Must be 0 for handles.
        scaling: Factor of the scores, 1 / sqrt(D) if None.
        is_causal: Whether the module is causal; asked of it if None.
        softcap: See `rq_hf.ops.attend`.
        s_aux: Attention sinks, one logit a head `[Hq]`.
        **kwargs: Passed on to the host's functions.

    Returns:
        Output `[B, L, Hq, D]`, and the weights where the host's function gives them, else None.
    """
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if isinstance(key, StaticHandle) and not dropout and not query.requires_grad:
        out = key.attend(query, mask=attention_mask, scale=scaling, softcap=softcap, sinks=s_aux)
        return out.transpose(1, 2).contiguous(), None
    source = key.source if isinstance(key, Handle) else None
    if isinstance(source, PromptSource) and source.strict:
        source.observe(query, attention_mask)
        source = source.stored()
    if isinstance(source, ViewSource) and not dropout and not query.requires_grad:
        out = source.attend(
            query,
            mask=attention_mask,
            causal=causal and attention_mask is None,
            scale=scaling,
            softcap=softcap,
            sinks=s_aux,
            door=NAME,
        )
        return out.transpose(1, 2).contiguous(), None
    if attention_mask is None and causal and query.shape[2] > 1:
        attention_mask = _causal_mask(query, key)
    if softcap is None and s_aux is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
        )
    if isinstance(source, PromptSource):
        source.layer.count("prompt")
        source.observe(query, attention_mask)
        key, value = source.key, source.value
    options = kwargs if softcap is None else {**kwargs, "softcap": softcap}
    mask = _additive(attention_mask, query.dtype)
    result = _eager(module)(
        module, query, key, value, mask, scaling=scaling, dropout=dropout, **options
    )
    if isinstance(source, PromptSource):
        source.layer.settle()
    return result


def rotorquant_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """Returns None for a plain causal mask without padding, else the host's boolean mask."""
    newest_sees_all = isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length
    plain = mask_function is causal_mask_function and local_size is None and newest_sees_all
    # the last question waits for the device
    if allow_is_causal_skip and plain and _is_unpadded(attention_mask):
        return None
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=False,
        **kwargs,
    )


def _is_unpadded(attention_mask: Tensor | None) -> bool:
    return attention_mask is None or (attention_mask.dim() == 2 and bool(attention_mask.all()))


def register() -> None:
    """Adds the name "rotorquant" to the host's tables of attentions and masks."""
    AttentionInterface.register(NAME, rotorquant_attention_forward)
    AttentionMaskInterface.register(NAME, rotorquant_mask)


def _causal_mask(query: Tensor, key: Tensor) -> Tensor:
    """Returns the mask `[1, 1, L, N]` in which the newest query sees all keys."""
    rows, columns = query.shape[2], key.shape[2]
    mask = torch.ones(rows, columns, dtype=torch.bool, device=query.device)
    return mask.tril(columns - rows)[None, None]


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if mask is None or mask.dtype != torch.bool:
        return mask
    zeros = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return zeros.masked_fill(~mask, torch.finfo(dtype).min)


def _eager(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """Returns the plain attention of the model's own file, which knows its softcap and sinks."""
    return sys.modules[type(module).__module__].eager_attention_forward
