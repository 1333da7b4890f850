# SPDX-License-Identifier: Apache-2.0
"""Ways to run `generate()`: a cache, the model's attention, and whether steps are compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from transformers import (
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
    QuantizedCache,
    StaticCache,
)
from transformers.cache_utils import Cache

from rq_hf import RotorQuantCache, RotorQuantStaticCache, cuda_graph


@contextmanager
def _nothing(model: PreTrainedModel, cache: Cache) -> Iterator[None]:
    yield


@dataclass(frozen=True)
class CacheRow:
    """A way to run `generate()`.

    Attributes:
        label: What it is, for tables.
        make: Returns an empty cache for a model of that config, and a number of tokens that it must
            hold.
        attention: The model's attention implementation.
        compiled: Let `generate` compile the steps, which it does for caches of a fixed size.
        around: What holds while a model runs with a cache.
        goal: Kind of the goal for its step, a key of `goals.STEP`.
    """

    label: str
    make: Callable[[PreTrainedConfig, int], Cache]
    attention: str = "sdpa"
    compiled: bool = False
    around: Callable[[PreTrainedModel, Cache], AbstractContextManager] = _nothing
    goal: str | None = None


@contextmanager
def without_cudnn(model: PreTrainedModel, cache: Cache) -> Iterator[None]:
    """Takes cuDNN from among the kernels of scaled_dot_product_attention.

    It builds a plan for every new length of the cache, which is every step.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def _dynamic(config: PreTrainedConfig, tokens: int) -> Cache:
    return DynamicCache(config=config)


def _static(config: PreTrainedConfig, tokens: int) -> Cache:
    return StaticCache(config=config, max_cache_len=tokens)


def _quantized(config: PreTrainedConfig, tokens: int) -> Cache:
    return QuantizedCache("quanto", config=config, nbits=4)


def _packed(nbits: int) -> Callable[[PreTrainedConfig, int], Cache]:
    return lambda config, tokens: RotorQuantCache(config=config, nbits=nbits)


def _packed_static(nbits: int) -> Callable[[PreTrainedConfig, int], Cache]:
    return lambda config, tokens: RotorQuantStaticCache(
        config=config, max_cache_len=tokens, nbits=nbits
    )


def _compiled(nbits: int) -> CacheRow:
    label = f"RotorQuantStaticCache, {nbits} bits, compiled by generate"
    return CacheRow(label, _packed_static(nbits), compiled=True, goal="graph")


ROWS = {
    "dynamic": CacheRow("DynamicCache as shipped", _dynamic),
    "dynamic-without-cudnn": CacheRow(
        "DynamicCache, cuDNN attention off", _dynamic, around=without_cudnn
    ),
    "static": CacheRow("StaticCache, eager", _static),
    "static-compiled": CacheRow("StaticCache, compiled by generate", _static, compiled=True),
    "quanto-4": CacheRow("QuantizedCache, quanto, 4 bits", _quantized),
    "rotorquant-2": CacheRow("RotorQuantCache, 2 bits", _packed(2)),
    "rotorquant-3": CacheRow("RotorQuantCache, 3 bits", _packed(3), goal="eager"),
    "rotorquant-4": CacheRow("RotorQuantCache, 4 bits", _packed(4)),
    "rotorquant-3-registered": CacheRow(
        'RotorQuantCache, 3 bits, attention "rotorquant"',
        _packed(3),
        attention="rotorquant",
        goal="eager",
    ),
    "rotorquant-static-3": CacheRow("RotorQuantStaticCache, 3 bits, eager", _packed_static(3)),
    "rotorquant-static-3-graph": CacheRow(
        "RotorQuantStaticCache, 3 bits, `cuda_graph`",
        _packed_static(3),
        around=cuda_graph,
        goal="graph",
    ),
    "rotorquant-static-2-compiled": _compiled(2),
    "rotorquant-static-3-compiled": _compiled(3),
    "rotorquant-static-4-compiled": _compiled(4),
}
