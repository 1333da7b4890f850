# SPDX-License-Identifier: Apache-2.0
"""What tests of whole generations have in common."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.generation import GenerateDecoderOnlyOutput

from rq_hf import RotorQuantCache

FAMILIES = ["llama", "gemma3", "gemma3-window", "qwen3"]
SETTINGS: dict[str, Any] = {
    "nbits": 3,
    "residual_length": 32,
    "sink_length": 4,
    "sliding": "packed",
}
# one tile leaves the tail of a prompt of LENGTH tokens, a second one while NEW tokens come
LENGTH, NEW = 285, 12
PADDING = 100
# of the logits' scale; float32 sums in another order
TOLERANCE = 2e-5


def make_cache(model: PreTrainedModel, **settings: Any) -> RotorQuantCache:
    return RotorQuantCache(config=model.config, **(SETTINGS | settings))


def packed_tokens(cache: RotorQuantCache) -> set[int]:
    """Returns how many tokens each layer has packed, those since dropped by a window included."""
    stores = [layer.store for layer in cache.packed_layers]
    return {store.dropped + store.packed_length for store in stores}


def generate(
    model: PreTrainedModel, tokens: Tensor, cache: Cache, **options: Any
) -> GenerateDecoderOnlyOutput:
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0} | options
    if "inputs_embeds" not in options:
        options = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)} | options
    torch.manual_seed(0)
    return model.generate(
        past_key_values=cache,
        return_dict_in_generate=True,
        output_logits=True,
        output_scores=True,
        **options,
    )


def assert_close(mine: Tensor, theirs: Tensor) -> None:
    assert float((mine - theirs).abs().max()) < TOLERANCE * float(theirs.abs().max())
