# SPDX-License-Identifier: Apache-2.0
"""`use_rotorquant`: pipelines and plain `generate()` get a packed cache; all else stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from support.flows import LENGTH, NEW, SETTINGS, generate, make_cache
from support.models import make_model, make_tokens
from torch import Tensor
from transformers import AutoTokenizer, DynamicCache, pipeline

from rq_hf import RotorQuantCache, integration, use_rotorquant

PROMPTS = 3
OPTIONS: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}


@pytest.fixture
def generator(saved_model: Path) -> Any:
    """A pipeline that pads on the left."""
    generator = pipeline("text-generation", model=str(saved_model))
    generator.tokenizer.pad_token_id = 0
    generator.tokenizer.padding_side = "left"
    return generator


@pytest.fixture
def prompts(saved_model: Path) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(saved_model)
    tokens = [make_tokens(LENGTH - 40 * i, seed=i)[0] for i in range(PROMPTS)]
    return [tokenizer.decode(x.tolist()) for x in tokens]


class Made:
    """Keeps every cache that is made within a context."""

    def __init__(self) -> None:
        self.caches: list[RotorQuantCache] = []

    def __call__(self, **settings: Any) -> RotorQuantCache:
        self.caches.append(RotorQuantCache(**settings))
        return self.caches[-1]

    def used(self) -> list[RotorQuantCache]:
        return [cache for cache in self.caches if cache.get_seq_length()]


def with_own_caches(generator: Any, batches: list[list[str]]) -> list[list[dict[str, str]]]:
    """Returns what the pipeline says to each batch with a cache of its own."""
    answers = []
    for batch in batches:
        options = {"batch_size": len(batch)} if len(batch) > 1 else {}
        cache = make_cache(generator.model)
        answers += generator(batch, past_key_values=cache, **options, **OPTIONS)
    return answers


@pytest.mark.parametrize("form", ["text", "list", "batch"])
def test_pipelines(generator: Any, prompts: list[str], form: str) -> None:
    batches = {"text": [prompts[:1]], "list": [[x] for x in prompts], "batch": [prompts]}[form]
    expected = with_own_caches(generator, batches)
    made = Made()
    inputs: Any = prompts[0] if form == "text" else prompts
    size = {"batch_size": PROMPTS} if form == "batch" else {}
    with (
        patch.object(integration, "RotorQuantCache", made),
        use_rotorquant(generator.model, **SETTINGS),
    ):
        mine = generator(inputs, **size, **OPTIONS)
    mine = [mine] if form == "text" else mine
    assert mine == expected
    # each call of generate() has a fresh cache
    for cache, batch in zip(made.used(), batches, strict=True):
        assert cache.layers[0].keys.shape[0] == len(batch)
        assert cache.layers[0].store.packed_length >= 128


def answer(model: Any, **options: Any) -> Tensor:
    return model.generate(make_tokens(LENGTH), pad_token_id=0, **OPTIONS, **options)


def test_only_generate_without_a_cache_is_served() -> None:
    model = make_model("llama")
    plain = answer(model)
    made = Made()
    with (
        patch.object(integration, "RotorQuantCache", made),
        use_rotorquant(model, **SETTINGS) as same,
    ):
        assert same is model
        mine = answer(model)
        dynamic = DynamicCache(config=model.config)
        assert torch.equal(answer(model, past_key_values=dynamic), plain)
        assert torch.equal(answer(model, cache_implementation="static"), plain)
        assert torch.equal(answer(model, use_cache=False), plain)
    assert torch.equal(mine, generate(model, make_tokens(LENGTH), make_cache(model)).sequences)
    assert len(made.used()) == 1


def test_the_model_is_as_it_was_afterwards_even_after_an_error() -> None:
    model = make_model("llama")
    before = dict(vars(model))
    with pytest.raises(KeyError), use_rotorquant(model):
        raise KeyError
    assert vars(model) == before
    again = use_rotorquant(model)
    with use_rotorquant(model), pytest.raises(ValueError, match="replaced already"), again:
        pass
    assert vars(model) == before


def test_what_cannot_be_served_is_refused_at_the_door() -> None:
    wrong_bits = use_rotorquant(make_model("llama"), nbits=7)
    with pytest.raises(ValueError, match="nbits must be one of"), wrong_bits:
        pass
    pair = use_rotorquant(make_model("bart"))
    with pytest.raises(ValueError, match="EncoderDecoderCache"), pair:
        pass
