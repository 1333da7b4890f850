# SPDX-License-Identifier: Apache-2.0
"""NaN and infinity: found before they are packed, told with a way out, and nothing is changed.

A GPU would have to be waited for, so a few new tokens there are looked at when some are packed.
Without a GPU the tests take the CPU for one.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.flows import make_cache
from support.models import make_model, make_tokens
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache, EncoderDecoderCache, PreTrainedModel

from rq_hf import RotorQuantCache, RotorQuantConfig, layers
from rq_hf.layers import RotorQuantLayer
from rq_hf.quant.rope import RopeTable
from rq_hf.sliding import RotorQuantSlidingLayer

CONFIG = RotorQuantConfig(residual_length=32, sink_length=4)
WINDOW = 160
NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def waiting(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens are not looked at, on whatever device a test runs."""
    on_gpu = "device" in request.fixturenames and request.getfixturevalue("device").type == "cuda"
    if not on_gpu:
        monkeypatch.setattr(layers, "looks_at_once", lambda device: False)


def make_states(tokens: int, seed: int = 0) -> Tensor:
    """Returns keys and values `[2, 2, 2, tokens, 64]`."""
    return torch.randn(2, 2, 2, tokens, 64, generator=torch.Generator().manual_seed(seed))


def make_layer(window: int | None = None) -> RotorQuantLayer:
    if window is None:
        return RotorQuantLayer(CONFIG, layer_idx=5)
    return RotorQuantSlidingLayer(CONFIG, window, layer_idx=5)


def feed(layer: RotorQuantLayer, states: Tensor, first: int = 0) -> None:
    """Stores a prompt of `first` tokens and then the others one by one."""
    for part in states.split([first] + [1] * (states.shape[3] - first), 3):
        if part.shape[3]:
            layer.update(*part)


def contents(layer: RotorQuantLayer) -> list[Any]:
    """Everything that a layer holds."""
    layer.settle()
    store, means = layer.store, layer.preconditioner
    assert store is not None
    held = [*store.exact.view(), *store.tiles.view()]
    held += [] if means is None else [means.pre_mean, means.post_mean, means.balance]
    lengths = (store.packed_length, store.dropped, layer.get_seq_length())
    return [*(tensor.clone() for tensor in held), torch.tensor(lengths)]


def assert_holds(layer: RotorQuantLayer, expected: list[Any]) -> None:
    found = contents(layer)
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)


# tokens of the prompt, how many there are when the next tile is packed, tokens that are not finite
STEPS = [
    (300, 4 + 256 + 160, [400]),
    (300, 4 + 256 + 160, [400, 401, 415]),
    # the first tile, whose statistics and sinks are still open
    (1, 4 + 160, [2]),
    (1, 4 + 160, [3, 4, 5, 60, 61, 163]),
]


@pytest.mark.parametrize(("which", "number"), [(0, NAN), (1, -INF)])
@pytest.mark.parametrize(("prompt", "end", "bad"), STEPS)
def test_steps_are_looked_at_before_they_are_packed(
    prompt: int, end: int, bad: list[int], which: int, number: float, device: torch.device
) -> None:
    layer, expected = make_layer(), make_layer()
    states = make_states(end).to(device)
    spoilt = states.clone()
    spoilt[which, 1, 1, bad, 3] = number
    feed(layer, spoilt[:, :, :, : end - 1], prompt)
    before = contents(layer)
    stored = [index for index in bad if index < end - 1]
    back = end - 1 - stored[0]
    named = ", ".join(map(str, stored[:4])) + (" and 1 more" if len(stored) > 4 else "")
    message = f"layer 5: keys or values of tokens? {named} are .* crop\\(-{back}\\), or reset"
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            layer.update(*spoilt[:, :, :, end - 1 :])
        assert_holds(layer, before)
    layer.crop(-back)
    feed(layer, states[:, :, :, stored[0] :])
    feed(expected, states, prompt)
    assert expected.store.packed_length in (128, 384)
    assert_holds(layer, contents(expected))


