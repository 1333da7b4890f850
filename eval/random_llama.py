# SPDX-License-Identifier: Apache-2.0
"""Models of Llama's architecture with random weights, and prompts for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

MODELS: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 8,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32_000,
        "max_position_embeddings": 1 << 20,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
    },
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 97,
        "max_position_embeddings": 4096,
    },
}


def make_model(name: str, device: torch.device) -> PreTrainedModel:
    """Returns a random model in bfloat16 that never ends a text."""
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    config = LlamaConfig(**MODELS[name], **special)
    torch.manual_seed(0)
    # made where it is used: a CPU takes a minute to draw the weights
    with device:
        return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()


def make_prompt(model: PreTrainedModel, batch: int, tokens: int) -> Tensor:
    """Returns token ids `[batch, tokens]`, none of them special."""
    stream = torch.Generator().manual_seed(1)
    high = model.config.vocab_size
    return torch.randint(3, high, (batch, tokens), generator=stream).to(model.device)
