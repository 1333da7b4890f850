# SPDX-License-Identifier: Apache-2.0
"""Measuring the statistics that a `Preconditioner` holds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rq_hf.quant.preconditioning import SPAN, Preconditioner
from rq_hf.quant.rope import RopeTable

KEY_MEANS = ("auto", "pre_rope", "post_rope", "none")
MIN_TOKENS = 16  # statistics of fewer say more about the tokens than about the head
MIN_SAVING = 0.01  # part of the energy that a mean has to remove to be worth its upkeep
# numbers in float32 at a time, beside the cache, but a span of tokens at least
_NUMBERS_AT_ONCE = 1 << 23
_POWER_FLOOR = 1e-8  # of the average channel: a dead channel must not blow up a ratio


@dataclass(frozen=True)
class StatisticsSettings:
    """What `measure` measures.

    Args:
        key_mean: Mean removed from keys: "pre_rope" (a constant before RoPE, such as the bias of
            the key projection), "post_rope", "none", or "auto", which takes for each sequence and
            head the one that leaves the least energy.
        balance: Whether key channels are scaled by sqrt(rms q / rms k').
        value_mean: Whether the mean value is removed.
        balance_limit: The scales stay within [1 / balance_limit, balance_limit].

    Raises:
        ValueError: Unknown `key_mean`, or `balance_limit` below 1.
    """

    key_mean: str = "auto"
    balance: bool = True
    value_mean: bool = True
    balance_limit: float = 4.0

    def __post_init__(self) -> None:
        if self.key_mean not in KEY_MEANS:
            raise ValueError(
                f"key_mean must be one of {', '.join(KEY_MEANS)}, got {self.key_mean!r}"
            )
        if not 1 <= self.balance_limit < math.inf:
            raise ValueError(
                f"balance_limit must be finite and at least 1, got {self.balance_limit}"
            )


def measure(
    keys: Tensor,
    values: Tensor,
    *,
    start: int,
    rope: RopeTable | None,
    settings: StatisticsSettings,
    query_power: Tensor | None = None,
    valid: Tensor | None = None,
) -> Preconditioner:
    """Measures the statistics of these keys and values.

    Each sequence is measured by itself, as if it were alone and without its padding, which counts
    zero. Sums are float64: torch orders them by the shape, and what that changes is far below what
    the float32 result keeps. (The one exception: a `rope` of unknown convention is tried both ways,
    and the batch decides as a whole.)

    Args:
        keys: Keys as cached `[B, Hk, n, D]`, any floating dtype.
        values: Values, same shape.
        start: Index in the cache of the first row.
        rope: What RoPE did to the keys; None if nothing, then "pre_rope" means "post_rope".
        settings: What to measure.
        query_power: Mean square of the queries by channel, averaged over the heads of a group,
            `[B, Hk, D]`; None: all channels alike.
        valid: False for padding, bool `[B, n]`; None: no padding.

    Returns:
        The preconditioner; the identity for sequences with fewer than `MIN_TOKENS` valid tokens.

    Raises:
        ValueError: Shapes that do not match; "pre_rope" with a `rope` wider than D.
    """
    _check_shapes(keys, values, query_power, valid)
    rows = _Rows(start, keys.shape[2], valid, keys.shape[0], keys.device)
    pre, post, table = _key_means(keys, rows, rope, settings.key_mean)
    neutral = Preconditioner.identity(keys)
    means = replace(neutral, pre_mean=pre, post_mean=post, rope=table)
    balance, value_mean = neutral.balance, neutral.value_mean
    if settings.balance:
        power = rows.mean(keys, lambda x, n: (x - means.key_mean(n, x.shape[2])).square_())
        balance = rows.pick(_balance(power, query_power, settings.balance_limit), balance)
    if settings.value_mean:
        value_mean = rows.pick(rows.mean(values), value_mean)
    return replace(means, balance=balance, value_mean=value_mean)


@dataclass(frozen=True, eq=False)
class _Rows:
    """The tokens that statistics are taken of: `count` rows from index `start` on."""

    start: int
    count: int
    valid: Tensor | None
    batch: int
    device: torch.device

    @property
    def tokens(self) -> Tensor:
        """Valid tokens of each sequence, float64 `[B, 1, 1]`."""
        if self.valid is None:
            shape = (self.batch, 1, 1)
            return torch.full(shape, self.count, dtype=torch.float64, device=self.device)
        return self.valid.sum(1, dtype=torch.float64)[:, None, None]

    def pick(self, measured: Tensor, neutral: Tensor) -> Tensor:
        """`measured` for sequences with tokens enough, `neutral` for the others; float32."""
        return torch.where(self.tokens >= MIN_TOKENS, measured.float(), neutral)

    def mean(self, x: Tensor, term: Callable[[Tensor, int], Tensor] | None = None) -> Tensor:
        """Mean over valid tokens of `term(rows, index of the first)`, float64 `[B, Hk, D]`."""
        total = torch.zeros(1, dtype=torch.float64, device=x.device)
        step = max(SPAN, _NUMBERS_AT_ONCE // (x.shape[0] * x.shape[1] * x.shape[3]))
        for a in range(0, self.count, step):
            rows = slice(a, min(a + step, self.count))
            part = x[:, :, rows].float()
            part = part if term is None else term(part, self.start + a)
            if self.valid is not None:
                # not a product: padding may hold NaN
                part = part.masked_fill(~self.valid[:, None, rows, None], 0)
            total = total + part.sum(-2, dtype=torch.float64)
        return total / self.tokens.clamp_min(1)


def _key_means(
    keys: Tensor, rows: _Rows, rope: RopeTable | None, choice: str
) -> tuple[Tensor, Tensor, RopeTable | None]:
    """Returns pre_mean and post_mean, float32 `[B, Hk, D]`, and the table of the former."""
    zero = Preconditioner.identity(keys).pre_mean
    if choice == "none":
        return zero, zero, None
    if choice == "auto" and rope is not None and rope.rotary_dim > keys.shape[3]:
        rope = None
    if choice == "post_rope" or rope is None:
        post = rows.mean(keys)
        if choice == "auto":
            post = torch.where(_worthwhile(post, keys, rows), post, 0)
        return zero, rows.pick(post, zero), None
    pre, table = _pre_mean(keys, rows, rope)
    if choice == "pre_rope":
        return rows.pick(pre, zero), zero, table
    post = rows.mean(keys)
    # RoPE turns without stretching, so either mean removes its own square from the mean energy
    turned = _energy(pre) > _energy(post)
    best = torch.where(turned, pre, post)
    best = rows.pick(torch.where(_worthwhile(best, keys, rows), best, 0), zero)
    pre, post = torch.where(turned, best, 0), torch.where(turned, 0, best)
    return pre, post, table if bool(pre.any()) else None


def _pre_mean(keys: Tensor, rows: _Rows, rope: RopeTable) -> tuple[Tensor, RopeTable]:
    """Returns the mean of the keys turned back, float64, and by which convention they were."""
    means = []
    for table in rope.conventions:
        table.cos_sin(rows.start, rows.count, keys.device)
        means.append((rows.mean(keys, table.unrotate), table))
    if len(means) == 1:
        return means[0]
    zero = torch.zeros((), device=keys.device)
    return max(means, key=lambda pair: float(rows.pick(_energy(pair[0]), zero).sum()))


def _worthwhile(mean: Tensor, keys: Tensor, rows: _Rows) -> Tensor:
    """Whether removing a mean saves enough of the energy of keys to come, bool `[B, Hk, 1]`.

    The mean m of N tokens carries sigma^2 / N of their noise: chance alone makes |m|^2 too large
    by that, and it is added to every key that m is later taken from.
    """
    energy = _energy(mean)
    total = _channel_sum(rows.mean(keys, lambda x, n: x.square()))
    tokens = rows.tokens
    noise = (total - energy).clamp_min(0) / (tokens - 1).clamp_min(1)
    return (energy - 2 * noise >= MIN_SAVING * total) & (energy > 0)


def _balance(key_power: Tensor, query_power: Tensor | None, limit: float) -> Tensor:
    """sqrt(rms q / rms k') from mean squares, of geometric mean 1, then clamped; `[B, Hk, D]`."""
    log_ratio = -_log_power(key_power) / 4
    if query_power is not None:
        log_ratio = log_ratio + _log_power(query_power.double()) / 4
    log_ratio = log_ratio - _channel_sum(log_ratio) / log_ratio.shape[-1]
    return log_ratio.exp().clamp(1 / limit, limit)


def _log_power(power: Tensor) -> Tensor:
    """log of a power relative to the mean of its channels; 0 where all of them are dead."""
    average = _channel_sum(power) / power.shape[-1]
    relative = power / torch.where(average > 0, average, 1)
    return torch.where(average > 0, relative.clamp_min(_POWER_FLOOR), 1).log()


def _energy(mean: Tensor) -> Tensor:
    """Squared length, `[..., D]` to `[..., 1]`."""
    return _channel_sum(mean.square())


def _channel_sum(x: Tensor) -> Tensor:
    return x.sum(-1, keepdim=True)


def _check_shapes(
    keys: Tensor, values: Tensor, query_power: Tensor | None, valid: Tensor | None
) -> None:
    if keys.dim() != 4 or keys.shape != values.shape or keys.shape[2] == 0:
        raise ValueError(
            "keys and values must share one shape [batch, kv_heads, tokens, head_dim] with at "
            f"least one token, got {list(keys.shape)} and {list(values.shape)}"
        )
    batch, heads, count, dim = keys.shape
    if query_power is not None and query_power.shape != (batch, heads, dim):
        raise ValueError(
            f"query_power must be [batch, kv_heads, head_dim] = {[batch, heads, dim]}, got "
            f"{list(query_power.shape)}; average the heads of a group first"
        )
    if valid is not None and (valid.shape != (batch, count) or valid.dtype != torch.bool):
        raise ValueError(
            f"valid must be bool [batch, tokens] = {[batch, count]}, got {valid.dtype} "
            f"{list(valid.shape)}"
        )
