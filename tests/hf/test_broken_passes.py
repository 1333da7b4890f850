# SPDX-License-Identifier: Apache-2.0
"""Passes that break off, by whatever error, and models that a cache was not made for."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any, NoReturn

import pytest
import torch
from support.host_layers import assert_same_host_layers
from support.models import make_model, make_tokens
from support.refusals import NAN, assert_holds, contents
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    PreTrainedModel,
)
from transformers.cache_utils import LinearAttentionAndFullAttentionLayer
from transformers.models.mllama import MllamaForCausalLM, MllamaTextConfig

from rq_hf import RotorQuantCache, RotorQuantStaticCache

CONVOLUTION_LAST = ["full_attention", "conv"]


@torch.no_grad()
def run(model: PreTrainedModel, cache: Cache, tokens: Tensor) -> Tensor:
    return model(tokens, past_key_values=cache).logits


def make_cache(model: PreTrainedModel, **settings: Any) -> RotorQuantCache:
    return RotorQuantCache(config=model.config, **{"residual_length": 32, **settings})


def assert_same(mine: RotorQuantCache, theirs: RotorQuantCache) -> None:
    assert_same_host_layers(mine, theirs)
    for one, other in zip(mine.packed_layers, theirs.packed_layers, strict=True):
        if other.store is None:
            assert one.get_seq_length() == 0
        else:
            assert_holds(one, contents(other))


def assert_goes_on(model: PreTrainedModel, mine: RotorQuantCache, theirs: RotorQuantCache) -> None:
    for seed, tokens in enumerate((3, 1, 40, 1)):
        ids = make_tokens(tokens, batch=2, seed=seed)
        assert torch.equal(run(model, mine, ids), run(model, theirs, ids))
    assert_same(mine, theirs)


def pair(model: PreTrainedModel, prompt: int, **settings: Any) -> list[RotorQuantCache]:
    caches = [make_cache(model, **settings) for _ in range(2)]
    for cache in caches:
        if prompt:
            run(model, cache, make_tokens(prompt, batch=2))
    return caches


def interrupt(*args: Any, **kwargs: Any) -> NoReturn:
    raise KeyboardInterrupt


def break_off(model: PreTrainedModel, cache: RotorQuantCache, layer: int, tokens: int) -> None:
    """A pass that ends behind a layer of the model."""
    hook = model.model.layers[layer].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(model, cache, make_tokens(tokens, batch=2, seed=9))
    hook.remove()


def two_before_attention(family: str) -> PreTrainedModel:
    """A pass that breaks off behind the first layer of these looks like a layer that goes on."""
    kind = {"lfm2": "conv", "qwen3-next": "linear_attention"}[family]
    return make_model(family, num_hidden_layers=3, layer_types=[kind, kind, "full_attention"])


LINEAR = ["lfm2", "qwen3-next"]
FAMILIES = ["llama", "gemma3", *LINEAR]


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_that_broke_off_is_taken_back_by_the_next(family: str, tokens: int) -> None:
    model = two_before_attention(family) if family in LINEAR else make_model(family)
    cache, fresh = pair(model, 60, revertible=True)
    break_off(model, cache, int(family in LINEAR), tokens)
    if family not in LINEAR:
        # keys and values are there already
        with pytest.raises(ValueError, match=r"layer 1 has not seen .* first 60: .* taken back$"):
            run(model, cache, make_tokens(1, batch=2))
        assert_same(cache, fresh)
    assert_goes_on(model, cache, fresh)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_first_prompt_that_broke_off(family: str) -> None:
    model = two_before_attention(family) if family in LINEAR else make_model(family)
    cache, fresh = pair(model, 0)
    break_off(model, cache, int(family in LINEAR), 60)
    if family not in LINEAR:
        for _ in range(2):
            with pytest.raises(ValueError, match=r"layer 1 holds 0 tokens, .* 60: .* reset\(\)"):
                run(model, cache, make_tokens(3, batch=2))
        cache.reset()
    assert_goes_on(model, cache, fresh)


def test_convolutions_that_a_pass_did_not_come_to() -> None:
    model = make_model("lfm2", layer_types=CONVOLUTION_LAST)
    cache, fresh = pair(model, 60)
    break_off(model, cache, 0, 5)
    with pytest.raises(ValueError, match=r"layer 1 has not seen .* taken back$"):
        run(model, cache, make_tokens(1, batch=2))
    assert_goes_on(model, cache, fresh)


def test_states_that_cannot_come_back_ask_for_a_reset() -> None:
    model = two_before_attention("qwen3-next")
    cache, fresh = pair(model, 60)
    break_off(model, cache, 1, 5)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"a pass broke off: layer 0: .*revertible.*reset\(\)"):
            run(model, cache, make_tokens(1, batch=2))
    cache.reset(), fresh.reset()
    assert_goes_on(model, cache, fresh)


def fail(*args: Any, **kwargs: Any) -> NoReturn:
    raise MemoryError


@pytest.mark.parametrize("copied", [None, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("family", ["qwen3-next", "jamba", "falcon-h1"])
def test_errors_behind_states_that_cannot_come_back(
    family: str, copied: Callable[[Any], Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(family)
    cache, fresh = pair(model, 60)
    monkeypatch.setattr(cache.layers[1], "update", fail)
    with pytest.raises(MemoryError):
        run(model, cache, make_tokens(5, batch=2))
    monkeypatch.undo()
    cache = copied(cache) if copied else cache
    for _ in range(2):
        with pytest.raises(ValueError, match=r"a pass broke off: layer 0: .*reset\(\)"):
            run(model, cache, make_tokens(5, batch=2))
    cache.reset(), fresh.reset()
    assert_goes_on(model, cache, fresh)


@pytest.mark.parametrize("family", ["falcon-h1", "mistral-sliding"])
def test_where_nothing_is_packed_errors_are_taken_back_too(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(family)
    cache, fresh = pair(model, 60, revertible=True)
    for tokens in (5, 1):
        monkeypatch.setattr(cache.layers[1], "update", fail)
        with pytest.raises(MemoryError):
            run(model, cache, make_tokens(tokens, batch=2))
        monkeypatch.undo()
        assert_same(cache, fresh)
    assert_goes_on(model, cache, fresh)


@pytest.mark.parametrize("how", ["save", "reorder", "pickle", "deepcopy"])
def test_a_pass_that_broke_off_is_told_by_whatever_comes(how: str, tmp_path: Any) -> None:
    model = make_model(
        "lfm2", num_hidden_layers=4, layer_types=["conv", "full_attention", "conv", "conv"]
    )
    cache, fresh = pair(model, 60)
    break_off(model, cache, 2, 5)
    if how == "pickle":
        cache = pickle.loads(pickle.dumps(cache))
    elif how == "deepcopy":
        cache = copy.deepcopy(cache)
    # a pickle does not keep what there was before
    end = r"layer 1: it was changed since; reset\(\) .*" if how == "pickle" else "taken back"
    with pytest.raises(ValueError, match=rf"layer 3 has not seen .* {end}$"):
        if how == "save":
            cache.save(tmp_path / "cache")
        elif how == "reorder":
            cache.reorder_cache(torch.tensor([1, 0]))
        else:
            run(model, cache, make_tokens(1, batch=2))
    assert not (tmp_path / "cache").exists()
    if how == "pickle":
        cache.reset(), fresh.reset()
    assert_goes_on(model, cache, fresh)


@pytest.mark.parametrize("family", ["llama", "gemma3", "lfm2"])
def test_errors_of_a_layer_that_are_no_refusal(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(family)
    cache, fresh = pair(model, 60)

    for tokens in (1, 40):
        layer = cache.packed_layers[-1]
        monkeypatch.setattr(layer, "_take", fail)
        with pytest.raises(MemoryError):
            run(model, cache, make_tokens(tokens, batch=2, seed=9))
        monkeypatch.undo()
        assert_same(cache, fresh)
    assert_goes_on(model, cache, fresh)


def lfm2(**settings: Any) -> PreTrainedModel:
    return make_model("lfm2", **settings)


# models whose cache another one is given, and what is said
OTHERS: dict[str, tuple[Callable[[], PreTrainedModel], Callable[[], PreTrainedModel], str]] = {
    "deeper": (
        lfm2,
        lambda: lfm2(num_hidden_layers=4, layer_types=["conv", "full_attention"] * 2),
        "layer 2: the cache was made for a model with 2 layers; make a new one",
    ),
    "keys for convolutions": (
        lambda: lfm2(layer_types=CONVOLUTION_LAST),
        lambda: make_model("llama", head_dim=32),
        "layer 1: the model asks for a place for keys and values, the cache has a Linear",
    ),
    "keys first": (
        lfm2,
        lambda: make_model("llama", head_dim=32),
        "layer 0: the model asks for a place for keys and values, the cache has a Linear",
    ),
    "convolutions for keys": (
        lambda: make_model("llama", head_dim=32, num_attention_heads=4),
        lambda: lfm2(layer_types=CONVOLUTION_LAST),
        "layer 1: the model asks for states of linear attention, the cache has a RotorQuantLayer",
    ),
}


@pytest.mark.parametrize("prompt", [0, 60])
@pytest.mark.parametrize("others", OTHERS)
def test_caches_of_other_models(others: str, prompt: int) -> None:
    make, make_other, message = OTHERS[others]
    model, other = make(), make_other()
    cache, fresh = pair(model, prompt)
    for tokens in (5, 40, 1):
        with pytest.raises(ValueError, match=message):
            run(other, cache, make_tokens(tokens, batch=2))
        assert_same(cache, fresh)
    assert_goes_on(model, cache, fresh)


def test_a_model_with_fewer_layers_on_an_empty_cache() -> None:
    deep, shallow = make_model("llama", num_hidden_layers=4), make_model("llama")
    cache = make_cache(deep)
    run(shallow, cache, make_tokens(60))
    run(shallow, cache, make_tokens(5))
    with pytest.raises(ValueError, match=r"layer 2 holds 0 tokens, those before it 65: .* fewer"):
        run(deep, cache, make_tokens(1))
    # nothing of the deeper model's is left
    assert [layer.get_seq_length() for layer in cache.layers] == [65, 65, 0, 0]


def test_layers_may_be_filled_one_after_the_other() -> None:
    """By hand, in parts: no model does so, and no attention reads a layer meanwhile."""
    model = make_model("llama", num_hidden_layers=3)
    cache, fresh = (make_cache(model) for _ in range(2))
    states = torch.randn(3, 2, 1, 2, 90, 64)
    for i in range(3):
        for at in (0, 30, 60):
            cache.update(*states[i, ..., at : at + 30, :], i)
    for at in (0, 30, 60):
        for i in range(3):
            fresh.update(*states[i, ..., at : at + 30, :], i)
    assert_same(cache, fresh)
    # again, behind tokens that all layers have
    for i in range(3):
        for at in (0, 30, 60):
            cache.update(*states[i, ..., at : at + 30, :], i)
    assert {layer.get_seq_length() for layer in cache.layers} == {180}


@pytest.mark.parametrize("with_config", [True, False])
def test_cross_attention_may_come_late(with_config: bool) -> None:
    """To an image of the second turn, in a layer that text alone leaves out."""
    config = MllamaTextConfig(
        vocab_size=99,
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        cross_attention_layers=[1],
        pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    model = MllamaForCausalLM(config).eval()
    image = {
        "cross_attention_states": torch.randn(1, 70, 128),
        "cross_attention_mask": torch.zeros(1, 1, 60, 70),
        "full_text_row_masked_out_mask": torch.ones(1, 1, 60, 1),
    }
    # nothing is packed yet, so that answers are the exact ones
    caches = RotorQuantCache(config if with_config else None), DynamicCache(config=config)
    for seed, (tokens, seen) in enumerate(((20, {}), (60, image), (1, {}), (1, {}))):
        ids = make_tokens(tokens, seed=seed)
        with torch.no_grad():
            mine, theirs = (model(ids, past_key_values=x, **seen).logits for x in caches)
        torch.testing.assert_close(mine, theirs)
    assert [layer.get_seq_length() for layer in caches[0].layers] == [82, 70, 82]


def test_a_model_without_the_last_convolution() -> None:
    kinds = ["conv", "full_attention", "conv"]
    model = lfm2(num_hidden_layers=3, layer_types=kinds)
    cache, fresh = pair(model, 60)
    run(lfm2(num_hidden_layers=2, layer_types=kinds[:2]), cache, make_tokens(5, batch=2))
    with pytest.raises(ValueError, match=r"layer 2 has not seen .* fewer layers .* taken back$"):
        run(model, cache, make_tokens(5, batch=2))
    assert_goes_on(model, cache, fresh)


@pytest.mark.parametrize("family", ["qwen3-next", "lfm2", "jamba", "bamba"])
@pytest.mark.parametrize("tokens", [5, 40])
def test_another_batch_or_dtype_in_linear_attention(family: str, tokens: int) -> None:
    model = make_model(family)
    cache, fresh = pair(model, 60, revertible=True)
    for batch in (1, 3):
        with pytest.raises(ValueError, match=r"layer 0: the cache holds conv_states \[2, "):
            run(model, cache, make_tokens(tokens, batch=batch))
        assert_same(cache, fresh)
    # whoever notices it first
    with pytest.raises((ValueError, RuntimeError), match=r"dtype|bfloat16"):
        run(copy.deepcopy(model).bfloat16(), cache, make_tokens(tokens, batch=2))
    assert_goes_on(model, cache, fresh)


@pytest.mark.parametrize("family", ["lfm2", "qwen3-next", "jamba", "gemma3"])
def test_a_pass_refused_in_inference_mode_is_taken_back_for_all_modes(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(family)
    cache, fresh = pair(model, 60, revertible=True)

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError("not these")

    monkeypatch.setattr(cache.packed_layers[-1], "update", refuse)
    with torch.inference_mode(), pytest.raises(ValueError, match=r"not these$"):
        model(make_tokens(5, batch=2), past_key_values=cache)
    monkeypatch.undo()
    assert_goes_on(model, cache, fresh)


@pytest.mark.parametrize("revertible", [False, True])
@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_models_without_attention_go_on(kind: str, revertible: bool) -> None:
    """No layer counts tokens: no pass is taken for one that has broken off."""
    settings = {"num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 16}
    config = AutoConfig.for_model(
        kind,
        vocab_size=99,
        hidden_size=64,
        state_size=8,
        num_hidden_layers=2,
        **(settings if kind == "mamba2" else {}),
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    cache, plain = RotorQuantCache(config, revertible=revertible), DynamicCache(config=config)
    for seed, tokens in enumerate((20, 1, 1, 1)):
        ids = make_tokens(tokens, seed=seed)
        with torch.no_grad():
            mine, theirs = (model(ids, cache_params=x).logits for x in (cache, plain))
        assert torch.equal(mine, theirs)


EXACT_LAST: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "window": ("gemma3", {"layer_types": ["full_attention", "sliding_attention"]}, {}),
    "16 bits": ("llama", {}, {"layer_bits": {1: 16}}),
}


@pytest.mark.parametrize("last", EXACT_LAST)
@pytest.mark.parametrize("prompt", [0, 60])
def test_exact_layers_refuse_what_is_not_finite(last: str, prompt: int) -> None:
    family, options, settings = EXACT_LAST[last]
    model = make_model(family, **options)
    cache, fresh = pair(model, prompt, **settings)
    weight = model.model.layers[1].self_attn.v_proj.weight
    whole = weight.detach().clone()
    for tokens in (40, 1):
        with torch.no_grad():
            weight[0, 0] = NAN
        with pytest.raises(ValueError, match=r"layer 1: .* new value numbers are NaN"):
            run(model, cache, make_tokens(tokens, batch=2))
        with torch.no_grad():
            weight.copy_(whole)
        assert_same(cache, fresh)
    assert_goes_on(model, cache, fresh)


def test_a_layer_with_both_attentions_goes_back_whole() -> None:
    model = make_model("lfm2")
    cache = make_cache(model)
    # before any state: layers of a model with both in one
    cache.layers[0] = LinearAttentionAndFullAttentionLayer()
    cache._keep_empty_layers()
    states = torch.randn(2, 1, 4, 60, 32)
    for i in range(2):
        if i == 0:
            cache.update_conv_state(torch.ones(1, 8, 3), 0)
        cache.update(*states[..., :50, :], i)
    cache.update_conv_state(2 * torch.ones(1, 8, 1), 0)
    cache.update(*states[..., 50:, :], 0)
    with pytest.raises(ValueError, match=r"layer 1: .* NaN"):
        cache.update(*(NAN * states[..., 50:, :]), 1)
    layer = cache.layers[0]
    assert {x.get_seq_length() for x in cache.layers} == {50}
    assert torch.equal(layer.keys, states[0, ..., :50, :])
    assert torch.equal(layer.conv_states[0], torch.ones(1, 8, 3))


def test_a_loaded_cache_may_be_revertible(tmp_path: Any) -> None:
    model = two_before_attention("qwen3-next")
    cache, fresh = pair(model, 60)
    cache.save(tmp_path / "cache")
    for config in (model.config, None):
        loaded = RotorQuantCache.load(tmp_path / "cache", config, revertible=True)
        break_off(model, loaded, 1, 5)
        assert torch.equal(
            run(model, loaded, make_tokens(1, batch=2)),
            run(model, copy.deepcopy(fresh), make_tokens(1, batch=2)),
        )


def test_a_static_cache_takes_no_steps_back() -> None:
    config = make_model("qwen3-next").config
    with pytest.raises(ValueError, match="takes no steps back"):
        RotorQuantStaticCache(config, 64, revertible=True)
    with pytest.raises(ValueError, match="do not move"):
        RotorQuantStaticCache(config, 64, offload_only_non_sliding=False)
