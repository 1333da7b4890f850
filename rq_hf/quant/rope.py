# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding (RoFormer, arXiv 2104.09864) as a rotation that can be undone.

Pairs of coordinates turn by n * inv_freq at position n. Two conventions say which make a pair: in
"half-split" models coordinate i goes with i + r/2 (r = rotary_dim), in "interleaved" ones 2i goes
with 2i + 1. Coordinates from r on stay.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

# positions whose angles are held in float64 at a time
_ANGLE_ROWS = 4096
# longest table that is kept: one for a whole long text would be a burden
_KEPT_ROWS = 8192


@dataclass(frozen=True, eq=False)
class RopeTable:
    """What RoPE does to the keys of one layer.

    Args:
        inv_freq: Radians a position turns each pair, `[rotary_dim / 2]`, float32 or float64. A
            model's own float32 numbers serve best: its keys were turned by exactly these.
        interleaved: Pairs are neighbours (True) or half of `rotary_dim` apart (False). None says
            that it is not known; `conventions` lists what to try, and nothing can be rotated.
    """

    inv_freq: Tensor
    interleaved: bool | None = False
    # the last range asked for: layers that share a table ask for the same one in turn
    _last: dict[str, tuple[int, Tensor, Tensor]] = field(
        default_factory=dict, init=False, repr=False
    )

    def __post_init__(self) -> None:
        if self.inv_freq.dim() != 1 or not self.inv_freq.is_floating_point():
            raise ValueError(
                "inv_freq must be one row of floating-point radians a position, got "
                f"{self.inv_freq.dtype} {list(self.inv_freq.shape)}"
            )

    @property
    def rotary_dim(self) -> int:
        """How many leading coordinates turn."""
        return 2 * self.inv_freq.shape[0]

    @cached_property
    def conventions(self) -> tuple[RopeTable, ...]:
        """The tables of known convention that this one may stand for, itself if it is known."""
        if self.interleaved is not None:
            return (self,)
        return tuple(replace(self, interleaved=choice) for choice in (False, True))

    @cached_property
    def digest(self) -> tuple[bytes, bool | None]:
        """What tells tables apart: equal for tables that turn alike."""
        return self.inv_freq.double().cpu().numpy().tobytes(), self.interleaved

    def cos_sin(
        self, start: int, count: int, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the angles at positions `start` to `start + count - 1`.

        Angles are float64, so that 1e6 radians still leave 1e-10 for the fraction of a turn.

        Returns:
            Two float32 tensors `[count, rotary_dim / 2]`, to be read only: they are kept for the
            next caller.
        """
        name = str(torch.device(device))
        first, cos, sin = self._last.get(name, (0, None, None))
        if cos is None or sin is None or start < first or start + count > first + cos.shape[0]:
            first, (cos, sin) = start, self._tabulate(start, count, device)
            if count <= _KEPT_ROWS:
                self._last[name] = (first, cos, sin)
        rows = slice(start - first, start - first + count)
        return cos[rows], sin[rows]

    def _tabulate(
        self, start: int, count: int, device: torch.device | str
    ) -> tuple[Tensor, Tensor]:
        inv_freq = self.inv_freq.to(device=device, dtype=torch.float64)
        cos = torch.empty(count, inv_freq.shape[0], dtype=torch.float32, device=device)
        sin = torch.empty_like(cos)
        for a in range(0, count, _ANGLE_ROWS):
            b = min(a + _ANGLE_ROWS, count)
            position = torch.arange(start + a, start + b, dtype=torch.float64, device=device)
            angle = position[:, None] * inv_freq
            cos[a:b], sin[a:b] = angle.cos(), angle.sin()
        return cos, sin

    def rotate(self, x: Tensor, start: int, count: int | None = None) -> Tensor:
        """RoPE_n x: every row turned forward to its position.

        Args:
            x: Vectors `[..., n, D]`, any floating dtype; row j belongs to position `start + j`.
            start: Position of the first row.
            count: With n = 1: one vector for `count` positions, as `[..., count, D]`.

        Returns:
            float32, `[..., n, D]`.

        Raises:
            ValueError: The convention is unknown, or D is less than `rotary_dim`.
        """
        cos, sin = self._angles(x, start, count)
        return self._turn(x, cos, sin)

    def unrotate(self, x: Tensor, start: int) -> Tensor:
        """RoPE_n^-1 x: the inverse of `rotate`, same arguments and errors."""
        cos, sin = self._angles(x, start, None)
        return self._turn(x, cos, -sin)

    def channels(
        self, start: int, count: int, head_dim: int, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor]:
        """Cosines and sines by channel: RoPE_n x = x cos - partner(x) sin, its inverse with +.

        Returns:
            Two float32 tensors `[count, head_dim]`; 1 and 0 for channels that stay.

        Raises:
            ValueError: As for `rotate`.
        """
        self._check_width(head_dim)
        cos, sin = (self._join(t, t) for t in self.cos_sin(start, count, device))
        stay = head_dim - self.rotary_dim
        return (F.pad(cos, (0, stay), value=1.0), F.pad(sin, (0, stay))) if stay else (cos, sin)

    def partner(self, x: Tensor) -> Tensor:
        """For each pair of channels (a, b) of `x` `[..., D]` (b, -a); 0 for those that stay."""
        a, b = self._pairs(x[..., : self.rotary_dim])
        partner, stay = self._join(b, -a), x.shape[-1] - self.rotary_dim
        return F.pad(partner, (0, stay)) if stay else partner

    def inner_products(self, x: Tensor, vector: Tensor, start: int, count: int) -> Tensor:
        """x . RoPE_n vector for n = `start` .. `start + count - 1`.

        With a turned pair (v1, v2) the product is (x1 v1 + x2 v2) cos + (x2 v1 - x1 v2) sin, so
        one product with the table serves all rows.

        Args:
            x: Vectors `[..., D]`, not turned.
            vector: What is turned, `[..., D]`, broadcast against `x`.
            start: First position.
            count: Number of positions.

        Returns:
            `[..., count]` in the dtype of `x`.
        """
        cos, sin = (t.to(x.dtype) for t in self.cos_sin(start, count, x.device))
        vector, r = vector.to(x.dtype), self.rotary_dim
        x1, x2 = self._pairs(x[..., :r])
        v1, v2 = self._pairs(vector[..., :r])
        product = (x1 * v1 + x2 * v2) @ cos.T + (x2 * v1 - x1 * v2) @ sin.T
        rest = x[..., r:] * vector[..., r:]
        return product + rest.sum(-1, keepdim=True)

    def _angles(self, x: Tensor, start: int, count: int | None) -> tuple[Tensor, Tensor]:
        self._check_width(x.shape[-1])
        return self.cos_sin(start, x.shape[-2] if count is None else count, x.device)

    def _check_width(self, head_dim: int) -> None:
        if head_dim < self.rotary_dim:
            raise ValueError(
                f"RoPE turns {self.rotary_dim} coordinates, got vectors of {head_dim}; this "
                "table belongs to another layer or model"
            )

    def _turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x.float()
        r = self.rotary_dim
        a, b = self._pairs(x[..., :r])
        turned = self._join(a * cos - b * sin, b * cos + a * sin)
        if x.shape[-1] == r:
            return turned
        rest = x[..., r:].expand(*turned.shape[:-1], -1)
        return torch.cat([turned, rest], dim=-1)

    def _pairs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.interleaved is None:
            raise ValueError(
                "this RopeTable does not say whether pairs are interleaved; rotate with one of "
                "its `conventions`"
            )
        if self.interleaved:
            return x[..., 0::2], x[..., 1::2]
        half = self.inv_freq.shape[0]
        return x[..., :half], x[..., half:]

    def _join(self, a: Tensor, b: Tensor) -> Tensor:
        if self.interleaved:
            return torch.stack([a, b], dim=-1).flatten(-2)
        return torch.cat([a, b], dim=-1)
