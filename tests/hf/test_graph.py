# SPDX-License-Identifier: Apache-2.0
"""Steps as a CUDA graph: tokens of plain steps, whatever calls come between.

Without a GPU the graph is one that calls the model again. What is around it is the same: which
calls it stands for, what goes in and comes out, and a cache that recording leaves as it was.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.models import make_model, make_tokens
from support.static import (
    LENGTH,
    NEW,
    PACKED,
    PADDING,
    compiled,
    dynamic,
    generate,
    make_prompt,
    packed,
    static,
)
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, PreTrainedModel
from transformers.cache_utils import StaticSlidingWindowLayer

from rq_hf import RotorQuantStaticCache, cuda_graph, graph, layers
from rq_hf.graph import GraphedSteps
from rq_hf.graph_state import CacheState
from rq_hf.static_exact import ExactStaticSlidingLayer


class Again:
    """Stands for a graph: calls the model again, and puts the results where the first ones are.

    As with a graph, recording does nothing to the numbers in the cache's tensors, and replaying
    nothing to what the host counts.
    """

    def __init__(self, device: torch.device, cache: RotorQuantStaticCache) -> None:
        self.device, self.state = device, CacheState(cache)

    def warm_up(self, step: Callable[[], Any]) -> None:
        step()

    def record(self, step: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        saved = self.state.save()
        outputs = step()
        counted, places = self.state.numbers(), self.state.places()
        saved.restore()
        for layer, name, value in counted:
            setattr(layer, name, value)
        for holder, name, tensor in places:
            holder[name] = tensor
        leaves = [x for x in tree_leaves(outputs) if isinstance(x, torch.Tensor)]
        for x in leaves:
            x.fill_(torch.nan)

        def replay() -> None:
            before = self.state.numbers()
            new = [x for x in tree_leaves(step()) if isinstance(x, torch.Tensor)]
            for mine, result in zip(leaves, new, strict=True):
                mine.copy_(result)
            for layer, name, value in before:
                setattr(layer, name, value)

        return outputs, replay


class NoConstants(TorchFunctionMode):
    """Refuses tensors that are made of Python's numbers: on a GPU these would be copied there."""

    def __torch_function__(
        self, func: Callable, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        assert func is not torch.tensor, "a number from the host"
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=["again", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cuda":
        return "cuda"
    of = {}
    check = graph._check

    def remember(model: PreTrainedModel, cache: RotorQuantStaticCache) -> None:
        check(model, cache)
        of["cache"] = cache

    monkeypatch.setattr(graph, "_check", remember)
    monkeypatch.setattr(graph, "make_recorder", lambda device: Again(device, of["cache"]))
    return "cpu"


def steps_of(model: PreTrainedModel) -> GraphedSteps:
    return vars(model)["forward"]


def on(device: str, prompt: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor.to(device) for name, tensor in prompt.items()}


def plain(model: PreTrainedModel, prompt: dict[str, Any], **options: Any) -> Any:
    return generate(model, prompt, static(model), disable_compile=True, **options)


@pytest.mark.parametrize("attention", ["sdpa", "eager", "rotorquant"])
@pytest.mark.parametrize("padding", [0, PADDING])
def test_tokens_are_those_of_plain_steps(device: str, attention: str, padding: int) -> None:
    model, prompt = make_model("llama").to(device), on(device, make_prompt(padding))
    model.set_attn_implementation(attention)
    expected = plain(model, prompt)
    cache = static(model)
    with cuda_graph(model, cache) as same:
        assert same is model
        actual = generate(model, prompt, cache)
        steps = steps_of(model)
        # the first step is plain, the second is recorded and, as all others, replayed
        assert (steps.recorded, steps.replayed) == (1, NEW - 2)
    assert torch.equal(actual.sequences, expected.sequences)
    for mine, theirs in zip(actual.logits, expected.logits, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert packed(cache) == {PACKED}
    assert int(cache.get_seq_length()) == LENGTH + NEW - 1
    assert f"step {NEW - 1}x" in cache.describe()
    assert "_compiled_call" not in vars(model)


def test_recording_while_a_tile_is_packed(device: str) -> None:
    model = make_model("llama").to(device)
    # the step that is recorded, the second, packs the first tile
    prompt = on(device, make_prompt(PADDING, length=4 + 16 + 64 - 1))
    expected = plain(model, prompt)
    cache = static(model)
    with cuda_graph(model, cache):
        few = generate(model, prompt, cache, max_new_tokens=3)
        assert packed(cache) == {64} and steps_of(model).recorded == 1
        cache.reset()
        actual = generate(model, prompt, cache)
    assert torch.equal(few.sequences, expected.sequences[:, : few.sequences.shape[1]])
    assert torch.equal(actual.sequences, expected.sequences)


def test_other_prompts_need_no_other_graph(device: str) -> None:
    model, cache = make_model("llama").to(device), None
    cache = static(model)
    with cuda_graph(model, cache):
        for length, padding in ((LENGTH, PADDING), (50, 0), (90, 20), (1, 0)):
            prompt = on(device, make_prompt(padding, length=length))
            cache.reset()
            actual = generate(model, prompt, cache)
            assert torch.equal(actual.sequences, plain(model, prompt).sequences)
        steps = steps_of(model)
        assert steps.recorded == 1 and steps.replayed >= 4 * (NEW - 2)


def test_turns_on_one_cache(device: str) -> None:
    model = make_model("llama").to(device)
    cache, other = static(model, 400), static(model, 400)
    texts = []
    for used in (other, cache):
        tokens, mask = on(device, make_prompt(PADDING)).values()
        context = cuda_graph(model, used) if used is cache else torch.no_grad()
        with context:
            for turn, new in enumerate((10, 1, 70)):
                prompt = {"input_ids": tokens, "attention_mask": mask}
                tokens = generate(
                    model, prompt, used, max_new_tokens=25, disable_compile=True
                ).sequences
                more = make_tokens(new, batch=2, seed=turn).to(device)
                tokens = torch.cat((tokens, more), 1)
                ones = mask.new_ones(2, tokens.shape[1] - mask.shape[1])
                mask = torch.cat((mask, ones), 1)
        texts.append(tokens)
    assert torch.equal(*texts)


@pytest.mark.parametrize(
    ("family", "graphs"),
    [
        ("qwen3", 1),
        # the prompt fills the window, or it becomes full on the way
        ("gemma3", 1),
        ("gemma3-window", 2),
        ("gpt-oss", 1),
        ("qwen3-next", 1),
        ("llava", 1),
    ],
)
def test_models_of_several_kinds_of_layers(device: str, family: str, graphs: int) -> None:
    model, prompt = make_model(family).to(device), on(device, make_prompt(PADDING))
    expected = plain(model, prompt)
    cache = static(model)
    with cuda_graph(model, cache):
        for _ in range(2):
            cache.reset()
            actual = generate(model, prompt, cache)
            assert torch.equal(actual.sequences, expected.sequences)
        steps = steps_of(model)
        assert steps.recorded == graphs
        assert steps.replayed == 2 * (NEW - 1) - graphs


def test_exact_layers_beside_packed_ones(device: str) -> None:
    model, prompt = make_model("llama").to(device), on(device, make_prompt(PADDING))
    settings = {"layer_bits": {0: 16, 1: 2}}
    expected = generate(model, prompt, static(model, **settings), disable_compile=True)
    cache = static(model, **settings)
    with cuda_graph(model, cache):
        actual = generate(model, prompt, cache)
        assert steps_of(model).replayed == NEW - 2
    assert torch.equal(actual.sequences, expected.sequences)


@pytest.mark.parametrize("settings", [{}, {"layer_bits": {0: 16, 1: 2}}])
def test_beams_change_places(device: str, settings: dict[str, Any]) -> None:
    model, prompt = make_model("llama").to(device), on(device, make_prompt(PADDING))
    options: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 20, "disable_compile": True}
    expected = generate(model, prompt, static(model, **settings), **options)
    cache = static(model, **settings)
    with cuda_graph(model, cache):
        actual = generate(model, prompt, cache, **options)
        assert (steps_of(model).recorded, steps_of(model).replayed) == (1, 18)
    assert torch.equal(actual.sequences, expected.sequences)


@torch.no_grad()
def test_a_loop_of_ones_own(device: str) -> None:
    model, prompt = make_model("llama").to(device), on(device, make_prompt())
    tokens, mask = prompt.values()
    expected = plain(model, prompt).sequences
    for grows in (False, True):
        cache = static(model)
        seen = mask
        with cuda_graph(model, cache):
            token = model(tokens, past_key_values=cache).logits[:, -1:].argmax(-1)
            kept = []
            for at in range(NEW):
                assert torch.equal(token[:, 0], expected[:, LENGTH + at])
                seen = torch.cat((seen, mask[:, :1]), 1)
                options = {"attention_mask": seen} if grows else {}
                # positional arguments are arguments by name
                outputs = model(token, past_key_values=cache, **options)
                assert outputs.past_key_values is cache
                kept.append(outputs.logits)
                token = outputs.logits.argmax(-1)
            # a mask that grows is another one each time
            assert steps_of(model).replayed == (0 if grows else NEW - 1)
        # results are copies
        assert torch.equal(torch.stack(kept).argmax(-1)[:-1, :, 0].T, expected[:, LENGTH + 1 :])


@torch.no_grad()
def test_calls_that_differ(device: str) -> None:
    model, tokens = make_model("llama").to(device), make_tokens(LENGTH + 30, batch=2).to(device)
    cache, other = static(model), static(model)
    with cuda_graph(model, cache):
        for used in (cache, other):
            model(tokens[:, :LENGTH], past_key_values=used)
        steps = steps_of(model)

        def step(at: int, **options: Any) -> None:
            new = tokens[:, LENGTH + at : LENGTH + at + 1]
            mine, theirs = (model(new, past_key_values=c, **options) for c in (cache, other))
            assert type(mine) is type(theirs)
            for a, b in zip(tree_leaves(mine), tree_leaves(theirs), strict=True):
                if isinstance(a, torch.Tensor):
                    torch.testing.assert_close(a, b)

        for at in range(2):
            step(at)
        assert (steps.recorded, steps.replayed) == (1, 1)
        step(2, output_hidden_states=True)
        step(3, return_dict=False)
        # once is not enough to be recorded
        assert (steps.recorded, steps.replayed) == (1, 1)
        step(4, return_dict=False)
        step(5, output_hidden_states=True)
        assert (steps.recorded, steps.replayed) == (3, 3)
        # numbers that change each time are never recorded
        for at in range(6, 26):
            step(at, logits_to_keep=at)
        assert (steps.recorded, steps.replayed) == (3, 3)
        # and push out nothing
        step(26, return_dict=False)
        step(27)
        assert (steps.recorded, steps.replayed) == (3, 5)
        with torch.enable_grad():
            step(28)
        assert steps.replayed == 5
        step(29, use_cache=True)
    # behind it all is plain again, also for who kept the function
    new = make_tokens(1, batch=2).to(device)
    steps(new, past_key_values=cache)
    assert steps.replayed == 5 and int(cache.get_seq_length()) == LENGTH + 31


@torch.no_grad()
def test_only_the_last_graphs_are_kept(device: str) -> None:
    model, tokens = make_model("llama").to(device), make_tokens(LENGTH, batch=2).to(device)
    cache = static(model)
    with cuda_graph(model, cache):
        model(tokens, past_key_values=cache)
        for kept in range(1, 7):
            for _ in range(2):
                model(tokens[:, :1], past_key_values=cache, logits_to_keep=kept)
        steps = steps_of(model)
        assert steps.recorded == 6 and len(steps._graphs) == graph._MOST_GRAPHS


@torch.no_grad()
def test_a_step_that_fails_leaves_the_cache_alone(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompt = make_model("gemma3-window").to(device), on(device, make_prompt(PADDING))
    expected = plain(model, prompt).sequences
    cache = static(model)
    recorder: Any = Again if device == "cpu" else graph.Recorder

    def fail(self: Any, step: Callable[[], Any]) -> Any:
        step()
        raise RuntimeError("no such graph")

    monkeypatch.setattr(recorder, "record", fail)
    with pytest.raises(RuntimeError, match="no such graph"), cuda_graph(model, cache):
        generate(model, prompt, cache)
    assert "forward" not in vars(model) and "_valid_auto_compile_criteria" not in vars(model)
    # the prompt and the first step, which was plain
    assert int(cache.get_seq_length(1)) == LENGTH + 1 == cache.layers[0].cumulative_length_int
    assert cache.layers[1].calls["step"] == 1
    ones = prompt["attention_mask"].new_ones(2, 2)
    rest = {
        "input_ids": expected[:, : LENGTH + 2],
        "attention_mask": torch.cat((prompt["attention_mask"], ones), 1),
    }
    actual = generate(model, rest, cache, max_new_tokens=NEW - 2, disable_compile=True)
    assert torch.equal(actual.sequences, expected)


@torch.no_grad()
def test_steps_that_cannot_be_replayed(device: str) -> None:
    model, tokens = make_model("llama").to(device), make_tokens(LENGTH, batch=2).to(device)
    cache = static(model, layer_bits={0: 16, 1: 2})
    inner = model.forward

    def moving(*args: Any, **kwargs: Any) -> Any:
        outputs = inner(*args, **kwargs)
        cache.layers[0].keys = cache.layers[0].keys.clone()
        return outputs

    def strange(*args: Any, **kwargs: Any) -> Any:
        return {"logits": inner(*args, **kwargs).logits, "more": object()}

    for forward, message in ((moving, "puts new tensors"), (strange, "returns a object")):
        model.forward = forward
        cache.reset()
        with pytest.raises(RuntimeError, match=message), cuda_graph(model, cache):
            model(input_ids=tokens, past_key_values=cache)
            for _ in range(3):
                model(input_ids=tokens[:, :1], past_key_values=cache)
        # what was there before is there again
        assert model.forward is forward
        assert int(cache.get_seq_length(1)) == LENGTH + 1


def test_a_full_window_moves_on_as_the_hosts_does() -> None:
    layers = [
        kind(100, sliding_window=8) for kind in (ExactStaticSlidingLayer, StaticSlidingWindowLayer)
    ]
    for seed, count in enumerate((5, 1, 1, 1, 1, 1, 3, 1)):
        states = torch.randn(2, 2, 2, count, 4, generator=torch.Generator().manual_seed(seed))
        results = [layer.update(*states) for layer in layers]
        for mine, theirs in zip(*results, strict=True):
            assert torch.equal(mine, theirs)
        assert layers[0].get_mask_sizes(1) == layers[1].get_mask_sizes(1)
    # these steps get nothing from the host
    with NoConstants():
        layers[0].update(*states)
    with pytest.raises(AssertionError, match="from the host"), NoConstants():
        layers[1].update(*states)


def test_generate_sees_the_same_function(device: str) -> None:
    model = make_model("llama").to(device)
    signature, cache = inspect.signature(model.forward), static(model)
    with cuda_graph(model, cache):
        assert inspect.signature(model.forward) == signature
        others = static(model)
        tokens = on(device, make_prompt())
        assert torch.equal(
            generate(model, tokens, others, max_new_tokens=3, disable_compile=True).sequences,
            generate(model, tokens, dynamic(model), max_new_tokens=3).sequences,
        )
        assert steps_of(model).recorded == 0
    assert inspect.signature(model.forward) == signature


def test_what_is_refused(device: str) -> None:
    model, second = (make_model("llama").to(device) for _ in range(2))
    cache = static(model)
    with cuda_graph(model, cache):
        with pytest.raises(ValueError, match="the model is in use"), cuda_graph(model, cache):
            pass
        with pytest.raises(ValueError, match="with another model"), cuda_graph(second, cache):
            pass
        with cuda_graph(second, static(second)):
            pass
        with pytest.raises(ValueError, match="leave one of the two"):
            generate(model, on(device, make_prompt()), cache, **compiled())
    with pytest.raises(ValueError, match="must be a RotorQuantStaticCache, got RotorQuantCache"):
        cuda_graph(model, dynamic(model)).__enter__()  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="neither wrapped nor compiled, got Linear"):
        cuda_graph(torch.nn.Linear(1, 1), cache).__enter__()  # type: ignore[arg-type]
    # it is free again
    with cuda_graph(second, cache):
        pass


@torch.no_grad()
def test_steps_that_are_not_finite_are_told_of_in_the_end(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # as on a GPU, where single tokens are not looked at
    monkeypatch.setattr(layers, "looks_at_once", lambda device: False)
    model, tokens = make_model("llama").to(device), make_tokens(LENGTH, batch=2).to(device)
    cache = static(model)
    embeds = model.get_input_embeddings()(tokens[:, :1])

    def run(steps: int) -> None:
        cache.reset()
        model(tokens, past_key_values=cache)
        for at in range(5):
            factor = torch.nan if at in range(steps, 4) else 1.0
            model(inputs_embeds=embeds * factor, past_key_values=cache)

    for steps in (0, 1, 2):
        with (
            pytest.raises(ValueError, match="layer 0: decode steps have stored"),
            cuda_graph(model, cache),
        ):
            run(steps)
        assert "forward" not in vars(model)
    with pytest.raises(RuntimeError, match="another error"), cuda_graph(model, cache):
        run(1)
        raise RuntimeError("another error")
    with cuda_graph(model, cache):
        run(1)
        run(4)


@pytest.mark.gpu
@torch.no_grad()
def test_loops_that_run_on_read_what_is_there() -> None:
    model, tokens = make_model("llama").to("cuda"), make_tokens(LENGTH, batch=2).to("cuda")
    # beyond the last tile and the rows of the tail, were they written to
    for settings in ({}, {"layer_bits": {0: 16, 1: 4}}):
        cache = static(model, LENGTH + 3, **settings)
        with cuda_graph(model, cache):
            model(tokens, past_key_values=cache)
            for at in range(400):
                logits = model(tokens[:, at % LENGTH, None], past_key_values=cache).logits
            assert steps_of(model).replayed == 399
        assert bool(logits.isfinite().all())
        assert int(cache.get_seq_length(1)) == LENGTH + 400
        for layer in cache.packed_layers:
            assert sum(layer.static.buffers.counts.tolist()[:3]) == LENGTH + 3
        with pytest.raises(ValueError, match=f"{LENGTH + 400} tokens and 5 new ones are more"):
            model(tokens[:, :5], past_key_values=cache)


class Empty(PreTrainedModel):
    """A model without parameters."""

    config_class = LlamaConfig


def test_models_without_parameters() -> None:
    cache = static(make_model("llama"))
    with (
        pytest.raises(ValueError, match="on one CUDA device, got one without parameters"),
        cuda_graph(Empty(LlamaConfig()), cache),
    ):
        pass


def test_models_elsewhere() -> None:
    model = make_model("llama")
    with (
        pytest.raises(ValueError, match="needs a model on a CUDA device, got cpu"),
        cuda_graph(model, static(model)),
    ):
        pass
    assert "forward" not in vars(model)
    model.lm_head.to("meta")
    with (
        pytest.raises(ValueError, match="one CUDA device, got cpu, meta"),
        cuda_graph(model, static(model)),
    ):
        pass
