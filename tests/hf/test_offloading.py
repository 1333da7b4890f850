# SPDX-License-Identifier: Apache-2.0
"""`offloading=True`: layers wait on the CPU, and the next one is fetched while another computes."""

from __future__ import annotations

import itertools
from functools import partialmethod
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
import torch
from support.flows import generate, make_cache
from support.models import make_model, make_tokens
from torch import Tensor
from transformers import PreTrainedModel

from rq_hf import RotorQuantCache
from rq_hf.layers import RotorQuantLayer

LAYERS = 4


class Stream:
    """Stands for a CUDA stream where there is none, and notes who waits for whom."""

    entered: list[Stream] = []  # noqa: RUF012
    events: list[tuple[str, ...]] = []  # noqa: RUF012

    def __init__(self, name: str = "prefetch") -> None:
        self.name = name

    def __enter__(self) -> None:
        self.entered.append(self)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.entered.pop()

    def wait_stream(self, other: Stream) -> None:
        self.events.append((self.name, "waits for", other.name))


def note_moves(cache: RotorQuantCache, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Returns the list in which every later move of a packed layer will be noted."""
    events: list[tuple[Any, ...]] = Stream.events
    events.clear()
    moves = {name: getattr(RotorQuantLayer, name) for name in ("offload", "prefetch")}

    def note(layer: RotorQuantLayer, name: str) -> None:
        if layer.store is not None and layer._offloaded == (name == "prefetch"):
            on = "prefetch" if Stream.entered else "default"
            events.append((on, name, layer.layer_idx))
        moves[name](layer)

    for name in moves:
        monkeypatch.setattr(RotorQuantLayer, name, partialmethod(note, name))
    return events


@pytest.fixture
def no_gpu_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device=None: Stream("default"))


def make_states(tokens: int) -> Tensor:
    """Returns keys and values `[2, 1, 2, tokens, 64]`."""
    return torch.randn(2, 1, 2, tokens, 64, generator=torch.Generator().manual_seed(tokens))


@pytest.mark.usefixtures("no_gpu_needed")
def test_each_layer_is_fetched_while_the_one_before_computes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_model("llama", num_hidden_layers=LAYERS)
    cache = make_cache(model, offloading=True)
    for layer in range(LAYERS):
        cache.update(*make_states(300), layer)
        cache.layers[layer].settle()
    events = note_moves(cache, monkeypatch)
    for _ in range(2):
        for layer in range(LAYERS):
            cache.update(*make_states(1), layer)
    moves = [event for event in events if event[1] != "waits for"]
    # the first layer is still on the device
    assert moves == [
        move
        for layer in [*range(LAYERS)] * 2
        for move in (
            ("prefetch", "prefetch", (layer + 1) % LAYERS),
            ("default", "offload", layer),
        )
    ]
    # a copy begins when what used the memory before has been computed
    for before, after in itertools.pairwise(events):
        if after[:2] == ("prefetch", "prefetch"):
            assert before == ("prefetch", "waits for", "default")
    waits = [i for i, event in enumerate(events) if event == ("default", "waits for", "prefetch")]
    assert len(waits) == 2 * LAYERS


@pytest.mark.usefixtures("no_gpu_needed")
@pytest.mark.parametrize("family", ["llama", "gemma3-window", "mistral-window"])
@pytest.mark.parametrize("only_non_sliding", [True, False])
def test_what_is_generated_does_not_change(family: str, only_non_sliding: bool) -> None:
    model = make_model(family, num_hidden_layers=2)
    cache = make_cache(model, offloading=True, offload_only_non_sliding=only_non_sliding)
    mine = generate(model, make_tokens(300), cache).sequences
    assert torch.equal(mine, generate(model, make_tokens(300), make_cache(model)).sequences)
    stays = [x.is_sliding and only_non_sliding for x in cache.layers]
    # the first of several that come and go has been fetched for the next step
    away = [not stay for stay in stays]
    if away.count(True) > 1:
        away[away.index(True)] = False
    assert [layer._offloaded for layer in cache.packed_layers] == away


@pytest.mark.usefixtures("no_gpu_needed")
def test_layers_that_are_away_are_cropped_reordered_and_saved(tmp_path: Path) -> None:
    model = make_model("llama", num_hidden_layers=LAYERS)
    keys = []
    for offloading in (True, False):
        cache = make_cache(model, offloading=offloading)
        generate(model, make_tokens(300, batch=2), cache)
        cache.crop(-20)
        cache.reorder_cache(torch.tensor([1, 0]))
        cache.save(tmp_path / "cache")
        loaded = RotorQuantCache.load(tmp_path / "cache", model.config)
        keys += [cache.layers[1].keys, loaded.layers[1].keys]
        cache.reset()
        assert not any(layer._offloaded for layer in cache.layers)
    assert all(torch.equal(keys[0], other) for other in keys[1:])


def devices(layer: Any) -> set[str]:
    return {t.device.type for t in layer.store.tensors()}


def long_model(family: str) -> PreTrainedModel:
    # six layers, of which at most two are on the device
    changes = (
        {} if family == "llama" else {"layer_types": ["sliding_attention", "full_attention"] * 3}
    )
    return make_model(family, num_hidden_layers=6, **changes).to("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("only_non_sliding", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma3-window"])
def test_tokens_and_devices_on_a_gpu(family: str, only_non_sliding: bool) -> None:
    model = long_model(family)
    tokens = make_tokens(300, batch=2).to("cuda")
    options = {"max_new_tokens": 200}
    cache = make_cache(model, offloading=True, offload_only_non_sliding=only_non_sliding)
    mine = generate(model, tokens, cache, **options)
    theirs = generate(model, tokens, make_cache(model), **options)
    assert torch.equal(mine.sequences, theirs.sequences)
    assert all(map(torch.equal, mine.logits, theirs.logits))
    moving = [x for x in cache.layers if not (x.is_sliding and only_non_sliding)]
    assert [devices(layer) for layer in moving] == [{"cuda"}] + [{"cpu"}] * (len(moving) - 1)
    for layer in cache.layers:
        if layer not in moving:
            assert devices(layer) == {"cuda"}


@pytest.mark.gpu
def test_turns_beams_and_saving_on_a_gpu(tmp_path: Path) -> None:
    model = long_model("llama")
    results = []
    for offloading in (True, False):
        cache = make_cache(model, offloading=offloading)
        text = generate(model, make_tokens(300).to("cuda"), cache).sequences
        cache.save(tmp_path / "cache")
        text = torch.cat((text, make_tokens(40, seed=1).to("cuda")), 1)
        text = generate(model, text, cache, prompt_lookup_num_tokens=4).sequences
        loaded = RotorQuantCache.load(tmp_path / "cache", model.config, device="cuda")
        cache.reset()
        beams = generate(model, make_tokens(290).to("cuda"), cache, num_beams=3).sequences
        results.append((text, beams, loaded.layers[3].keys))
    assert all(map(torch.equal, *results))


@pytest.mark.gpu
def test_a_slow_reader_is_not_overwritten_on_a_gpu() -> None:
    """What a handle shows stays, though its memory is free for the next layer once it is gone."""
    model = long_model("llama")
    cache, plain = make_cache(model, offloading=True), make_cache(model)
    states = torch.randn(6, 2, 1, 2, 20_000, 64, device="cuda")
    for each in (cache, plain):
        for layer in range(6):
            each.update(*states[layer], layer)
            each.layers[layer].settle()
    query = torch.randn(1, 4, 1, 64, device="cuda")
    for _ in range(5):
        answers = []
        for each in (cache, plain):
            for layer in range(6):
                key, value = each.update(*states[layer, :, :, :, :1], layer)
                # the device is busy when attention is asked for, and the host goes on at once
                torch.cuda._sleep(20_000_000)
                answers.append(
                    torch.nn.functional.scaled_dot_product_attention(
                        query, key, value, enable_gqa=True
                    )
                )
        assert all(map(torch.equal, answers[:6], answers[6:]))


@pytest.mark.gpu
def test_memory_on_a_gpu_is_that_of_two_layers() -> None:
    model = long_model("llama")
    states = torch.randn(2, 1, 2, 60_000, 64, device="cuda", dtype=torch.bfloat16)
    held = {}
    for offloading in (True, False):
        cache = make_cache(model, offloading=offloading)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        for layer in range(6):
            cache.update(*states, layer)
            cache.layers[layer].settle()
        for layer in range(6):
            cache.update(*states[:, :, :, :1], layer)
        torch.cuda.synchronize()
        held[offloading] = torch.cuda.memory_allocated() - before
        del cache
    # one layer of six stays, and constants
    assert held[True] < held[False] / 3


@pytest.mark.gpu
def test_layers_are_fetched_in_turn_on_the_other_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    model = long_model("llama")
    cache = make_cache(model, offloading=True)
    with torch.no_grad():
        model(make_tokens(300).to("cuda"), past_key_values=cache)
    seen: list[tuple[int, bool]] = []
    prefetch = RotorQuantLayer.prefetch

    def noted(layer: RotorQuantLayer) -> None:
        if layer._offloaded:
            seen.append(
                (layer.layer_idx, torch.cuda.current_stream() != torch.cuda.default_stream())
            )
        prefetch(layer)

    monkeypatch.setattr(RotorQuantLayer, "prefetch", noted)
    with torch.no_grad():
        model(make_tokens(1).to("cuda"), past_key_values=cache)
    assert seen == [(layer % 6, True) for layer in range(1, 7)]
