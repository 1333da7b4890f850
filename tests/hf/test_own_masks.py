# SPDX-License-Identifier: Apache-2.0
"""Masks of four dimensions that the user gives, of every form, and attention of the user's own.

The twin is the host's eager attention over the decoded numbers of the same store, with the same
mask as numbers to add.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.flows import LENGTH, assert_close, make_cache, packed_tokens
from support.models import make_model, make_tokens
from support.replay import make_replay, recorded
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedModel
from transformers.masking_utils import sdpa_mask

HEADS = 4
# a prompt, several tokens that are read beside the store, a few that are stored before, and steps
PIECES = (LENGTH, 40, 3, 1, 1)
SIZE = sum(PIECES)
# batch and heads of the mask
FORMS = {"one": (1, 1), "by head": (1, HEADS), "by sequence": (2, 1), "both": (2, HEADS)}


def seen(batch: int, heads: int) -> Tensor:
    """A mask in which a token sees itself and about half of the older ones."""
    some = torch.rand(batch, heads, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) > 0.5
    return (some | torch.eye(SIZE, dtype=torch.bool)).tril()


def additive(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


@torch.no_grad()
def run(model: PreTrainedModel, cache: Cache, mask: Tensor, batch: int) -> Tensor:
    """Returns the logits of all pieces."""
    logits, done = [], 0
    for tokens in make_tokens(SIZE, batch=batch).split(PIECES, 1):
        end = done + tokens.shape[1]
        own = mask[:, :, done:end, :end]
        logits.append(model(tokens, past_key_values=cache, attention_mask=own).logits)
        done = end
    return torch.cat(logits, 1)


def assert_reads_as_decoded(attention: str, given: Tensor, mask: Tensor, batch: int = 1) -> Tensor:
    """Compares what a mask `given` in any form does with what `mask` tells, and returns it."""
    model = make_model("llama")
    model.set_attn_implementation(attention)
    cache = make_cache(model)
    with recorded() as recording:
        logits = run(model, cache, given, batch)
    assert packed_tokens(cache) == {256}
    for layer in cache.packed_layers:
        assert layer.calls["prompt"] == 1 and layer.calls[attention] == len(PIECES) - 1
    model.set_attn_implementation("eager")
    twin = make_replay(make_cache(model), recording)
    assert_close(logits, run(model, twin, additive(mask), batch))
    return logits


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("attention", "dtype"),
    [
        ("sdpa", torch.bool),
        ("sdpa", torch.float32),
        # the host's eager attention adds what it is given
        ("eager", torch.float32),
        ("rotorquant", torch.bool),
        ("rotorquant", torch.float32),
    ],
)
def test_masks_of_every_form(attention: str, dtype: torch.dtype, form: str) -> None:
    batch, heads = FORMS[form]
    mask = seen(batch, heads)
    given = mask if dtype == torch.bool else additive(mask)
    logits = assert_reads_as_decoded(attention, given, mask, batch)
    if heads > 1:
        alike = mask[:, :1].expand_as(mask)
        other = assert_reads_as_decoded(attention, additive(alike), alike, batch)
        assert (logits - other).abs().max() > 0.01 * other.abs().max()


@pytest.mark.parametrize("attention", ["sdpa", "eager", "rotorquant"])
def test_a_bias_that_hides_nothing(attention: str) -> None:
    """As ALiBi's: a number for each head and distance, and the future hidden."""
    past = torch.ones(SIZE, SIZE, dtype=torch.bool).tril()
    distance = (torch.arange(SIZE)[:, None] - torch.arange(SIZE)).clamp_min(0)
    slopes = 2.0 ** -torch.arange(1, HEADS + 1)[:, None, None]
    bias = (additive(past) - slopes * distance)[None].clamp_min(torch.finfo(torch.float32).min)
    model = make_model("llama")
    model.set_attn_implementation(attention)
    cache = make_cache(model)
    with recorded() as recording:
        logits = run(model, cache, bias, 1)
    assert packed_tokens(cache) == {256}
    model.set_attn_implementation("eager")
    assert_close(logits, run(model, make_replay(make_cache(model), recording), bias, 1))


@pytest.mark.parametrize("attention", ["sdpa", "eager", "rotorquant"])
def test_what_one_head_alone_does_not_see_is_no_padding(attention: str) -> None:
    mask = torch.ones(1, HEADS, SIZE, SIZE, dtype=torch.bool).tril()
    mask[:, 0, :, :20] = False
    given = additive(mask)
    model = make_model("llama")
    model.set_attn_implementation(attention)
    cache = make_cache(model)
    run(model, cache, given, 1)
    assert [layer.padding for layer in cache.packed_layers] == [None, None]
    assert_reads_as_decoded(attention, given, mask)


def test_attention_of_ones_own_gets_dense_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = set()

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        kinds.update((type(key), type(value)))
        scale = options["scaling"]
        out = F.scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=True)
        return out.transpose(1, 2), None

    for table, function in ((AttentionInterface, attend), (AttentionMaskInterface, sdpa_mask)):
        monkeypatch.setitem(table._global_mapping, "own", function)
    model = make_model("llama")
    model.set_attn_implementation("own")
    mask = seen(1, 1)
    cache = make_cache(model)
    with recorded() as recording:
        logits = run(model, cache, mask, 1)
    assert kinds == {Tensor}
    assert packed_tokens(cache) == {256}
    assert all(layer.calls["dense"] == len(PIECES) for layer in cache.packed_layers)
    # a prompt that no handle stands for is recorded as it is read from the store
    model.set_attn_implementation("eager")
    assert_close(logits, run(model, make_replay(make_cache(model), recording), additive(mask), 1))
