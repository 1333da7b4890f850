# SPDX-License-Identifier: Apache-2.0
"""What a cache layer accepts; every refusal happens before anything is stored."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MIN_HEAD_DIM, MAX_HEAD_DIM = 16, 512
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_states(key: Tensor, value: Tensor, layer: str) -> None:
    """Refuses states that no layer can store.

    Args:
        key: New keys `[B, Hk, t, D]`.
        value: New values, same shape.
        layer: Name of the layer for the message.

    Raises:
        ValueError: Wrong rank, shapes that differ, unsupported dtype or head_dim.
    """
    shape = key.shape
    if len(shape) != 4 or value.dim() != 4:
        raise ValueError(
            f"{layer}: keys and values must be [batch, kv_heads, tokens, head_dim], "
            f"got {list(key.shape)} and {list(value.shape)}"
        )
    if shape != value.shape:
        raise ValueError(
            f"{layer}: keys {list(key.shape)} and values {list(value.shape)} must have one shape; "
            "models whose keys and values differ (multi-head latent attention) need DynamicCache"
        )
    if key.dtype not in DTYPES or value.dtype not in DTYPES:
        raise ValueError(
            f"{layer}: keys and values must be float32, bfloat16 or float16, "
            f"got {key.dtype} and {value.dtype}"
        )
    if not MIN_HEAD_DIM <= shape[3] <= MAX_HEAD_DIM:
        raise ValueError(
            f"{layer}: head_dim must be {MIN_HEAD_DIM} to {MAX_HEAD_DIM}, got {key.shape[3]}"
        )


def check_unchanged(
    key: Tensor, shape: tuple[int, int, int], dtype: torch.dtype, layer: str
) -> None:
    """Refuses new keys that do not continue the stored ones.

    Raises:
        ValueError: Batch, heads, head_dim or dtype differ from those stored.
    """
    batch, heads, _, head_dim = key.shape
    new = (batch, heads, head_dim)
    if new != shape:
        raise ValueError(
            f"{layer}: the cache holds (batch, kv_heads, head_dim) = {shape}, got {new}; use a new "
            "cache for another model or batch, or reset() this one"
        )
    if key.dtype != dtype:
        raise ValueError(
            f"{layer}: the cache holds {dtype}, got {key.dtype}; use a new cache, or reset()"
        )


def check_device(key: Tensor, device: torch.device, layer: str) -> None:
    """Refuses new keys that are on another device than the stored ones.

    Raises:
        ValueError: The devices differ.
    """
    if key.device != device:
        raise ValueError(
            f"{layer}: the cache is on {device}, got states on {key.device}; move it with "
            "to(device), or use a new cache"
        )


def check_finite(key: Tensor, value: Tensor, layer: str) -> None:
    """Refuses NaN and infinity.

    States on a GPU are not looked at: the answer would have to be waited for in every layer.
    `largest` is asked of them when they are packed, and `check_largest` reads the answer later.

    Raises:
        ValueError: A key or value is not finite.
    """
    if key.is_cuda or key.numel() == 0:
        return
    for name, states in (("key", key), ("value", value)):
        # as they will be kept; NaN is passed on
        states = states.detach().to(key.dtype)
        smallest, greatest = states.aminmax()
        if not (math.isfinite(smallest) and math.isfinite(greatest)):
            bad = int((~torch.isfinite(states)).sum())
            raise ValueError(
                f"{layer}: {bad} of {states.numel()} new {name} numbers are NaN or infinite and "
                "were not stored; look at the model's inputs, weights and dtype"
            )


def largest(*tensors: Tensor) -> Tensor:
    """Returns the largest absolute number of each tensor, float32; NaN if one is in it."""
    norm = torch.linalg.vector_norm
    return torch.stack([norm(tensor, math.inf, dtype=torch.float32) for tensor in tensors])


def check_largest(key: float, value: float, layer: str) -> None:
    """Refuses to go on with packed states that were NaN or infinite.

    Args:
        key: Largest absolute number of all keys that were packed.
        value: The same of the values.
        layer: Name of the layer for the message.

    Raises:
        ValueError: One of the two is not finite.
    """
    for name, number in (("keys", key), ("values", value)):
        if not math.isfinite(number):
            raise ValueError(
                f"{layer}: {name} that are packed already were NaN or infinite; look at the "
                "model's inputs, weights and dtype, reset() the cache and run the prompt again"
            )
