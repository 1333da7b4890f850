# SPDX-License-Identifier: Apache-2.0
"""What tests of caches of a fixed size have in common."""

from __future__ import annotations

from typing import Any

import torch
from support.models import make_tokens
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import Cache, CompileConfig, PreTrainedModel
from transformers.generation import GenerateDecoderOnlyOutput

from rq_hf import RotorQuantCache, RotorQuantStaticCache

# a tile leaves the tail of a prompt of LENGTH tokens; two more are packed while NEW tokens come
SETTINGS: dict[str, Any] = {"nbits": 4, "residual_length": 16, "sink_length": 4}
LENGTH, NEW = 146, 70
PACKED = 192
PADDING = 40


def dynamic(model: PreTrainedModel, **settings: Any) -> RotorQuantCache:
    return RotorQuantCache(config=model.config, **(SETTINGS | settings))


def static(
    model: PreTrainedModel, room: int = LENGTH + NEW, **settings: Any
) -> RotorQuantStaticCache:
    return RotorQuantStaticCache(config=model.config, max_cache_len=room, **(SETTINGS | settings))


def make_prompt(padding: int = 0, length: int = LENGTH) -> dict[str, Tensor]:
    """Returns two prompts, the first left-padded."""
    tokens = make_tokens(length, batch=2)
    mask = torch.ones_like(tokens)
    tokens[0, :padding] = mask[0, :padding] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def generate(
    model: PreTrainedModel, prompt: dict[str, Tensor], cache: Cache, **options: Any
) -> GenerateDecoderOnlyOutput:
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0} | options
    return model.generate(
        **prompt,
        past_key_values=cache,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )


def packed(cache: RotorQuantCache) -> set[int]:
    """Returns how many tokens the layers have packed."""
    for layer in cache.packed_layers:
        layer.settle()
    return {layer.store.packed_length for layer in cache.packed_layers if layer.store is not None}


def compiled(*, fullgraph: bool = True, backend: str = "eager") -> dict[str, Any]:
    """Returns options of `generate` with which it compiles steps on any device.

    Args:
        fullgraph: Refuse to break the graph.
        backend: "eager" traces a step, "aot_eager" also takes it apart and makes it functional.
    """
    config = CompileConfig(fullgraph=fullgraph, backend=backend, mode=None)
    config._compile_all_devices = True
    return {"compile_config": config}


def forget_compiled(model: PreTrainedModel | None = None) -> None:
    """Forgets all that was compiled, by the model's own ways too, and counts anew."""
    torch._dynamo.reset()
    counters.clear()
    if model is not None:
        model.__dict__.pop("_compiled_call", None)


def graphs() -> int:
    """Returns how many graphs were compiled; none must have been broken."""
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]
