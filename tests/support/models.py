# SPDX-License-Identifier: Apache-2.0
"""Tiny random models, made offline from a config with a fixed seed."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

VOCABULARY = 97
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


def _llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SMALL, head_dim=64))


def _qwen2() -> PreTrainedModel:
    return Qwen2ForCausalLM(Qwen2Config(**{**SMALL, "hidden_size": 256}))


def _mistral_sliding() -> PreTrainedModel:
    return MistralForCausalLM(MistralConfig(**SMALL, head_dim=64, sliding_window=32))


def _gemma3() -> PreTrainedModel:
    kinds = ["sliding_attention", "full_attention"]
    config = Gemma3TextConfig(**SMALL, head_dim=64, sliding_window=32, layer_types=kinds)
    return Gemma3ForCausalLM(config)


def _gpt2() -> PreTrainedModel:
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=128,
        n_layer=2,
        n_head=2,
        n_positions=2048,
        bos_token_id=1,
        eos_token_id=None,
    )
    return GPT2LMHeadModel(config)


def _qwen3_next() -> PreTrainedModel:
    config = Qwen3NextConfig(
        **SMALL,
        head_dim=64,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    )
    return Qwen3NextForCausalLM(config)


def _deepseek_v2() -> PreTrainedModel:
    config = DeepseekV2Config(
        **{**SMALL, "num_key_value_heads": 4},
        kv_lora_rank=16,
        q_lora_rank=None,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=32,
        first_k_dense_replace=2,
    )
    return DeepseekV2ForCausalLM(config)


def _bart() -> PreTrainedModel:
    config = BartConfig(
        vocab_size=VOCABULARY,
        d_model=64,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        max_position_embeddings=1024,
    )
    return BartForConditionalGeneration(config)


FAMILIES = {
    "llama": _llama,
    "qwen2": _qwen2,
    "mistral-sliding": _mistral_sliding,
    "gemma3": _gemma3,
    "gpt2": _gpt2,
    "qwen3-next": _qwen3_next,
    "deepseek-v2": _deepseek_v2,
    "bart": _bart,
}


def make_model(family: str, seed: int = 0) -> PreTrainedModel:
    """Returns a tiny random model in evaluation mode; weights large enough to give varied text."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = FAMILIES[family]()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


def make_tokens(length: int, *, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """Returns token ids `[batch, length]`, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)
