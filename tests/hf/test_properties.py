# SPDX-License-Identifier: Apache-2.0
"""Any sequence of calls, with any settings, reads as the oracle's dense rows.

Every other layer does as where kernels run (see `support.waiting`): a single token waits for its
attention, which writes it behind the tail.

`RQ_HF_EXAMPLES=5000` tries that many sequences, others at each run, in place of the few that are
the same always.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from support.oracle import OracleLayer
from support.waiting import kernels_by_torch
from torch import Tensor
from torch.nn import functional as F

from rq_hf import RotorQuantCache, RotorQuantConfig
from rq_hf.handle import Handle
from rq_hf.layers import RotorQuantLayer
from rq_hf.quant.rope import RopeTable
from rq_hf.serialization import load_cache, save_cache
from rq_hf.sliding import RotorQuantSlidingLayer

EXAMPLES = os.environ.get("RQ_HF_EXAMPLES")
LONGEST = 800  # tokens that a sequence grows to
LARGEST_BATCH = 4
# tokens of which some are packed, whatever the settings
FIRST = 280
# longer than any tail
WINDOWS = st.sampled_from([None, None, 130, 161, 300])
DROPPED_AT_ONCE = 128
MEANS = ("pre_mean", "post_mean", "balance", "value_mean")

CONFIGS = st.builds(
    RotorQuantConfig,
    key_bits=st.sampled_from([2, 3, 4, 8]),
    value_bits=st.sampled_from([2, 3, 4, 8]),
    residual_length=st.sampled_from([0, 1, 32, 40, 128]),
    sink_length=st.sampled_from([0, 1, 4, 7]),
    rotation=st.sampled_from(["butterfly", "rotor", "dense", "hadamard", "none"]),
    key_codec=st.sampled_from(["mse", "mse", "prod"]),
    scale=st.sampled_from(["least_squares", "norm", "search"]),
    sketch=st.sampled_from(["orthogonal", "gaussian"]),
    sketch_size=st.sampled_from([None, 32]),
    estimator=st.sampled_from(["mmse", "unbiased"]),
    key_mean=st.sampled_from(["auto", "pre_rope", "post_rope", "none"]),
    balance=st.booleans(),
    value_mean=st.booleans(),
    path=st.sampled_from(["auto", "auto", "dense"]),
    strict=st.sampled_from([False, False, False, True]),
)
SEEDS = st.integers(0, 2**31)
QUERIED = st.sampled_from([True, True, False])
# whether the rows are left unread after a call, so that the next one meets pending states
BLIND = st.sampled_from([False, False, True])
# whether a token has come right before a call, of which no attention has stored it yet
WAITING = st.booleans()


def causal_mask(new: int, total: int, padding: Tensor | None, window: int | None) -> Tensor:
    """True where query j of `new` sees token n of `total`, `[B | 1, 1, new, total]`."""
    index, own = torch.arange(total), torch.arange(total - new, total)[:, None]
    mask = ((index <= own) & (index > own - (window or total)))[None, None]
    return mask if padding is None else mask & (index >= padding[:, None, None, None])


class Asked(NamedTuple):
    """Attention that is yet to come, or to come once more.

    Attributes:
        returned: Handles of keys and values.
        query: Their queries.
        mask: What these see.
        expected: The oracle's keys and values.
    """

    returned: tuple[Tensor, Tensor]
    query: Tensor
    mask: Tensor
    expected: tuple[Tensor, Tensor]

    def attend(self) -> Tensor:
        return F.scaled_dot_product_attention(
            self.query, *self.returned, self.mask, enable_gqa=True
        )


class CacheMachine(RuleBasedStateMachine):
    """A cache of one layer, and the oracle that is told the same."""

    @initialize(
        config=CONFIGS,
        window=WINDOWS,
        head_dim=st.sampled_from([16, 64, 64, 80, 128]),
        heads=st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 2)]),
        dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16]),
        biased=st.booleans(),
        interleaved=st.sampled_from([False, True, None]),
        as_kernels=st.sampled_from([True, False]),
        batch=st.integers(1, 3),
        seed=SEEDS,
    )
    def start(
        self,
        config: RotorQuantConfig,
        window: int | None,
        head_dim: int,
        heads: tuple[int, int],
        dtype: torch.dtype,
        biased: bool,
        interleaved: bool | None,
        as_kernels: bool,
        batch: int,
        seed: int,
    ) -> None:
        self.at_the_end = ExitStack()
        if as_kernels:
            config = replace(config, impl="triton", path="auto", strict=False)
            self.at_the_end.enter_context(kernels_by_torch())
        self.window, self.dtype = window, dtype
        self.head_dim, self.heads, self.group = head_dim, *heads
        inv_freq = 100.0 ** -torch.linspace(0, 1, head_dim // 2)
        self.rope = RopeTable(inv_freq, interleaved)
        generator = torch.Generator().manual_seed(seed)
        self.bias = 2.0 * biased * torch.randn(2, self.heads, 1, head_dim, generator=generator)
        self.cache = RotorQuantCache(quantization=config)
        if window is None:
            self.cache._append_layers(1)
        else:
            self.cache.layers.append(RotorQuantSlidingLayer(config, window))
        self.layer.rope = self.rope
        # a window has no sinks
        self.config = self.layer.config
        self.oracle = OracleLayer(self.config)
        self.batch = 0
        self.padding: Tensor | None = None
        self.means: dict[str, Tensor] | None = None
        # those of an earlier prompt
        self.kept: dict[str, Tensor] | None = None
        self.handles: tuple[Any, tuple[Tensor, Tensor], int] | None = None
        self.asked: list[Asked] = []
        self.copies: list[tuple[RotorQuantCache, Tensor | None, Tensor | None]] = []
        if as_kernels:
            # tokens wait once some are packed
            self.update(FIRST, batch, True, 0, seed, True)

    @property
    def layer(self) -> RotorQuantLayer:
        layer = self.cache.layers[0]
        assert isinstance(layer, RotorQuantLayer)
        return layer

    @property
    def length(self) -> int:
        return self.oracle.get_seq_length()

    @rule(
        batch=st.integers(1, 3),
        queried=QUERIED,
        padding=st.sampled_from([0, 0, 5, 60]),
        count=st.one_of(st.integers(1, 300), st.integers(150, 300)),
        seed=SEEDS,
        blind=BLIND,
    )
    def prompt(
        self, batch: int, queried: bool, padding: int, count: int, seed: int, blind: bool
    ) -> None:
        self.update(count, batch, queried, padding, seed, blind)

    @precondition(lambda self: self.length)
    @rule(
        count=st.sampled_from([1, 1, 1, 2, 33, 130]),
        queried=QUERIED,
        late=st.booleans(),
        seed=SEEDS,
        blind=BLIND,
    )
    def step(self, count: int, queried: bool, late: bool, seed: int, blind: bool) -> None:
        self.update(count, self.batch, queried, 0, seed, blind, late)

    def update(
        self,
        count: int,
        batch: int,
        queried: bool,
        padding: int,
        seed: int,
        blind: bool,
        late: bool = False,
    ) -> None:
        start = self.length
        count = min(count, LONGEST - start)
        if count == 0:
            return
        generator = torch.Generator().manual_seed(seed)
        if start == 0:
            self.batch = batch if self.kept is None else len(self.kept[MEANS[0]])
            # only a mask tells of padding, and only to handles
            if padding and count > padding and queried and self.config.path == "auto":
                self.padding = torch.zeros(self.batch, dtype=torch.long)
                self.padding[0] = padding
        key, value = self.make_states(count, generator)
        offset = self.check_mask_sizes(count)
        returned = self.cache.update(key, value, 0)
        assert returned[0].shape[2] == start + count - offset
        answer, handles = None, isinstance(returned[0], Handle)
        shape = (self.batch, self.heads * self.group, count, self.head_dim)
        query = torch.randn(shape, generator=generator).to(self.dtype)
        mask = causal_mask(count, start + count, self.padding, self.window)[..., offset:]
        # queries that are to be observed never come later
        late = late and handles and not getattr(returned[0].source, "observed", True)
        if queried and handles and not late:
            answer = F.scaled_dot_product_attention(query, *returned, mask, enable_gqa=True)
        self.take_statistics()
        key, value = self.oracle.update(key, value)
        expected = (key[:, :, offset:], value[:, :, offset:])
        self.check_handles()
        if late:
            self.asked.append(Asked(returned, query, mask, expected))
        elif answer is not None:
            self.check_attention(answer, query, expected, mask)
            self.handles = (returned, expected, self.length)
        elif not isinstance(returned[0], Handle) and (start or not self.config.strict):
            self.assert_rows(returned, expected)
        self.check(blind or late)

    @precondition(lambda self: self.length)
    @rule(
        brim=st.booleans(),
        count=st.integers(1, 3),
        order=st.lists(st.integers(0, 2), max_size=2),
        again=st.booleans(),
        seed=SEEDS,
        blind=BLIND,
    )
    def late_steps(
        self, brim: bool, count: int, order: list[int], again: bool, seed: int, blind: bool
    ) -> None:
        """Single tokens; the attention of some comes in any order while the last one waits.

        From the brim of the tail on, the first of them is one with which a tile leaves it.
        """
        tile = self.oracle.codec.layout.tile_length
        exact = self.config.sink_length + self.config.residual_length
        to_brim = (exact - self.length - 1) % tile if brim else 0
        if to_brim:
            self.update(to_brim, self.batch, True, 0, seed, True)
        for number in range(count):
            self.update(1, self.batch, True, 0, seed + number, True, late=True)
        for which in order:
            if self.asked:
                self.attend_late(which, again, blind)

    def let_wait(self, waiting: bool) -> None:
        """Stores a token, if one is wanted, and lets its attention come later."""
        if waiting and self.length:
            self.update(1, self.batch, True, 0, self.length, True, late=True)

    @precondition(lambda self: self.asked)
    @rule(which=st.integers(0, 3), again=st.booleans(), blind=BLIND)
    def attend_late(self, which: int, again: bool, blind: bool) -> None:
        """After other calls, or for a second time: handles read what was there at their update."""
        asked = self.asked.pop(-1 - which % len(self.asked))
        self.check_attention(asked.attend(), asked.query, asked.expected, asked.mask)
        if again:
            self.asked.append(asked)
        self.check(blind)

    @precondition(lambda self: self.length)
    @rule(kind=st.sampled_from(["describe", "memory", "copy", "decode"]), waiting=WAITING)
    def look(self, kind: str, waiting: bool) -> None:
        """What changes nothing."""
        self.let_wait(waiting)
        if kind == "describe":
            assert "layer 0" in self.cache.describe()
        elif kind == "memory":
            assert self.cache.memory().packed_bytes >= 0
        elif kind == "copy":
            self.look_at_a_copy()
        elif self.asked:
            self.asked[-1].returned[0].dense()
        self.check(True)

    def look_at_a_copy(self) -> None:
        self.take_statistics()
        if self.means is None:
            # the copy would measure its own
            return
        layer = copy.deepcopy(self.cache).layers[0]
        rows = (layer.keys, layer.values)
        self.assert_rows(rows, [x[:, :, self.dropped :] for x in self.oracle.read()])

    def check_mask_sizes(self, count: int) -> int:
        """Returns where the keys that `count` new tokens will see begin."""
        length, offset = self.layer.get_mask_sizes(count)
        assert length + offset == self.length + count
        in_window = max(0, self.length - self.window + 1) if self.window else 0
        assert offset <= in_window
        if self.window and not self.layer.record_past:
            assert in_window - offset < DROPPED_AT_ONCE
        return offset

    def make_states(self, count: int, generator: torch.Generator) -> list[Tensor]:
        shape = (2, self.batch, self.heads, count, self.head_dim)
        key, value = torch.randn(shape, generator=generator)
        turned = self.rope.conventions[0].rotate(self.bias[0], self.length, count)
        return [(key + turned).to(self.dtype), (value + self.bias[1]).to(self.dtype)]

    def take_statistics(self) -> None:
        """Gives the oracle the layer's statistics, which must never change once they are there."""
        statistics = self.layer.preconditioner
        self.oracle.preconditioner, self.oracle.padding = statistics, self.layer.padding
        if self.means is not None:
            assert statistics is not None
            for name, mean in self.means.items():
                assert torch.equal(getattr(statistics, name), mean), name
        elif statistics is not None:
            self.means = {name: getattr(statistics, name).clone() for name in MEANS}
            for name, mean in (self.kept or {}).items():
                assert torch.equal(self.means[name], mean), name

    def check_attention(
        self, answer: Tensor, query: Tensor, states: tuple[Tensor, Tensor], mask: Tensor
    ) -> None:
        expected = F.scaled_dot_product_attention(
            query.float(), *(x.float() for x in states), mask, enable_gqa=True
        )
        # queries of padding see nothing
        seen = mask.any(-1)[..., None].expand_as(answer)
        eps = torch.finfo(self.dtype).eps
        size = float(states[1].abs().max())
        torch.testing.assert_close(
            answer.float()[seen], expected[seen], rtol=0, atol=max(2e-5, 2 * eps) * size
        )

    def check_handles(self) -> None:
        """What handles stand for stays as it was, whatever is stored after them."""
        if self.handles is not None:
            returned, expected, length = self.handles
            self.assert_rows([x.dense() for x in returned], expected, length)
            self.handles = None

    @precondition(lambda self: self.length)
    @rule(removed=st.one_of(st.integers(1, 5), st.integers(1, 300)), waiting=WAITING, blind=BLIND)
    def crop(self, removed: int, waiting: bool, blind: bool) -> None:
        self.let_wait(waiting)
        self.handles, self.asked = None, []
        left = self.length - removed
        if self.layer.preconditioner is None:
            # a prompt that waits would be packed in between
            self.layer.settle()
        if self.window and left > 0 and self.dropped > max(0, left - self.window + 1):
            self.assert_refused(removed)
            return
        padding = 0 if self.padding is None else int(self.padding.max())
        if padding and 0 < left < padding + self.config.sink_length:
            if self.layer.padding is not None:
                self.assert_refused(removed)
            return
        store, dropped = self.layer.store, self.dropped
        before = [x.clone() for x in store.tiles.view()] if store is not None else []
        self.cache.crop(-removed)
        if left > 0:
            self.oracle.crop(-removed)
            first = (self.dropped - dropped) // store.tile_length
            last = first + store.tiles.length
            for old, new in zip(before, store.tiles.view(), strict=True):
                assert torch.equal(old[:, :, first:last], new)
        else:
            self.forget()
        self.check(blind)

    def assert_refused(self, removed: int) -> None:
        """Sinks of padded sequences, or tokens that left the window, would be missing."""
        try:
            self.cache.crop(-removed)
        except ValueError:
            self.check(False)
        else:
            raise AssertionError("cropped to a place that is gone")

    @property
    def dropped(self) -> int:
        return 0 if self.layer.store is None else self.layer.store.dropped

    @precondition(lambda self: self.window)
    @rule()
    def record_the_past(self) -> None:
        self.cache.activate_past_recording()

    @precondition(lambda self: self.length > LONGEST // 2)
    @rule()
    def reset(self) -> None:
        self.cache.reset()
        self.forget()
        self.kept = None
        self.check(False)

    @precondition(lambda self: self.length > LONGEST // 4)
    @rule()
    def reset_and_keep_statistics(self) -> None:
        # states that waited may have been stored unnoticed
        self.take_statistics()
        kept = self.means or self.kept
        self.cache.reset(keep_statistics=True)
        self.forget()
        self.kept = kept
        self.check(False)

    def forget(self) -> None:
        # the host's own reset keeps tokens of zeros in some versions
        self.oracle = OracleLayer(self.config)
        self.padding = self.means = self.handles = None
        self.asked = []

    @precondition(lambda self: self.length)
    @rule(
        data=st.data(),
        kind=st.sampled_from(["reorder", "select", "mask"]),
        waiting=WAITING,
        blind=BLIND,
    )
    def pick(self, data: st.DataObject, kind: str, waiting: bool, blind: bool) -> None:
        self.let_wait(waiting)
        rows = st.integers(0, self.batch - 1)
        if kind == "mask":
            index = torch.zeros(self.batch, dtype=torch.bool)
            index[data.draw(st.lists(rows, min_size=1))] = True
        else:
            size = self.batch if kind == "reorder" else data.draw(st.integers(1, LARGEST_BATCH))
            index = torch.tensor(data.draw(st.lists(rows, min_size=size, max_size=size)))
        for each in (self.cache, self.oracle):
            if kind == "reorder":
                each.reorder_cache(index)
            else:
                each.batch_select_indices(index)
        self.follow(lambda x: x[index])
        self.check(blind)

    @precondition(lambda self: self.length and self.batch <= LARGEST_BATCH // 2)
    @rule(waiting=WAITING, blind=BLIND)
    def repeat(self, waiting: bool, blind: bool) -> None:
        self.let_wait(waiting)
        for each in (self.cache, self.oracle):
            each.batch_repeat_interleave(2)
        self.follow(lambda x: x.repeat_interleave(2, 0))
        self.check(blind)

    def follow(self, function: Callable[[Tensor], Tensor]) -> None:
        """Does to the machine's own notes what was done to the batch."""
        if self.kept is not None:
            self.kept = {name: function(mean) for name, mean in self.kept.items()}
        # states that waited were stored before
        fresh = self.means is None
        if fresh:
            self.take_statistics()
        elif self.means is not None:
            self.means = {name: function(mean) for name, mean in self.means.items()}
        self.padding = None if self.padding is None else function(self.padding)
        self.batch = len(function(torch.zeros(self.batch)))
        self.handles, self.asked = None, []

    @rule(waiting=WAITING, blind=BLIND, go_on=st.booleans())
    def save_and_load(self, waiting: bool, blind: bool, go_on: bool) -> None:
        self.let_wait(waiting)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "cache"
            save_cache(self.cache, path)
            loaded = load_cache(path)
        for mine, theirs in (
            (self.layer.keys, loaded.layers[0].keys),
            (self.layer.values, loaded.layers[0].values),
        ):
            assert (mine is None and theirs is None) or torch.equal(mine, theirs)
        if go_on:
            self.cache = loaded
        self.check(blind)

    @precondition(lambda self: len(self.copies) < 3)
    @rule(waiting=WAITING, blind=BLIND)
    def go_on_with_a_copy(self, waiting: bool, blind: bool) -> None:
        self.let_wait(waiting)
        original, self.cache = self.cache, copy.deepcopy(self.cache)
        layer = original.layers[0]
        clones = (None if x is None else x.clone() for x in (layer.keys, layer.values))
        self.copies.append((original, *clones))
        self.check(blind)

    @rule(fetch=st.booleans(), waiting=WAITING, blind=BLIND)
    def offload(self, fetch: bool, waiting: bool, blind: bool) -> None:
        self.let_wait(waiting)
        self.layer.offload()
        if fetch:
            self.layer.prefetch()
        self.check(blind)

    def check(self, blind: bool) -> None:
        assert self.cache.get_seq_length() == self.length
        if blind:
            return
        if self.length == 0:
            assert self.layer.keys is None and self.layer.values is None
            return
        rows = (self.layer.keys, self.layer.values)
        self.take_statistics()
        assert rows[0].shape[2] == self.length - self.dropped
        self.assert_rows(rows, [x[:, :, self.dropped :] for x in self.oracle.read()])
        self.check_store()

    def check_store(self) -> None:
        """As many tokens are packed as there are whole tiles of."""
        store = self.layer.store
        assert store is not None
        assert store.dropped + store.packed_length == self.oracle.packed
        assert store.tiles.length == -(-store.packed_length // store.tile_length)
        limit = 1 if self.config.strict else self.config.residual_length + store.tile_length
        assert store.tail + store.open_tokens * (not self.config.strict) < limit

    def assert_rows(self, mine: Any, theirs: Any, length: int | None = None) -> None:
        """Both have the same rows, but for rounding; padding does not count.

        Args:
            mine: Keys and values.
            theirs: The same.
            length: Of the sequence that they are the newest of, if not the present one.
        """
        eps = torch.finfo(self.dtype).eps
        for a, b in zip(mine, theirs, strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype
            if self.padding is not None:
                end = self.length if length is None else length
                index = torch.arange(end - a.shape[2], end)
                hidden = index < self.padding[:, None]
                a, b = (x.masked_fill(hidden[:, None, :, None], 0) for x in (a, b))
            # half types: numbers of float32 that differ in rounding may fall to both sides
            tolerance = 1e-5 if self.dtype == torch.float32 else eps
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)

    def teardown(self) -> None:
        with getattr(self, "at_the_end", ExitStack()):
            self.check_copies()

    def check_copies(self) -> None:
        for original, *clones in getattr(self, "copies", []):
            layer = original.layers[0]
            for mine, clone in zip((layer.keys, layer.values), clones, strict=True):
                assert (mine is None and clone is None) or torch.equal(mine, clone)


CacheMachine.TestCase.settings = settings(
    max_examples=int(EXAMPLES or 90),
    stateful_step_count=30,
    derandomize=EXAMPLES is None,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
TestCache = CacheMachine.TestCase
