# SPDX-License-Identifier: Apache-2.0
"""The host's ways to generate, each against its dense twin (see `support.replay`).

Both runs make the same calls, so tokens are equal and logits differ by rounding alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from support.flows import (
    FAMILIES,
    LENGTH,
    NEW,
    PADDING,
    assert_close,
    generate,
    make_cache,
    packed_tokens,
)
from support.models import make_model, make_tokens
from support.replay import run_with_twin
from torch import Tensor
from transformers import AutoTokenizer, Cache, DynamicCache, PreTrainedModel, pipeline
from transformers.generation.streamers import BaseStreamer

from rq_hf import RotorQuantCache

Flow = Callable[[PreTrainedModel, Cache], Any]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return make_model(request.param)


def padded_batch() -> dict[str, Tensor]:
    """Returns two prompts, the first left-padded."""
    tokens = make_tokens(LENGTH, batch=2)
    mask = torch.ones_like(tokens)
    tokens[0, :PADDING] = mask[0, :PADDING] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def assert_as_twin(
    model: PreTrainedModel, flow: Flow, *, packed: int = 256, **settings: Any
) -> Any:
    """Compares a flow that generates with its twin and returns its output."""
    cache = make_cache(model, **settings)
    mine, theirs = run_with_twin(cache, lambda cache: flow(model, cache))
    assert torch.equal(mine.sequences, theirs.sequences)
    assert_close(torch.stack(mine.logits), torch.stack(theirs.logits))
    assert packed_tokens(cache) == {packed}
    assert not any(door.startswith("decoded") for x in cache.packed_layers for door in x.calls)
    return mine


FLOWS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sample": {"do_sample": True, "num_return_sequences": 3, "top_k": 20},
    "beam": {"num_beams": 4, "num_return_sequences": 2},
    "beam-sample": {"num_beams": 3, "do_sample": True},
    "chunked-prefill": {"prefill_chunk_size": 50},
    "guidance": {"guidance_scale": 1.5},
}


@pytest.mark.parametrize(
    ("name", "padded"),
    # the host's guidance takes no padding
    [*((name, False) for name in FLOWS), *((name, True) for name in FLOWS if name != "guidance")],
)
def test_ways_of_choosing_tokens(model: PreTrainedModel, name: str, padded: bool) -> None:
    options = FLOWS[name] | (padded_batch() if padded else {})
    output = assert_as_twin(
        model, lambda model, cache: generate(model, make_tokens(LENGTH), cache, **options)
    )
    exact = DynamicCache(config=model.config)
    unquantised = generate(model, make_tokens(LENGTH), exact, **options)
    assert not torch.equal(output.logits[1], unquantised.logits[1])


def test_prompt_lookup(model: PreTrainedModel) -> None:
    tokens = make_tokens(LENGTH // 5).repeat(1, 5)
    options = {"prompt_lookup_num_tokens": 4}
    assert_as_twin(model, lambda m, cache: generate(m, tokens, cache, **options))


@pytest.mark.parametrize("nbits", [3, 4])
def test_rejected_tokens_may_be_packed_already(model: PreTrainedModel, nbits: int) -> None:
    cache = make_cache(model, nbits=nbits, residual_length=0, sink_length=0)

    @torch.no_grad()
    def flow(cache: Cache) -> Tensor:
        logits = []
        for layer in cache.layers:
            layer.record_past = True
        # a tile is full at the 256th token
        for seed, (length, rejected) in enumerate([(250, 0), (10, 9), (3, 1), (10, 0), (1, 0)]):
            tokens = make_tokens(length, seed=seed)
            logits.append(model(tokens, past_key_values=cache).logits[0])
            cache.crop(-rejected)
            if rejected == 9 and isinstance(cache, RotorQuantCache):
                assert packed_tokens(cache) == {251}
        return torch.cat(logits)

    mine, theirs = run_with_twin(cache, flow)
    assert_close(mine, theirs)
    assert packed_tokens(cache) == {256}


def test_sequences_change_places(model: PreTrainedModel) -> None:
    @torch.no_grad()
    def flow(cache: Cache) -> Tensor:
        model(make_tokens(LENGTH, batch=3), past_key_values=cache)
        logits = []
        for seed, order in enumerate([[2, 0, 1], [1, 1, 0], [0, 2, 2]]):
            cache.reorder_cache(torch.tensor(order))
            tokens = make_tokens(4, batch=3, seed=seed)
            logits.append(model(tokens, past_key_values=cache).logits)
        return torch.cat(logits)

    cache = make_cache(model)
    mine, theirs = run_with_twin(cache, flow)
    assert_close(mine, theirs)
    assert packed_tokens(cache) == {256}


def make_assistant(model: PreTrainedModel) -> PreTrainedModel:
    """Returns a model that guesses right often, not always."""
    assistant = copy.deepcopy(model)
    with torch.no_grad():
        norm = assistant.model.norm.weight
        norm += 0.3 * torch.randn(norm.shape, generator=torch.Generator().manual_seed(0))
    return assistant


def give_cache(assistant: PreTrainedModel, cache: Cache) -> None:
    """Makes `assistant` generate with `cache` where it is given none."""

    def prepare(generation_config: Any, model_kwargs: dict[str, Any], *args: Any) -> None:
        if model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = cache

    assistant._prepare_cache_for_generation = prepare  # type: ignore[method-assign]


@pytest.mark.parametrize("sample", [False, True])
def test_assisted(model: PreTrainedModel, sample: bool) -> None:
    sliding = getattr(model.config, "sliding_window", None) is not None
    if sliding and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("an assistant with a sliding window fails here with any cache")
    assistant = make_assistant(model)
    options = {"assistant_model": assistant, "do_sample": sample}
    assert_as_twin(model, lambda m, cache: generate(m, make_tokens(LENGTH), cache, **options))


def test_as_the_cache_of_an_assistant(model: PreTrainedModel) -> None:
    def flow(model: PreTrainedModel, cache: Cache) -> Any:
        assistant = make_assistant(model)
        give_cache(assistant, cache)
        exact = DynamicCache(config=model.config)
        return generate(model, make_tokens(LENGTH), exact, assistant_model=assistant)

    output = assert_as_twin(model, flow)
    greedy = generate(model, make_tokens(LENGTH), DynamicCache(config=model.config))
    assert torch.equal(output.sequences, greedy.sequences)


def test_inputs_embeds(model: PreTrainedModel) -> None:
    tokens = make_tokens(LENGTH)
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(tokens)
    options = {"inputs_embeds": embeddings}
    output = assert_as_twin(model, lambda m, cache: generate(m, tokens, cache, **options))
    expected = generate(model, tokens, make_cache(model))
    assert torch.equal(output.sequences, expected.sequences[:, LENGTH:])


def test_turns_on_one_cache(model: PreTrainedModel) -> None:
    def flow(model: PreTrainedModel, cache: Cache) -> Any:
        text = make_tokens(LENGTH)
        for turn in (1, 2, 3):
            output = generate(model, text, cache)
            text = torch.cat((output.sequences, make_tokens(10 * turn, seed=turn)), 1)
        return generate(model, text, cache)

    assert_as_twin(model, flow)


def test_a_prefix_is_copied_and_shared(model: PreTrainedModel) -> None:
    prefix = make_tokens(LENGTH)

    @torch.no_grad()
    def flow(model: PreTrainedModel, cache: Cache) -> Any:
        model(prefix, past_key_values=cache)
        for seed in (1, 2):
            turn = torch.cat((prefix, make_tokens(50, seed=seed)), 1)
            generate(model, turn, copy.deepcopy(cache))
        assert cache.get_seq_length() == LENGTH
        cache.batch_repeat_interleave(3)
        turns = torch.cat((prefix.repeat(3, 1), make_tokens(50, batch=3, seed=3)), 1)
        return generate(model, turns, cache)

    output = assert_as_twin(model, flow)
    alone = torch.cat((prefix, make_tokens(50, batch=3, seed=3)[1:2]), 1)
    cache = make_cache(model)
    with torch.no_grad():
        model(prefix, past_key_values=cache)
    assert torch.equal(output.sequences[1:2], generate(model, alone, cache).sequences)


def test_candidates_are_tried_side_by_side_and_one_is_kept(model: PreTrainedModel) -> None:
    @torch.no_grad()
    def flow(model: PreTrainedModel, cache: Cache) -> Tensor:
        logits = model(make_tokens(LENGTH, batch=2), past_key_values=cache).logits[:, -1]
        steps = []
        for _ in range(NEW):
            candidates = logits.topk(3).indices.reshape(-1, 1)
            cache.batch_repeat_interleave(3)
            logits = model(candidates, past_key_values=cache).logits[:, -1]
            steps.append(logits)
            chosen = torch.tensor([2, 4])
            cache.batch_select_indices(chosen)
            logits = logits[chosen]
        return torch.stack(steps)

    cache = make_cache(model)
    mine, theirs = run_with_twin(cache, lambda cache: flow(model, cache))
    assert_close(mine, theirs)
    assert packed_tokens(cache) == {256}


def test_reset_and_reuse_with_another_batch_size(model: PreTrainedModel) -> None:
    def flow(model: PreTrainedModel, cache: Cache) -> Any:
        generate(model, make_tokens(LENGTH), cache)
        cache.reset()
        if not isinstance(cache, RotorQuantCache):
            # transformers 5.17 leaves its own layers at their old length and batch size
            for layer in cache.layers:
                layer.is_initialized, layer.cumulative_length = False, 0
        return generate(model, make_tokens(LENGTH), cache, **padded_batch())

    assert_as_twin(model, flow)


class Collector(BaseStreamer):
    """Keeps the tokens that are streamed."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.parts.append(value.reshape(-1))

    def end(self) -> None:
        self.ended = True


