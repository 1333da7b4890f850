# SPDX-License-Identifier: Apache-2.0
"""Tiny random models, made offline from a config with a fixed seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 97
LENGTH = 2048
SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": LENGTH,
    **SPECIAL,
}
# names of the same sizes in the oldest families
GPT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 128,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": LENGTH,
    **SPECIAL,
}
ENCODER_DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "max_position_embeddings": 1024,
}
T5: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "d_kv": 32,
    "d_ff": 96,
    "num_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
IMAGE_TOKEN = 2
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}

WIDE = {"hidden_size": 128}
WINDOW = {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]}
# longer than the exact tail of the tests' caches
LONG_WINDOW = {**WINDOW, "sliding_window": 160}
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
DELTA = {
    **LINEAR,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
# small chunks: the host's own code for the CPU takes memory and time by their square
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_chunk_size": 32}
LOCAL_EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32}
ROUTED_EXPERTS = {
    "n_routed_experts": 2,
    "n_shared_experts": 1,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 32,
    "first_k_dense_replace": 2,
}
SHARED = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "sliding_window": 32,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": VOCABULARY,
}
CHUNKED = {
    "head_dim": 64,
    "intermediate_size_mlp": 96,
    "num_local_experts": 2,
    "attention_chunk_size": 32,
    "no_rope_layers": [1, 0],
    "interleave_moe_layer_step": 2,
}
DEFAULT_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}


Maker = Callable[..., PreTrainedModel]


def _decoder(model_type: str, *groups: dict[str, Any], **single: Any) -> Maker:
    """Returns what makes the family's language model, `SMALL` but for what is given."""
    return _causal(model_type, SMALL, *groups, single)


def _causal(model_type: str, *groups: dict[str, Any]) -> Maker:
    options = {name: value for group in groups for name, value in group.items()}
    config = CONFIG_MAPPING[model_type]
    return lambda **changes: AutoModelForCausalLM.from_config(config(**(options | changes)))


def _of_class(name: str, *groups: dict[str, Any]) -> Maker:
    """Returns what makes a model by the name of its class."""
    options = {option: value for group in groups for option, value in group.items()}

    def make() -> PreTrainedModel:
        model_class = getattr(transformers, name)
        return model_class(model_class.config_class(**options))

    return make


def _with_vision(
    name: str, text: str, vision: str, whole: dict[str, Any] | None = None, **options: Any
) -> Maker:
    """Returns what makes a model with a vision tower before its text decoder.

    Args:
        name: Its class.
        text: Type of the decoder.
        vision: Type of the tower, which gives four tokens an image.
        whole: Options of the config around both.
        **options: Of the decoder.
    """

    def make() -> PreTrainedModel:
        return _of_class(
            name,
            {
                "text_config": CONFIG_MAPPING[text](**SMALL, **options),
                "vision_config": CONFIG_MAPPING[vision](**VISION),
                "image_token_index": IMAGE_TOKEN,
                **(whole or {}),
            },
        )()

    return make


