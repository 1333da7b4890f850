# SPDX-License-Identifier: Apache-2.0
"""Linear attention, Mamba and convolutions, saved and loaded: they go on as if nothing had been."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support.host_layers import assert_same_host_layers
from support.models import make_model, make_tokens
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import (
    DynamicIndexedLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from rq_hf import RotorQuantCache, cache_file

# delta rules, Mamba of both makes, a convolution alone, and both kinds of attention in one layer
FAMILIES = [
    "qwen3-next",
    "olmo-hybrid",
    "jamba",
    "bamba",
    "nemotron-h",
    "granitemoehybrid",
    "lfm2",
    "falcon-h1",
]


@torch.no_grad()
def run(model: PreTrainedModel, cache: Any, tokens: Tensor) -> Tensor:
    return model(tokens, past_key_values=cache).logits


def filled(model: PreTrainedModel, batch: int = 1, **settings: Any) -> RotorQuantCache:
    cache = RotorQuantCache(config=model.config, **{"residual_length": 32, **settings})
    run(model, cache, make_tokens(200, batch=batch))
    return cache


def reloaded(cache: RotorQuantCache, folder: Path, config: Any = None) -> RotorQuantCache:
    cache.save(folder / "cache")
    return RotorQuantCache.load(folder / "cache", config)


@pytest.mark.parametrize("with_config", [True, False], ids=["config", "alone"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loaded_continues_to_the_bit(family: str, with_config: bool, tmp_path: Path) -> None:
    model = make_model(family)
    cache = filled(model, batch=2)
    loaded = reloaded(cache, tmp_path, model.config if with_config else None)
    assert_same_host_layers(cache, loaded)
    for seed, count in enumerate((1, 1, 40, 1)):
        tokens = make_tokens(count, batch=2, seed=seed)
        logits = run(model, cache, tokens)
        assert torch.equal(logits, run(model, loaded, tokens))
        # states of zeros would answer otherwise
        assert not torch.equal(logits, run(model, DynamicCache(config=model.config), tokens))
    for each in (cache, loaded):
        each.reorder_cache(torch.tensor([1, 0]))
    tokens = make_tokens(1, batch=2, seed=9)
    assert torch.equal(run(model, cache, tokens), run(model, loaded, tokens))
    assert_same_host_layers(cache, loaded)


@pytest.mark.parametrize("family", ["qwen3-next", "jamba", "lfm2"])
def test_generate_goes_on_with_the_same_tokens(family: str, tmp_path: Path) -> None:
    model = make_model(family).to(torch.bfloat16)
    cache = RotorQuantCache(config=model.config, residual_length=32)
    options: dict[str, Any] = {
        "max_new_tokens": 12,
        "do_sample": False,
        "pad_token_id": 0,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    text = model.generate(make_tokens(200), past_key_values=cache, **options).sequences
    loaded = reloaded(cache, tmp_path, model.config)
    mine, theirs = (model.generate(text, past_key_values=x, **options) for x in (cache, loaded))
    assert torch.equal(mine.sequences, theirs.sequences)
    assert all(torch.equal(a, b) for a, b in zip(mine.logits, theirs.logits, strict=True))


@pytest.mark.parametrize("family", ["qwen3-next", "falcon-h1"])
def test_an_empty_cache_is_loaded_empty(family: str, tmp_path: Path) -> None:
    model = make_model(family)
    cache = RotorQuantCache(config=model.config, residual_length=32)
    loaded = reloaded(cache, tmp_path, model.config)
    assert_same_host_layers(cache, loaded)
    tokens = make_tokens(200)
    assert torch.equal(run(model, cache, tokens), run(model, loaded, tokens))


def test_convolutions_that_record_their_past_are_cropped_after_loading(tmp_path: Path) -> None:
    model = make_model("lfm2")
    cache = RotorQuantCache(config=model.config, residual_length=32)
    cache.activate_past_recording()
    run(model, cache, make_tokens(200))
    cache.crop(0)
    run(model, cache, make_tokens(6, seed=1))
    loaded = reloaded(cache, tmp_path, model.config)
    assert_same_host_layers(cache, loaded)
    for each in (cache, loaded):
        each.crop(-4)
    assert_same_host_layers(cache, loaded)
    tokens = make_tokens(3, seed=2)
    assert torch.equal(run(model, cache, tokens), run(model, loaded, tokens))


@pytest.mark.parametrize("family", ["qwen3-next", "falcon-h1"])
def test_reset_makes_the_same_layers_anew(family: str, tmp_path: Path) -> None:
    model = make_model(family)
    loaded = reloaded(filled(model), tmp_path)
    loaded.reset()
    fresh = RotorQuantCache(config=model.config, residual_length=32)
    assert_same_host_layers(loaded, fresh)
    tokens = make_tokens(150, seed=3)
    assert torch.equal(run(model, loaded, tokens), run(model, fresh, tokens))


def test_reset_makes_windows_anew(tmp_path: Path) -> None:
    model = make_model("gemma3")
    loaded = reloaded(filled(model), tmp_path)
    loaded.reset()
    assert_same_host_layers(loaded, RotorQuantCache(config=model.config))


def cache_of(*layers: Any) -> RotorQuantCache:
    cache = RotorQuantCache(config=make_model("llama").config)
    cache.layers = list(layers)
    return cache


def test_several_states_of_which_some_are_empty(tmp_path: Path) -> None:
    layer = LinearAttentionLayer(number_of_states=3)
    layer.update_conv_state(torch.randn(2, 6, 2), 1, conv_kernel_size=4)
    layer.update_recurrent_state(torch.randn(2, 3, 5, 7, dtype=torch.float64), 2)
    cache = cache_of(layer, LinearAttentionLayer())
    loaded = reloaded(cache, tmp_path)
    assert_same_host_layers(cache, loaded)
    new = torch.randn(2, 6, 1)
    mine, theirs = (x.layers[0].update_conv_state(new, 1) for x in (cache, loaded))
    assert mine.shape[2] == 5 and torch.equal(mine, theirs)


def test_a_window_beside_a_recurrent_state(tmp_path: Path) -> None:
    layer = LinearAttentionAndSlidingWindowAttentionLayer(sliding_window=8)
    layer.update_conv_state(torch.randn(1, 6, 4))
    layer.update(*torch.randn(2, 1, 2, 20, 16))
    cache = cache_of(layer)
    loaded = reloaded(cache, tmp_path)
    assert_same_host_layers(cache, loaded)
    assert loaded.get_seq_length() == 20
    new = torch.randn(2, 1, 2, 1, 16)
    for mine, theirs in zip(layer.update(*new), loaded.layers[0].update(*new), strict=True):
        assert mine.shape[2] == 8 and torch.equal(mine, theirs)


def test_loaded_states_keep_their_place(tmp_path: Path) -> None:
    """Compiled code holds the addresses of such states, so steps must write into them."""
    model = make_model("qwen3-next")
    loaded = reloaded(filled(model), tmp_path)
    layer = loaded.layers[0]
    places = [x[0].data_ptr() for x in (layer.conv_states, layer.recurrent_states)]
    run(model, loaded, make_tokens(1))
    assert places == [x[0].data_ptr() for x in (layer.conv_states, layer.recurrent_states)]


@pytest.mark.gpu
def test_to_and_from_a_gpu(tmp_path: Path) -> None:
    model = make_model("jamba").to("cuda")
    cache = RotorQuantCache(config=model.config, residual_length=32)
    tokens = make_tokens(200).to("cuda")
    run(model, cache, tokens)
    cache.save(tmp_path / "cache")
    loaded = RotorQuantCache.load(tmp_path / "cache", model.config, device="cuda")
    assert_same_host_layers(cache, loaded)
    assert torch.equal(run(model, cache, tokens[:, :1]), run(model, loaded, tokens[:, :1]))
    assert RotorQuantCache.load(tmp_path / "cache").layers[0].device == torch.device("cpu")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    filled(make_model("qwen3-next")).save(tmp_path / "cache")
    return tmp_path / "cache"


def test_every_flipped_bit_is_refused(saved: Path) -> None:
    content = saved.read_bytes()
    for n, place in enumerate(range(0, len(content), len(content) // 60)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << n % 8
        saved.write_bytes(damaged)
        with pytest.raises(ValueError, match=str(saved)):
            RotorQuantCache.load(saved)


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
def test_truncated_files_are_refused(saved: Path, kept: float) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match="is cut short or damaged"):
        RotorQuantCache.load(saved)


Change = Callable[[dict[str, Any], dict[str, Tensor]], Any]


def rewrite(path: Path, change: Change) -> None:
    """Changes the first layer's record and its tensors, and the checksum with them."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    header = json.loads(metadata["header"])
    change(header["layers"][0], tensors)
    metadata["header"] = json.dumps(header)
    metadata["sha256"] = cache_file._checksum(metadata, tensors)
    save_file(tensors, path, metadata)