def test_the_token_that_fills_the_tail_is_looked_at_too(device: torch.device) -> None:
    layer = make_layer()
    states = make_states(420).to(device)
    feed(layer, states[:, :, :, :419], 300)
    before = contents(layer)
    spoilt = states[:, :, :, 419:].clone()
    spoilt[0, 1, 0, 0, :2] = INF
    with pytest.raises(ValueError, match=r"2 of 256 new key numbers .* in token 419, and were not"):
        layer.update(*spoilt)
    assert_holds(layer, before)
    layer.update(*states[:, :, :, 419:])
    assert layer.store.packed_length == 384


def test_a_long_part_finds_what_steps_before_it_left(device: torch.device) -> None:
    layer = make_layer()
    states = make_states(310).to(device)
    states[1, 0, 0, 305, 0] = NAN
    feed(layer, states, 300)
    before = contents(layer)
    with pytest.raises(ValueError, match=r"values of token 305 are .* crop\(-5\)"):
        layer.update(*make_states(200, 1).to(device))
    assert_holds(layer, before)
    layer.crop(-5)
    layer.update(*make_states(200, 1).to(device))
    assert layer.get_seq_length() == 505 and bool(layer.values.isfinite().all())


def test_sinks_that_a_crop_opened_are_looked_at_again(device: torch.device) -> None:
    layer = make_layer()
    states = make_states(300).to(device)
    feed(layer, states, 300)
    layer.crop(-298)
    spoilt = states[:, :, :, 2:164].clone()
    spoilt[0, 0, 0, 1] = NAN
    with pytest.raises(ValueError, match=r"values of token 3 are .* crop\(-160\)"):
        feed(layer, spoilt)
    assert layer.get_seq_length() == 163


@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize(("which", "number"), [(0, NAN), (1, INF)])
@pytest.mark.parametrize("tokens", [2, 33, 300])
def test_a_prompt_is_looked_at_first(
    tokens: int, which: int, number: float, window: int | None, device: torch.device
) -> None:
    layer = make_layer(window)
    spoilt = make_states(tokens).to(device)
    spoilt[which, 1, 1, 1, 3] = number
    name = ("key", "value")[which]
    message = f"layer 5: 1 of {2 * 2 * tokens * 64} new {name} numbers are .* in token 1, and"
    with pytest.raises(ValueError, match=message):
        layer.update(*spoilt)
    assert layer.get_seq_length() == 0
    # nothing was made for the prompt that was refused
    layer.update(*make_states(300)[:, :1].bfloat16().to(device))
    assert layer.keys.shape[0] == 1


@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("tokens", [33, 200])
def test_a_long_part_is_looked_at_first(
    tokens: int, window: int | None, device: torch.device
) -> None:
    layer = make_layer(window)
    layer.update(*make_states(300).to(device))
    before = contents(layer)
    spoilt = make_states(tokens, 1).to(device)
    spoilt[1, 0, 0, 7] = NAN
    with pytest.raises(ValueError, match=r"64 of .* new value numbers are .* in token 307, and"):
        layer.update(*spoilt)
    assert_holds(layer, before)


def test_a_window_finds_steps_before_they_are_packed(device: torch.device) -> None:
    layer, expected = make_layer(200), make_layer(200)
    states = make_states(416).to(device)
    spoilt = states.clone()
    spoilt[0, :, :, 410] = NAN
    with pytest.raises(ValueError, match=r"values of token 410 are .* crop\(-5\), or reset"):
        feed(layer, spoilt, 300)
    layer.crop(-5)
    feed(layer, states[:, :, :, 410:])
    feed(expected, states, 300)
    assert_holds(layer, contents(expected))
    assert layer.store.dropped == 128


def test_where_a_window_has_moved_on_reset_is_left(device: torch.device) -> None:
    layer, expected = make_layer(WINDOW), make_layer(WINDOW)
    states = make_states(416).to(device)
    spoilt = states.clone()
    spoilt[0, :, :, 410] = NAN
    with pytest.raises(ValueError, match=r"values of token 410 are .* crop\(-5\), or reset"):
        feed(layer, spoilt, 300)
    with pytest.raises(ValueError, match=r"or reset\(\) the cache"):
        layer.crop(-5)
    layer.reset()
    for each in (layer, expected):
        feed(each, states, 300)
    assert_holds(layer, contents(expected))


