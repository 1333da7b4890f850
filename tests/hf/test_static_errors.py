# SPDX-License-Identifier: Apache-2.0
"""What a cache of a fixed size refuses, and that it is as it was afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import make_model, make_tokens
from support.static import LENGTH, compiled, forget_compiled, generate, make_prompt, static
from transformers import PreTrainedModel

from rq_hf import RotorQuantConfig, RotorQuantStaticCache, layers
from rq_hf.static_exact import ExactStaticLayer


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make_model("llama")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strict": True}, "strict=True is for evaluation"),
        ({"sliding": "packed"}, "keeps sliding layers exact"),
        ({"offloading": True}, "do not move"),
        ({"nbits": 5}, "nbits must be one of 2, 3, 4, 8"),
        ({"bits": 4}, "unknown settings: bits"),
        ({"layer_bits": {2: 4}}, "caches 2 layers"),
        ({"quantization": RotorQuantConfig(), "nbits": 3}, "either quantization or single"),
        ({"max_cache_len": 0}, "at least 1, got 0"),
        ({"max_cache_len": 10.0}, "number of tokens, got 10.0"),
    ],
)
def test_settings(model: PreTrainedModel, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RotorQuantStaticCache(model.config, **{"max_cache_len": 100, **settings})


@pytest.mark.parametrize("family", ["bloom", "mpt", "falcon-alibi", "gpt-neo"])
def test_models_whose_attention_counts_keys(family: str) -> None:
    with pytest.raises(ValueError, match="goes by the number of keys"):
        static(make_model(family))


def test_encoder_decoders() -> None:
    with pytest.raises(ValueError, match="encoder-decoder"):
        static(make_model("t5"))


@torch.no_grad()
def test_prompts_that_do_not_fit(model: PreTrainedModel) -> None:
    cache = static(model, LENGTH)
    with pytest.raises(ValueError, match=f"0 tokens and {LENGTH + 1} new ones are more than"):
        model(make_tokens(LENGTH + 1), past_key_values=cache)
    assert cache.get_seq_length() == 0
    model(make_tokens(LENGTH - 1), past_key_values=cache)
    with pytest.raises(ValueError, match=f"{LENGTH - 1} tokens and 2 new ones are more than"):
        model(make_tokens(2), past_key_values=cache)
    model(make_tokens(1), past_key_values=cache)
    assert int(cache.get_seq_length()) == LENGTH


@pytest.mark.parametrize("options", [{}, compiled()])
def test_steps_that_do_not_fit(model: PreTrainedModel, options: dict[str, Any]) -> None:
    forget_compiled(model)
    cache = static(model, LENGTH + 3)
    with pytest.raises(ValueError, match=f"holds max_cache_len = {LENGTH + 3} tokens"):
        generate(model, make_prompt(), cache, max_new_tokens=6, **options)
    assert int(cache.get_seq_length()) == LENGTH + 3


@torch.no_grad()
def test_buffers_keep_batch_and_dtype(model: PreTrainedModel) -> None:
    cache = static(model)
    model(make_tokens(LENGTH, batch=2), past_key_values=cache)
    cache.reset()
    with pytest.raises(ValueError, match="keeps these from its first use on"):
        model(make_tokens(LENGTH), past_key_values=cache)
    layer = cache.packed_layers[0]
    with pytest.raises(ValueError, match="keeps these from its first use on"):
        layer.update(*torch.zeros(2, 2, 2, 5, 64, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="NaN or infinite"):
        layer.update(*torch.full((2, 2, 2, 5, 64), torch.nan))
    assert cache.get_seq_length() == 0


@torch.no_grad()
def test_what_changes_tokens_or_places(model: PreTrainedModel, tmp_path: Path) -> None:
    cache = static(model)
    tokens = make_tokens(LENGTH, batch=2)
    model(tokens, past_key_values=cache)
    cache.crop(0)
    cache.batch_repeat_interleave(1)
    cache.batch_select_indices(torch.tensor([True, True]))
    for call, message in (
        (lambda: cache.crop(-1), "use RotorQuantCache for speculative decoding"),
        (lambda: cache.batch_repeat_interleave(2), "keeps its batch size"),
        (lambda: cache.batch_select_indices(torch.tensor([1])), "keeps its batch size 2"),
        (lambda: cache.reorder_cache(torch.tensor([1, 1, 0])), "keeps its batch size 2"),
        (lambda: cache.to("cpu"), "do not move"),
        (lambda: cache.packed_layers[0].offload(), "do not move"),
        (lambda: cache.save(tmp_path / "x"), "cannot be saved"),
        (lambda: RotorQuantStaticCache.load(tmp_path / "x"), "cannot be loaded"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert int(cache.get_seq_length()) == LENGTH


@torch.no_grad()
def test_refused_changes_leave_the_hosts_layers_as_they_were() -> None:
    model = make_model("gemma3")
    cache = static(model)
    model(make_tokens(LENGTH, batch=2), past_key_values=cache)
    host = [layer for layer in cache.layers if layer not in cache.packed_layers]
    assert host and cache.packed_layers and cache.layers[0] in host
    before = [layer.keys for layer in host]
    for call in (
        lambda: cache.reorder_cache(torch.tensor([1, 1, 0])),
        lambda: cache.batch_select_indices(torch.tensor([False, True])),
        lambda: cache.batch_repeat_interleave(2),
    ):
        with pytest.raises(ValueError, match="keeps its batch size"):
            call()
        assert all(layer.keys is keys for layer, keys in zip(host, before, strict=True))
    with pytest.raises(ValueError, match="drops no tokens"):
        cache.crop(-1)
    cache.crop(0)
    cache.batch_repeat_interleave(1)
    cache.batch_select_indices(torch.tensor([1, 1]))
    for layer, keys in zip(host, before, strict=True):
        assert torch.equal(layer.keys, keys[[1, 1]])
    for layer in cache.packed_layers:
        assert torch.equal(layer.keys[0], layer.keys[1])


@torch.no_grad()
def test_steps_that_were_not_finite(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # as on a GPU, where single tokens are not looked at
    monkeypatch.setattr(layers, "looks_at_once", lambda device: False)
    cache = static(model)
    tokens = make_tokens(LENGTH)
    model(tokens, past_key_values=cache)
    first = cache.packed_layers[0]
    bad = torch.zeros(2, 1, 2, 1, 64)
    for layer_idx in (0, 1):
        cache.update(*bad, layer_idx)
        bad[1, 0, 1, 0, 5] = torch.inf
    model(tokens[:, :1], past_key_values=cache)
    calls: tuple[Any, ...] = (
        lambda: model(tokens[:, :3], past_key_values=cache),
        cache.describe,
        cache.memory,
        cache.check_steps,
    )
    for call in calls:
        with pytest.raises(ValueError, match=r"layer 1: decode steps .* NaN .* reset\(\)"):
            call()
        # nor was the layer before it changed
        assert int(first.get_seq_length()) == LENGTH + 2
    cache.reset(keep_statistics=True)
    assert first.kept is not None
    model(tokens[:, :50], past_key_values=cache)
    assert "layer 1" in cache.describe() and int(cache.get_seq_length()) == 50


@pytest.mark.parametrize("compiling", [False, True])
def test_exact_layers_beside_packed_ones(compiling: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = ExactStaticLayer(6)
    states = torch.randn(2, 1, 2, 7, 16)
    with pytest.raises(ValueError, match="0 tokens and 7 new ones are more than max_cache_len = 6"):
        layer.update(*states)
    assert not layer.is_initialized
    layer.update(*states[:, :, :, :5])
    with pytest.raises(ValueError, match="5 tokens and 2 new ones are more than"):
        layer.update(*states[:, :, :, :2])
    key, value = layer.update(*states[:, :, :, 5:6])
    assert torch.equal(torch.stack((key, value)), states[:, :, :, :6])
    if compiling:
        # nobody waits for the length, and nothing is written elsewhere
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        for _ in range(3):
            layer.update(*states[:, :, :, 6:])
        assert torch.equal(torch.stack((key, value)), states[:, :, :, [0, 1, 2, 3, 4, 6]])
        return
    for _ in range(2):
        with pytest.raises(ValueError, match="6 tokens and 1 new ones are more than"):
            layer.update(*states[:, :, :, 6:])
    assert int(layer.get_seq_length()) == 6
    assert torch.equal(torch.stack((key, value)), states[:, :, :, :6])


def test_speculation(model: PreTrainedModel) -> None:
    tokens = make_tokens(20).repeat(1, 5)
    prompt = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    with pytest.raises(ValueError, match="speculative decoding"):
        generate(model, prompt, static(model), prompt_lookup_num_tokens=3)
