# SPDX-License-Identifier: Apache-2.0
"""Means of keys and values in the form that the encode kernel reads, and how RoPE turns them.

What depends on a preconditioner alone is kept as long as that; the angles of the range asked for
last are kept for the next layer.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from rq_hf.ops.triton.arguments import KeyMean, Matrix, Turns
from rq_hf.quant.preconditioning import Preconditioner
from rq_hf.quant.rope import RopeTable
from rq_hf.quant.rotations import Rotation
from rq_hf.quant.tiles import TileCodec

_kept: WeakKeyDictionary[Preconditioner, dict[Any, Any]] = WeakKeyDictionary()


class Pairing(NamedTuple):
    """Which dimensions RoPE turns together: `rotary_dim` leading ones, neighbours or halves."""

    rotary_dim: int = 0
    interleaved: bool = False

    @classmethod
    def of(cls, rope: RopeTable | None) -> Pairing:
        """Returns the pairing of a table of known convention."""
        return cls() if rope is None else cls(rope.rotary_dim, bool(rope.interleaved))

    def dims(self, head_dim: int) -> Tensor:
        """Dimensions of the firsts and seconds of all pairs, [2, D / 2], first those that turn."""
        turned = torch.arange(self.rotary_dim)
        turned = turned.view(-1, 2).T if self.interleaved else turned.view(2, -1)
        return torch.cat((turned, torch.arange(self.rotary_dim, head_dim).view(2, -1)), 1)


def key_mean(preconditioner: Preconditioner) -> Tensor:
    """Returns the means and the balance of keys, members of `KeyMean`: [B, Hk, 4, 2, D / 2]."""
    kept = _kept.setdefault(preconditioner, {})
    if "key" not in kept:
        kept["key"] = _key_mean(preconditioner)
    return kept["key"]


def _key_mean(preconditioner: Preconditioner) -> Tensor:
    balance = preconditioner.balance
    dims = pairs(Pairing.of(preconditioner.rope), balance.shape[-1], balance.device)[0]
    pre, post, balance = (
        x[..., dims] for x in (preconditioner.pre_mean, preconditioner.post_mean, balance)
    )
    members = KeyMean(
        pre=balance * pre, cross=balance * pre.flip(-2), post=balance * post, balance=balance
    )
    return torch.stack(members, -3)


def rotated_mean(preconditioner: Preconditioner, rotation: Rotation, matrix: Matrix) -> Tensor:
    """Returns the mean of values as rows have it that `matrix` has rotated, [B, Hk, D padded]."""
    kept = _kept.setdefault(preconditioner, {})
    key = rotation, matrix.unscale
    if key not in kept:
        mean = preconditioner.value_mean
        exact = rotation.matrix(mean.device, torch.float64)
        rotated = (mean.double() @ exact.T / matrix.unscale).float()
        kept[key] = F.pad(rotated, (0, matrix.high.shape[-1] - rotation.head_dim))
    return kept[key]


def turns(
    rope: RopeTable | None, start: int, tiles: int, codec: TileCodec, device: torch.device
) -> Turns | None:
    """Angles of the tiles' first rows, and of the rows from there on."""
    if rope is None:
        return None
    length = codec.layout.tile_length
    return Turns(
        _cos_sin(rope, start, tiles, length, codec.head_dim, device),
        _cos_sin(rope, 0, length, 1, codec.head_dim, device),
        *pairs(Pairing.of(rope), codec.head_dim, device),
    )


@lru_cache(maxsize=16)
def _cos_sin(
    rope: RopeTable, start: int, count: int, step: int, head_dim: int, device: torch.device
) -> Tensor:
    """Cosines and sines at every `step`-th position from `start`: float32 [count, 2, D / 2].

    Pairs that do not turn have the angle 0. Angles are float64, as in `RopeTable`.
    """
    inv_freq = rope.inv_freq.to(device=device, dtype=torch.float64)
    inv_freq = F.pad(inv_freq, (0, head_dim // 2 - inv_freq.shape[0]))
    position = start + step * torch.arange(count, dtype=torch.float64, device=device)
    angle = position[:, None] * inv_freq
    return torch.stack((angle.cos(), angle.sin()), 1).float()


@lru_cache(maxsize=64)
def pairs(pairing: Pairing, head_dim: int, device: torch.device) -> tuple[Tensor, tl.constexpr]:
    """Returns the dimensions of the pairs, int32 [2, D / 2], and whether these are the halves."""
    dims = pairing.dims(head_dim)
    halves = bool((dims.flatten() == torch.arange(head_dim)).all())
    return dims.to(device=device, dtype=torch.int32).contiguous(), tl.constexpr(halves)
