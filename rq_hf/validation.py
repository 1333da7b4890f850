# SPDX-License-Identifier: Apache-2.0
"""What a cache layer accepts; every refusal happens before anything is stored."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MIN_HEAD_DIM, MAX_HEAD_DIM = 16, 512
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# of those that a message could name
_TOKENS_SHOWN = 4


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
    check_dtype(key, dtype, layer)


def check_dtype(key: Tensor, dtype: torch.dtype, layer: str) -> None:
    """Refuses new keys of another dtype than the stored ones.

    Raises:
        ValueError: The dtypes differ.
    """
    if key.dtype != dtype:
        raise ValueError(
            f"{layer}: the cache holds {dtype}, got {key.dtype}; use a new cache, or reset()"
        )


def check_exact(
    key: Tensor,
    value: Tensor,
    stored: tuple[Tensor, Tensor],
    device: torch.device,
    layer: str,
) -> None:
    """Refuses new states that do not continue those of an exact layer of the host.

    Args:
        key: New keys `[B, Hk, t, D]`.
        value: New values; their head_dim may differ from that of the keys.
        stored: Keys and values stored.
        device: Where these are while they are in use.
        layer: Name of the layer for the message.

    Raises:
        ValueError: Batch, heads, head_dim or device differ from those stored.
    """
    for name, new, old in zip(("keys", "values"), (key, value), stored, strict=True):
        mine, theirs = ((*x.shape[:-2], x.shape[-1]) for x in (old, new))
        if theirs != mine:
            raise ValueError(
                f"{layer}: the cache holds {name} of (batch, kv_heads, head_dim) = {mine}, got "
                f"{theirs}; use a new cache for another model or batch, or reset() this one"
            )
    check_device(key, device, layer)


def check_kept(key: Tensor, balance: Tensor, layer: str) -> None:
    """Refuses a first prompt that is not like the one whose statistics were kept.

    Args:
        key: New keys `[B, Hk, t, D]`.
        balance: One of these statistics, `[B, Hk, D]`.
        layer: Name of the layer for the message.

    Raises:
        ValueError: Batch, heads, head_dim or device differ.
    """
    batch, heads, _, head_dim = key.shape
    new, kept = (batch, heads, head_dim), tuple(balance.shape)
    if (new, key.device) != (kept, balance.device):
        raise ValueError(
            f"{layer}: the statistics that reset(keep_statistics=True) kept are for (batch, "
            f"kv_heads, head_dim) = {kept} on {balance.device}, got {new} on {key.device}; call "
            "reset() to measure anew"
        )


def check_device(key: Tensor, device: torch.device, layer: str) -> None:
    """Refuses new keys that are on another device than the stored ones.

    Raises:
        ValueError: The devices differ.
    """
    if key.device != device:
        raise ValueError(
            f"{layer}: the cache is on {device}, got states on {key.device}; move it with "
            "to(device), or to({layer: device, ...}) for a model on several, or use a new cache"
        )


def looks_at_once(device: torch.device) -> bool:
    """Whether numbers on a device can be looked at without waiting for it."""
    return device.type != "cuda"


def check_finite(
    key: Tensor, value: Tensor, layer: str, *, stored: Sequence[Tensor] = (), end: int = 0
) -> None:
    """Refuses NaN and infinity. A GPU is waited for, once.

    Args:
        key: New keys `[B, Hk, t, D]`.
        value: New values, same shape; looked at in the dtype of the keys, as they will be kept.
        layer: Name of the layer for the message.
        stored: Exact keys and values of the newest tokens stored, `[B, Hk, n, D]`, if they are
            to be looked at too.
        end: Tokens of a sequence stored, for the message.

    Raises:
        ValueError: A key or value is not finite; the message says which tokens are concerned.
    """
    new = [key.detach(), value.detach().to(key.dtype)]
    if _all_finite(*new, *stored):
        return
    if not _all_finite(*stored):
        bad = _bad_tokens(stored)
        first = end - stored[0].shape[2]
        back = stored[0].shape[2] - bad[0]
        raise ValueError(
            f"{layer}: keys or values of {_name_tokens(bad, first)} are NaN or infinite: they are "
            f"stored exactly and were now to be packed; the new tokens were not stored. Crop the "
            f"cache by {back} tokens, crop(-{back}), or reset() it; look at the model's inputs, "
            "weights and dtype"
        )
    for name, states in zip(("key", "value"), new, strict=True):
        if not _all_finite(states):
            bad_numbers = int((~torch.isfinite(states)).sum())
            raise ValueError(
                f"{layer}: {bad_numbers} of {states.numel()} new {name} numbers are NaN or "
                f"infinite, in {_name_tokens(_bad_tokens([states]), end)}, and were not stored; "
                "look at the model's inputs, weights and dtype"
            )


def late_error(
    layer: str, token: int, back: int, obstacle: str | None, new_tokens: bool
) -> ValueError:
    """Returns what to raise where kernels have found a stored token that is not finite.

    Args:
        layer: Name of the layer for the message.
        token: Index of the token in the sequence.
        back: How many tokens there are from it on.
        obstacle: Why these could not be taken back, and what to do; None if they were.
        new_tokens: Whether others were to be stored.
    """
    found = (
        f"{layer}: keys or values of token {token} are NaN or infinite, which was found after its "
        "attention had run"
    )
    stored = " The new tokens were not stored." if new_tokens else ""
    if obstacle is None:
        taken = f"the last {back} tokens were" if back > 1 else "it was"
        done = f"The cache is as it was before: {taken} taken back."
    else:
        done = f"It is stored still, and of no use with what follows it: {obstacle}."
    return ValueError(f"{found}. {done}{stored} Look at the model's inputs, weights and dtype")


def _all_finite(*states: Tensor) -> bool:
    # the largest absolute number passes NaN on, and takes no memory
    norm = torch.linalg.vector_norm
    largest = [norm(x, math.inf) for x in states if x.numel()]
    return not largest or all(map(math.isfinite, torch.stack(largest).tolist()))


def _bad_tokens(states: Sequence[Tensor]) -> list[int]:
    """Returns the rows in which a number is not finite."""
    bad = [(~torch.isfinite(x)).any(3).any(1).any(0) for x in states]
    return torch.stack(bad).any(0).nonzero()[:, 0].tolist()


def _name_tokens(rows: list[int], first: int) -> str:
    """Names tokens by their index in the sequence, the first few of them."""
    shown = ", ".join(str(first + row) for row in rows[:_TOKENS_SHOWN])
    more = len(rows) - _TOKENS_SHOWN
    return f"token{'s' * (len(rows) > 1)} {shown}" + (f" and {more} more" if more > 0 else "")
