# SPDX-License-Identifier: Apache-2.0
"""Which cache layer each layer of a model gets."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import PreTrainedConfig
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    STATIC_LAYER_TYPE_MAPPING,
    CacheLayerMixin,
    DynamicLayer,
    get_layer_types_and_kwargs,
)

from rq_hf.config import EXACT_BITS, RotorQuantConfig
from rq_hf.layers import RotorQuantLayer
from rq_hf.quant.rope import RopeTable
from rq_hf.rope import rope_tables
from rq_hf.sliding import RotorQuantSlidingLayer, covers
from rq_hf.static_exact import ExactStaticLayer, ExactStaticSlidingLayer
from rq_hf.static_layer import RotorQuantStaticLayer

# attention implementations that take keys and values as handles; others get dense tensors
HANDLE_IMPLEMENTATIONS = (None, "sdpa", "eager", "rotorquant")
# their code counts the keys: for places of the mask, or of ALiBi's slopes
_NOT_STATIC = ("bloom", "gpt_neo", "mpt")
# the host's names; to a cache the two are the same, only their masks differ
_WINDOWED = ("sliding_attention", "chunked_attention")


def make_layer(
    quantization: RotorQuantConfig,
    layer_idx: int,
    rope: RopeTable | None = None,
    gives_handles: Callable[[], bool] = lambda: True,
    sliding_window: int | None = None,
) -> CacheLayerMixin:
    """Returns an empty packed layer, or the host's exact one where the settings ask for it.

    Args:
        quantization: How to store; `layer_bits` of all layers.
        layer_idx: Position in the model.
        rope: As for `RotorQuantLayer`.
        gives_handles: As for `RotorQuantLayer`.
        sliding_window: Window of a layer that has one.
    """
    of_layer = quantization.for_layer(layer_idx)
    if of_layer is None:
        return DynamicLayer()
    options: dict[str, Any] = {
        "layer_idx": layer_idx,
        "rope": rope,
        "gives_handles": gives_handles,
    }
    if sliding_window is not None:
        return RotorQuantSlidingLayer(of_layer, sliding_window, **options)
    return RotorQuantLayer(of_layer, **options)


def make_layers(
    config: PreTrainedConfig, quantization: RotorQuantConfig
) -> tuple[list[Any], str | None]:
    """Returns an empty layer for each of the model's, and why none is packed if that is so.

    Raises:
        ValueError: The model is an encoder-decoder, or `layer_bits` does not fit it.
    """
    plan = _plan(config, quantization)
    layers = [
        make_layer(quantization, i, plan.ropes[i], plan.gives_handles, plan.windows[i])
        if plan.packs[i]
        else DYNAMIC_LAYER_TYPE_MAPPING[kind](**options)
        for i, (kind, options) in enumerate(plan.layers)
    ]
    return layers, plan.obstacle


def make_static_layers(
    config: PreTrainedConfig, quantization: RotorQuantConfig, max_cache_len: int
) -> tuple[list[Any], str | None]:
    """The same for layers of a fixed size, with room for `max_cache_len` tokens.

    Raises:
        ValueError: As `make_layers`; or the host has no static layer of a kind.
    """
    _check_static(config.get_text_config(decoder=True))
    plan = _plan(config, quantization)
    unknown = {kind for kind, _ in plan.layers} - set(STATIC_LAYER_TYPE_MAPPING)
    if unknown:
        raise ValueError(
            f"transformers has no static layers for {', '.join(sorted(unknown))}; use "
            "RotorQuantCache"
        )
    layers = [
        _make_static_layer(quantization, i, plan, max_cache_len) for i in range(len(plan.layers))
    ]
    return layers, plan.obstacle


def _check_static(decoder: PreTrainedConfig) -> None:
    if decoder.model_type in _NOT_STATIC or getattr(decoder, "alibi", False):
        raise ValueError(
            f"the attention of {decoder.model_type} goes by the number of keys it is given, which "
            "in a cache of a fixed size is not that of the tokens; use RotorQuantCache"
        )


def _make_static_layer(
    quantization: RotorQuantConfig, i: int, plan: _Plan, max_cache_len: int
) -> Any:
    of_layer, (kind, options) = quantization.for_layer(i), plan.layers[i]
    if plan.packs[i]:
        assert of_layer is not None
        return RotorQuantStaticLayer(of_layer, max_cache_len, i, plan.ropes[i], plan.gives_handles)
    if kind == "full_attention" and any(plan.packs):
        # one mask of the host is for these and for packed ones
        return ExactStaticLayer(max_cache_len)
    options = {**options, "max_cache_len": max_cache_len}
    if kind in _WINDOWED:
        return ExactStaticSlidingLayer(**options)
    return STATIC_LAYER_TYPE_MAPPING[kind](**options)


@dataclass(frozen=True)
class _Plan:
    """What becomes of the layers of a model.

    Attributes:
        layers: The host's kind of each layer, and the arguments of its class.
        packs: Whether it is packed.
        windows: Window of a layer that has one and is packed, else None.
        ropes: As for `RotorQuantLayer`.
        gives_handles: As for `RotorQuantLayer`.
        obstacle: Why no layer is packed; None if some are.
    """

    layers: list[tuple[str, dict[str, Any]]]
    packs: list[bool]
    windows: list[int | None]
    ropes: list[RopeTable | None]
    gives_handles: Callable[[], bool]
    obstacle: str | None


def _plan(config: PreTrainedConfig, quantization: RotorQuantConfig) -> _Plan:
    if config.is_encoder_decoder:
        raise ValueError(
            "an encoder-decoder model needs a cache for each attention: "
            "EncoderDecoderCache(RotorQuantCache(), DynamicCache()), without config"
        )
    decoder = config.get_text_config(decoder=True)
    types, options = get_layer_types_and_kwargs(decoder)
    # transformers 5.17 gives one dict for all layers
    options = [options] * len(types) if isinstance(options, dict) else options
    windows = [
        _packed_window(quantization, kind, option)
        for kind, option in zip(types, options, strict=True)
    ]
    packable = [
        kind == "full_attention" or window is not None
        for kind, window in zip(types, windows, strict=True)
    ]
    _check_layer_bits(quantization, packable, windows)
    obstacle = _obstacle(decoder)
    if obstacle is not None:
        warnings.warn(f"{obstacle}: all layers stay exact", stacklevel=4)
    ropes = rope_tables(decoder)
    return _Plan(
        layers=list(zip(types, options, strict=True)),
        packs=[
            packable[i] and obstacle is None and quantization.for_layer(i) is not None
            for i in range(len(types))
        ],
        windows=windows,
        ropes=[ropes[i] if i < len(ropes) else None for i in range(len(types))],
        gives_handles=partial(_takes_handles, weakref.ref(decoder)),
        obstacle=obstacle,
    )


def _packed_window(quantization: RotorQuantConfig, kind: str, option: dict[str, Any]) -> int | None:
    """Returns the window of a layer that has one and is to be packed, else None."""
    if kind not in _WINDOWED or quantization.sliding == "exact":
        return None
    window = option["sliding_window"]
    return None if covers(quantization, window) else window


def _check_layer_bits(
    quantization: RotorQuantConfig, packable: list[bool], windows: list[int | None]
) -> None:
    bits = quantization.layer_bits or {}
    unknown = [i for i in bits if i >= len(packable)]
    if unknown:
        raise ValueError(
            f"layer_bits names layers {unknown}, the model caches {len(packable)} layers"
        )
    exact = [i for i, width in bits.items() if not packable[i] and width != EXACT_BITS]
    if exact:
        raise ValueError(
            f"layer_bits names layers {exact}, which are not of full attention"
            + (" or whose window fits the exact tail" if quantization.sliding == "packed" else "")
        )
    windowed = [i for i, window in enumerate(windows) if window is not None]
    mixed = [i for i in windowed if quantization.for_layer(i) is None]
    if mixed and len(mixed) < len(windowed):
        raise ValueError(
            f"layer_bits keeps the sliding layers {mixed} exact and others of {windowed} packed, "
            "but one mask of the host is for all of them: give all of them bits, or none"
        )


def _obstacle(decoder: PreTrainedConfig) -> str | None:
    """Returns why nothing of a model can be packed; None if something can."""
    if getattr(decoder, "kv_lora_rank", None) is not None:
        return "the latents of multi-head latent attention are compressed already"
    key, value = (getattr(decoder, name, None) for name in ("head_dim", "v_head_dim"))
    if isinstance(key, int) and isinstance(value, int) and key != value:
        return f"keys have {key} numbers a head and values {value}, which tiles do not take"
    return None


def _takes_handles(config: weakref.ref[PreTrainedConfig]) -> bool:
    """Whether the attention that the model uses now takes handles."""
    decoder = config()
    # the modules of the model hold this very object, so a later switch shows here
    return getattr(decoder, "_attn_implementation", None) in HANDLE_IMPLEMENTATIONS
