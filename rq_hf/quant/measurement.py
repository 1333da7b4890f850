# SPDX-License-Identifier: Apache-2.0
"""Measuring the statistics that a `Preconditioner` holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from rq_hf.quant.preconditioning import SPAN, Preconditioner
from rq_hf.quant.rope import RopeTable

KEY_MEANS = ("auto", "pre_rope", "post_rope", "none")
MIN_TOKENS = 8  # statistics of fewer say more about the tokens than about the head
MIN_SAVING = 0.01  # part of the energy that a mean has to remove to be worth its upkeep
# numbers in float64 at a time, beside the cache, but a span of tokens at least
_NUMBERS_AT_ONCE = 1 << 22
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
    rows = _Rows(start, keys.shape[2], valid)
    means = _Means.of(keys, rows, _tables(rope, settings.key_mean, keys.shape[3]))
    neutral = Preconditioner.identity(keys)
    pre, post, table = _key_means(means, rows, settings.key_mean)
    pre, post = (neutral.pre_mean if mean is None else mean for mean in (pre, post))
    balance, value_mean = neutral.balance, neutral.value_mean
    if settings.balance:
        power = means.left_by(pre, post, table)
        balance = rows.pick(_balance(power, query_power, settings.balance_limit), 1.0)
    if settings.value_mean:
        value_mean = rows.pick(rows.means(values, _sum)[0], 0.0)
    return Preconditioner(pre, post, balance, value_mean, table)


def _tables(rope: RopeTable | None, choice: str, head_dim: int) -> tuple[RopeTable, ...]:
    """Returns the tables by which keys may have been turned, as far as `choice` asks for them."""
    if rope is None or choice not in ("auto", "pre_rope"):
        return ()
    if choice == "auto" and rope.rotary_dim > head_dim:
        return ()
    return rope.conventions


@dataclass(frozen=True, eq=False)
class _Rows:
    """The tokens that statistics are taken of: `count` rows from index `start` on."""

    start: int
    count: int
    valid: Tensor | None

    @cached_property
    def tokens(self) -> Tensor | float:
        """Valid tokens: of each sequence float64 `[B, 1, 1]`, without padding one number."""
        if self.valid is None:
            return float(self.count)
        return self.valid.sum(1, dtype=torch.float64)[:, None, None]

    def pick(self, measured: Tensor, neutral: float) -> Tensor:
        """`measured` for sequences with tokens enough, `neutral` for the others; float32."""
        enough, measured = self.tokens >= MIN_TOKENS, measured.float()
        if isinstance(enough, Tensor):
            return measured.where(enough, neutral)
        return measured if enough else torch.full_like(measured, neutral)

    def means(self, x: Tensor, *sums: Callable[[Tensor, int], Tensor]) -> list[Tensor]:
        """Means over the valid tokens of `x` `[B, Hk, n, D]`, float64 `[B, Hk, D]`.

        Args:
            x: A row for each token.
            sums: Each adds up something of float64 rows, given the place of the first.
        """
        totals: list[Tensor] = []
        step = max(SPAN, _NUMBERS_AT_ONCE // (x.shape[0] * x.shape[1] * x.shape[3]))
        for a in range(0, self.count, step):
            part = x[:, :, a : a + step]
            if self.valid is not None:
                # not a product: padding may hold NaN
                part = part.masked_fill(~self.valid[:, None, a : a + step, None], 0)
            part = part.double()
            new = [of(part, a) for of in sums]
            totals = [x + y for x, y in zip(totals, new, strict=True)] if totals else new
        return [total / self._divisor(1) for total in totals]

    def variance_of_mean(self, power: Tensor, energy: Tensor) -> Tensor:
        """Square of what chance makes of a mean, from the mean square and the mean squared."""
        return (power - energy).clamp_min(0) / self._divisor(1, but=1)

    def _divisor(self, least: int, but: int = 0) -> Tensor | float:
        tokens = self.tokens - but
        return tokens.clamp_min(least) if isinstance(tokens, Tensor) else max(tokens, least)


def _sum(x: Tensor, first: int) -> Tensor:
    return x.sum(-2)


def _sum_of_squares(x: Tensor, first: int) -> Tensor:
    return x.square().sum(-2)


def _sum_with(factor: Tensor) -> Callable[[Tensor, int], Tensor]:
    """Sums rows times a factor that each has for each channel, `[n, D]`."""
    return lambda x, first: (x * factor[first : first + x.shape[-2]]).sum(-2)


class _Turned(NamedTuple):
    """Means over keys that a table of RoPE has turned, float64 `[B, Hk, D]`."""

    key_cos: Tensor
    key_sin: Tensor
    cos_cos: Tensor
    cos_sin: Tensor
    sin_sin: Tensor

    @classmethod
    def of(cls, cos: Tensor, sin: Tensor, key_cos: Tensor, key_sin: Tensor, rows: _Rows) -> _Turned:
        """Takes the table by channel, `[n, D]`, and the means over the keys."""
        # sequences without padding have the same rows of the table
        batch = 1 if rows.valid is None else rows.valid.shape[0]
        wide_cos, wide_sin = (t.expand(batch, 1, -1, -1) for t in (cos, sin))
        cos_cos, cos_sin = rows.means(wide_cos, _sum_with(cos), _sum_with(sin))
        (sin_sin,) = rows.means(wide_sin, _sum_with(sin))
        return cls(key_cos, key_sin, cos_cos, cos_sin, sin_sin)


@dataclass(frozen=True, eq=False)
class _Means:
    """What one pass over the keys tells, float64 `[B, Hk, D]`.

    Attributes:
        key: Mean of the keys.
        square: Mean of their squares.
        turned: By table that may have turned them.
    """

    key: Tensor
    square: Tensor
    turned: dict[RopeTable, _Turned]

    @classmethod
    def of(cls, keys: Tensor, rows: _Rows, tables: Sequence[RopeTable]) -> _Means:
        angles = [t.channels(rows.start, rows.count, keys.shape[3], keys.device) for t in tables]
        factors = [_sum_with(factor) for pair in angles for factor in pair]
        key, square, *rest = rows.means(keys, _sum, _sum_of_squares, *factors)
        turned = {
            table: _Turned.of(*angle, rest[2 * i], rest[2 * i + 1], rows)
            for i, (table, angle) in enumerate(zip(tables, angles, strict=True))
        }
        return cls(key, square, turned)

    def before_rope(self, table: RopeTable) -> Tensor:
        """Mean of the keys turned back."""
        turned = self.turned[table]
        return turned.key_cos + table.partner(turned.key_sin)

    def left_by(self, pre: Tensor, post: Tensor, table: RopeTable | None) -> Tensor:
        """Mean square of the keys k_n less R_n `pre` and `post`, one of which is zero.

        The square is multiplied out, with R_n m = m cos_n - partner(m) sin_n, so no second pass
        over the keys is needed. Where a mean is large the difference loses digits that float64 has
        to spare.
        """
        m = post.double()
        power = self.square + m * (m - 2 * self.key)
        if table is not None:
            of, m = self.turned[table], pre.double()
            p = table.partner(m)
            power = power + m * (m * of.cos_cos - 2 * of.key_cos)
            power = power + p * (p * of.sin_sin - 2 * m * of.cos_sin + 2 * of.key_sin)
        return power.clamp_min(0)


def _key_means(
    means: _Means, rows: _Rows, choice: str
) -> tuple[Tensor | None, Tensor | None, RopeTable | None]:
    """Returns pre_mean and post_mean, float32 `[B, Hk, D]`, and the table of the former."""
    if choice == "none":
        return None, None, None
    if not means.turned:
        post = means.key
        if choice == "auto":
            post = post.where(_worthwhile(post, means, rows), 0)
        return None, rows.pick(post, 0.0), None
    pre, table = _pre_mean(means, rows)
    if choice == "pre_rope":
        return rows.pick(pre, 0.0), None, table
    # RoPE turns without stretching, so either mean removes its own square from the mean energy
    turned = _energy(pre) > _energy(means.key)
    best = pre.where(turned, means.key)
    best = rows.pick(best.where(_worthwhile(best, means, rows), 0), 0.0)
    pre = best.where(turned, 0)
    post = best - pre
    return pre, post, table if bool(pre.any()) else None


def _pre_mean(means: _Means, rows: _Rows) -> tuple[Tensor, RopeTable]:
    """Returns the mean of the keys turned back, float64, and by which convention they were."""
    found = [(means.before_rope(table), table) for table in means.turned]
    if len(found) == 1:
        return found[0]
    return max(found, key=lambda pair: float(rows.pick(_energy(pair[0]), 0.0).sum()))


def _worthwhile(mean: Tensor, means: _Means, rows: _Rows) -> Tensor:
    """Whether removing a mean saves enough of the energy of keys to come, bool `[B, Hk, 1]`.

    The mean m of N tokens carries sigma^2 / N of their noise: chance alone makes |m|^2 too large
    by that, and it is added to every key that m is later taken from.
    """
    energy, total = _energy(mean), _channel_sum(means.square)
    noise = rows.variance_of_mean(total, energy)
    return (energy - 2 * noise >= MIN_SAVING * total) & (energy > 0)


def _balance(key_power: Tensor, query_power: Tensor | None, limit: float) -> Tensor:
    """sqrt(rms q / rms k') from mean squares, of geometric mean 1, then clamped; `[B, Hk, D]`."""
    if query_power is None:
        log_ratio = _log_power(key_power).neg()
    else:
        key, query = _log_power(torch.stack((key_power, query_power.double())))
        log_ratio = query - key
    log_ratio = (log_ratio - log_ratio.mean(-1, keepdim=True)) / 4
    return log_ratio.exp().clamp(1 / limit, limit)


def _log_power(power: Tensor) -> Tensor:
    """log of a power relative to the mean of its channels; 0 where that is 0 or not finite."""
    average = power.mean(-1, keepdim=True)
    relative = (power / average).clamp_min(_POWER_FLOOR)
    return relative.where((average > 0) & average.isfinite(), 1).log()


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
