# SPDX-License-Identifier: Apache-2.0
"""`generate` with buffers of a fixed size gives the tokens of the growing cache."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.flows import assert_close
from support.models import make_model, make_tokens
from support.static import (
    LENGTH,
    NEW,
    PACKED,
    PADDING,
    compiled,
    dynamic,
    forget_compiled,
    generate,
    make_prompt,
    packed,
    static,
)
from transformers import DynamicCache


def assert_same(mine: Any, theirs: Any) -> None:
    # tokens alone: sums in another order may flip a code; test_static_layer has the numbers
    assert torch.equal(mine.sequences, theirs.sequences)


@pytest.mark.parametrize(
    ("family", "attention", "padding"),
    [
        ("llama", "sdpa", 0),
        ("llama", "sdpa", PADDING),
        ("llama", "eager", PADDING),
        ("llama", "rotorquant", 0),
        ("llama", "rotorquant", PADDING),
        ("qwen3", "sdpa", PADDING),
        ("gemma3-window", "sdpa", PADDING),
        ("gemma2", "rotorquant", PADDING),
        ("gpt-oss", "eager", PADDING),
        ("gpt-oss", "rotorquant", PADDING),
        ("qwen3-next", "sdpa", PADDING),
    ],
)
def test_tokens_are_those_of_the_growing_cache(family: str, attention: str, padding: int) -> None:
    model, prompt = make_model(family), make_prompt(padding)
    model.set_attn_implementation(attention)
    cache = static(model)
    mine = generate(model, prompt, cache)
    assert_same(mine, generate(model, prompt, dynamic(model)))
    assert packed(cache) == {PACKED}
    assert int(cache.get_seq_length()) == LENGTH + NEW - 1
    exact = generate(model, prompt, DynamicCache(config=model.config))
    assert not torch.equal(mine.logits[1], exact.logits[1])


SETTINGS_OF_STORES = {
    "3 bits": {"nbits": 3, "residual_length": 5},
    "2 and 4 bits": {"key_bits": 4, "value_bits": 2, "residual_length": 5},
    "8 bits": {"nbits": 8, "residual_length": 5},
    "prod": {"nbits": 3, "key_codec": "prod", "residual_length": 5},
    "nothing exact": {"residual_length": 0, "sink_length": 0},
    "rotorquant": {"preset": "rotorquant", "nbits": 4},
    "a layer exact": {"layer_bits": {0: 16, 1: 2}, "residual_length": 5},
    "dense": {"path": "dense"},
    "no mean": {"key_mean": "none", "value_mean": False},
}


@pytest.mark.parametrize("name", SETTINGS_OF_STORES)
def test_settings(name: str) -> None:
    model, prompt = make_model("llama"), make_prompt(PADDING)
    settings = SETTINGS_OF_STORES[name]
    mine = generate(model, prompt, static(model, **settings))
    assert_same(mine, generate(model, prompt, dynamic(model, **settings)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model, prompt = make_model("llama").to(dtype), make_prompt(PADDING)
    mine = generate(model, prompt, static(model))
    assert torch.equal(mine.sequences, generate(model, prompt, dynamic(model)).sequences)


@pytest.mark.parametrize("options", [{}, compiled()])
def test_turns_on_one_cache(options: dict[str, Any]) -> None:
    model = make_model("llama")
    forget_compiled(model)
    texts = []
    for cache, extra in ((dynamic(model), {}), (static(model, 400), options)):
        tokens, mask = make_prompt(PADDING).values()
        # few new tokens are appended before attention, many are read beside the store
        for turn, new in enumerate((10, 1, 70)):
            prompt = {"input_ids": tokens, "attention_mask": mask}
            tokens = generate(model, prompt, cache, max_new_tokens=25, **extra).sequences
            tokens = torch.cat((tokens, make_tokens(new, batch=2, seed=turn)), 1)
            ones = mask.new_ones(2, tokens.shape[1] - mask.shape[1])
            mask = torch.cat((mask, ones), 1)
        texts.append(tokens)
        assert packed(cache) == {192}
    assert torch.equal(*texts)


@pytest.mark.parametrize("make", [static, dynamic])
def test_buffers_made_before_the_first_prompt(make: Callable[..., Any]) -> None:
    model = make_model("llama")
    config = model.config
    early = make(model)
    heads, head_dim = config.num_key_value_heads, config.head_dim
    early.early_initialization(2, heads, head_dim, torch.float32, torch.device("cpu"))
    assert all(layer.is_initialized for layer in early.layers) and early.get_seq_length() == 0
    mine, theirs = (generate(model, make_prompt(PADDING), cache) for cache in (early, make(model)))
    assert torch.equal(mine.sequences, theirs.sequences)
    assert min(packed(early)) > 0


@pytest.mark.parametrize("length", [1, 3, 20, 50])
def test_short_prompts(length: int) -> None:
    # without statistics it does not matter when they are frozen
    model, prompt = make_model("llama"), make_prompt(length=length)
    settings = {"preset": "rotorquant", "nbits": 4}
    expected = generate(model, prompt, dynamic(model, **settings), max_new_tokens=NEW + 30)
    mine = generate(model, prompt, static(model, **settings), max_new_tokens=NEW + 30)
    assert_same(mine, expected)


@pytest.mark.parametrize("length", [31, 35, 36])
def test_statistics_need_tokens_behind_the_sinks(length: int) -> None:
    model, prompt = make_model("llama"), make_prompt(length=length)
    cache = static(model)
    generate(model, prompt, cache, max_new_tokens=2)
    for layer in cache.packed_layers:
        statistics = layer.preconditioner
        assert statistics is not None
        measured = bool(statistics.value_mean.any()) and bool((statistics.balance != 1).any())
        assert measured == (length >= 36)


def test_padded_sinks_are_found_before_anything_is_packed() -> None:
    model = make_model("llama")
    prompt = make_prompt(20, length=40)
    alone = {name: x[:1, 20:] for name, x in prompt.items()}
    # without statistics a sequence does not depend on its padding
    settings = {"preset": "rotorquant", "nbits": 4, "sink_length": 4, "residual_length": 0}
    options = {"max_new_tokens": 45}
    padded = generate(model, prompt, static(model, **settings), **options)
    single = generate(model, alone, static(model, **settings), **options)
    # until the first tile is packed, which holds other tokens of the two
    for mine, theirs in zip(padded.logits[:25], single.logits[:25], strict=True):
        assert_close(mine[:1], theirs)


def test_prompt_in_chunks() -> None:
    model, prompt = make_model("llama"), make_prompt(PADDING)
    options = {"prefill_chunk_size": 100}
    mine = generate(model, prompt, static(model), **options)
    assert_same(mine, generate(model, prompt, dynamic(model), **options))


@pytest.mark.parametrize("compile_steps", [False, True])
def test_beams_change_places(compile_steps: bool) -> None:
    model, prompt = make_model("llama"), make_prompt(PADDING)
    forget_compiled(model)
    options = {"num_beams": 3, "max_new_tokens": 20}
    expected = generate(model, prompt, dynamic(model), **options)
    mine = generate(
        model, prompt, static(model), **options, **(compiled() if compile_steps else {})
    )
    assert torch.equal(mine.sequences, expected.sequences)


def test_copies_go_on_alone() -> None:
    model, prompt = make_model("llama"), make_prompt(PADDING)
    expected = generate(model, prompt, dynamic(model))
    first = static(model)
    generate(model, prompt, first, max_new_tokens=1)
    second = copy.deepcopy(first)
    rest = {
        "input_ids": expected.sequences[:, : LENGTH + 1],
        "attention_mask": torch.cat((prompt["attention_mask"], torch.ones(2, 1).long()), 1),
    }
    for cache in (first, second):
        mine = generate(model, rest, cache, max_new_tokens=NEW - 1)
        assert torch.equal(mine.sequences, expected.sequences)


@pytest.mark.filterwarnings("ignore:the operation")
def test_gradient_goes_through_decoded_rows() -> None:
    model, cache = make_model("llama"), None
    gradients = []
    for cache in (static(model), dynamic(model)):
        model(make_tokens(LENGTH), past_key_values=cache)
        model.zero_grad()
        model(make_tokens(1), past_key_values=cache).logits.sum().backward()
        gradients.append(model.model.layers[0].self_attn.q_proj.weight.grad.clone())
    assert float(gradients[0].abs().max()) > 0
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def test_memory_and_description() -> None:
    model = make_model("llama")
    cache = static(model)
    assert cache.describe().splitlines()[0] == "layer 0: packed, nothing stored yet"
    assert cache.memory().held_bytes == 0
    generate(model, make_prompt(), cache)
    memory = cache.memory()
    # room for 216 tokens in tiles of 64, 2 layers of 2 sequences of 2 heads; codes of 64 numbers
    # and 2 scales a token
    assert memory.packed_bytes == 2 * 2 * 2 * 4 * 64 * (2 * 64 * 4 // 8 + 2 * 2)
    assert memory.exact_bytes == 2 * 2 * 2 * 2 * (4 + 16 + 64) * 64 * 4
    assert memory.packed_numbers == 2 * 2 * 2 * 2 * PACKED * 64
    line = cache.describe().splitlines()[1]
    assert "192 tokens packed in 3 tiles of 64" in line
    assert f"| room for {LENGTH + NEW} tokens; attention: prompt 1x, step {NEW - 1}x" in line
    assert cache.get_max_length() == cache.get_max_cache_shape() == LENGTH + NEW
    assert cache.is_compileable and not cache.is_croppable
