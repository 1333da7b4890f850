# SPDX-License-Identifier: Apache-2.0
"""Packing a layer's tokens: statistics first, then tile after tile as they leave the tail."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rq_hf.config import RotorQuantConfig
from rq_hf.ops import ExactRows, LayerView
from rq_hf.ops.encode import encode
from rq_hf.quant.measurement import StatisticsSettings, measure
from rq_hf.quant.precision import no_autocast
from rq_hf.quant.preconditioning import Preconditioner
from rq_hf.quant.rope import RopeTable
from rq_hf.quant.tiles import TileCodec
from rq_hf.statistics import QueryStatistics
from rq_hf.storage import LayerStore, RowBuffer, StoreMark

# store, frozen statistics, padding, and what is known of queries and padding while they are open
_Before = tuple[
    StoreMark,
    Preconditioner | None,
    Tensor | None,
    tuple[Tensor | None, Tensor | None, Tensor | None],
]


class PackedStates:
    """Keys and values of one layer: a store, and what it takes to fill and to read it.

    Attributes:
        config: How to store.
        layer_idx: Position in the model, for messages.
        rope: What the model's position embedding does to the keys; None if unknown.
        store: Exact rows and packed tiles; None while nothing was allocated.
        codec: What packs tiles and decodes them.
        preconditioner: Statistics, frozen when the first tokens are packed; None before.
        statistics: What is known of queries and padding until then.
        kept: Statistics of an earlier prompt, which are to be frozen in place of measured ones.
        padding: Left padding `[B]` that the sinks skip; None for none.
    """

    _before: _Before | None

    def __init__(self, config: RotorQuantConfig, layer_idx: int, rope: RopeTable | None) -> None:
        self.config = config
        self.layer_idx = layer_idx
        self.rope = rope
        self.forget()

    def forget(self) -> None:
        """Drops all states and statistics."""
        self.store: LayerStore | None = None
        self.codec: TileCodec | None = None
        self.preconditioner: Preconditioner | None = None
        self.statistics = QueryStatistics()
        self.kept: Preconditioner | None = None
        self.padding: Tensor | None = None
        self.forget_before()

    def note_before(self) -> None:
        """Notes what there is, for `go_back`; in force until the next note, crop, map or forget."""
        store, seen = self.store, self.statistics
        if store is None or store.length == 0:
            self._before = None
            return
        self._before = (
            store.mark(),
            self.preconditioner,
            self.padding,
            (seen.total, seen.count, seen.padding),
        )

    def forget_before(self) -> None:
        """Lets go of what `note_before` noted."""
        self._before = None

    def can_go_back_to(self, length: int) -> bool:
        """Whether a note was made when there were `length` tokens."""
        return self._before is not None and self._before[0].length == length

    def go_back(self) -> None:
        """Puts back what there was at the last note, statistics included."""
        assert self._before is not None
        mark, self.preconditioner, self.padding, seen = self._before
        self._store.go_back(mark)
        self.statistics.total, self.statistics.count, self.statistics.padding = seen
        self.forget_before()

    @property
    def name(self) -> str:
        return f"layer {self.layer_idx}"

    def allocate(self, like: Tensor) -> None:
        """Makes empty buffers for states like these, `[B, Hk, any, D]`."""
        self.codec = make_codec(self.config, like.shape[3])
        self.store = _empty_store(self.config, self.codec, like)

    @property
    def _store(self) -> LayerStore:
        assert self.store is not None
        return self.store

    @property
    def _codec(self) -> TileCodec:
        assert self.codec is not None
        return self.codec

    def extend(self, key: Tensor, value: Tensor) -> None:
        """Appends new tokens and packs those that leave the tail."""
        if self.leaving(key.shape[2]) > 0:
            self.pack(key, value)
        else:
            self._store.exact.append(key, value)

    def leaving(self, new: int) -> int:
        """Of the exact tokens and `new` ones, those that are to be packed."""
        store, strict = self._store, self.config.strict
        room = max(0, store.sink_length - store.exact.length)
        waiting = max(0, store.tail + new - room)
        if strict:
            return waiting
        total = store.open_tokens + waiting - self.config.residual_length
        full = total - total % store.tile_length
        return max(0, full - store.open_tokens)

    def expired(self, total: int) -> int:
        """Of a sequence's first `total` tokens, those that no query will read again: none here."""
        return 0

    def pack(self, *new: Tensor) -> None:
        """Packs the oldest of the exact tokens and `new` ones, as many as are to leave.

        Those that have expired are dropped instead.
        """
        leaving = self.leaving(new[0].shape[2] if new else 0)
        if leaving == 0:
            return
        store = self._store
        rows = store.exact.view()
        if new:
            rows = [_join(old, fresh) for old, fresh in zip(rows, new, strict=True)]
        sinks, padding = [x[:, :, : store.sink_length] for x in rows], self.padding
        if self.preconditioner is None:
            sinks, padding = self._find_sinks(rows)
        rest = [x[:, :, store.sink_length :] for x in rows]
        key, value = (x[:, :, :leaving] for x in rest)
        end = store.dropped + store.packed_length
        skipped = max(0, self.expired(end + rows[0].shape[2]) - end)
        with no_autocast(key.device):
            preconditioner = self.preconditioner or self.kept or self._measure(rest, padding)
            tiles = None
            if skipped < leaving:
                tiles = self._encode(key, value, preconditioner, skipped)
        if skipped:
            store.skip(skipped)
        if tiles is not None:
            store.push_tiles(*tiles, leaving - skipped)
        store.replace_exact(
            *(torch.cat((s, x[:, :, leaving:]), 2) for s, x in zip(sinks, rest, strict=True))
        )
        self.preconditioner, self.padding = preconditioner, padding
        self.statistics.forget_marks()

    def _find_sinks(self, rows: list[Tensor]) -> tuple[list[Tensor], Tensor | None]:
        """Returns each sequence's first real tokens, and its padding as far as it is skipped."""
        count = self._store.sink_length
        padding = self.statistics.padding
        if padding is None:
            return [x[:, :, :count] for x in rows], None
        padding = padding.clamp_max(rows[0].shape[2] - count)
        at = padding[:, None] + torch.arange(count, device=padding.device)
        at = at[:, None, :, None]
        return [x.gather(2, at.expand(*x.shape[:2], -1, x.shape[3])) for x in rows], padding

    def _measure(self, rest: list[Tensor], padding: Tensor | None) -> Preconditioner:
        """Measures the statistics on all exact tokens behind the sinks."""
        config, start = self.config, self._store.sink_length
        valid = None
        if padding is not None:
            index = torch.arange(start, start + rest[0].shape[2], device=padding.device)
            valid = index >= padding[:, None] + start
        return measure(
            *rest,
            start=start,
            rope=self.rope,
            settings=StatisticsSettings(
                key_mean=config.key_mean, balance=config.balance, value_mean=config.value_mean
            ),
            query_power=self.statistics.power,
            valid=valid,
        )

    def _encode(
        self, key: Tensor, value: Tensor, preconditioner: Preconditioner, skipped: int
    ) -> tuple[Tensor, Tensor]:
        """Packs tokens `[B, Hk, n, D]`, but for the first `skipped`, behind those of an open tile.

        Skipped tokens end where a tile does.
        """
        store, codec = self._store, self._codec
        key, value = key[:, :, skipped:], value[:, :, skipped:]
        kept = 0 if skipped else store.open_tokens
        start = store.dropped + store.sink_length + store.packed_length + skipped - kept
        missing = -(kept + key.shape[2]) % store.tile_length
        key, value = (
            F.pad(x, (0, 0, kept, missing)) if kept or missing else x for x in (key, value)
        )
        records, scales = encode(codec, preconditioner, key, value, start, impl=self.config.impl)
        if kept:
            old_records, old_scales = store.tiles.view(store.tiles.length - 1)
            layout = codec.layout
            records[:, :, :1] = layout.merge(old_records, records[:, :, :1], kept)
            scales[:, :, :1] = layout.merge_scales(old_scales, scales[:, :, :1], kept)
        return records, scales

    def view(self, *fresh: Tensor) -> LayerView:
        """Returns what attention reads: all stored tokens, and behind them `fresh` ones."""
        store = self._store
        records, scales = store.tiles.head(store.tiles.length)
        padding, sinks = self.padding, store.sinks
        if padding is not None and store.dropped:
            padding = (padding - store.dropped).clamp_min(0)
        recent = []
        if store.exact.length > sinks:
            tail_key, tail_value = store.exact.view(sinks)
            recent.append(ExactRows(tail_key, tail_value, sinks + store.packed_length))
        if fresh and fresh[0].shape[2]:
            recent.append(ExactRows(fresh[0], fresh[1], store.length))
        sink_key, sink_value = store.exact.head(sinks)
        return LayerView(
            sinks=ExactRows(sink_key, sink_value, 0, self.padding),
            packed_start=sinks,
            packed_length=store.packed_length,
            records=records,
            scales=scales,
            codec=self._codec,
            preconditioner=self.preconditioner,
            recent=tuple(recent),
            padding=padding,
            offset=store.dropped,
        )

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Applies `function` to every tensor, all batch first."""
        self.forget_before()
        self.kept = None if self.kept is None else self.kept.map(function)
        if self.store is None:
            return
        self.store.map(function)
        self.statistics.map(function)
        self.padding = None if self.padding is None else function(self.padding)
        if self.preconditioner is not None:
            self.preconditioner = self.preconditioner.map(function)

    def to(self, device: torch.device | str) -> None:
        """Moves all states and statistics to a device, where the next states must be."""
        self.map(lambda t: t.to(device))


def make_codec(config: RotorQuantConfig, head_dim: int) -> TileCodec:
    """Returns the codec that `config` asks for: one object for all layers and caches."""
    return _make_codec(head_dim, *codec_fields(config))


def codec_fields(config: RotorQuantConfig) -> tuple[Any, ...]:
    """Returns those settings that make codecs differ."""
    return tuple(getattr(config, name) for name in _CODEC_FIELDS)


_CODEC_FIELDS = (
    "key_bits",
    "value_bits",
    "key_codec",
    "rotation",
    "codebook",
    "scale",
    "sketch",
    "sketch_size",
    "estimator",
    "seed",
)


@lru_cache(maxsize=64)
def _make_codec(head_dim: int, *fields: Any) -> TileCodec:
    return TileCodec(head_dim, **dict(zip(_CODEC_FIELDS, fields, strict=True)))


def _empty_store(config: RotorQuantConfig, codec: TileCodec, like: Tensor) -> LayerStore:
    layout = codec.layout
    with torch.inference_mode(False):
        rows = torch.empty(*like.shape[:2], 0, like.shape[3], dtype=like.dtype, device=like.device)
        records = rows.new_empty(*like.shape[:2], 0, layout.record_words, dtype=torch.int32)
        scales = rows.new_empty(
            *like.shape[:2], 0, layout.scale_rows, layout.tile_length, dtype=torch.float16
        )
        return LayerStore(
            sink_length=config.sink_length,
            tile_length=layout.tile_length,
            exact=RowBuffer(rows, rows.clone()),
            tiles=RowBuffer(records, scales),
        )


def _join(old: Tensor, new: Tensor) -> Tensor:
    """Returns the rows of `old` and `new`; without a copy where `old` has none."""
    return new if old.shape[2] == 0 else torch.cat((old, new), 2)
