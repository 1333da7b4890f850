# SPDX-License-Identifier: Apache-2.0
"""What one layer refuses is taken back from the layers before it, or a reset is asked for."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.flows import make_cache
from support.models import make_model, make_tokens
from support.refusals import (
    NAN,
    assert_holds,
    contents,
    let_few_tokens_wait,
    make_layer,
    make_states,
)
from torch import Tensor
from transformers import Cache, EncoderDecoderCache, PreTrainedModel

from rq_hf import RotorQuantCache


@pytest.fixture(autouse=True)
def waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    let_few_tokens_wait(monkeypatch)


@contextmanager
def broken(model: PreTrainedModel, index: int) -> Iterator[None]:
    """Lets the values of a layer be NaN."""
    weight = model.model.layers[index].self_attn.v_proj.weight
    whole = weight.detach().clone()
    with torch.no_grad():
        weight[0, 0] = NAN
    try:
        yield
    finally:
        with torch.no_grad():
            weight.copy_(whole)


@torch.no_grad()
def run(model: PreTrainedModel, cache: Cache, tokens: Tensor, **options: Any) -> Tensor:
    tokens = tokens.to(model.device)
    return model(tokens, past_key_values=cache, **options).logits


def lengths(cache: RotorQuantCache) -> set[int]:
    return {layer.get_seq_length() for layer in cache.layers if hasattr(layer, "get_seq_length")}


# packed and exact layers with a window, states of linear attention
MODELS = ["llama", "gemma3", "gemma3-window", "qwen3-next"]
RESET = r"The layers before it hold these tokens already, .* reset\(\) the cache"


@pytest.mark.parametrize("family", MODELS)
def test_a_refused_prompt_leaves_no_layer_with_tokens(family: str, device: torch.device) -> None:
    model = make_model(family).to(device)
    cache, fresh = (make_cache(model) for _ in range(2))
    with broken(model, 1), pytest.raises(ValueError, match=r"layer 1: .* were not stored") as error:
        run(model, cache, make_tokens(300, batch=2))
    assert not re.search(RESET, str(error.value))
    assert lengths(cache) == {0}
    for seed, tokens in enumerate((200, 1, 100)):
        tokens = make_tokens(tokens, seed=seed)
        assert torch.equal(run(model, cache, tokens), run(model, fresh, tokens))


@pytest.mark.parametrize("family", MODELS)
def test_a_refused_part_is_taken_back_or_reset_is_asked_for(
    family: str, device: torch.device
) -> None:
    model = make_model(family).to(device)
    cache, fresh = (make_cache(model) for _ in range(2))
    for each in (cache, fresh):
        run(model, each, make_tokens(300))
    with broken(model, 1), pytest.raises(ValueError, match=r"layer 1: .* were not stored") as error:
        run(model, cache, make_tokens(40, seed=1))
    # linear attention does not go back
    if family == "qwen3-next":
        assert re.search(RESET, str(error.value))
        cache.reset()
        fresh.reset()
    else:
        assert not re.search(RESET, str(error.value))
        assert lengths(cache) == {300}
    for seed, tokens in enumerate((40, 1, 100)):
        tokens = make_tokens(tokens, seed=seed)
        assert torch.equal(run(model, cache, tokens), run(model, fresh, tokens))


@pytest.mark.parametrize("settings", [{}, {"layer_bits": {0: 16}}], ids=["packed", "exact first"])
def test_a_step_found_at_packing_is_cropped_from_all_layers(
    settings: dict[str, Any], device: torch.device
) -> None:
    model = make_model("llama")
    cache, fresh = (make_cache(model, **settings) for _ in range(2))
    states = make_states(440).to(device)
    spoilt = states.clone()
    spoilt[:, :, :, 410:] = NAN

    def update(each: RotorQuantCache, first: int, last: int, second: Tensor) -> None:
        each.update(*states[:, :, :, first:last], 0)
        each.update(*second[:, :, :, first:last], 1)

    for each in (cache, fresh):
        update(each, 0, 300, states)
    for i in range(300, 419):
        update(cache, i, i + 1, spoilt)
    # the step that packs, and layer 0 does
    message = r"layer 1: .* tokens 410, 411, 412, 413 and 5 more are .*crop\(-9\)"
    with pytest.raises(ValueError, match=message) as error:
        update(cache, 419, 420, spoilt)
    assert not re.search(RESET, str(error.value))
    assert lengths(cache) == {419}
    cache.crop(-9)
    for i in range(300, 440):
        update(fresh, i, i + 1, states)
        if i >= 410:
            update(cache, i, i + 1, states)
    for mine, theirs in zip(cache.layers, fresh.layers, strict=True):
        assert torch.equal(mine.keys, theirs.keys) and torch.equal(mine.values, theirs.values)
    assert all(layer.store.packed_length == 384 for layer in cache.packed_layers)


@pytest.mark.parametrize("padding", [0, 7])
@pytest.mark.parametrize("path", ["auto", "dense"])
# statistics stay open, are frozen by the refused part, were frozen before
@pytest.mark.parametrize(("prompt", "part"), [(20, 20), (20, 200), (100, 70), (300, 40), (420, 1)])
def test_a_part_that_was_taken_back_leaves_no_trace(
    prompt: int, part: int, path: str, padding: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the refused step is found in a later layer alone, as on the CPU
    monkeypatch.undo()
    model = make_model("llama")
    cache, fresh = (make_cache(model, path=path) for _ in range(2))
    mask = torch.ones(2, prompt + part + 150, dtype=torch.long)
    mask[0, :padding] = 0

    def forward(each: RotorQuantCache, tokens: int, seed: int) -> Tensor:
        seen = mask[:, : each.get_seq_length() + tokens]
        return run(model, each, make_tokens(tokens, batch=2, seed=seed), attention_mask=seen)

    for each in (cache, fresh):
        forward(each, prompt, 0)
    for _ in range(2):
        with broken(model, 1), pytest.raises(ValueError, match=r"layer 1: .* were not stored"):
            forward(cache, part, 1)
        assert lengths(cache) == {prompt}
    for tokens, seed in ((part, 2), (150, 3)):
        assert torch.equal(forward(cache, tokens, seed), forward(fresh, tokens, seed))
    for mine, theirs in zip(cache.packed_layers, fresh.packed_layers, strict=True):
        assert_holds(mine, contents(theirs))
        for name in ("total", "count", "padding"):
            pair = getattr(mine.statistics, name), getattr(theirs.statistics, name)
            assert pair == (None, None) or torch.equal(*pair)


def test_old_states_are_held_until_the_next_pass() -> None:
    """Until then a model with more layers may be found to have stored the new ones."""
    model = make_model("llama")
    cache = make_cache(model)
    for before in (0, 151, 302):
        run(model, cache, make_tokens(150, seed=before))
        run(model, cache, make_tokens(1))
        for layer in cache.packed_layers:
            assert layer.can_go_back_to(before + 150) and not layer.can_go_back_to(before)


@pytest.mark.parametrize("change", ["crop", "reorder_cache", "to"])
def test_what_was_changed_since_does_not_go_back(change: str) -> None:
    layer = make_layer()
    layer.update(*make_states(300))
    layer.update(*make_states(40, 1))
    assert layer.can_go_back_to(300)
    argument = {"crop": -1, "reorder_cache": torch.tensor([1, 0]), "to": "cpu"}[change]
    getattr(layer, change)(argument)
    assert not layer.can_go_back_to(300)


@pytest.mark.parametrize("window", [None, 200])
def test_tiles_that_were_filled_or_dropped_come_back(window: int | None) -> None:
    layer = make_layer(window)
    layer.update(*make_states(416))
    # an open tile
    layer.crop(-60)
    before = [layer.keys, layer.values]
    lengths = layer.store.packed_length, layer.store.dropped
    layer.update(*make_states(300, 1))
    assert (layer.store.packed_length, layer.store.dropped) != lengths
    layer.go_back()
    assert (layer.store.packed_length, layer.store.dropped) == lengths
    assert all(map(torch.equal, (layer.keys, layer.values), before))


PAIR = r"were not stored; .*If this cache is one of an EncoderDecoderCache, reset\(\) that$"


def test_without_a_config_too() -> None:
    model = make_model("llama")
    cache, fresh = (RotorQuantCache(residual_length=32) for _ in range(2))
    for seed, tokens in enumerate((300, 40, 70)):
        tokens = make_tokens(tokens, batch=2, seed=seed)
        for _ in range(2):
            with broken(model, 1), pytest.raises(ValueError, match=PAIR):
                run(model, cache, tokens)
            assert lengths(cache) <= {fresh.get_seq_length()}
        assert torch.equal(run(model, cache, tokens), run(model, fresh, tokens))


def test_a_pair_of_caches_is_reset_as_one() -> None:
    model = make_model("bart")
    pair = EncoderDecoderCache(*(RotorQuantCache(residual_length=32) for _ in range(2)))
    fresh = EncoderDecoderCache(*(RotorQuantCache(residual_length=32) for _ in range(2)))
    weight = model.model.decoder.layers[1].encoder_attn.v_proj.weight
    whole = weight.detach().clone()
    tokens, start = make_tokens(200), make_tokens(40, seed=1)
    with torch.no_grad():
        weight[0, 0] = NAN
    with pytest.raises(ValueError, match=f"layer 1: .*{PAIR}"):
        run(model, pair, tokens, decoder_input_ids=start)
    with torch.no_grad():
        weight.copy_(whole)
    pair.reset()
    options = {"decoder_input_ids": start}
    assert torch.equal(run(model, pair, tokens, **options), run(model, fresh, tokens, **options))


def test_statistics_kept_for_a_refused_prompt_are_kept_on() -> None:
    model = make_model("llama")
    cache = make_cache(model)
    run(model, cache, make_tokens(300))
    cache.reset(keep_statistics=True)
    other = copy.deepcopy(cache)
    kept = [layer.kept for layer in cache.packed_layers]
    with broken(model, 1), pytest.raises(ValueError, match=r"layer 1: .* were not stored"):
        run(model, cache, make_tokens(300, seed=1))
    assert [layer.kept for layer in cache.packed_layers] == kept
    tokens = make_tokens(300, seed=1)
    assert torch.equal(run(model, cache, tokens), run(model, other, tokens))
    # a prompt that was measured and refused leaves no statistics
    cache.reset()
    with broken(model, 1), pytest.raises(ValueError, match=r"layer 1: .* were not stored"):
        run(model, cache, tokens)
    assert [layer.kept for layer in cache.packed_layers] == [None, None]


def test_a_recorded_past_stays_recorded() -> None:
    model = make_model("gemma3")
    cache = make_cache(model)
    cache.activate_past_recording()
    with broken(model, 1), pytest.raises(ValueError, match=r"layer 1: .* were not stored"):
        run(model, cache, make_tokens(300))
    run(model, cache, make_tokens(300))
    cache.crop(-5)
    assert lengths(cache) == {295}


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("family", "windows_stay"), [("llama", True), ("gemma3", True), ("gemma3", False)]
)
def test_offloaded_layers_are_taken_back_on_a_gpu(family: str, windows_stay: bool) -> None:
    model = make_model(family).cuda()
    cache, fresh = (
        make_cache(model, offloading=True, offload_only_non_sliding=windows_stay) for _ in range(2)
    )
    for tokens in (300, 40, 70):
        part = make_tokens(tokens)
        with broken(model, 1), pytest.raises(ValueError, match=r"layer 1: .* were not stored"):
            run(model, cache, part)
        assert torch.equal(run(model, cache, part), run(model, fresh, part))
        assert lengths(cache) == lengths(fresh)
