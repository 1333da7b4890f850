# SPDX-License-Identifier: Apache-2.0
"""Gradients, inference mode, half precision, and weights that are elsewhere."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from support.flows import (
    FAMILIES,
    LENGTH,
    NEW,
    assert_close,
    generate,
    make_cache,
    packed_tokens,
)
from support.models import make_model, make_tokens
from support.replay import Recording, make_replay, recorded, run_with_twin
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return make_model(request.param)


def gradients(model: PreTrainedModel, cache: Cache) -> list[Tensor]:
    """Returns the gradients of a prompt's loss."""
    model.zero_grad()
    tokens = make_tokens(LENGTH)
    model(tokens, past_key_values=cache, labels=tokens).loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_a_prompt_in_grad_mode_has_its_gradients_and_fills_the_cache(
    model: PreTrainedModel,
) -> None:
    cache = make_cache(model)
    mine = gradients(model, cache)
    expected = gradients(model, DynamicCache(config=model.config))
    assert len(mine) == len(expected) > 0
    for a, b in zip(mine, expected, strict=True):
        # where there is a mask the host repeats heads, and sums their gradients in another order
        assert_close(a, b)
    assert not any(t.requires_grad for x in cache.packed_layers for t in x.store.tensors())
    turn = torch.cat((make_tokens(LENGTH), make_tokens(50, seed=1)), 1)
    without_gradients = make_cache(model)
    with torch.no_grad():
        model(make_tokens(LENGTH), past_key_values=without_gradients)
    continued, again = generate(model, turn, cache), generate(model, turn, without_gradients)
    assert torch.equal(continued.sequences, again.sequences)


def test_a_continuation_in_grad_mode(model: PreTrainedModel) -> None:
    def flow(cache: Cache) -> Tensor:
        with torch.no_grad():
            model(make_tokens(LENGTH), past_key_values=cache)
        model.zero_grad()
        tokens = make_tokens(NEW, seed=1)
        logits = model(tokens, past_key_values=cache).logits
        logits.logsumexp(-1).sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
        return logits.detach()

    mine, theirs = run_with_twin(make_cache(model), flow)
    assert_close(mine, theirs)


def test_inference_mode_then_no_grad(model: PreTrainedModel) -> None:
    tokens, more = make_tokens(LENGTH), make_tokens(9, seed=1)

    def flow(mode: Any) -> Any:
        cache = make_cache(model)
        with mode:
            model(tokens, past_key_values=cache)
        with torch.no_grad():
            model(more, past_key_values=cache)
        with mode:
            model(more, past_key_values=cache)
        output = generate(model, torch.cat((tokens, more, more, more), 1), cache)
        assert packed_tokens(cache) == {256}
        return output.sequences

    assert torch.equal(flow(torch.inference_mode()), flow(torch.no_grad()))


def test_a_compiled_model_gives_the_same_tokens() -> None:
    model = make_model("llama", num_hidden_layers=1)
    tokens, options = make_tokens(165), {"max_new_tokens": 4}
    expected = generate(model, tokens, make_cache(model), **options)
    model.forward = torch.compile(model.forward, backend="eager")
    cache = make_cache(model)
    assert torch.equal(generate(model, tokens, cache, **options).sequences, expected.sequences)
    assert packed_tokens(cache) == {128}


@pytest.mark.parametrize("dynamic", [False, True])
@torch.no_grad()
def test_a_traced_model_gives_the_same_logits(dynamic: bool) -> None:
    model = make_model("llama", num_hidden_layers=1)
    torch.compiler.reset()
    # so that the codec is made in the first compiled pass
    seed = 20 + dynamic
    cache, other = make_cache(model, seed=seed), make_cache(model, seed=seed)
    compiled = torch.compile(model, dynamic=dynamic, backend="aot_eager")
    # a tile is packed at once, another one behind steps
    passes = [make_tokens(n, seed=n) for n in (165, 1, 1, 130)]
    mine = [compiled(tokens, past_key_values=cache).logits for tokens in passes]
    for tokens, logits in zip(passes, mine, strict=True):
        assert_close(logits, model(tokens, past_key_values=other).logits)
    assert cache.describe() == other.describe()
    assert packed_tokens(cache) == {256}
    assert "decoded" not in cache.describe()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(model: PreTrainedModel, dtype: torch.dtype) -> None:
    half = copy.deepcopy(model).to(dtype)
    tokens = make_tokens(LENGTH + NEW)

    @torch.no_grad()
    def flow(model: PreTrainedModel, cache: Cache) -> Tensor:
        model(tokens[:, :LENGTH], past_key_values=cache)
        steps = tokens[:, LENGTH:].split(1, 1)
        return torch.cat([model(x, past_key_values=cache).logits.float() for x in steps])

    cache = make_cache(half)
    with recorded() as recording:
        twin = make_replay(cache, recording)
        mine = flow(half, cache)
    again = Recording()
    again.states = recording.states.copy()
    in_float32 = flow(copy.deepcopy(half).float(), make_replay(make_cache(half), again))
    twins_error = (flow(half, twin) - in_float32).norm()
    assert (mine - in_float32).norm() <= 2 * twins_error
    output = generate(half, make_tokens(LENGTH), make_cache(half))
    assert torch.isfinite(torch.stack(output.logits)).all()


def test_weights_that_accelerate_brings_for_each_layer() -> None:
    """By hooks around a module's forward, which must hand on what the cache gives."""
    model, tokens = make_model("llama"), make_tokens(LENGTH)
    expected = generate(model, tokens, make_cache(model)).sequences
    cache = make_cache(model)
    offloaded = cpu_offload(model, execution_device=torch.device("cpu"))
    assert next(offloaded.parameters()).device.type == "meta"
    assert torch.equal(generate(offloaded, tokens, cache).sequences, expected)
    assert min(packed_tokens(cache)) > 0
    assert all(set(layer.calls) == {"prompt", "sdpa"} for layer in cache.packed_layers)
