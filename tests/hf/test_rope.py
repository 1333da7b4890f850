# SPDX-License-Identifier: Apache-2.0
"""`rope_tables` against what models really do to their keys."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from rq_hf.quant.rope import RopeTable
from rq_hf.quant.seeding import generator
from rq_hf.rope import rope_tables

ULP = torch.finfo(torch.float32).eps / 2
TINY = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
}
LONG = [1.0 + i for i in range(8)]
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 512},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "longrope": {
        "factor": 4.0,
        "short_factor": [1.0 + 0.1 * i for i in range(8)],
        "long_factor": LONG,
        "original_max_position_embeddings": 1024,
    },
}


def config_of(family: str, **fields: Any) -> PreTrainedConfig:
    return getattr(transformers, f"{family}Config")(**{**TINY, **fields})


def gpt_like(family: str, **fields: Any) -> PreTrainedConfig:
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128}
    return getattr(transformers, f"{family}Config")(**sizes, **fields)


def scaled(kind: str, theta: float = 10_000.0) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": theta, **SCALINGS[kind]}


GEMMA = {
    "head_dim": 16,
    "num_hidden_layers": 3,
    "sliding_window": 4096,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 1_000_000.0, "factor": 8.0},
    },
}
MODELS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: config_of("Llama"),
    "llama-head-dim": lambda: config_of("Llama", head_dim=32),
    **{
        f"llama-{kind}": lambda kind=kind: config_of("Llama", rope_parameters=scaled(kind))
        for kind in SCALINGS
    },
    "qwen2": lambda: config_of("Qwen2"),
    "qwen3": lambda: config_of("Qwen3", head_dim=32),
    "mistral": lambda: config_of("Mistral"),
    "phi3-longrope": lambda: config_of(
        "Phi3", original_max_position_embeddings=1024, rope_parameters=scaled("longrope")
    ),
    "gpt-neox-partial": lambda: config_of("GPTNeoX"),
    "phi-partial": lambda: config_of("Phi"),
    "stablelm-partial": lambda: config_of("StableLm"),
    "gemma3": lambda: config_of("Gemma3Text", **GEMMA),
    "falcon": lambda: config_of("Falcon", alibi=False),
    "gptj-interleaved": lambda: gpt_like("GPTJ", rotary_dim=8),
    "codegen-interleaved": lambda: gpt_like("CodeGen", rotary_dim=8),
    "cohere-interleaved": lambda: config_of("Cohere"),
    "glm-interleaved": lambda: config_of("Glm", head_dim=32),
    "smollm3-some-without": lambda: config_of("SmolLM3", no_rope_layers=[1, 0]),
}
WITHOUT: dict[str, Callable[[], PreTrainedConfig]] = {
    "gpt2": lambda: gpt_like("GPT2"),
    "opt": lambda: transformers.OPTConfig(hidden_size=64, num_hidden_layers=2),
    "bloom": lambda: transformers.BloomConfig(hidden_size=64, n_layer=2),
    "mpt": lambda: transformers.MptConfig(d_model=64, n_layers=2),
    "falcon-alibi": lambda: config_of("Falcon", alibi=True),
    "deepseek-v3": lambda: transformers.DeepseekV3Config(num_hidden_layers=2),
}


def cached_keys(config: PreTrainedConfig, start: int, count: int) -> list[Tensor]:
    """Keys of every layer for one token repeated: all are the same vector before RoPE.

    Values carry no position, so attention returns the same mixture everywhere and even the later
    layers see equal states at all positions.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    cache = DynamicCache()
    with torch.no_grad():
        model(
            torch.full((1, count), 7),
            position_ids=torch.arange(start, start + count)[None],
            past_key_values=cache,
        )
    return [layer.keys for layer in cache.layers]


def error(expected: Tensor, keys: Tensor) -> float:
    lengths = keys.norm(dim=-1, keepdim=True)
    assert lengths.min() > 0
    return float(((keys - expected) / lengths).abs().max())


@pytest.mark.parametrize("start", [0, 500])
@pytest.mark.parametrize("name", MODELS)
def test_turns_like_the_model(name: str, start: int) -> None:
    config, count = MODELS[name](), 64
    tables = rope_tables(config)
    keys = cached_keys(config, start, count)
    assert len(tables) == len(keys) == config.num_hidden_layers
    # the host rounds angles to float32: up to 2 ulp of the last position; 128 more for what the
    # states of later layers differ by after an average over 64 tokens
    bound = (2 * (start + count) + 128) * ULP
    for table, layer in zip(tables, keys, strict=True):
        first = layer[:, :, :1]
        if table is None:
            assert error(first, layer) <= bound
            continue
        assert error(first, layer) > 0.1
        bias = table.unrotate(first, start)
        assert error(table.rotate(bias, start, count), layer) <= bound


@pytest.mark.parametrize("kind", SCALINGS)
def test_turns_random_vectors_like_the_model(kind: str) -> None:
    config = config_of("Llama", rope_parameters=scaled(kind))
    rotary, (table, _) = LlamaRotaryEmbedding(config), rope_tables(config)
    x = torch.randn(1, 2, 1000, 16, generator=generator(0, "rope"))
    cos, sin = rotary(x, torch.arange(1000)[None])
    expected = apply_rotary_pos_emb(x, x, cos, sin)[1] / rotary.attention_scaling
    assert table is not None
    assert error(table.rotate(x, 0), expected) <= (2 * 1000 + 8) * ULP
    assert error(x, expected) > 0.1


def test_layers_share_tables_by_kind() -> None:
    tables = rope_tables(MODELS["gemma3"]())
    assert tables[0] is tables[2] and tables[0] is not tables[1]
    assert len({id(table) for table in rope_tables(MODELS["llama"]())}) == 1


@pytest.mark.parametrize("name", WITHOUT)
def test_models_without(name: str) -> None:
    assert rope_tables(WITHOUT[name]()) == [None, None]


def test_takes_the_text_decoder_of_a_composite() -> None:
    text = config_of("Gemma3Text", **GEMMA).to_dict()
    config = transformers.Gemma3Config(text_config=text)
    tables = rope_tables(config)
    assert len(tables) == 3
    assert all(isinstance(table, RopeTable) for table in tables)


class TestOtherMakes:
    """Nothing raises; what cannot be read is None."""

    def test_code_that_is_not_there(self) -> None:
        class MyConfig(LlamaConfig):
            pass

        (table, _) = rope_tables(MyConfig(**TINY))
        assert table is not None and table.interleaved is None and table.rotary_dim == 16

    @pytest.mark.parametrize(
        "parameters",
        [None, {}, {"rope_type": "spiral", "rope_theta": 1e4}, {"rope_type": "default"}, 3],
    )
    def test_parameters_of_another_kind(self, parameters: object) -> None:
        config = config_of("Llama")
        object.__setattr__(config, "rope_parameters", parameters)
        assert rope_tables(config) == [None, None]

    def test_nothing_known(self) -> None:
        assert rope_tables(PreTrainedConfig()) == []
