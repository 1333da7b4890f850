# SPDX-License-Identifier: Apache-2.0
"""Exact layers beside packed ones: what the host's give, from the same compiled step each time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.models import make_model
from support.static import (
    PADDING,
    compiled,
    dynamic,
    forget_compiled,
    generate,
    graphs,
    make_prompt,
    static,
)
from torch import Tensor
from torch._dynamo.backends.registry import lookup_backend
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

from rq_hf.static_exact import ExactStaticLayer, ExactStaticSlidingLayer

WINDOW, ROOM = 16, 64
STEPS = 14
# windows that are full before the first step, that become full at the last token of the prompt,
# and while steps go on
LENGTHS = [40, WINDOW, 8]


class Recorder:
    """A backend that notes which inputs of its graphs are numbers, or have sizes that change."""

    def __init__(self) -> None:
        self.changing: list[str] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable:
        places = [node for node in graph.graph.nodes if node.op == "placeholder"]
        self.changing += [
            node.name
            for node, x in zip(places, inputs, strict=True)
            if not isinstance(x, Tensor) or not all(type(size) is int for size in x.shape)
        ]
        return lookup_backend("aot_eager")(graph, inputs)


def make_states(tokens: int, seed: int) -> Tensor:
    """Returns keys and values `[2, B, Hk, tokens, D]`."""
    return torch.randn(2, 2, 2, tokens, 4, generator=torch.Generator().manual_seed(seed))


def make_sliding() -> list[StaticSlidingWindowLayer]:
    kinds = (ExactStaticSlidingLayer, StaticSlidingWindowLayer)
    return [kind(ROOM, sliding_window=WINDOW) for kind in kinds]


def update_both(layers: list[Any], tokens: int, seed: int, mine: Callable | None = None) -> None:
    """Stores the same in both layers and compares what they give, bit for bit."""
    states = make_states(tokens, seed)
    actual = (mine or layers[0].update)(*states)
    for one, other in zip(actual, layers[1].update(*states), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("length", LENGTHS)
def test_compiled_windows_move_as_the_hosts_do(length: int) -> None:
    forget_compiled()
    recorder = Recorder()
    layers = make_sliding()
    step = torch.compile(layers[0].update, fullgraph=True, backend=recorder)
    for _ in range(2):
        update_both(layers, length, seed=100)
        addresses = [x.data_ptr() for x in (layers[0].keys, layers[0].cumulative_length)]
        for seed in range(STEPS):
            update_both(layers, 1, seed, step)
        # what is not compiled goes on from there, and the other way round
        assert layers[0].get_seq_length() == layers[1].get_seq_length() == length + STEPS
        for tokens, mine in ((1, None), (1, step), (3, None), (1, step), (1, None)):
            for query in (1, 5):
                assert layers[0].get_mask_sizes(query) == layers[1].get_mask_sizes(query)
            update_both(layers, tokens, STEPS, mine)
        assert addresses == [x.data_ptr() for x in (layers[0].keys, layers[0].cumulative_length)]
        for layer in layers:
            layer.reset()
        assert layers[0].get_seq_length() == 0
    assert not recorder.changing and graphs() == 1


@pytest.mark.parametrize("length", LENGTHS)
def test_masks_of_compiled_steps_begin_where_the_window_does(length: int) -> None:
    forget_compiled()
    layers = make_sliding()

    def places(start: Tensor) -> tuple[Tensor, Tensor, int]:
        keys, offset = layers[0].get_mask_sizes(1)
        result = torch.arange(keys) + offset, start + layers[0].get_seq_length(), keys + offset
        layers[0].update(*make_states(1, 0))
        return result

    run = torch.compile(places, backend="aot_eager")
    update_both(layers, length, seed=100)
    for seed in range(STEPS):
        keys, offset = layers[1].get_mask_sizes(1)
        mine, query, most = run(torch.tensor(0))
        assert torch.equal(mine, torch.arange(keys) + offset)
        assert int(query) == length + seed
        # never less than there is, and the same for all steps
        assert most == ROOM
        layers[1].update(*make_states(1, 0))


def test_a_compiled_prompt_is_stored_as_the_hosts() -> None:
    forget_compiled()
    for length in (1, 8, 40):
        layers = make_sliding()
        # buffers that are made while compiling have no fixed addresses
        run = torch.compile(layers[0].update, backend="eager")
        for seed, tokens in enumerate((length, 3, 1, 1)):
            update_both(layers, tokens, seed, run)
        assert layers[0].get_seq_length() == length + 5


def test_a_compiled_full_layer_is_the_hosts() -> None:
    forget_compiled()
    recorder = Recorder()
    layers = [kind(ROOM) for kind in (ExactStaticLayer, StaticLayer)]
    step = torch.compile(layers[0].update, fullgraph=True, backend=recorder)
    states = make_states(8, 100)
    for layer in layers:
        layer.update(*states)
    for seed in range(STEPS):
        update_both(layers, 1, seed, step)
    assert not recorder.changing and graphs() == 1


@pytest.mark.parametrize("length", LENGTHS)
def test_generate_compiles_steps_once(length: int) -> None:
    model, prompt, recorder = _gemma(), make_prompt(length=length), Recorder()
    expected = generate(model, prompt, dynamic(model), max_new_tokens=STEPS).sequences
    forget_compiled(model)
    cache = static(model, ROOM)
    for _ in range(2):
        cache.reset()
        mine = generate(
            model, prompt, cache, **compiled(backend=recorder), max_new_tokens=STEPS
        ).sequences
        assert torch.equal(mine, expected)
    assert not recorder.changing and graphs() == 1


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
@torch.no_grad()
def test_steps_compiled_by_hand_are_compiled_once(length: int, masked: bool) -> None:
    model, recorder = _gemma(), Recorder()
    prompt = make_prompt(PADDING // 8 if masked else 0, length)
    expected = generate(model, prompt, dynamic(model), max_new_tokens=STEPS).sequences
    forget_compiled(model)
    step = torch.compile(model, fullgraph=True, backend=recorder)
    cache = static(model, ROOM)
    # of a fixed size: tokens to come are hidden by their places
    mask = torch.ones(2, ROOM, dtype=torch.long)
    mask[:, :length] = prompt["attention_mask"]
    tokens = prompt["input_ids"]
    for _ in range(2):
        cache.reset()
        options = {"attention_mask": mask[:, :length]} if masked else {}
        if masked:
            options["position_ids"] = (options["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        token = model(tokens, past_key_values=cache, **options).logits[:, -1:].argmax(-1)
        for at in range(STEPS - 1):
            assert torch.equal(token[:, 0], expected[:, length + at])
            if masked:
                places = options["position_ids"][:, -1:] + 1
                options = {"attention_mask": mask, "position_ids": places}
            token = step(token, past_key_values=cache, **options).logits.argmax(-1)
        assert {int(cache.get_seq_length(i)) for i in range(2)} == {length + STEPS - 1}
    assert not recorder.changing and graphs() == 1


def _gemma() -> Any:
    # in this order a model asks a sliding layer for the length of its sequences
    model = make_model("gemma3", sliding_window=WINDOW)
    assert model.config.layer_types == ["sliding_attention", "full_attention"]
    return model
