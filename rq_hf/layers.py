# SPDX-License-Identifier: Apache-2.0
"""One attention layer's packed keys and values, as `transformers` calls them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import CacheLayerMixin

from rq_hf.config import RotorQuantConfig
from rq_hf.handle import Handle
from rq_hf.ops import ExactRows, LayerView
from rq_hf.quant.measurement import StatisticsSettings, measure
from rq_hf.quant.preconditioning import Preconditioner
from rq_hf.quant.rope import RopeTable
from rq_hf.quant.tiles import TileCodec
from rq_hf.sources import PromptSource, ViewSource
from rq_hf.statistics import QueryStatistics
from rq_hf.storage import LayerStore, RowBuffer
from rq_hf.validation import check_finite, check_states, check_unchanged

# up to so many new tokens are appended before attention, more are read beside the store
_APPENDED_FIRST = 32
_TILES_AT_ONCE = 64


class RotorQuantLayer(CacheLayerMixin):
    """Stores the first tokens and the newest exactly, all others packed (see `storage`).

    `update` returns handles that attention reads packed (see `handle`), or dense tensors. A layer
    that is empty answers with the prompt's own exact states. Before the first tokens are packed,
    statistics of keys, values and queries are measured on all tokens so far and frozen (see
    `quant.preconditioning`).

    Args:
        config: How to store.
        layer_idx: Position in the model, for messages.
        rope: What the model's position embedding does to this layer's keys; None if unknown.
        gives_handles: Tells at each update whether the model's attention takes handles.
    """

    is_sliding = False
    is_croppable = True
    is_compileable = False

    def __init__(
        self,
        config: RotorQuantConfig,
        layer_idx: int = 0,
        rope: RopeTable | None = None,
        gives_handles: Callable[[], bool] = lambda: True,
        **kwargs: Any,
    ) -> None:
        self.config = config
        self.layer_idx = layer_idx
        self.rope = rope
        self.gives_handles = gives_handles
        self.calls: Counter[str] = Counter()
        self._forget()
        super().__init__(**kwargs)

    def _forget(self) -> None:
        self.store: LayerStore | None = None
        self.codec: TileCodec | None = None
        self.preconditioner: Preconditioner | None = None
        self.statistics = QueryStatistics()
        self.padding: Tensor | None = None
        self._pending: tuple[Tensor, Tensor] | None = None
        self._offloaded = False

    def __repr__(self) -> str:
        return f"RotorQuantLayer(layer_idx={self.layer_idx}, tokens={self.get_seq_length()})"

    @property
    def name(self) -> str:
        return f"layer {self.layer_idx}"

    @property
    def _store(self) -> LayerStore:
        assert self.store is not None
        return self.store

    @property
    def _codec(self) -> TileCodec:
        assert self.codec is not None
        return self.codec

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Makes empty buffers for states like these, `[B, Hk, any, D]`."""
        self.codec = make_codec(self.config, key_states.shape[3])
        self.store = _empty_store(self.config, self.codec, key_states)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stores new states and returns keys and values of all tokens.

        Args:
            key_states: New keys `[B, Hk, t, D]`, float32, bfloat16 or float16.
            value_states: New values, same shape and dtype.

        Returns:
            Keys and values `[B, Hk, n + t, D]` for `n` tokens stored before: handles, or dense
            tensors where the model's attention takes no handles.

        Raises:
            ValueError: The states cannot be stored here; the layer is as it was.
        """
        self._check(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.settle()
        self.prefetch()
        source = self._take(key_states, value_states)
        if self.config.path == "auto" and self.gives_handles():
            return Handle(source, "key"), Handle(source, "value")
        self.count("dense")
        key, value = source.dense("key"), source.dense("value")
        self.settle()
        return key, value

    def _check(self, key: Tensor, value: Tensor) -> None:
        check_states(key, value, self.name)
        if self.store is not None:
            shape = self.store.exact.tensors[0].shape
            check_unchanged(key, (shape[0], shape[1], shape[3]), self.dtype, self.name)
        check_finite(key, value, self.name)

    def _take(self, key_states: Tensor, value_states: Tensor) -> PromptSource | ViewSource:
        """Stores new states, or leaves them pending until their queries are seen."""
        key, value = key_states.detach(), value_states.detach()
        store, tokens, strict = self._store, key.shape[2], self.config.strict
        first = store.length == 0
        large = tokens > _APPENDED_FIRST or (first and tokens > 1)
        waits = self.preconditioner is None and self._leaving(tokens) > 0
        if first and tokens > 1 and (waits or not strict):
            self._store_or_wait(key, value, waits)
            return PromptSource(key_states, value_states, self)
        if strict:
            self._extend(key, value)
            return self._source(self.view(), tokens)
        if large:
            view = self.view(key, value)
            self._store_or_wait(key, value, waits)
            return self._source(view, tokens)
        store.exact.append(key, value)
        view = self.view()
        self._pack()
        return self._source(view, tokens)

    def _source(self, view: LayerView, tokens: int) -> ViewSource:
        return ViewSource(view, self, tokens, observed=self.preconditioner is None)

    def _store_or_wait(self, key: Tensor, value: Tensor, waits: bool) -> None:
        if waits:
            self._pending = (key, value)
        else:
            self._extend(key, value)

    def observe(self, query: Tensor, padding: Tensor | None, rows: int) -> None:
        """Takes note of queries `[B, Hq, L, D]` while statistics are open.

        Args:
            query: Queries that attend to this layer.
            padding: Left padding `[B]` that their mask shows, if any.
            rows: How many of the newest tokens they belong to.
        """
        if self.preconditioner is not None:
            return
        if padding is not None:
            self.statistics.padding = padding
        valid = None
        if self.statistics.padding is not None and rows == query.shape[2]:
            index = torch.arange(rows, device=query.device) + self.get_seq_length() - rows
            valid = index >= self.statistics.padding[:, None]
        self.statistics.observe(query, self._store.exact.tensors[0].shape[1], valid)

    def count(self, door: str) -> None:
        """Counts how attention was computed; `RotorQuantCache.describe` shows it."""
        if not torch.compiler.is_compiling():
            self.calls[door] += 1

    def settle(self) -> None:
        """Stores states that wait for queries, with what has been seen of these."""
        if self._pending is None:
            return
        key, value = self._pending
        offloaded = self._offloaded
        self.prefetch()
        self._extend(key, value)
        self._pending = None
        if offloaded:
            self.offload()

    def _extend(self, key: Tensor, value: Tensor) -> None:
        """Appends new tokens and packs those that leave the tail."""
        if self._leaving(key.shape[2]) > 0:
            self._pack(key, value)
        else:
            self._store.exact.append(key, value)

    def _leaving(self, new: int) -> int:
        """Of the exact tokens and `new` ones, those that are to be packed."""
        store, strict = self._store, self.config.strict
        room = max(0, store.sink_length - store.exact.length)
        waiting = max(0, store.tail + new - room)
        if strict:
            return waiting
        total = store.open_tokens + waiting - self.config.residual_length
        full = total - total % store.tile_length
        return max(0, full - store.open_tokens)

    def _pack(self, *new: Tensor) -> None:
        """Packs the oldest of the exact tokens and `new` ones, as many as are to leave."""
        leaving = self._leaving(new[0].shape[2] if new else 0)
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
        check_finite(key, value, self.name)
        preconditioner = self.preconditioner or self._measure(rest, padding)
        records, scales = self._encode(key, value, preconditioner)
        store.push_tiles(records, scales, leaving)
        store.replace_exact(
            *(torch.cat((s, x[:, :, leaving:]), 2) for s, x in zip(sinks, rest, strict=True))
        )
        self.preconditioner, self.padding = preconditioner, padding

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
        self, key: Tensor, value: Tensor, preconditioner: Preconditioner
    ) -> tuple[Tensor, Tensor]:
        """Packs tokens `[B, Hk, n, D]` behind those of an open tile."""
        store, codec = self._store, self._codec
        kept = store.open_tokens
        start = store.sink_length + store.packed_length - kept
        missing = -(kept + key.shape[2]) % store.tile_length
        key, value = (
            F.pad(x, (0, 0, kept, missing)) if kept or missing else x for x in (key, value)
        )
        parts = []
        step = _TILES_AT_ONCE * store.tile_length
        for at in range(0, key.shape[2], step):
            span = slice(at, at + step)
            keys = preconditioner.precondition_keys(key[:, :, span], start + at)
            values = preconditioner.center_values(value[:, :, span])
            parts.append(codec.encode(keys, values))
        records, scales = (torch.cat(x, 2) for x in zip(*parts, strict=True))
        if kept:
            old_records, old_scales = store.tiles.view(store.tiles.length - 1)
            layout = codec.layout
            records[:, :, :1] = layout.merge(old_records, records[:, :, :1], kept)
            scales[:, :, :1] = layout.merge_scales(old_scales, scales[:, :, :1], kept)
        return records, scales

    def view(self, *fresh: Tensor) -> LayerView:
        """Returns what attention reads: all stored tokens, and behind them `fresh` ones."""
        store = self._store
        records, scales = store.tiles.view()
        index = torch.arange(store.length, device=records.device)
        sink_index = index[: store.sinks]
        if self.padding is not None:
            sink_index = self.padding[:, None] + sink_index
        recent_start = store.sinks + store.packed_length
        sink_key, sink_value = store.exact.view(0, store.sinks)
        tail_key, tail_value = store.exact.view(store.sinks)
        recent = [ExactRows(tail_key, tail_value, index[recent_start:])]
        if fresh:
            new = torch.arange(fresh[0].shape[2], device=records.device) + store.length
            recent.append(ExactRows(fresh[0], fresh[1], new))
        return LayerView(
            sinks=ExactRows(sink_key, sink_value, sink_index),
            packed_start=store.sinks,
            packed_length=store.packed_length,
            records=records,
            scales=scales,
            codec=self._codec,
            preconditioner=self.preconditioner,
            recent=tuple(rows for rows in recent if rows.keys.shape[2]),
            padding=self.padding,
        )

    def _decoded(self, which: int) -> Tensor | None:
        self.settle()
        return self.view().dense()[which] if self.get_seq_length() else None

    @property
    def keys(self) -> Tensor | None:
        """All keys, decoded `[B, Hk, n, D]`; None while nothing is stored."""
        return self._decoded(0)

    @keys.setter
    def keys(self, states: Tensor | None) -> None:
        _only_none("keys", states)

    @property
    def values(self) -> Tensor | None:
        """All values, decoded `[B, Hk, n, D]`; None while nothing is stored."""
        return self._decoded(1)

    @values.setter
    def values(self, states: Tensor | None) -> None:
        _only_none("values", states)

    def get_seq_length(self) -> int:
        """Returns the number of tokens stored."""
        pending = 0 if self._pending is None else self._pending[0].shape[2]
        return pending + (0 if self.store is None else self.store.length)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Returns length and offset of the keys that `query_length` new tokens will see."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Returns -1: the layer grows without a limit."""
        return -1

    def reset(self) -> None:
        """Forgets everything; the next update may have another batch size, dtype or device."""
        self._forget()
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Drops the newest tokens; the packed ones that stay keep their codes bit for bit.

        Statistics stay frozen as they are.

        Args:
            tokens_to_remove: How many, as a number of at most 0 as `Cache.crop` passes it.

        Raises:
            ValueError: A positive number (the final length, in older versions of the host), or
                tokens that only some sequences of a left-padded batch have.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop takes minus the number of tokens to remove, got {tokens_to_remove}"
            )
        self.settle()
        if self.store is None or tokens_to_remove == 0:
            return
        left = self.store.length + tokens_to_remove
        if left <= 0:
            self.reset()
            return
        if self.padding is not None and left < int(self.padding.max()) + self.store.sink_length:
            raise ValueError(
                f"{self.name}: cropping to {left} tokens would cut into the first tokens of a "
                "left-padded sequence; reset() the cache and run the prompt again"
            )
        self.store.crop(-tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keeps the sequences `beam_idx` `[B]`, in that order."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the sequences `indices`, integer `[B']` or boolean `[B]`."""
        self._map(lambda t: t[torch.as_tensor(indices).to(t.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every sequence `repeats` times, copies side by side."""
        self._map(lambda t: t.repeat_interleave(repeats, 0))

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Applies `function` to every tensor, all batch first."""
        self.settle()
        if self.store is None:
            return
        self.store.map(function)
        self.statistics.map(function)
        self.padding = None if self.padding is None else function(self.padding)
        if self.preconditioner is not None:
            self.preconditioner = self.preconditioner.map(function)

    def offload(self) -> None:
        """Moves the buffers to the CPU."""
        if self.store is not None:
            self.store.map(lambda t: t.to("cpu"))
            self._offloaded = True

    def prefetch(self) -> None:
        """Moves the buffers back to the device of the states."""
        if self.store is not None and self._offloaded:
            self.store.map(lambda t: t.to(self.device, non_blocking=True))
            self._offloaded = False


def make_codec(config: RotorQuantConfig, head_dim: int) -> TileCodec:
    """Returns the codec that `config` asks for. All layers share its rotations."""
    assert config.key_bits is not None and config.value_bits is not None
    return TileCodec(
        head_dim,
        key_bits=config.key_bits,
        value_bits=config.value_bits,
        key_codec=config.key_codec,
        rotation=config.rotation,
        codebook=config.codebook,
        scale=config.scale,
        sketch=config.sketch,
        sketch_size=config.sketch_size,
        estimator=config.estimator,
        seed=config.seed,
    )


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


def _only_none(name: str, states: object) -> None:
    # the host's constructor assigns None
    if states is not None:
        raise AttributeError(f"{name} are stored packed; use update() to add tokens")
