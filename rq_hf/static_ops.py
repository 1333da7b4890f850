# SPDX-License-Identifier: Apache-2.0
"""Steps of a static layer as operators that `torch.compile` takes for single nodes of its graph.

Where nothing is compiled they are called without torch's dispatch, which takes several times
longer than what they do on the host. They get tensors, numbers and the name of a `Recipe`: what
else packing and reading need. Equal recipes have equal names, so what was compiled for one cache
serves all like it.
"""

# annotations stay objects here: the schemas of the operators are read from them
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rq_hf.ops import ExactRows, LayerView, attend
from rq_hf.ops.append import Buffers, append
from rq_hf.quant.preconditioning import Preconditioner
from rq_hf.quant.rope import RopeTable
from rq_hf.quant.tiles import TileCodec


@dataclass(frozen=True, eq=False)
class Recipe:
    """What is the same for every step of a layer.

    Attributes:
        codec: What packs tiles and decodes them.
        rope: How keys were turned; None if no key mean is taken before RoPE.
        impl: "auto", "reference" or "triton", see `RotorQuantConfig`.
    """

    codec: TileCodec
    rope: RopeTable | None
    impl: str


class StaticTensors(NamedTuple):
    """What attention reads of a static layer; all of it at fixed addresses.

    Attributes:
        exact_keys: Keys of sinks and tail, `[B, Hk, S + R + T, D]`.
        exact_values: Their values.
        records: Packed words, int32 `[B, Hk, tiles, W]`.
        scales: Scales, float16 `[B, Hk, tiles, rows, T]`.
        counts: What is in use, see `LayerView.counts`.
        padding: Left padding, int64 `[B]`.
        pre_mean: Of the `Preconditioner`, float32 `[B, Hk, D]`, as are the next three.
        post_mean: See there.
        balance: See there.
        value_mean: See there.
    """

    exact_keys: Tensor
    exact_values: Tensor
    records: Tensor
    scales: Tensor
    counts: Tensor
    padding: Tensor
    pre_mean: Tensor
    post_mean: Tensor
    balance: Tensor
    value_mean: Tensor

    @property
    def statistics(self) -> tuple[Tensor, ...]:
        """`pre_mean`, `post_mean`, `balance` and `value_mean`."""
        return self[-4:]

    def preconditioner(self, rope: RopeTable | None) -> Preconditioner:
        """Returns the statistics."""
        return Preconditioner(self.pre_mean, self.post_mean, self.balance, self.value_mean, rope)

    def view(self, recipe: Recipe, sink_length: int) -> LayerView:
        """Returns a view of the whole buffers, with `counts`."""
        keys, values = self.exact_keys, self.exact_values
        return LayerView(
            sinks=ExactRows(keys[:, :, :sink_length], values[:, :, :sink_length], 0, self.padding),
            packed_start=sink_length,
            packed_length=self.records.shape[2] * recipe.codec.layout.tile_length,
            records=self.records,
            scales=self.scales,
            codec=recipe.codec,
            preconditioner=self.preconditioner(recipe.rope),
            recent=(ExactRows(keys[:, :, sink_length:], values[:, :, sink_length:], sink_length),),
            padding=self.padding,
            counts=self.counts,
        )


_recipes: dict[str, Recipe] = {}


def intern_recipe(recipe: Recipe, fields: tuple[object, ...]) -> str:
    """Returns the name of a recipe for the life of the process.

    Args:
        recipe: The recipe.
        fields: What determines its codec.
    """
    rope = "none"
    if recipe.rope is not None:
        frequencies, interleaved = recipe.rope.digest
        rope = f"{hashlib.sha256(frequencies).hexdigest()[:16]} {interleaved}"
    name = f"{recipe.codec.head_dim} {fields!r} {recipe.impl} {rope}"
    _recipes.setdefault(name, recipe)
    return name


def recipe_of(name: str) -> Recipe:
    """Returns the recipe of that name."""
    return _recipes[name]


def _append(
    key: Tensor,
    value: Tensor,
    exact_keys: Tensor,
    exact_values: Tensor,
    records: Tensor,
    scales: Tensor,
    counts: Tensor,
    not_finite: Tensor,
    length: Tensor,
    base: Tensor,
    sink_length: int,
    residual_length: int,
    max_length: int,
    pre_mean: Tensor,
    post_mean: Tensor,
    balance: Tensor,
    value_mean: Tensor,
    recipe: str,
) -> None:
    """Stores one token a sequence, see `rq_hf.ops.append`: key, value, `Buffers`, statistics.

    Raises:
        ValueError: There is no room for another token. Seen on a CPU only: elsewhere the length
            would have to be waited for.
    """
    if length.device.type == "cpu" and int(length) >= max_length:
        raise ValueError(
            f"the cache is full: it holds max_cache_len = {max_length} tokens; make one with a "
            "larger max_cache_len"
        )
    # the schema of an operator has no tuples
    buffers = Buffers(
        exact_keys,
        exact_values,
        records,
        scales,
        counts,
        not_finite,
        length,
        base,
        sink_length,
        residual_length,
        max_length,
    )
    of = _recipes[recipe]
    statistics = Preconditioner(pre_mean, post_mean, balance, value_mean, of.rope)
    append(of.codec, statistics, key, value, buffers, impl=of.impl)