def test_streaming_and_scores(model: PreTrainedModel) -> None:
    streamer = Collector()
    output = generate(model, make_tokens(LENGTH), make_cache(model), streamer=streamer)
    assert streamer.ended and len(streamer.parts) == NEW + 1
    assert torch.equal(torch.cat(streamer.parts)[None], output.sequences)
    chosen = torch.stack(output.scores, 1).argmax(-1)
    assert torch.equal(chosen, output.sequences[:, LENGTH:])


def test_attention_weights_come_back(model: PreTrainedModel) -> None:
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        cache = make_cache(model)
        options = {"output_attentions": True}
        mine, theirs = run_with_twin(
            cache, lambda cache: generate(model, make_tokens(LENGTH), cache, **options)
        )
    finally:
        model.set_attn_implementation(implementation)
    assert set(cache.packed_layers[0].calls) == {"prompt", "eager"}
    assert len(mine.attentions) == NEW
    for step, (weights, expected) in enumerate(
        zip(mine.attentions, theirs.attentions, strict=True)
    ):
        assert weights[-1].shape[-1] == LENGTH + step
        for layer, expected_layer in zip(weights, expected, strict=True):
            # behind a window a packed layer may still show tokens that the host has dropped
            older = layer.shape[-1] - expected_layer.shape[-1]
            assert not layer[..., :older].any()
            layer = layer[..., older:]
            torch.testing.assert_close(layer, expected_layer, rtol=1e-4, atol=1e-5)
            rows = layer.sum(-1)
            torch.testing.assert_close(rows, torch.ones_like(rows))


@pytest.mark.parametrize("texts", [1, 2])
def test_text_generation_pipeline(saved_model: Path, texts: int) -> None:
    generator = pipeline("text-generation", model=str(saved_model))
    tokenizer = AutoTokenizer.from_pretrained(saved_model)
    generator.tokenizer.pad_token_id = 0
    generator.tokenizer.padding_side = "left"
    prompts = [
        tokenizer.decode(make_tokens(LENGTH - 40 * i, seed=i)[0].tolist()) for i in range(texts)
    ]

    def flow(cache: Cache) -> Any:
        options = {"past_key_values": cache, "max_new_tokens": NEW, "do_sample": False}
        batch = {"batch_size": texts} if texts > 1 else {}
        return generator(prompts if batch else prompts[0], **batch, **options)

    cache = make_cache(generator.model)
    mine, theirs = run_with_twin(cache, flow)
    assert mine == theirs
    first = mine[0] if texts == 1 else mine[0][0]
    assert first["generated_text"].startswith(prompts[0])
    assert len(first["generated_text"]) > len(prompts[0])
    assert packed_tokens(cache) == {256}
    assert cache.packed_layers[0].store.exact.tensors[0].shape[0] == texts