def test_what_was_moved_unseen_is_found_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_layer()
    states = make_states(420)
    states[0, 0, 0, 350] = NAN
    feed(layer, states[:, :, :, :380], 300)
    monkeypatch.undo()
    layer.to("cpu")
    with pytest.raises(ValueError, match=r"token 350 are .* crop\(-69\)"):
        feed(layer, states[:, :, :, 380:])


def test_the_cpu_looks_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    layer = make_layer()
    layer.update(*make_states(300))
    spoilt = make_states(1, 1)
    spoilt[0, 1, 0] = NAN
    with pytest.raises(ValueError, match=r"64 of 256 new key numbers are .* in token 300, and"):
        layer.update(*spoilt)


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
RESET = r"The layers before it hold these tokens already, .*: reset\(\) the cache"


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
    # the host's own windows and linear attention do not go back
    if family in ("gemma3", "qwen3-next"):
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


def test_no_old_states_are_held_between_passes() -> None:
    model = make_model("llama")
    cache = make_cache(model)
    for seed in range(3):
        run(model, cache, make_tokens(150, seed=seed))
        assert not any(layer.can_go_back_to(150 * seed) for layer in cache.packed_layers)


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


def test_without_a_config_a_reset_is_asked_for() -> None:
    model = make_model("llama")
    cache = RotorQuantCache(residual_length=32)
    with broken(model, 1), pytest.raises(ValueError, match=f"were not stored; .*{RESET}"):
        run(model, cache, make_tokens(300))
    cache.reset()
    assert lengths(cache) == {0}
    tokens = make_tokens(300, batch=2)
    assert torch.equal(
        run(model, cache, tokens), run(model, RotorQuantCache(residual_length=32), tokens)
    )


def test_a_pair_of_caches_is_reset_as_one() -> None:
    model = make_model("bart")
    pair = EncoderDecoderCache(*(RotorQuantCache(residual_length=32) for _ in range(2)))
    fresh = EncoderDecoderCache(*(RotorQuantCache(residual_length=32) for _ in range(2)))
    weight = model.model.decoder.layers[1].encoder_attn.v_proj.weight
    whole = weight.detach().clone()
    tokens, start = make_tokens(200), make_tokens(40, seed=1)
    with torch.no_grad():
        weight[0, 0] = NAN
    with pytest.raises(ValueError, match=f"layer 1: .*{RESET}"):
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
def test_offloaded_layers_are_taken_back_on_a_gpu() -> None:
    model = make_model("llama").cuda()
    cache, fresh = (make_cache(model, offloading=True) for _ in range(2))
    for tokens in (300, 40):
        part = make_tokens(tokens)
        with broken(model, 1), pytest.raises(ValueError, match=r"layer 1: .* were not stored"):
            run(model, cache, part)
        assert torch.equal(run(model, cache, part), run(model, fresh, part))
        assert lengths(cache) == lengths(fresh)


@contextmanager
def counted_waits() -> Iterator[list[str]]:
    """Yields a list of what waited for the GPU, complete behind the block."""
    waits: list[str] = []
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield waits
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits += [str(x.message) for x in caught if "synchronizing" in str(x.message)]


@pytest.mark.gpu
def test_how_often_a_gpu_is_waited_for() -> None:
    rope = RopeTable(100.0 ** -torch.linspace(0, 1, 32), interleaved=False)
    states = make_states(1000).cuda().bfloat16()
    query = torch.randn(2, 4, 700, 64, device="cuda", dtype=torch.bfloat16)

    def update(layer: RotorQuantLayer, first: int, last: int) -> None:
        key, value = layer.update(*states[:, :, :, first:last])
        if first == 0:
            F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    def feed_all(layer: RotorQuantLayer) -> list[int]:
        counts = []
        # 700 tokens leave 184 exact ones: 72 more fill a tile
        for first, last in ((0, 700), (700, 701), (701, 771), (771, 772), (772, 773)):
            with counted_waits() as waits:
                update(layer, first, last)
            counts.append(len(waits))
        assert layer.store.packed_length == 640
        return counts

    # the first one makes tables
    feed_all(RotorQuantLayer(RotorQuantConfig(), rope=rope))
    # the prompt is looked at, and asked once more whether it has a mean before RoPE
    assert feed_all(RotorQuantLayer(RotorQuantConfig(), rope=rope)) == [2, 0, 1, 1, 0]
