# SPDX-License-Identifier: Apache-2.0
"""Masks of the user's own, blocks that see one another, flex attention, beams of encoder-decoders.

A cache that gives dense tensors is the oracle: statistics of both come from the keys alone.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.flows import LENGTH, assert_close, make_cache, packed_tokens
from support.models import make_model, make_tokens
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

from rq_hf import RotorQuantCache

# the prompt, a few tokens, and one
PIECES = (LENGTH, 3, 1)
KEYS_ALONE: dict[str, Any] = {"balance": False}


def run(
    model: PreTrainedModel, cache: RotorQuantCache, mask: Tensor | None = None, **options: Any
) -> Tensor:
    """Returns the logits of all pieces; options have a column for each token."""
    logits, done = [], 0
    for tokens in make_tokens(sum(PIECES)).split(PIECES, 1):
        end = done + tokens.shape[1]
        inputs = {name: x[:, done:end] for name, x in options.items()}
        if mask is not None:
            inputs["attention_mask"] = mask[:, :, done:end, :end]
        with torch.no_grad():
            logits.append(model(tokens, past_key_values=cache, **inputs).logits)
        done = end
    return torch.cat(logits, 1)


def own_mask() -> Tensor:
    """An additive mask in which a token sees itself and about half of the older ones."""
    size = sum(PIECES)
    seen = torch.rand(size, size, generator=torch.Generator().manual_seed(0)) > 0.5
    seen = (seen | torch.eye(size, dtype=torch.bool)).tril()
    mask = torch.zeros(size, size).masked_fill(~seen, torch.finfo(torch.float32).min)
    return mask[None, None]


@pytest.mark.parametrize("attention", ["sdpa", "eager", "rotorquant"])
def test_a_mask_of_four_dimensions(attention: str) -> None:
    model, mask = make_model("llama"), own_mask()
    model.set_attn_implementation(attention)
    cache = make_cache(model, **KEYS_ALONE)
    logits = run(model, cache, mask)
    assert packed_tokens(cache) == {128}
    model.set_attn_implementation("eager")
    assert_close(logits, run(model, make_cache(model, path="dense", **KEYS_ALONE), mask))
    without = run(model, make_cache(model, **KEYS_ALONE))
    assert (logits - without).abs().max() > 0.1 * without.abs().max()


def test_groups_of_heads_that_the_host_packs_as_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    sdpa = pytest.importorskip("transformers.integrations.sdpa_attention")
    if not hasattr(sdpa, "pack_gqa"):
        pytest.skip("this version of transformers repeats keys and values")
    packed: list[int] = []

    def pack(states: Tensor | None, groups: int) -> Tensor | None:
        packed.append(groups)
        return original(states, groups)

    original = sdpa.pack_gqa
    monkeypatch.setattr(sdpa, "pack_gqa", pack)
    # a mask keeps the host from the grouped form of its own
    monkeypatch.setattr(sdpa, "use_gqa_in_sdpa", lambda *args: False)
    model, mask = make_model("llama"), own_mask()
    groups = model.config.num_attention_heads // model.config.num_key_value_heads
    cache = make_cache(model, **KEYS_ALONE)
    logits = run(model, cache, mask)
    # query, mask and bias of the last piece, in every layer
    assert packed == [groups] * 3 * len(model.model.layers) and groups > 1
    assert packed_tokens(cache) == {128}
    assert_close(logits, run(model, make_cache(model, path="dense", **KEYS_ALONE), mask))


def test_tokens_of_an_image_see_one_another() -> None:
    model = make_model("gemma3-vision")
    kinds = torch.zeros(1, sum(PIECES), dtype=torch.long)
    kinds[:, 20:60] = 1
    cache = make_cache(model, **KEYS_ALONE)
    logits = run(model, cache, token_type_ids=kinds)
    dense = make_cache(model, path="dense", **KEYS_ALONE)
    assert_close(logits, run(model, dense, token_type_ids=kinds))
    assert max(packed_tokens(cache)) >= 128
    text = run(model, make_cache(model, **KEYS_ALONE), token_type_ids=torch.zeros_like(kinds))
    assert (logits - text)[:, 20:60].abs().max() > 1e-3 * text.abs().max()


def test_flex_attention_gets_dense_tensors() -> None:
    model = make_model("llama")
    expected = run(model, make_cache(model, path="dense", **KEYS_ALONE))
    model.set_attn_implementation("flex_attention")
    cache = make_cache(model, **KEYS_ALONE)
    assert_close(run(model, cache), expected)
    assert packed_tokens(cache) == {128}
    assert "dense" in cache.describe()


def test_beams_of_an_encoder_decoder() -> None:
    model = make_model("bart")
    sequences = []
    for path in ("auto", "dense"):
        mine = RotorQuantCache(residual_length=32, path=path, **KEYS_ALONE)
        sequences.append(
            model.generate(
                make_tokens(40, batch=2, seed=1),
                decoder_input_ids=make_tokens(200, batch=2),
                past_key_values=EncoderDecoderCache(mine, DynamicCache()),
                num_beams=3,
                max_new_tokens=12,
                do_sample=False,
                pad_token_id=0,
            )
        )
        assert packed_tokens(mine) == {128}
    assert torch.equal(*sequences)
