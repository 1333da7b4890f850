# SPDX-License-Identifier: Apache-2.0
"""What a cache of a fixed size refuses, and that it is as it was afterwards."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import make_model, make_tokens
from support.static import LENGTH, NEW, compiled, forget_compiled, generate, make_prompt, static
from torch.nn import functional as F
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
def test_deeper_models(model: PreTrainedModel) -> None:
    deeper = make_model("llama", num_hidden_layers=3)
    cache = RotorQuantStaticCache(model.config, 400)
    with pytest.raises(ValueError, match=r"layer 2: .* for a model with 2 layers; make a new one"):
        deeper(make_tokens(200), past_key_values=cache)
    model(make_tokens(200), past_key_values=cache)
    with pytest.raises(ValueError, match=r"layer 2: .* with 2 layers; .* reset\(\) the cache"):
        deeper(make_tokens(3), past_key_values=cache)
    with pytest.raises(ValueError, match=r"reset\(\) the cache"):
        model(make_tokens(1), past_key_values=cache)
    cache.reset()
    model(make_tokens(200), past_key_values=cache)


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
    with pytest.raises(ValueError, match=f"{LENGTH + 3} tokens and 1 new ones are more than"):
        generate(model, make_prompt(), cache, max_new_tokens=6, **options)
    assert int(cache.get_seq_length()) == LENGTH + 3


@torch.no_grad()
def test_no_layer_stores_what_does_not_fit_into_a_later_one() -> None:
    model = make_model("gemma3")
    cache, other = static(model, 64), static(model, 64)
    # a sliding layer comes first, which takes any number
    assert cache.layers[0] not in cache.packed_layers
    model(make_tokens(50), past_key_values=cache)
    for mask in (None, torch.ones(1, 1, 40, 90, dtype=torch.bool)):
        # for a finished mask the host does not ask for sizes
        masks = (
            mask if mask is None else dict.fromkeys(("sliding_attention", "full_attention"), mask)
        )
        with pytest.raises(ValueError, match="layer 1: 50 tokens and 40 new ones are more than"):
            model(make_tokens(40), past_key_values=cache, attention_mask=masks)
        assert lengths(cache) == [50, 50]
    model(make_tokens(50), past_key_values=other)
    for x in (cache, other):
        model(make_tokens(14), past_key_values=x)
    for _ in range(2):
        with pytest.raises(ValueError, match="layer 1: 64 tokens and 1 new ones are more than"):
            model(make_tokens(1), past_key_values=cache)
        assert lengths(cache) == [64, 64]
    for mine, theirs in zip(cache.layers, other.layers, strict=True):
        assert torch.equal(mine.keys, theirs.keys)


def lengths(cache: RotorQuantStaticCache) -> list[int]:
    return [int(layer.get_seq_length()) for layer in cache.layers]


@contextmanager
def broken(model: PreTrainedModel, layer_idx: int) -> Iterator[None]:
    """Has one layer of the model give values that are not finite."""
    weight = model.model.layers[layer_idx].self_attn.v_proj.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight[0, 0] = torch.nan
        try:
            yield
        finally:
            weight.copy_(before)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("keeps", [False, True])
@torch.no_grad()
def test_first_tokens_are_taken_back(family: str, keeps: bool) -> None:
    model = make_model(family)
    cache, other = static(model), static(model)
    if keeps:
        for x in (cache, other):
            model(make_tokens(LENGTH, seed=1), past_key_values=x)
            x.reset(keep_statistics=True)
    for tokens in (LENGTH, 1):
        with broken(model, 1), pytest.raises(ValueError, match=r"layer 1: .* NaN") as caught:
            model(make_tokens(tokens), past_key_values=cache)
        assert "reset" not in str(caught.value)
        assert lengths(cache) == [0, 0]
    tensors = [x.static.tensors_read for x in cache.packed_layers if x.store is not None]
    assert tensors or family == "gemma3"
    for tokens in (LENGTH, 1, 5):
        mine, theirs = (
            model(make_tokens(tokens, seed=2), past_key_values=x).logits for x in (cache, other)
        )
        assert torch.equal(mine, theirs)
    for before, layer in zip(tensors, cache.packed_layers, strict=False):
        assert layer.static.tensors_read is before
    assert all((layer.kept is not None) == keeps for layer in cache.packed_layers)


def refused_by_numbers(model: PreTrainedModel, cache: RotorQuantStaticCache, tokens: int) -> None:
    with broken(model, 1):
        model(make_tokens(tokens), past_key_values=cache)


def refused_by_mask(model: PreTrainedModel, cache: RotorQuantStaticCache, tokens: int) -> None:
    mask = torch.ones(1, 1, tokens, 90, dtype=torch.bool)
    model(make_tokens(tokens), past_key_values=cache, attention_mask=mask)


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("refused", [refused_by_numbers, refused_by_mask])
@torch.no_grad()
def test_later_tokens_spoil_the_cache(
    model: PreTrainedModel, refused: Callable[..., None], tokens: int
) -> None:
    forget_compiled(model)
    cache = static(model)
    model(make_tokens(LENGTH), past_key_values=cache)
    key, value = cache.packed_layers[1].update(*torch.zeros(2, 1, 2, 1, 64))
    cache.reset()
    model(make_tokens(LENGTH), past_key_values=cache)
    with pytest.raises(ValueError, match=r"layers before it hold these tokens .* reset\(\)"):
        refused(model, cache, tokens)
    for options in (
        {"tokens": make_tokens(1)},
        {"tokens": make_tokens(5)},
        {"tokens": make_tokens(1), "attention_mask": torch.ones(1, 1, 1, LENGTH + NEW).bool()},
    ):
        with pytest.raises(ValueError, match=r"half-way, .* reset\(\)"):
            model(options.pop("tokens"), past_key_values=cache, **options)
    for call in (
        lambda: cache.update(*torch.zeros(2, 1, 2, 1, 64), 1),
        lambda: cache.packed_layers[1].update(*torch.zeros(2, 1, 2, 1, 64)),
        lambda: F.scaled_dot_product_attention(torch.ones(1, 2, 1, 64), key, value),
    ):
        with pytest.raises(ValueError, match=r"half-way, .* reset\(\)"):
            call()
    assert not any(layer.takes_steps for layer in cache.packed_layers)
    with pytest.raises(ValueError, match=r"half-way, .* reset\(\)"):
        torch.compile(model, backend="eager")(make_tokens(1), past_key_values=cache)
    cache.reset()
    other = static(model)
    for count in (LENGTH, 1):
        mine, theirs = (model(make_tokens(count), past_key_values=x).logits for x in (cache, other))
        assert torch.equal(mine, theirs)


@torch.no_grad()
def test_first_tokens_with_a_narrow_mask_are_taken_back(model: PreTrainedModel) -> None:
    cache = static(model)
    for tokens in (LENGTH, 1):
        # several tokens attend to themselves by the host's own function
        with pytest.raises((ValueError, RuntimeError)) as caught:
            refused_by_mask(model, cache, tokens)
        assert "reset" not in str(caught.value)
        assert lengths(cache) == [0, 0]
    model(make_tokens(LENGTH), past_key_values=cache)
    assert lengths(cache) == [LENGTH, LENGTH]


@torch.no_grad()
def test_what_a_host_layer_cannot_store_spoils_the_cache() -> None:
    model = make_model("gemma3")
    cache = static(model)
    model(make_tokens(LENGTH), past_key_values=cache)
    with pytest.raises(RuntimeError, match="Sizes of tensors"):
        model(make_tokens(5, batch=2), past_key_values=cache)
    with pytest.raises(ValueError, match=r"half-way, .* reset\(\)"):
        model(make_tokens(1), past_key_values=cache)


@torch.no_grad()
def test_passes_broken_off_are_noticed(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = static(model)
    model(make_tokens(LENGTH), past_key_values=cache)
    with monkeypatch.context() as patch:

        def stop(*args: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(model.model.layers[1], "forward", stop)
        with pytest.raises(KeyboardInterrupt):
            model(make_tokens(5), past_key_values=cache)
    assert lengths(cache) == [LENGTH + 5, LENGTH]
    for tokens in (5, 1):
        with pytest.raises(ValueError, match=r"half-way, .* reset\(\)"):
            model(make_tokens(tokens), past_key_values=cache)
    cache.reset()
    model(make_tokens(5), past_key_values=cache)
    assert lengths(cache) == [5, 5]


def test_the_cache_is_free_when_nobody_has_it(model: PreTrainedModel) -> None:
    cache = static(model)
    with torch.no_grad():
        for tokens in (LENGTH, 1):
            model(make_tokens(tokens), past_key_values=cache)
    held = weakref.ref(cache)
    gc.disable()
    try:
        del cache
        assert held() is None
    finally:
        gc.enable()


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
