# SPDX-License-Identifier: Apache-2.0
"""Models that are given images: prompts with pixels, and text after them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.flows import LENGTH, NEW, assert_close, generate, make_cache, packed_tokens
from support.models import IMAGE_TOKEN, VISION, make_model, make_tokens
from support.replay import run_with_twin
from torch import Tensor
from transformers import Cache, PreTrainedModel

FAMILIES = ["llava", "gemma3-vision"]
ATTENTIONS = ["sdpa", "eager", "rotorquant"]
# of one image: its square of patches
PLACES = (VISION["image_size"] // VISION["patch_size"]) ** 2


def make_inputs(family: str, seed: int = 0) -> dict[str, Tensor]:
    """Returns a prompt with two images, the first in a part that is packed, and what they show."""
    tokens = make_tokens(LENGTH)
    for start in (20, LENGTH - 30):
        tokens[:, start : start + PLACES] = IMAGE_TOKEN
    side, generator = VISION["image_size"], torch.Generator().manual_seed(seed)
    inputs = {
        "input_ids": tokens,
        "pixel_values": torch.randn(2, 3, side, side, generator=generator),
    }
    if family == "gemma3-vision":
        # tokens of an image see one another
        inputs["token_type_ids"] = (tokens == IMAGE_TOKEN).long()
    return inputs


def make(family: str, attention: str) -> PreTrainedModel:
    model = make_model(family)
    # the vision tower knows nothing of handles
    model.set_attn_implementation({"text_config": attention})
    assert model.config.get_text_config(decoder=True)._attn_implementation == attention
    return model


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_images_and_text_after_them(family: str, attention: str) -> None:
    model, inputs = make(family, attention), make_inputs(family)

    def flow(cache: Cache) -> Tensor:
        logits = []
        pieces = [
            inputs,
            *({"input_ids": x} for x in make_tokens(45, seed=1).split([40, 3, 1, 1], 1)),
        ]
        for piece in pieces:
            if family == "gemma3-vision":
                kinds = torch.zeros_like(piece["input_ids"])
                piece = {"token_type_ids": kinds, **piece}
            with torch.no_grad():
                logits.append(model(**piece, past_key_values=cache).logits)
        return torch.cat(logits, 1)

    cache = make_cache(model)
    mine, theirs = run_with_twin(cache, flow)
    assert_close(mine, theirs)
    assert packed_tokens(cache) == {256}
    inputs = make_inputs(family, seed=1)
    other = flow(make_cache(model))
    # the first image is read packed by the text behind the prompt
    assert (mine - other)[:, LENGTH:].abs().max() > 1e-3 * mine.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_from_images(family: str) -> None:
    model, inputs = make_model(family), make_inputs(family)

    def flow(cache: Cache) -> Any:
        return generate(model, inputs["input_ids"], cache, **inputs)

    cache = make_cache(model)
    mine, theirs = run_with_twin(cache, flow)
    assert mine.sequences.shape == (1, LENGTH + NEW)
    assert torch.equal(mine.sequences, theirs.sequences)
    assert_close(torch.stack(mine.logits), torch.stack(theirs.logits))
    assert packed_tokens(cache) == {256}
