# SPDX-License-Identifier: Apache-2.0
"""One attention layer's packed keys and values, as `transformers` calls them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from rq_hf.config import RotorQuantConfig
from rq_hf.handle import Handle
from rq_hf.ops import LayerView
from rq_hf.pickling import PickledLayer
from rq_hf.quant.rope import RopeTable
from rq_hf.sources import PromptSource, ViewSource
from rq_hf.validation import (
    check_device,
    check_finite,
    check_kept,
    check_states,
    check_unchanged,
    looks_at_once,
)
from rq_hf.watched_states import APPENDED_FIRST


class RotorQuantLayer(PickledLayer, CacheLayerMixin):
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

    Attributes:
        calls: How often attention was computed in which way.
        was_read: Whether what the last update gave has been read.
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
        PickledLayer.__init__(self, config, layer_idx, rope)
        self.gives_handles = gives_handles
        self.calls: Counter[str] = Counter()
        self.was_read = False
        self._pending: tuple[Tensor, Tensor] | None = None
        self._offloaded = False
        CacheLayerMixin.__init__(self, **kwargs)

    def __repr__(self) -> str:
        return f"RotorQuantLayer(layer_idx={self.layer_idx}, tokens={self.get_seq_length()})"

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Makes empty buffers for states like these, `[B, Hk, any, D]`."""
        self.allocate(key_states)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stores new states and returns keys and values of all tokens.

        Args:
            key_states: New keys `[B, Hk, t, D]`, float32, bfloat16 or float16.
            value_states: New values, same shape; kept in the dtype of the keys.

        Returns:
            Keys and values `[B, Hk, n + t, D]` for `n` tokens stored before: handles, or dense
            tensors where the model's attention takes no handles.

        Raises:
            ValueError: The states cannot be stored here; the layer is as it was. NaN and infinity
                are found at once, but for up to 32 new tokens on a GPU, which kernels look at while
                nobody waits: a later update tells of these, before anything behind them is packed,
                and takes them back.
        """
        self._check_form(key_states, value_states)
        self.refuse_noted_alone()
        self.settle()
        self.prefetch()
        self.check_numbers(key_states, value_states)
        if value_states.dtype != key_states.dtype:
            # autocast leaves values in half precision beside float32 keys
            value_states = value_states.to(key_states.dtype)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.note_before()
        self.was_read = False
        source = self._take(key_states, value_states)
        if self.config.path == "auto" and self.gives_handles():
            return Handle(source, "key"), Handle(source, "value")
        self.count("dense")
        key, value = source.dense("key"), source.dense("value")
        self.settle()
        return key, value

    def _check(self, key: Tensor, value: Tensor) -> None:
        """Refuses new states that a layer of a fixed size cannot store.

        On a GPU the numbers of a single token are not looked at: a graph that holds such a step
        could not wait for them.
        """
        self._check_form(key, value)
        if key.shape[2] > 1 or looks_at_once(key.device):
            check_finite(key, value, self.name)

    def _check_form(self, key: Tensor, value: Tensor) -> None:
        check_states(key, value, self.name)
        if self.store is not None:
            shape = self.store.exact.tensors[0].shape
            check_unchanged(key, (shape[0], shape[1], shape[3]), self.dtype, self.name)
            check_device(key, self.device, self.name)
        if self.kept is not None and self.preconditioner is None:
            check_kept(key, self.kept.balance, self.name)

    def _take(self, key_states: Tensor, value_states: Tensor) -> PromptSource | ViewSource:
        """Stores new states, or leaves them pending until their queries are seen.

        A single token may wait for its attention too, which stores it in a launch that there is
        anyway.
        """
        key, value = key_states.detach(), value_states.detach()
        store, tokens, strict = self._store, key.shape[2], self.config.strict
        first = store.length == 0
        large = tokens > APPENDED_FIRST or (first and tokens > 1)
        waits = self.preconditioner is None and self.leaving(tokens) > 0
        if first and tokens > 1 and (waits or not strict):
            self._store_or_wait(key, value, waits)
            return PromptSource(key_states, value_states, self)
        if strict:
            self.look(key, value)
            self.extend(key, value)
            return self._source(self.view(), tokens)
        if large:
            view = self.view(key, value)
            self._store_or_wait(key, value, waits)
            return self._source(view, tokens)
        if tokens == 1 and self._attention_may_store(key):
            return self._source(self._let_wait(key, value), tokens)
        self.look(key, value)
        store.exact.append(key, value)
        view = self.view()
        try:
            self.pack()
        except Exception:
            store.exact.length -= tokens
            raise
        return self._source(view, tokens)

    def _attention_may_store(self, key: Tensor) -> bool:
        """Whether attention by kernels is to come, which can write a token behind the tail."""
        impl = self.config.impl
        by_kernels = impl == "triton" or (impl == "auto" and key.device.type == "cuda")
        handles = self.config.path == "auto" and self.gives_handles()
        known = self.preconditioner is not None and self._store.tail > 0
        return by_kernels and handles and known and self.leaving(1) == 0

    def _let_wait(self, key: Tensor, value: Tensor) -> LayerView:
        """Returns a view with a token for which there is room behind the tail."""
        self._store.exact.reserve(self._store.exact.length + 1)
        self._pending = (key, value)
        return self.view(key, value)

    def waits_for(self, view: LayerView) -> bool:
        """Whether the newest token of `view` is still to be stored behind its tail."""
        if self._pending is None or self._pending[0].shape[2] != 1:
            return False
        return len(view.recent) == 2 and view.recent[1].keys is self._pending[0]

    def note_stored(self) -> None:
        """Takes note that the waiting token has been written behind the tail."""
        self._store.exact.length += 1
        self._pending, self.watch.unseen = None, False

    def _source(self, view: LayerView, tokens: int) -> ViewSource:
        return ViewSource(view, self, tokens, observed=self.preconditioner is None)

    def _store_or_wait(self, key: Tensor, value: Tensor, waits: bool) -> None:
        if waits:
            self._pending = (key, value)
        else:
            self.extend(key, value)

    def view(self, *fresh: Tensor) -> LayerView:
        """Returns what attention reads; without `fresh` tokens, those waiting are stored first."""
        if not fresh and self._pending is not None:
            self.settle()
        return super().view(*fresh)

    def observe(self, query: Tensor, padding: Tensor | None, rows: int) -> None:
        """Takes note of queries `[B, Hq, L, D]` while statistics are open.

        Args:
            query: Queries that attend to this layer.
            padding: How many of the newest tokens are left padding, `[B]` or `[1]`, if any.
            rows: How many of the newest tokens they belong to.
        """
        if self.preconditioner is not None:
            return
        before = self.get_seq_length() - rows
        if padding is not None:
            self.statistics.extend_padding(padding.expand(query.shape[0]), before)
        if self.kept is not None:
            return
        valid = None
        if self.statistics.padding is not None and rows == query.shape[2]:
            index = torch.arange(rows, device=query.device) + before
            valid = index >= self.statistics.padding[:, None]
        self.statistics.observe(query, self._store.exact.tensors[0].shape[1], valid)

    def count(self, door: str) -> None:
        """Counts how attention was computed; `RotorQuantCache.describe` shows it."""
        if not torch.compiler.is_compiling():
            self.was_read = True
            self.calls[door] += 1

    def settle(self) -> None:
        """Stores states that wait for their attention, with what has been seen of queries."""
        if self._pending is None:
            return
        key, value = self._pending
        offloaded = self._offloaded
        self.prefetch()
        self.look(key, value)
        self.extend(key, value)
        self._pending = None
        if offloaded:
            self.offload()

    def _decoded(self, which: int) -> Tensor | None:
        self.settle()
        if not self.get_seq_length():
            return None
        # some models read cross-attention so in every step
        self.count(f"{('keys', 'values')[which]} decoded")
        offloaded = self._offloaded
        self.prefetch()
        states = self.view().dense()[which]
        if offloaded:
            self.offload()
        return states

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
        """Returns the number of tokens of a sequence so far."""
        pending = 0 if self._pending is None else self._pending[0].shape[2]
        return pending + (0 if self.store is None else self.store.dropped + self.store.length)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Returns length and offset of the keys that `query_length` new tokens will see."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Returns -1: the layer grows without a limit."""
        return -1

    def reset(self, keep_statistics: bool = False) -> None:
        """Forgets all tokens; the next update may have another batch size, dtype or device.

        Args:
            keep_statistics: Keep the frozen statistics of keys, values and queries, and pack the
                next prompt with them: nothing is measured again, which saves time where many
                prompts of one kind follow each other, and a short one is packed by what a long one
                has shown. The next prompt must have the same batch size, heads and head_dim, on
                the same device. Left padding is forgotten in any case, and while statistics are
                not frozen there is nothing to keep.
        """
        kept = self.preconditioner or self.kept
        self.forget()
        self.kept = kept if keep_statistics else None
        self._pending = None
        self.watch.clear()
        self._offloaded = self.is_initialized = False

    def go_back_to_start(self) -> None:
        """Forgets all tokens, and keeps what statistics there were before the first one."""
        self.reset(keep_statistics=self.kept is not None)

    def go_back(self) -> None:
        """Puts back what there was before the last update, statistics included."""
        super().go_back()
        self._pending, self.watch.unseen = None, False
        self.watch.forget(self.get_seq_length())

    def crop(self, tokens_to_remove: int) -> None:
        """Drops the newest tokens; the packed ones that stay keep their codes bit for bit.

        Statistics stay frozen as they are. What kernels have noted of tokens that go is forgotten;
        on a GPU that waits for it.

        Args:
            tokens_to_remove: How many, as a number of at most 0 as `Cache.crop` passes it.

        Raises:
            ValueError: As `check_crop`; the layer is as it was.
        """
        self.check_crop(tokens_to_remove)
        if self.store is None or tokens_to_remove == 0:
            return
        if self.get_seq_length() + tokens_to_remove <= 0:
            self.go_back_to_start()
        else:
            self.forget_before()
            self.store.crop(-int(tokens_to_remove))
            length = self.get_seq_length()
            if self.watch.forget(length):
                self.statistics.go_back(length)

    def check_crop(self, tokens_to_remove: int) -> None:
        """Refuses what `crop` cannot do.

        Raises:
            ValueError: A positive number (the final length, in older versions of the host), or
                tokens that only some sequences of a left-padded batch have.
        """
        # the host counts with tensors in places
        if int(tokens_to_remove) > 0:
            raise ValueError(
                f"crop takes minus the number of tokens to remove, got {tokens_to_remove}"
            )
        obstacle = self.crop_obstacle(int(tokens_to_remove))
        if obstacle is not None:
            raise ValueError(f"{self.name}: {obstacle}")

    def crop_obstacle(self, tokens_to_remove: int) -> str | None:
        """Returns why `crop` cannot drop so many tokens, a number of at most 0; None if it can."""
        self.settle()
        left = self.get_seq_length() + tokens_to_remove
        if left <= 0 or self.padding is None or tokens_to_remove == 0:
            return None
        if left >= int(self.padding.max()) + self._store.sink_length:
            return None
        return (
            f"cropping to {left} tokens would cut into the first tokens of a left-padded sequence; "
            "reset() the cache and run the prompt again"
        )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keeps the sequences `beam_idx` `[B]`, in that order."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the sequences `indices`, integer `[B']` or boolean `[B]`."""
        self.settle()
        self.map(lambda t: t[torch.as_tensor(indices).to(t.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every sequence `repeats` times, copies side by side."""
        self.settle()
        self.map(lambda t: t.repeat_interleave(repeats, 0))

    def to(self, device: torch.device | str) -> None:
        """Moves everything to a device, where the next states must be."""
        self.settle()
        self.prefetch()
        super().to(device)
        if self.store is not None:
            self.device = self.store.exact.tensors[0].device
            self.watch.to(self.device)

    def offload(self) -> None:
        """Moves the buffers to the CPU."""
        if self.preconditioner is not None:
            # attention would store a token that waits where the buffers have been
            self.settle()
        if self.store is not None:
            self.store.map(lambda t: t.to("cpu"))
            self._offloaded = True

    def prefetch(self) -> None:
        """Moves the buffers back to the device of the states."""
        if self.store is not None and self._offloaded:
            self.store.map(lambda t: t.to(self.device, non_blocking=True))
            self._offloaded = False


def _only_none(name: str, states: object) -> None:
    # the host's constructor assigns None
    if states is not None:
        raise AttributeError(f"{name} are stored packed; use update() to add tokens")
