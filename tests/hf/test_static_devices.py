# SPDX-License-Identifier: Apache-2.0
"""A cache of a fixed size, with a model whose layers lie on two devices.

Each layer's buffers are to lie where its states are, and no number of one layer is to meet another
layer's. The host's own test of this asks for a model with sliding layers, whose embedding and head
lie on the first device and whose last norm and rotary embedding on the second.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from support.models import make_model
from support.static import PADDING, generate, make_prompt, packed, static
from torch import Tensor
from transformers import PreTrainedModel

from rq_hf import RotorQuantStaticCache
from rq_hf.static_layer import RotorQuantStaticLayer

FAMILIES = ["llama", "gemma2"]


def spread(model: PreTrainedModel, first: str, second: str) -> PreTrainedModel:
    """Puts the second half of the layers on another device than the first."""
    layers = model.config.num_hidden_layers
    places = {f"model.layers.{i}": first if 2 * i < layers else second for i in range(layers)}
    places |= {"model.embed_tokens": first, "lm_head": first}
    places |= {"model.norm": second, "model.rotary_emb": second}
    # as from_pretrained(device_map=...) does
    skipped = model._skip_keys_device_placement
    return dispatch_model(model, places, main_device=first, skip_keys=skipped, force_hooks=True)


def devices(layer: Any) -> set[torch.device]:
    """Returns where a layer's buffers and statistics are."""
    if isinstance(layer, RotorQuantStaticLayer):
        held: tuple[Any, ...] = (*layer.static.tensors_read, *layer.static.buffers)
    else:
        held = (layer.keys, layer.values)
    return {part.device for part in held if isinstance(part, Tensor)}


def on(device: str, prompt: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in prompt.items()}


def assert_spread_as_on_one(
    family: str, names: tuple[str, str], **options: Any
) -> RotorQuantStaticCache:
    """Two prompts on one cache give the tokens that the model gives on one device."""
    one, two = make_model(family).to(names[0]), spread(make_model(family), *names)
    mine, theirs = static(two), static(one)
    for padding in (PADDING, 0):
        prompt = on(names[0], make_prompt(padding))
        outputs = [
            generate(model, prompt, cache, **options)
            for model, cache in ((two, mine), (one, theirs))
        ]
        assert torch.equal(*(output.sequences for output in outputs))
        assert packed(mine) == packed(theirs) != {0}
        for cache in (mine, theirs):
            cache.reset()
    return mine


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("disable_compile", [True, False], ids=["eager", "compiled"])
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_on_two_devices(family: str, disable_compile: bool) -> None:
    names = ("cuda:0", "cuda:1")
    cache = assert_spread_as_on_one(family, names, disable_compile=disable_compile)
    for layer, name in zip(cache.layers, names, strict=True):
        assert devices(layer) == {torch.device(name)}


@pytest.mark.parametrize("family", FAMILIES)
def test_states_that_hooks_move_between_layers(family: str) -> None:
    """One device stands for both: hooks between the layers carry states, not the cache."""
    cache = assert_spread_as_on_one(family, ("cpu", "cpu"))
    assert {device for layer in cache.layers for device in devices(layer)} == {torch.device("cpu")}


def test_buffers_are_made_where_the_states_are() -> None:
    cache = static(make_model("llama"))
    states = torch.zeros(2, 2, 4, 64)
    for layer, device in zip(cache.packed_layers, ("cpu", "meta"), strict=True):
        layer.lazy_initialization(states.to(device), states.to(device))
        assert devices(layer) == {torch.device(device)} and layer.device.type == device
    for i, device in enumerate(("meta", "cpu")):
        away = states.to(device)
        with pytest.raises(ValueError, match=rf"layer {i}: .* got .*{device}.*first use"):
            cache.update(away, away, i)
