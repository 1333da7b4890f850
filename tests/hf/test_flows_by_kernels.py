# SPDX-License-Identifier: Apache-2.0
"""Whole generations with growing caches that kernels read.

The twin is the same model with the host's attention over the decoded numbers of the same store.
Codes are not compared: kernels and plain torch round numbers next to a boundary to either side.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from packaging.version import Version
from support.flows import generate, make_cache, packed_tokens
from support.models import make_model, make_tokens
from support.replay import run_with_twin
from torch import Tensor
from transformers import Cache, PreTrainedModel

pytest.importorskip("triton")

# of the logits' scale: kernels err by 2e-4 of attention's output at most (see their own tests),
# which the layers behind may let grow
TOLERANCE = 2e-3


class Family(NamedTuple):
    """A model, and the attention that brings its kind of scores to the kernels.

    Attributes:
        model: Name in `support.models.DECODERS`.
        changes: Other options of its config.
        door: Attention implementation, and the name that its calls are counted under.
        sliding: Whether it has layers with a window, packed here.
    """

    model: str
    changes: dict[str, Any]
    door: str = "sdpa"
    sliding: bool = False


FAMILIES = {
    "groups": Family("llama", {"head_dim": 64}),
    "one-kv-head": Family("llama-mqa", {}),
    "qk-norm": Family("qwen3", {"head_dim": 128}),
    "softcap-and-window": Family(
        "gemma2-window", {"attn_logit_softcapping": 5.0}, "rotorquant", sliding=True
    ),
    "attention-sinks-and-window": Family("gpt-oss-window", {}, "rotorquant", sliding=True),
}


class Size(NamedTuple):
    """How long texts are, and what is stored of them; the last tile is packed by a single token.

    Attributes:
        prompt: Tokens of the prompt.
        padding: Of these, left padding of the first sequence of a batch.
        new: Tokens to generate.
        packed: Tokens packed at the end of a flow, of which a crop may take some.
        settings: Of the cache.
    """

    prompt: int
    padding: int
    new: int
    packed: int
    settings: dict[str, Any]


LARGE = Size(prompt=285, padding=40, new=12, packed=256, settings={"residual_length": 32})
# the interpreter takes a quarter of a second for each layer and step
SMALL = Size(137, padding=30, new=5, packed=128, settings={"nbits": 4, "residual_length": 8})


class Result(NamedTuple):
    """What a flow gives.

    Attributes:
        scores: Logits of all steps `[S, B, V]`, or scores of sequences `[n]`.
        sequences: Chosen tokens; None where scores alone tell, since ties may be broken both ways.
    """

    scores: Tensor
    sequences: Tensor | None


Flow = Callable[[PreTrainedModel, Cache, Size], Result]


def run(model: PreTrainedModel, cache: Cache, size: Size, tokens: Tensor, **options: Any) -> Result:
    tokens = tokens.to(model.device)
    output = generate(model, tokens, cache, max_new_tokens=size.new, **options)
    return Result(torch.stack(output.logits), output.sequences)


def padded_batch(model: PreTrainedModel, size: Size) -> dict[str, Tensor]:
    """Returns two prompts, the first left-padded."""
    tokens = make_tokens(size.prompt, batch=2)
    mask = torch.ones_like(tokens)
    tokens[0, : size.padding] = mask[0, : size.padding] = 0
    return {"tokens": tokens.to(model.device), "attention_mask": mask.to(model.device)}


def greedy(model: PreTrainedModel, cache: Cache, size: Size) -> Result:
    return run(model, cache, size, **padded_batch(model, size))


def beams(model: PreTrainedModel, cache: Cache, size: Size) -> Result:
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": size.new}
    output = generate(model, cache=cache, **padded_batch(model, size), **options)
    return Result(output.sequences_scores, None)


def prompt_lookup(model: PreTrainedModel, cache: Cache, size: Size) -> Result:
    tokens = make_tokens(size.prompt // 5).repeat(1, 5)
    return run(model, cache, size, tokens, prompt_lookup_num_tokens=4)


def assisted(model: PreTrainedModel, cache: Cache, size: Size) -> Result:
    """With an assistant that guesses right often, not always."""
    assistant = copy.deepcopy(model)
    with torch.no_grad():
        norm = assistant.model.norm.weight
        noise = torch.randn(norm.shape, generator=torch.Generator().manual_seed(0))
        norm += 0.3 * noise.to(norm.device)
    # the first ones are looked at together with the prompt
    assistant.generation_config.num_assistant_tokens = 3
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    return run(model, cache, size, make_tokens(size.prompt), assistant_model=assistant)


def chunked_prefill(model: PreTrainedModel, cache: Cache, size: Size) -> Result:
    """In chunks of fewer tokens than kernels take at a time."""
    return run(model, cache, size, prefill_chunk_size=30, **padded_batch(model, size))


def turns(model: PreTrainedModel, cache: Cache, size: Size) -> Result:
    first = run(model, cache, size, make_tokens(size.prompt))
    assert first.sequences is not None
    more = make_tokens(3, seed=1).to(model.device)
    second = run(model, cache, size, torch.cat((first.sequences, more), 1))
    return Result(torch.cat((first.scores, second.scores)), second.sequences)


@torch.no_grad()
def crop_and_go_on(model: PreTrainedModel, cache: Cache, size: Size) -> Result:
    """Single tokens; packed ones are taken back first, then the newest at times."""
    # windows keep what a crop brings back
    for layer in cache.layers:
        layer.record_past = True
    model(make_tokens(size.prompt, batch=2).to(model.device), past_key_values=cache)
    logits = []
    for seed in range(2 * size.new):
        token = make_tokens(1, batch=2, seed=seed).to(model.device)
        logits.append(model(token, past_key_values=cache).logits)
        if seed == size.new:
            cache.crop(-40)
        elif seed > size.new and seed % 3 == 1:
            cache.crop(-1)
    return Result(torch.cat(logits), None)


FLOWS: dict[str, Flow] = {
    "greedy": greedy,
    "beams": beams,
    "prompt-lookup": prompt_lookup,
    "assisted": assisted,
    "chunked-prefill": chunked_prefill,
    "turns": turns,
    "crop": crop_and_go_on,
}


def make(family: Family, device: str, **changes: Any) -> PreTrainedModel:
    model = make_model(family.model, **(family.changes | changes))
    for name, parameter in model.named_parameters():
        if name.endswith("self_attn.sinks"):
            # initial ones are all alike
            parameter.data = torch.linspace(-1, 3, len(parameter))
    if family.door != "sdpa":
        model.set_attn_implementation(family.door)
    return model.to(device)


def assert_as_twin(model: PreTrainedModel, flow: Flow, size: Size, door: str) -> None:
    """Compares a flow by kernels with its twin, and looks at how it came about."""
    cache = make_cache(model, impl="triton", **size.settings)
    actual, expected = run_with_twin(cache, lambda cache: flow(model, cache, size))
    # tokens that differ are told from what comes of them
    steps = len(expected.scores)
    if expected.sequences is not None:
        alike = (actual.scores.argmax(-1) == expected.scores.argmax(-1)).all(1)
        steps = 1 + int(alike.long().cumprod(0).sum())
    error = float((actual.scores - expected.scores)[:steps].abs().max())
    assert error <= TOLERANCE * float(expected.scores.abs().max())
    if actual.sequences is not None and expected.sequences is not None:
        assert torch.equal(actual.sequences, expected.sequences)
    assert min(packed_tokens(cache)) > size.packed // 2
    for layer in cache.packed_layers:
        assert layer.calls[f"{door} by kernels"] > 0
        assert set(layer.calls) <= {"prompt", door, f"{door} by kernels"}


def assert_never_by_kernels(model: PreTrainedModel, flow: Flow, size: Size, door: str) -> None:
    """The same flow with plain torch."""
    cache = make_cache(model, impl="reference", **size.settings)
    flow(model, cache, size)
    for layer in cache.packed_layers:
        assert layer.calls[door] > 0
        assert set(layer.calls) <= {"prompt", door}


@pytest.mark.gpu
@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("kind", FAMILIES)
def test_flows(kind: str, name: str) -> None:
    family = FAMILIES[kind]
    old = Version(transformers.__version__) < Version("5.23")
    if family.sliding and name == "assisted" and old:
        pytest.skip("an assistant with a sliding window fails here with any cache")
    if family.sliding and name == "crop" and old:
        pytest.skip("the twin's windows, which are the host's, keep no past")
    model = make(family, "cuda")
    assert_as_twin(model, FLOWS[name], LARGE, family.door)
    assert_never_by_kernels(model, FLOWS[name], LARGE, family.door)


@pytest.mark.parametrize("name", ["greedy", "turns"])
def test_flows_with_tiles_in_plain_order(name: str) -> None:
    """On a GPU where there is one, else in the interpreter."""
    family, device = FAMILIES["groups"], "cuda" if torch.cuda.is_available() else "cpu"
    few = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
    model = make(family, device, head_dim=48, **few)
    assert_as_twin(model, FLOWS[name], SMALL, family.door)
    assert_never_by_kernels(model, FLOWS[name], SMALL, family.door)
