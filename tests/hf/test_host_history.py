# SPDX-License-Identifier: Apache-2.0
"""A pass that is refused behind layers of the host leaves these as they were."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import pytest
import torch
from support.host_layers import assert_same_host_layers
from support.models import make_model, make_tokens
from support.refusals import assert_holds, contents
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import LinearAttentionLayer

from rq_hf import RotorQuantCache

WINDOWS = ["gemma3", "gpt-oss", "llama4", "cohere2"]
RECURRENT = ["qwen3-next", "olmo-hybrid", "jamba", "bamba", "nemotron-h", "granitemoehybrid"]
RESET = r"linear attention keeps no states.* revertible=True .*reset\(\) the cache"


@torch.no_grad()
def run(model: PreTrainedModel, cache: Cache, tokens: Tensor) -> Tensor:
    return model(tokens.to(model.device), past_key_values=cache).logits


def make_cache(model: PreTrainedModel, **settings: Any) -> RotorQuantCache:
    return RotorQuantCache(config=model.config, **{"residual_length": 32, **settings})


@contextmanager
def refusing(cache: RotorQuantCache, message: str = "not these$") -> Iterator[None]:
    """Lets the last packed layer refuse whatever comes."""

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError("not these")

    layer = cache.packed_layers[-1]
    layer.update = refuse  # type: ignore[method-assign]
    try:
        with pytest.raises(ValueError, match=message):
            yield
    finally:
        del layer.update


def assert_same(mine: RotorQuantCache, theirs: RotorQuantCache) -> None:
    assert_same_host_layers(mine, theirs)
    for one, other in zip(mine.packed_layers, theirs.packed_layers, strict=True):
        assert_holds(one, contents(other))


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("family", [*WINDOWS, "lfm2", *RECURRENT])
def test_a_refused_pass_leaves_no_trace(family: str, recorded: bool, device: torch.device) -> None:
    model = make_model(family).to(device)
    recurrent = family in RECURRENT
    if recorded and recurrent:
        pytest.skip("recurrent states cannot be recorded")
    cache, fresh = (make_cache(model, revertible=recurrent) for _ in range(2))
    if recorded:
        cache.activate_past_recording()
        fresh.activate_past_recording()
    # into an empty cache, windows that are filling, full ones
    for seed, tokens in enumerate((20, 7, 40, 1, 200, 3, 1)):
        with refusing(cache):
            run(model, cache, make_tokens(tokens, batch=2, seed=seed + 50))
        mine, theirs = (
            run(model, each, make_tokens(tokens, batch=2, seed=seed)) for each in (cache, fresh)
        )
        assert torch.equal(mine, theirs)
        if recorded:
            cache.crop(0)
            fresh.crop(0)
        assert_same(cache, fresh)


@pytest.mark.parametrize("family", RECURRENT)
def test_states_of_linear_attention_are_copied_on_request_only(family: str) -> None:
    model = make_model(family)
    cache = make_cache(model)
    run(model, cache, make_tokens(60))
    with refusing(cache, rf"not these\. The layers before it hold .* layer 0: {RESET}"):
        run(model, cache, make_tokens(1))
    cache.reset()
    fresh = make_cache(model)
    for tokens in (60, 1):
        assert torch.equal(
            run(model, cache, make_tokens(tokens)), run(model, fresh, make_tokens(tokens))
        )


def held_bytes(cache: RotorQuantCache) -> int:
    return cache.memory().host_bytes


@pytest.mark.parametrize("family", WINDOWS)
def test_what_left_a_window_takes_no_memory(family: str) -> None:
    model = make_model(family)
    cache = make_cache(model)
    for tokens in (100, 1, 30, 1):
        run(model, cache, make_tokens(tokens))
        with_history = held_bytes(cache)
        assert any(True for _ in cache._history.tensors()) == (tokens != 100)
        cache._history.forget()
        assert held_bytes(cache) == with_history


def test_copied_states_are_counted() -> None:
    model = make_model("qwen3-next")
    cache, lean = make_cache(model, revertible=True), make_cache(model)
    for tokens in (60, 1):
        for each in (cache, lean):
            run(model, each, make_tokens(tokens))
    states = sum(
        x.nbytes
        for layer in cache.layers
        if isinstance(layer, LinearAttentionLayer)
        for x in (*layer.conv_states.values(), *layer.recurrent_states.values())
    )
    assert held_bytes(cache) == held_bytes(lean) + states > states


def change(cache: RotorQuantCache, how: str) -> RotorQuantCache:
    if how == "reorder":
        cache.reorder_cache(torch.tensor([1, 0]))
    elif how == "select":
        cache.batch_select_indices(torch.tensor([1, 0]))
    elif how == "repeat":
        cache.batch_repeat_interleave(2)
    elif how == "to":
        cache.to("cpu")
    elif how == "deepcopy":
        return copy.deepcopy(cache)
    elif how == "pickle":
        return pickle.loads(pickle.dumps(cache))
    return cache


@pytest.mark.parametrize(
    "how", ["reorder", "select", "repeat", "to", "deepcopy", "pickle", "memory"]
)
@pytest.mark.parametrize("family", ["gemma3", "lfm2", "qwen3-next"])
def test_a_cache_that_was_changed_takes_back_what_comes_then(family: str, how: str) -> None:
    if family != "gemma3" and how in ("select", "repeat"):
        pytest.skip("the host's linear attention and convolutions cannot")
    model = make_model(family)
    cache, fresh = (make_cache(model, revertible=True) for _ in range(2))
    for each in (cache, fresh):
        run(model, each, make_tokens(60, batch=2))
        run(model, each, make_tokens(1, batch=2))
    cache, fresh = (change(each, how) for each in (cache, fresh))
    batch = 4 if how == "repeat" else 2
    with refusing(cache):
        run(model, cache, make_tokens(5, batch=batch, seed=1))
    assert_same(cache, fresh)
    tokens = make_tokens(5, batch=batch)
    assert torch.equal(run(model, cache, tokens), run(model, fresh, tokens))


def test_a_copy_goes_back_for_itself() -> None:
    """In the midst of a pass, which the copy refuses and the original does not."""
    model = make_model("gemma3", num_hidden_layers=2)
    cache = make_cache(model)
    run(model, cache, make_tokens(60))
    states = torch.randn(2, 1, 2, 3, 64)
    cache.update(*states, 0)
    other = copy.deepcopy(cache)
    with refusing(other):
        other.update(*states, 1)
    cache.update(*states, 1)
    assert {x.get_seq_length() for x in other.layers} == {60}
    assert {x.get_seq_length() for x in cache.layers} == {63}


def test_has_previous_state_may_be_asked_between_passes() -> None:
    model = make_model("qwen3-next")
    cache, fresh = (make_cache(model, revertible=True) for _ in range(2))
    for each in (cache, fresh):
        run(model, each, make_tokens(60))
    for _ in range(2):
        assert cache.has_previous_state() and cache.has_previous_state(0)
    with refusing(cache):
        run(model, cache, make_tokens(4, seed=1))
    assert_same(cache, fresh)


def test_layers_before_the_refusing_one_that_the_pass_left_out_stay() -> None:
    model = make_model("gemma3", num_hidden_layers=2)
    cache, fresh = (make_cache(model) for _ in range(2))
    for each in (cache, fresh):
        run(model, each, make_tokens(60))
    with refusing(cache):
        cache.update(*torch.randn(2, 1, 2, 3, 64), 1)
    assert_same(cache, fresh)