DECODERS: dict[str, Maker] = {
    "llama": _decoder("llama", head_dim=64),
    "llama-mqa": _decoder("llama", head_dim=128, num_key_value_heads=1),
    "llama-80": _decoder("llama", head_dim=80),
    "qwen2": _decoder("qwen2", hidden_size=256),
    "qwen2-sliding": _decoder(
        "qwen2", WIDE, use_sliding_window=True, sliding_window=32, max_window_layers=1
    ),
    "qwen3": _decoder("qwen3", head_dim=32),
    "mistral": _decoder("mistral", head_dim=64, sliding_window=None),
    "mistral-sliding": _decoder("mistral", head_dim=64, sliding_window=32),
    "mistral-window": _decoder("mistral", head_dim=64, sliding_window=160),
    "ministral": _decoder("ministral", WINDOW, head_dim=64),
    "gemma": _decoder("gemma", head_dim=128),
    "gemma2": _decoder("gemma2", head_dim=64, sliding_window=32, query_pre_attn_scalar=64),
    "gemma2-window": _decoder("gemma2", head_dim=64, sliding_window=160, query_pre_attn_scalar=64),
    "gemma3": _decoder("gemma3_text", WINDOW, head_dim=64),
    "gemma3-window": _decoder("gemma3_text", LONG_WINDOW, head_dim=64),
    "gemma3n": _decoder(
        "gemma3n_text",
        SHARED,
        head_dim=64,
        altup_num_inputs=2,
        laurel_rank=8,
        activation_sparsity_pattern=[0.0] * 4,
    ),
    "gemma3n-window": _decoder(
        "gemma3n_text",
        {**SHARED, "sliding_window": 160},
        head_dim=64,
        altup_num_inputs=2,
        laurel_rank=8,
        activation_sparsity_pattern=[0.0] * 4,
    ),
    "gemma4": _decoder("gemma4_text", SHARED, head_dim=64, global_head_dim=64),
    "vaultgemma": _decoder("vaultgemma", WINDOW, head_dim=64, query_pre_attn_scalar=64),
    "gpt-oss": _decoder("gpt_oss", WINDOW, LOCAL_EXPERTS, DEFAULT_ROPE, head_dim=64),
    "gpt-oss-window": _decoder("gpt_oss", LONG_WINDOW, LOCAL_EXPERTS, DEFAULT_ROPE, head_dim=64),
    "llama4": _decoder("llama4_text", CHUNKED),
    "llama4-window": _decoder("llama4_text", {**CHUNKED, "attention_chunk_size": 160}),
    "phi": _decoder("phi", WIDE),
    "phi3": _decoder("phi3", WIDE),
    "phimoe": _decoder("phimoe", WIDE, num_local_experts=2),
    "gpt-neox": _decoder("gpt_neox", WIDE),
    "gpt-neox-japanese": _decoder("gpt_neox_japanese", WIDE),
    "gpt2": _causal("gpt2", GPT),
    "gptj": _causal("gptj", GPT, {"rotary_dim": 16}),
    "codegen": _causal("codegen", GPT, {"rotary_dim": 16, "n_head": 4}),
    "gpt-bigcode": _causal("gpt_bigcode", GPT),
    "gpt-neo": _decoder(
        "gpt_neo",
        num_layers=2,
        num_heads=2,
        attention_types=[[["global", "local"], 1]],
        window_size=32,
    ),
    "ctrl": _causal("ctrl", GPT, {"dff": 96}),
    "opt": _decoder("opt", ffn_dim=96, word_embed_proj_dim=64),
    "biogpt": _decoder("biogpt", num_attention_heads=2),
    "bert-decoder": _decoder("bert", is_decoder=True, num_attention_heads=2),
    "falcon-mqa": _decoder("falcon", WIDE, multi_query=True),
    "falcon-gqa": _decoder("falcon", WIDE, num_kv_heads=2, new_decoder_architecture=True),
    "falcon-alibi": _decoder("falcon", WIDE, multi_query=False, alibi=True),
    "mpt": _decoder("mpt", d_model=128, n_heads=2, n_layers=2, max_seq_len=LENGTH),
    "bloom": _decoder("bloom", n_layer=2, n_head=2),
    "xglm": _decoder("xglm", d_model=64, ffn_dim=96, num_layers=2, attention_heads=2),
    "persimmon": _decoder("persimmon", WIDE),
    "stablelm": _decoder("stablelm", WIDE),
    "starcoder2": _decoder("starcoder2", WIDE, sliding_window=None),
    "cohere": _decoder("cohere", WIDE),
    "cohere2": _decoder("cohere2", WINDOW, head_dim=64),
    "olmo": _decoder("olmo", WIDE),
    "olmo2": _decoder("olmo2", WIDE),
    "olmo3": _decoder("olmo3", WIDE, WINDOW),
    "olmoe": _decoder("olmoe", WIDE, EXPERTS),
    "granite": _decoder("granite", WIDE, attention_multiplier=0.125),
    "granitemoe": _decoder("granitemoe", WIDE, LOCAL_EXPERTS, attention_multiplier=0.125),
    "granitemoehybrid": _decoder(
        "granitemoehybrid",
        WIDE,
        LINEAR,
        LOCAL_EXPERTS,
        MAMBA,
        attention_multiplier=0.125,
        shared_intermediate_size=32,
    ),
    "glm": _decoder("glm", head_dim=64),
    "glm4": _decoder("glm4", head_dim=64),
    "glm4-moe": _decoder("glm4_moe", ROUTED_EXPERTS, head_dim=64),
    "smollm3": _decoder("smollm3", WIDE, no_rope_layers=[1, 0]),
    "nemotron": _decoder("nemotron", head_dim=32),
    "exaone4": _decoder("exaone4", WIDE, WINDOW),
    "ernie4-5": _decoder("ernie4_5", head_dim=64),
    "seed-oss": _decoder("seed_oss", head_dim=64),
    "hunyuan": _decoder("hunyuan_v1_dense", head_dim=64),
    "arcee": _decoder("arcee", head_dim=64),
    "apertus": _decoder("apertus", WIDE),
    "bitnet": _decoder("bitnet", WIDE),
    "nanochat": _decoder("nanochat", WIDE),
    "doge": _decoder("doge", WIDE),
    "modernbert-decoder": _decoder(
        "modernbert-decoder", WINDOW, num_attention_heads=2, local_attention=32
    ),
    "diffllama": _decoder("diffllama", WIDE),
    "mixtral": _decoder("mixtral", LOCAL_EXPERTS, head_dim=64),
    "jetmoe": _decoder("jetmoe", kv_channels=32, num_local_experts=2, num_experts_per_tok=2),
    "qwen2-moe": _decoder("qwen2_moe", WIDE, EXPERTS, shared_expert_intermediate_size=32),
    "qwen3-moe": _decoder("qwen3_moe", EXPERTS, head_dim=64),
    "qwen3-next": _decoder(
        "qwen3_next", DELTA, EXPERTS, head_dim=64, shared_expert_intermediate_size=32
    ),
    "qwen3-5": _decoder("qwen3_5_text", DELTA, head_dim=64),
    "olmo-hybrid": _decoder("olmo_hybrid", WIDE, DELTA),
    "minimax-m2": _decoder("minimax_m2", LOCAL_EXPERTS, head_dim=64),
    "dots1": _decoder("dots1", ROUTED_EXPERTS, head_dim=64),
    "jamba": _decoder(
        "jamba",
        WIDE,
        num_experts=2,
        num_experts_per_tok=1,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        use_mamba_kernels=False,
        mamba_d_state=8,
        mamba_dt_rank=8,
    ),
    "lfm2": _decoder("lfm2", WIDE, layer_types=["conv", "full_attention"]),
    "bamba": _decoder("bamba", WIDE, MAMBA, attn_layer_indices=[1]),
    "nemotron-h": _decoder(
        "nemotron_h",
        head_dim=64,
        hybrid_override_pattern="M*",
        mamba_num_heads=8,
        mamba_head_dim=16,
        ssm_state_size=16,
        n_groups=1,
        chunk_size=32,
    ),
    "falcon-h1": _decoder("falcon_h1", {**MAMBA, "mamba_d_head": 16}, mamba_d_ssm=128, head_dim=32),
    "mimo-v2-flash": _decoder(
        "mimo_v2_flash",
        ROUTED_EXPERTS,
        head_dim=64,
        v_head_dim=32,
        sliding_window=160,
        layer_types=["full_attention", "sliding_attention"],
    ),
    "deepseek-v2": _decoder("deepseek_v2", LATENT),
    "deepseek-v3": _decoder("deepseek_v3", LATENT),
    "llava": _with_vision(
        "LlavaForConditionalGeneration", "llama", "clip_vision_model", head_dim=64
    ),
    "gemma3-vision": _with_vision(
        "Gemma3ForConditionalGeneration",
        "gemma3_text",
        "siglip_vision_model",
        {"mm_tokens_per_image": 4},
        head_dim=64,
        **WINDOW,
    ),
}
ENCODER_DECODERS: dict[str, Maker] = {
    "bart": _of_class("BartForConditionalGeneration", ENCODER_DECODER),
    "pegasus": _of_class("PegasusForConditionalGeneration", ENCODER_DECODER),
    "t5": _of_class("T5ForConditionalGeneration", T5),
    "mt5": _of_class("MT5ForConditionalGeneration", T5),
}
FAMILIES = DECODERS | ENCODER_DECODERS


def make_model(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Returns a tiny random model in evaluation mode; weights large enough to give varied text.

    Args:
        family: Name in `FAMILIES`.
        seed: Of the weights.
        **changes: Other options of a decoder's config.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = FAMILIES[family](**changes)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


def make_tokens(length: int, *, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """Returns token ids `[batch, length]`, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)