def _attend(
    query: Tensor,
    tensors: Sequence[Tensor],
    mask: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float | None,
    sink_length: int,
    recipe: str,
) -> Tensor:
    """Returns attention for queries `[B, Hq, L, D]`, see `rq_hf.ops.attend`.

    `tensors` are `StaticTensors`, here and below.
    """
    of = _recipes[recipe]
    view = StaticTensors(*tensors).view(of, sink_length)
    options = {"scale": scale, "mask": mask, "softcap": softcap, "sinks": sinks}
    return attend(query, view, impl=of.impl, **options).contiguous()  # type: ignore[arg-type]


def _decode(
    tensors: Sequence[Tensor],
    length: int,
    sink_length: int,
    recipe: str,
) -> tuple[Tensor, Tensor]:
    """Returns all keys and values, `[B, Hk, length, D]`; rows behind the last token are zero.

    Waits for nothing: every tile that there is room for is decoded.
    """
    of = StaticTensors(*tensors)
    view = of.view(_recipes[recipe], sink_length)
    key, value = view.decode_tiles(0, of.records.shape[2], dtype=of.exact_keys.dtype)
    place = _Places(of.counts, of.padding, length, sink_length)
    return place.join(of.exact_keys, key), place.join(of.exact_values, value)


class _Places:
    """Where each of `length` tokens lies, by tensors alone."""

    def __init__(self, counts: Tensor, padding: Tensor, length: int, sink_length: int) -> None:
        sinks, tail, packed, _ = counts.long().unbind()
        self.index = torch.arange(length, device=counts.device)
        self.is_packed = (self.index >= sinks) & (self.index < sinks + packed)
        self.is_free = self.index >= sinks + packed + tail
        self.packed = self.index - sinks
        self.exact = torch.where(self.index < sinks, self.index, self.index - packed)
        first = torch.arange(min(sink_length, length), device=counts.device)
        self.sinks = (padding[:, None] + first).clamp_max(length - 1)

    def join(self, exact: Tensor, packed: Tensor) -> Tensor:
        """Returns rows in the order of the sequence, of which `exact` and `packed` have some."""
        rows, tiles = (
            x.index_select(2, at.clamp(0, x.shape[2] - 1))
            for x, at in ((exact, self.exact), (packed, self.packed))
        )
        dense = torch.where(self.is_packed[:, None], tiles, rows)
        # the sinks of a padded sequence are its first real tokens
        first = exact[:, :, : self.sinks.shape[1]]
        dense.scatter_(2, self.sinks[:, None, :, None].expand_as(first), first)
        return dense.masked_fill_(self.is_free[:, None], 0)


_append_op = torch.library.custom_op(
    "rq_hf::append_",
    _append,
    mutates_args=("exact_keys", "exact_values", "records", "scales", "counts", "not_finite"),
)
_attend_op = torch.library.custom_op("rq_hf::attend_static", _attend, mutates_args=())
_decode_op = torch.library.custom_op("rq_hf::decode_static", _decode, mutates_args=())


@_append_op.register_fake
def _(*args: object) -> None:
    return None


@_attend_op.register_fake
def _(query: Tensor, *args: object) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


@_decode_op.register_fake
def _(tensors: Sequence[Tensor], length: int, *args: object) -> tuple[Tensor, Tensor]:
    batch, heads, _, head_dim = tensors[0].shape
    dense = tensors[0].new_empty(batch, heads, length, head_dim)
    return dense, torch.empty_like(dense)


def append_(*args: Any) -> None:
    """Stores one token a sequence; arguments and errors are those of `_append`."""
    (_append_op if _is_traced(args[0]) else _append)(*args)


def attend_static(*args: Any) -> Tensor:
    """Returns attention for queries; arguments are those of `_attend`."""
    return (_attend_op if _is_traced(args[0]) else _attend)(*args)


def decode_static(*args: Any) -> tuple[Tensor, Tensor]:
    """Returns all keys and values; arguments are those of `_decode`."""
    return (_decode_op if _is_traced(args[0][0]) else _decode)(*args)


def _is_traced(tensor: Tensor) -> bool:
    """Whether operations are taken note of and not done.

    Before torch 2.13 handles are asked with tensors without numbers, when nothing is compiling.
    """
    return torch.compiler.is_compiling() or type(tensor) is not Tensor
