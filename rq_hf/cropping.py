# SPDX-License-Identifier: Apache-2.0
"""Whether a layer of any kind can drop its newest tokens, asked before any layer does."""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import (
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)

from rq_hf.layers import RotorQuantLayer

INSTEAD = "reset() the cache and run the prompt again"


def crop_obstacle(layer: Any, tokens_to_remove: int) -> str | None:
    """Returns why `crop` of a layer cannot drop so many tokens; None if it can.

    Args:
        layer: Packed, or one of the host's.
        tokens_to_remove: A number of at most 0.
    """
    if isinstance(layer, RotorQuantLayer) and layer.is_croppable:
        return layer.crop_obstacle(tokens_to_remove)
    if holds_nothing(layer):
        return None
    if isinstance(layer, LinearAttentionCacheLayerMixin) and not (
        layer.record_past and layer.is_croppable
    ):
        return (
            "linear attention keeps no states of earlier tokens (those of convolutions alone do, "
            f"after activate_past_recording()); {INSTEAD}"
        )
    if isinstance(layer, DynamicSlidingWindowLayer):
        return _window_obstacle(layer, tokens_to_remove)
    if tokens_to_remove and not getattr(layer, "is_croppable", False):
        return f"a {type(layer).__name__} drops no tokens; {INSTEAD}"
    return None


def holds_nothing(layer: Any) -> bool:
    """Whether a layer of the host has no states yet; its own `crop` may then fail."""
    if isinstance(layer, LinearAttentionCacheLayerMixin) and (
        any(layer.is_conv_states_initialized.values())
        or any(layer.is_recurrent_states_initialized.values())
    ):
        return False
    return not getattr(layer, "is_initialized", False)


def _window_obstacle(layer: DynamicSlidingWindowLayer, tokens_to_remove: int) -> str | None:
    length, window = layer.get_seq_length(), layer.sliding_window
    if length < window:
        return None
    left = length + tokens_to_remove
    assert layer.keys is not None
    recorded = layer.keys.shape[-2] + tokens_to_remove
    if layer.record_past and tokens_to_remove <= 0 and recorded >= min(left, window - 1) >= 0:
        return None
    return (
        f"of {length} tokens it holds the newest {layer.keys.shape[-2]}, too few to go back to "
        f"{left} with a window of {window}; call activate_past_recording() before tokens that may "
        f"have to go are stored, or {INSTEAD}"
    )