CONV = "conv_states.0"
CHANGES: dict[str, tuple[Change, str]] = {
    "another number of states": (
        lambda layer, tensors: layer["linear"].update(states=2),
        "other states of linear attention than 2",
    ),
    "another kernel": (
        lambda layer, tensors: layer["linear"].update(kernels=[3]),
        r"a convolution over 3 states holds \[4\]",
    ),
    "no kernel": (
        lambda layer, tensors: layer["linear"].update(kernels=[None], record_past=True),
        "a convolution over None states holds",
    ),
    "an unknown entry": (
        lambda layer, tensors: layer["linear"].update(decay=1),
        "not a header of this format",
    ),
    "an entry too few": (
        lambda layer, tensors: layer["linear"].pop("filled"),
        "not a header of this format",
    ),
    "a form that is none": (
        lambda layer, tensors: layer["linear"]["forms"].update({CONV: []}),
        "a convolution over 4 states holds",
    ),
    "another form": (
        lambda layer, tensors: layer["linear"]["forms"][CONV].__setitem__(0, "float16"),
        "layers.0.conv_states.0 is .* the header says",
    ),
    "a tensor too few": (
        lambda layer, tensors: tensors.pop(f"layers.0.{CONV}"),
        "layers.0.conv_states.0 is None, the header says",
    ),
    "a tensor too many": (
        lambda layer, tensors: tensors.update({"layers.0.conv_states.1": torch.ones(1)}),
        "there are tensors that the header does not list",
    ),
    "a name that is not listed": (
        lambda layer, tensors: layer["tensors"].remove(CONV),
        "not those of a LinearAttentionLayer",
    ),
    "no record": (
        lambda layer, tensors: layer.pop("linear"),
        "not those of a LinearAttentionLayer",
    ),
    "another kind": (
        lambda layer, tensors: layer.update(kind="DynamicLayer"),
        "not those of a DynamicLayer",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_files_that_make_no_sense_are_refused(name: str, saved: Path) -> None:
    change, message = CHANGES[name]
    rewrite(saved, lambda layer, tensors: None)
    RotorQuantCache.load(saved)
    rewrite(saved, change)
    for config in (None, make_model("qwen3-next").config):
        with pytest.raises(ValueError, match=message if config is None else str(saved)):
            RotorQuantCache.load(saved, config)


def test_caches_of_other_models_are_refused(saved: Path) -> None:
    with pytest.raises(ValueError, match=r"kind of layer 0 is LinearAttentionLayer, .* packed"):
        RotorQuantCache.load(saved, make_model("llama").config)

    def add(layer: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        layer["linear"].update(states=2, kernels=[4, None], filled=[True, False])

    rewrite(saved, add)
    with pytest.raises(ValueError, match="number of states of layer 0 is 2, the model's is 1"):
        RotorQuantCache.load(saved, make_model("qwen3-next").config)


def test_older_readers_take_what_they_know(tmp_path: Path, saved: Path) -> None:
    """A header names such states only where there are some."""
    filled(make_model("llama")).save(tmp_path / "other")
    for path, named in ((saved, [True, False]), (tmp_path / "other", [False, False])):
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()["header"])
        assert ["linear" in layer for layer in header["layers"]] == named


def test_other_layers_are_not_saved(tmp_path: Path) -> None:
    layer = DynamicIndexedLayer()
    layer.update(*torch.randn(2, 1, 2, 20, 16))
    with pytest.raises(ValueError, match=r"layer 0 is a DynamicIndexedLayer, .* cannot be saved"):
        cache_of(layer).save(tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []
