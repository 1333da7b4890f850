# SPDX-License-Identifier: Apache-2.0
"""One attention layer's packed keys and values in buffers of a fixed size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from rq_hf.config import RotorQuantConfig
from rq_hf.handle import Handle
from rq_hf.ops import LayerView
from rq_hf.ops.append import make_constants
from rq_hf.ops.dispatch import MAX_QUERIES
from rq_hf.packed_states import codec_fields
from rq_hf.quant.preconditioning import Preconditioner
from rq_hf.quant.rope import RopeTable
from rq_hf.static_handle import StaticHandle
from rq_hf.static_limits import FixedLayer, check_room
from rq_hf.static_ops import Recipe, append_, intern_recipe, recipe_of
from rq_hf.static_sources import StaticPromptSource, StaticViewSource
from rq_hf.static_store import StaticStore

# statistics of fewer tokens would say more about these than about the ones to come
MIN_STATISTICS = 32
HALF_WAY = (
    "a pass was refused or broken off half-way, and layers hold tokens that others do not: reset() "
    "the cache and run the prompt again"
)


class Owner(Protocol):
    """The cache of a layer."""

    def refused(self, error: Exception, layer_idx: int, stored: int) -> None:
        """Tells that a layer has refused a pass, of which it holds `stored` tokens itself."""


class RotorQuantStaticLayer(FixedLayer):
    """Like `RotorQuantLayer`, with room for `max_cache_len` tokens and steps of fixed calls.

    The prompt and later steps of several tokens are stored by the host, which waits for the
    device. A step of one token is two operators on the same addresses each time: `torch.compile`
    takes it whole, and one CUDA graph holds it. So that such a step never has to measure anything,
    statistics are frozen at the end of the prompt, however short that is.

    Args:
        config: How to store.
        max_cache_len: Tokens to make room for.
        layer_idx: Position in the model, for messages.
        rope: What the model's position embedding does to this layer's keys; None if unknown.
        gives_handles: Tells whether the model's attention takes handles.

    Attributes:
        owner: Gives the cache, which is told when attention fails.
        spoilt: Whether the cache must be reset before anything else, see `refused`.
    """

    is_compileable = True

    def __init__(
        self,
        config: RotorQuantConfig,
        max_cache_len: int,
        layer_idx: int = 0,
        rope: RopeTable | None = None,
        gives_handles: Callable[[], bool] = lambda: True,
        **kwargs: Any,
    ) -> None:
        self.max_cache_len = max_cache_len
        self._steps = False
        self._takes_handles = True
        self._measured = False
        self._recipe = ""
        self.owner: Callable[[], Owner | None] = lambda: None
        self.spoilt = False
        super().__init__(config, layer_idx, rope, gives_handles, **kwargs)

    def __repr__(self) -> str:
        return f"RotorQuantStaticLayer(layer_idx={self.layer_idx}, room={self.max_cache_len})"

    def allocate(self, like: Tensor) -> None:
        """Makes the buffers for states like these, `[B, Hk, any, D]`."""
        if self.store is not None:
            return
        super().allocate(like)
        self.store = StaticStore(self._store, self.config.residual_length, self.max_cache_len)

    @property
    def static(self) -> StaticStore:
        """The store."""
        assert isinstance(self.store, StaticStore)
        return self.store

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stores new states and returns keys and values of all tokens.

        Args:
            key_states: New keys `[B, Hk, t, D]`, float32, bfloat16 or float16.
            value_states: New values, same shape; kept in the dtype of the keys.

        Returns:
            Keys and values: of a step of one token `[B, Hk, max_cache_len, D]`, of which the mask
            hides what is not there yet; of several tokens behind n others `[B, Hk, n + t, D]`.
            Handles, or dense tensors where the model's attention takes no handles.

        Raises:
            ValueError: The states cannot be stored here; the layer is as it was. On a GPU a step
                beyond `max_cache_len` tokens is not noticed, and stores nothing. Compiled steps,
                and all on a GPU, note on the device that their states were not finite: the next
                update of several tokens tells, as do `settle` and `check_steps`.
        """
        if not torch.compiler.is_compiling():
            self.check_usable()
        if self._pending is not None:
            self._store_prompt()
        if self._steps and key_states.shape[2] == 1:
            return self._step(key_states, value_states)
        return self._store_many(key_states, value_states, torch.compiler.is_compiling())

    def _step(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Stores one token a sequence; all of it can be compiled."""
        if not torch.compiler.is_compiling():
            self._check(key_states, value_states)
            self._takes_handles = self.config.path == "auto" and self.gives_handles()
        static = self.static
        tensors = static.tensors_read
        append_(
            key_states.detach(),
            # autocast leaves values in half precision beside float32 keys
            value_states.detach().to(key_states.dtype),
            *static.buffers,
            *tensors.statistics,
            self._recipe,
        )
        static.buffers.length.add_(1)
        self.count("step")
        options: dict[str, Any] = {
            "form": "bhnd",
            "repeats": 1,
            "dtype": key_states.dtype,
            "length": self.max_cache_len,
            "sink_length": static.sink_length,
            "recipe": self._recipe,
        }
        key = StaticHandle(*tensors, role="key", **options)
        value = StaticHandle(*tensors, role="value", **options)
        if not torch.compiler.is_compiling():
            key.layer = value.layer = self
        return (key, value) if self._takes_handles else (key.dense(), value.dense())

    @torch.compiler.disable(reason="the host stores prompts; compile steps of one token only")
    def _store_many(
        self, key_states: Tensor, value_states: Tensor, plain: bool
    ) -> tuple[Tensor, Tensor]:
        """Stores the prompt, or several tokens behind it; `plain` asks for dense tensors."""
        self._check(key_states, value_states)
        self.check_steps()
        check_room(int(self.get_seq_length()), key_states.shape[2], self.max_cache_len, self.name)
        value_states = value_states.to(key_states.dtype)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._takes_handles = self.config.path == "auto" and self.gives_handles()
        if not self._steps and key_states.shape[2] == 1:
            # there is nothing to measure yet, and the host's mask is that of a step
            self._begin(self.kept or Preconditioner.identity(key_states))
            return self._step(key_states, value_states)
        source = self._source_of_many(key_states, value_states)
        if self._takes_handles and not plain:
            return Handle(source, "key"), Handle(source, "value")
        self.count("dense")
        key, value = source.dense("key"), source.dense("value")
        self.settle()
        return key, value

    def _source_of_many(self, key: Tensor, value: Tensor) -> StaticPromptSource | StaticViewSource:
        if self._steps:
            view = self._extend_store(key.detach(), value.detach())
            return StaticViewSource(view, self, key.shape[2], observed=False)
        self._pending = (key.detach(), value.detach())
        return StaticPromptSource(key, value, self)

    def _extend_store(self, key: Tensor, value: Tensor) -> LayerView:
        """Stores tokens behind others; returns what their queries read."""
        static = self.static
        static.refresh()
        self.store = static.working_copy()
        try:
            # a full tail is packed here, where the next step would have packed it
            self.pack()
            view = self._append_and_view(key, value)
            static.take(self.store)
        finally:
            self.store = static
        return view

    def _append_and_view(self, key: Tensor, value: Tensor) -> LayerView:
        if key.shape[2] > MAX_QUERIES:
            view = self.view(key, value)
            self.extend(key, value)
            return view
        self._store.exact.append(key, value)
        view = self.view()
        self.pack()
        return view

    @property
    def is_waiting(self) -> bool:
        """Whether a prompt waits to be stored."""
        return self._pending is not None

    @property
    def takes_steps(self) -> bool:
        """Whether the prompt is stored, statistics are frozen and nothing was refused."""
        return self._steps and self._pending is None and not self.spoilt

    def check_usable(self) -> None:
        """Refuses what would go on where a pass was refused half-way.

        Raises:
            ValueError: The cache must be reset first.
        """
        if self.spoilt:
            raise ValueError(f"{self.name}: {HALF_WAY}")

    def refused(self, error: Exception, tokens: int) -> None:
        """Tells the cache that attention of the newest `tokens` tokens has failed.

        Raises:
            ValueError: The cache must be reset, see `RotorQuantStaticCache.update`.
        """
        owner = self.owner()
        if owner is not None:
            owner.refused(error, self.layer_idx, tokens)

    @property
    def recipe(self) -> str:
        """Name of what packs and reads the layer, see `static_ops`; empty before the prompt."""
        return self._recipe

    def settle(self) -> None:
        """Stores a prompt that waits for queries, and freezes statistics.

        Later it finds out from the device what is stored.

        Raises:
            ValueError: See `check_steps`.
        """
        if self._pending is not None:
            self._store_prompt()
        elif self.store is not None:
            self.check_steps()
            self.static.refresh()

    def _store_prompt(self) -> None:
        """Stores the prompt, with what has been seen of its queries, and freezes statistics."""
        if torch.compiler.is_compiling():
            raise ValueError(
                f"{self.name}: the prompt waits for its attention still, and a compiled step "
                "cannot store it: call get_mask_sizes() or describe() of the cache before the step"
            )
        assert self._pending is not None
        key, value = self._pending
        static = self.static
        self.store = static.working_copy()
        try:
            self.extend(key, value)
            # those that packing has needed are measured
            self._measured = self.preconditioner is not None
            preconditioner = self.preconditioner or self._freeze()
            static.take(self.store)
        finally:
            self.store = static
        self._pending = None
        self._begin(preconditioner)

    def check_steps(self) -> None:
        """Looks at what steps have noted on the device, and waits for it.

        Raises:
            ValueError: They have stored numbers that are not finite; so it is until `reset`.
        """
        if self.store is not None and bool(self.static.buffers.not_finite):
            raise ValueError(
                f"{self.name}: decode steps have stored keys or values that are NaN or infinite, "
                "and what was generated from them on is of no use; look at the model's inputs, "
                "weights and dtype, reset() the cache and run the prompt again"
            )

    def _freeze(self) -> Preconditioner:
        """Sets the sinks and returns the statistics, while nothing is packed yet."""
        store, count = self._store, self._store.sink_length
        rows = store.exact.view()
        if rows[0].shape[2] < count:
            return self.kept or Preconditioner.identity(rows[0])
        sinks, self.padding = self._find_sinks(rows)
        rest = [x[:, :, count:] for x in rows]
        store.replace_exact(*(torch.cat(parts, 2) for parts in zip(sinks, rest, strict=True)))
        if self.kept is not None:
            return self.kept
        if rest[0].shape[2] < MIN_STATISTICS:
            return Preconditioner.identity(rows[0])
        self._measured = True
        return self._measure(rest, self.padding)

    def _begin(self, preconditioner: Preconditioner) -> None:
        """Makes ready for steps, with these statistics."""
        rope = preconditioner.rope or self._known_rope()
        recipe = Recipe(self._codec, rope, self.config.impl)
        self._recipe = intern_recipe(recipe, codec_fields(self.config))
        # an equal one of an earlier cache may stand under that name: tables are made by object
        recipe = recipe_of(self._recipe)
        self.static.set_statistics(preconditioner, self.padding)
        # from here on these are the tensors that steps read
        self.preconditioner = self.static.preconditioner(recipe.rope)
        self.padding = None if self.padding is None else self.static.tensors_read.padding
        make_constants(
            recipe.codec, self.preconditioner, self.static.buffers, impl=self.config.impl
        )
        self._steps = True

    def _known_rope(self) -> RopeTable | None:
        """Returns the same table for every prompt, whether it has a key mean before RoPE or not."""
        takes_mean = self.config.key_mean in ("auto", "pre_rope")
        if self.rope is None or not takes_mean or self.rope.rotary_dim > self._codec.head_dim:
            return None
        return self.rope.conventions[0]

    def _check(self, key: Tensor, value: Tensor) -> None:
        if self.store is not None:
            batch, heads, _, head_dim = self._store.exact.tensors[0].shape
            mine = (batch, heads, head_dim, self.dtype, self.device)
            new = (key.shape[0], key.shape[1], key.shape[-1], key.dtype, key.device)
            if new != mine:
                raise ValueError(
                    f"{self.name}: the buffers are made for (batch, kv_heads, head_dim, dtype, "
                    f"device) = {mine}, got {new}; a static cache keeps these from its first use "
                    "on, make a new one"
                )
        super()._check(key, value)

    def get_seq_length(self) -> Any:
        """Returns the tokens of a sequence so far: 0, or a tensor that steps count up in."""
        if self._pending is not None:
            return self._pending[0].shape[2]
        return self.static.buffers.length if self._steps else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Returns length and offset of the keys that `query_length` new tokens will see."""
        if query_length == 1:
            return self.max_cache_len, 0
        return int(self.get_seq_length()) + query_length, 0

    def get_max_length(self) -> int:
        """Returns `max_cache_len`."""
        return self.max_cache_len

    def reset(self, keep_statistics: bool = False) -> None:
        """Forgets all tokens; buffers stay, and with them batch size, dtype and device.

        Args:
            keep_statistics: Pack the next prompt with the statistics of this one, see
                `RotorQuantLayer.reset`. After a prompt too short to measure there are none to keep
                but those kept before.
        """
        measured = self.preconditioner if self._measured else None
        store, codec, kept = self.store, self.codec, measured or self.kept
        self.forget()
        self.store, self.codec = store, codec
        self.kept = kept if keep_statistics else None
        self._pending, self._steps = None, False
        self._measured = self.spoilt = False
        if store is not None:
            self.static.clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Puts the sequences `beam_idx`, int64 `[B]`, in place of those here.

        Raises:
            ValueError: The batch size would change.
        """
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Puts the sequences `indices` in place of those here.

        Args:
            indices: Integer `[B]`, or boolean `[B]` with all of them true.

        Raises:
            ValueError: The batch size would change.
        """
        if self.store is None:
            return
        indices = self.check_indices(indices)
        if self._pending is not None:
            self.settle()
        # whole buffers, so that the device is not asked what is in use
        self.static.reorder(indices)
        # what was made of the statistics is kept by their object
        self.preconditioner, self.kept = (
            None if statistics is None else replace(statistics)
            for statistics in (self.preconditioner, self.kept)
        )

    def check_indices(self, indices: Tensor) -> Tensor:
        """Returns the sequences that `batch_select_indices` takes as int64 `[B]`.

        Raises:
            ValueError: The batch size would change.
        """
        indices = torch.as_tensor(indices)
        indices = indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices
        if self.store is None:
            return indices
        batch = self.static.tensors_read.padding.shape[0]
        if indices.shape != (batch,):
            raise ValueError(
                f"{self.name}: a static cache keeps its batch size {batch}, got indices "
                f"{list(indices.shape)}; use RotorQuantCache"
            )
        return indices.to(self.device)
