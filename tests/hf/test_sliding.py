# SPDX-License-Identifier: Apache-2.0
"""Packed layers behind a sliding window: what they forget, and that nobody misses it.

`test_families.py`, `test_flows.py` and `test_properties.py` have such layers among the others.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support.flows import SETTINGS, assert_close, generate, make_cache
from support.models import make_model, make_tokens
from support.replay import run_with_twin
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from rq_hf import RotorQuantCache, RotorQuantConfig
from rq_hf.layers import RotorQuantLayer
from rq_hf.sliding import RotorQuantSlidingLayer

WINDOW = 160
FAMILIES = ["mistral-window", "gemma2-window", "gemma3-window", "gpt-oss-window", "llama4-window"]
# a prompt of several windows, a step, more than a window at once, a short piece, many steps
PIECES = (700, 1, 250, 20, *[1] * 150)
PADDING = 600


def make_layer(**settings: Any) -> RotorQuantSlidingLayer:
    return RotorQuantSlidingLayer(RotorQuantConfig(residual_length=32, **settings), WINDOW)


def make_states(tokens: int, seed: int = 0) -> Tensor:
    """Returns keys and values `[2, 1, 2, tokens, 64]`."""
    return torch.randn(2, 1, 2, tokens, 64, generator=torch.Generator().manual_seed(seed))


def feed(layer: RotorQuantSlidingLayer, states: Tensor, *lengths: int) -> None:
    """Stores states in pieces, the last of them all that is left."""
    parts = states.split([*lengths, states.shape[3] - sum(lengths)], 3)
    for part in parts:
        layer.update(*part)
        layer.settle()


@torch.no_grad()
def run(model: PreTrainedModel, cache: Cache, padding: int = 0) -> Tensor:
    """Returns the logits of all pieces, those of padding left out."""
    tokens = make_tokens(sum(PIECES), batch=2)
    mask = torch.ones_like(tokens)
    mask[0, :padding] = 0
    logits, end = [], 0
    for length in PIECES:
        start, end = end, end + length
        output = model(tokens[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
        logits.append(output.logits)
    return torch.cat(logits, 1)[mask.bool()]


@pytest.mark.parametrize("padding", [0, PADDING])
@pytest.mark.parametrize("attention", ["own", "rotorquant"])
@pytest.mark.parametrize("family", FAMILIES)
def test_over_many_windows_all_is_read_as_decoded(
    family: str, attention: str, padding: int
) -> None:
    model = make_model(family)
    if attention == "rotorquant":
        model.set_attn_implementation(attention)
    cache = make_cache(model)
    mine, theirs = run_with_twin(cache, lambda cache: run(model, cache, padding))
    assert_close(mine, theirs)
    layer = cache.layers[0]
    assert isinstance(layer, RotorQuantSlidingLayer)
    # 1121 tokens, of which the next query sees 159
    assert (layer.store.dropped, layer.store.packed_length) == (896, 128)
    assert not any(door.startswith("decoded") for door in layer.calls)
    exact = run(model, DynamicCache(config=model.config), padding)
    assert (mine - exact).abs().max() > 1e-3 * exact.abs().max()


@pytest.mark.parametrize("family", ["mistral-window", "gemma3-window"])
def test_dense_path(family: str) -> None:
    model = make_model(family)
    cache = make_cache(model, path="dense")
    mine, theirs = run_with_twin(cache, lambda cache: run(model, cache))
    assert_close(mine, theirs)
    assert set(cache.layers[0].calls) == {"dense"}


def test_strict_reads_decoded_tokens_from_the_first_query_on() -> None:
    model = make_model("gemma3-window")
    settings = {"strict": True, "balance": False}
    cache = make_cache(model, path="dense", **settings)
    mine, theirs = run_with_twin(cache, lambda cache: run(model, cache))
    assert_close(mine, theirs)
    assert cache.layers[0].store.tail == 0
    # attention rounds otherwise on this path, which gives a few numbers of later layers other codes
    handles = make_cache(model, **settings)
    off = (run(model, handles) - theirs).abs().max()
    exact = run(model, DynamicCache(config=model.config))
    assert off < 0.01 * (exact - theirs).abs().max()
    first, same = (cache.layers[0].store.tiles.view() for cache in (cache, handles))
    assert torch.equal(first[0], same[0])
    assert set(handles.layers[0].calls) == {"sdpa"}


@pytest.mark.parametrize("nbits", [3, 4])
@pytest.mark.parametrize("lengths", [(1000,), (700, 1, 99), (163, *[1] * 837), (500, 450)])
def test_the_same_codes_stay_however_the_tokens_came(nbits: int, lengths: tuple[int, ...]) -> None:
    states = make_states(1000)
    layer, full = (
        make_layer(nbits=nbits),
        RotorQuantLayer(RotorQuantConfig(residual_length=32, sink_length=0, nbits=nbits)),
    )
    feed(layer, states, *lengths)
    # statistics are those of the first pieces
    full.preconditioner = layer.preconditioner
    full.update(*states)
    full.settle()
    store, tile = layer.store, layer.store.tile_length
    assert store.dropped == (1000 - WINDOW + 1) // 128 * 128
    assert store.dropped + store.packed_length == full.store.packed_length
    for mine, theirs in zip(store.tiles.view(), full.store.tiles.view(), strict=True):
        assert torch.equal(mine, theirs[:, :, store.dropped // tile :])
    assert torch.equal(layer.keys, full.keys[:, :, store.dropped :])


def test_of_a_long_prompt_only_what_will_be_read_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_layer()
    seen = []
    layer.lazy_initialization(*make_states(0))
    encode = layer.codec.encode

    def note(keys: Tensor, values: Tensor) -> Any:
        seen.append(keys.shape[2])
        return encode(keys, values)

    monkeypatch.setattr(layer.codec, "encode", note)
    feed(layer, make_states(3000))
    assert sum(seen) == layer.store.packed_length == 128
    # statistics are of all tokens nevertheless
    expected = RotorQuantLayer(RotorQuantConfig(residual_length=32, sink_length=0))
    expected.update(*make_states(3000))
    expected.settle()
    assert torch.equal(layer.preconditioner.value_mean, expected.preconditioner.value_mean)


def test_mask_sizes_leave_out_what_was_dropped() -> None:
    layer = make_layer()
    assert layer.get_mask_sizes(7) == (7, 0)
    feed(layer, make_states(286))
    assert layer.get_mask_sizes(3) == (289, 0)
    layer.update(*make_states(1))
    # the next query is the 288th token and sees from the 129th on
    assert layer.get_mask_sizes(3) == (162, 128)
    assert (layer.get_seq_length(), layer.get_max_length()) == (287, WINDOW)


def test_views_outlive_what_is_dropped_later() -> None:
    layer = make_layer()
    feed(layer, make_states(286))
    view = layer.view()
    before = view.dense()
    feed(layer, make_states(500), 1, 1)
    assert layer.store.dropped > 0
    assert all(map(torch.equal, view.dense(), before))


def test_crop_into_what_is_gone_is_refused() -> None:
    layer = make_layer()
    feed(layer, make_states(300))
    keys = layer.keys
    layer.crop(-13)
    assert torch.equal(layer.keys, keys[:, :, :-13])
    with pytest.raises(ValueError, match="layer 0: cropping to 286 tokens would bring back some"):
        layer.crop(-1)
    assert torch.equal(layer.keys, keys[:, :, :-13])
    layer.crop(-287)
    assert layer.get_seq_length() == 0


def test_crop_with_a_recorded_past_goes_back_any_number_of_tokens() -> None:
    layer, expected = make_layer(), make_layer()
    states = make_states(700)
    layer.activate_past_recording()
    feed(layer, states, 300, 200)
    assert layer.store.dropped == 0
    layer.crop(-400)
    feed(expected, states[:, :, :, :300])
    # what is packed is not unpacked
    assert layer.store.packed_length == 300 - layer.store.dropped
    assert layer.store.dropped == expected.store.dropped == 128
    layer.crop(0)
    assert layer.get_mask_sizes(1) == (173, 128)


def test_a_refused_crop_leaves_all_layers_as_they_were() -> None:
    model = make_model("gemma3-window")
    # the full layer comes first, and could be cropped
    model.config.layer_types = list(reversed(model.config.layer_types))
    cache = make_cache(model)
    for i in range(2):
        cache.update(*make_states(400), i)
    with pytest.raises(ValueError, match="layer 1: cropping to 250 tokens"):
        cache.crop(-150)
    assert [layer.get_seq_length() for layer in cache.layers] == [400, 400]


def test_another_batch_after_a_reset() -> None:
    model = make_model("gemma3-window")
    cache = make_cache(model)
    tokens = make_tokens(400)
    generate(model, make_tokens(300, batch=3), cache)
    cache.reset()
    assert cache.layers[0].get_mask_sizes(5) == (5, 0)
    again = generate(model, tokens, cache).sequences
    assert torch.equal(again, generate(model, tokens, make_cache(model)).sequences)


@pytest.mark.parametrize("with_config", [True, False], ids=["config", "alone"])
@pytest.mark.parametrize("prompt", [20, 280, 900])
@torch.no_grad()
def test_loaded_continues_to_the_bit(prompt: int, with_config: bool, tmp_path: Path) -> None:
    model = make_model("gemma3-window")
    cache = make_cache(model)
    model(make_tokens(prompt, batch=2), past_key_values=cache)
    cache.save(tmp_path / "cache")
    loaded = RotorQuantCache.load(tmp_path / "cache", model.config if with_config else None)
    other = copy.deepcopy(cache)
    for seed, count in enumerate((1, 200, *[1] * 30)):
        tokens = make_tokens(count, batch=2, seed=seed)
        logits = [model(tokens, past_key_values=x).logits for x in (cache, loaded, other)]
        assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])


def test_a_recorded_past_is_saved(tmp_path: Path) -> None:
    model = make_model("gemma3-window")
    cache = make_cache(model)
    cache.activate_past_recording()
    for i in range(2):
        cache.update(*make_states(400), i)
    cache.save(tmp_path / "cache")
    loaded = RotorQuantCache.load(tmp_path / "cache", model.config)
    for each in (cache, loaded):
        each.crop(-200)
        assert each.layers[0].get_mask_sizes(1) == (201, 0)
    assert torch.equal(cache.layers[0].keys, loaded.layers[0].keys)


def test_a_reset_ends_the_recording_as_the_hosts_does() -> None:
    for family in ("gemma3", "gemma3-window"):
        cache = make_cache(make_model(family))
        cache.activate_past_recording()
        for i in range(2):
            cache.update(*make_states(300), i)
        # all tokens dropped: the recording goes on
        cache.layers[0].crop(-300)
        assert cache.layers[0].record_past and cache.layers[0].get_seq_length() == 0
        cache.reset()
        assert not cache.layers[0].record_past


def kinds(family: str, **settings: Any) -> list[type]:
    cache = RotorQuantCache(config=make_model(family).config, **(SETTINGS | settings))
    return [type(layer) for layer in cache.layers]


def test_which_layers_are_packed() -> None:
    assert kinds("gemma3-window") == [RotorQuantSlidingLayer, RotorQuantLayer]
    assert kinds("llama4-window") == [RotorQuantSlidingLayer, RotorQuantLayer]
    exact = [DynamicSlidingWindowLayer, RotorQuantLayer]
    assert kinds("gemma3-window", sliding="exact") == exact
    # a tail of 159 tokens holds all that is seen of the window
    assert kinds("gemma3-window", residual_length=158)[0] is RotorQuantSlidingLayer
    assert kinds("gemma3-window", residual_length=159) == exact


def test_bits_of_single_layers() -> None:
    assert kinds("gemma3-window", layer_bits={0: 8, 1: 16}) == [
        RotorQuantSlidingLayer,
        DynamicLayer,
    ]
    assert kinds("gemma3-window", layer_bits={0: 16})[0] is DynamicSlidingWindowLayer
    with pytest.raises(ValueError, match=r"keeps the sliding layers \[0\] exact and others"):
        kinds("mistral-window", layer_bits={0: 16})
    with pytest.raises(ValueError, match=r"\[0\], .* or whose window fits the exact tail"):
        kinds("gemma3", layer_bits={0: 4})


def test_layers_of_other_bits_share_the_hosts_mask() -> None:
    model = make_model("mistral-window")
    cache = make_cache(model, layer_bits={1: 4})
    mine, theirs = run_with_twin(cache, lambda cache: run(model, cache))
    assert_close(mine, theirs)
    assert [layer.store.tile_length for layer in cache.layers] == [128, 64]


def test_description_and_memory() -> None:
    model = make_model("gemma3-window")
    cache = make_cache(model)
    assert "layer 0: packed, nothing stored yet" in cache.describe()
    generate(model, make_tokens(1000), cache)
    first, second = cache.describe().splitlines()
    assert first.startswith(
        "layer 0: window 160, 768 tokens dropped | 128 tokens packed in 1 tiles of 128"
    )
    assert second.startswith("layer 1: 4 exact sinks | 896 tokens packed in 7 tiles of 128")
    memory = cache.memory()
    assert memory.packed_numbers == (128 + 896) * 2 * 2 * 64
    held = sum(layer.store.length for layer in cache.packed_layers)
    assert memory.dense_bytes == held * 2 * 2 * 64 * 4
