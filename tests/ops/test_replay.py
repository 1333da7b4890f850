# SPDX-License-Identifier: Apache-2.0
"""A call like an earlier one launches just what it would have launched as the first."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from ops.test_attend_kernels import KV_HEADS, TOLERANCE, make_query, make_view, place
from ops.test_counted_view import in_buffers
from support.compile import outside_interpreter
from torch import Tensor

from rq_hf import RotorQuantConfig
from rq_hf.layers import RotorQuantLayer
from rq_hf.ops import LayerView, attend
from rq_hf.quant.rope import RopeTable

pytest.importorskip("triton")

CPU = torch.device("cpu")
HEAD_DIM = 128
# query, view, options
Call = tuple[Tensor, LayerView, dict[str, Any]]


def make_layer(tokens: int, head_dim: int, device: torch.device = CPU) -> RotorQuantLayer:
    """A layer with `tokens` tokens, of which all but some forty are packed."""
    rope = RopeTable(10000.0 ** -torch.linspace(0, 1, head_dim // 2))
    layer = RotorQuantLayer(RotorQuantConfig(residual_length=40), rope=rope)
    layer.update(*new_tokens(tokens, head_dim, device))
    layer.settle()
    return layer


def new_tokens(count: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    shape = (1, KV_HEADS, count, head_dim)
    return tuple(torch.randn(shape, generator=generator).to(device) for _ in range(2))


def decoding(queries: int = 1, **options: Any) -> Iterator[Call]:
    """Token after token: tail and buffers grow, parts and tiles are added."""
    layer = make_layer(300, HEAD_DIM)
    for _ in range(200):
        layer.update(*new_tokens(1, HEAD_DIM, CPU))
        view = layer.view()
        yield make_query(view, 4, queries), view, options


def storing_decoding() -> Iterator[Call]:
    """The same, where attention writes each token to its place, and notes those not finite."""
    layer = make_layer(300, HEAD_DIM)
    not_finite = [None, *torch.zeros(2, 1, dtype=torch.int32)]
    for step in range(200):
        key, value = new_tokens(1, HEAD_DIM, CPU)
        if layer.leaving(1) == 0:
            layer._store.exact.reserve(layer._store.exact.length + 1)
            view = layer.view(key, value)
            yield (
                make_query(view, 4, 1),
                view,
                {
                    "stores_newest": True,
                    "not_finite": not_finite[step // 5 % 3],
                },
            )
        layer.update(key, value)


def masked_decoding() -> Iterator[Call]:
    """Masks of a batch with padding, longer at every step."""
    for query, view, _ in decoding():
        mask = torch.ones(1, 1, 1, view.length + view.length // 64, dtype=torch.bool)
        yield query, view, {"mask": mask}


def queries_of_all_kinds() -> Iterator[Call]:
    view = make_view(300, HEAD_DIM, CPU)
    query = make_query(view, 4, 1)
    rows = torch.randn(2 * 8 * HEAD_DIM + 1)
    for each in (
        query,
        query.bfloat16(),
        rows[:-1].view(query.shape),
        rows[1:].view(query.shape),
        make_query(view, 4, 3),
        make_query(view, 4, 3).transpose(1, 2).contiguous().transpose(1, 2),
        make_query(view, 8, 1),
        make_query(view, 8, 1)[:, :8],
        make_query(view, 4, 3).transpose(2, 3).contiguous().transpose(2, 3),
    ):
        yield from 3 * [(each, view, {})]


def options_of_all_kinds() -> Iterator[Call]:
    view = make_view(300, HEAD_DIM, CPU)
    query = make_query(view, 4, 2)
    mask = torch.ones(2, 1, 2, view.length, dtype=torch.bool)
    for options in (
        {},
        {"mask": mask},
        {"mask": mask.float()},
        {"mask": mask[:1, :, :1]},
        {"mask": torch.ones(2, 8, 2, view.length + 5, dtype=torch.bool)},
        {"causal": True},
        {"softcap": 3.0},
        {"scale": 0.2},
        {"sinks": torch.ones(8)},
        {"sinks": torch.ones(16)[::2]},
        {"sinks": torch.ones(8).bfloat16()},
        {},
    ):
        yield from 2 * [(query, view, options)]


def views_of_all_kinds() -> Iterator[Call]:
    view = make_view(300, HEAD_DIM, CPU)
    padded = make_view(300, HEAD_DIM, CPU, padding=[100, 0])
    counted = in_buffers(view)
    assert counted.counts is not None
    for each in (
        view,
        replace(view, codec=make_view(300, HEAD_DIM, CPU, seed=1).codec),
        replace(view, packed_length=view.packed_length - 3),
        replace(view, packed_length=0),
        replace(view, packed_start=view.packed_start - 1),
        replace(view, offset=128),
        padded,
        replace(padded, padding=None),
        counted,
        replace(counted, counts=counted.counts.clone()),
        make_view(60, HEAD_DIM, CPU),
        make_view(300, HEAD_DIM, CPU, dtype=torch.bfloat16),
        *other_tiles(view),
        *other_statistics(view),
        *other_rows(view),
        view,
    ):
        yield from 2 * [(make_query(each, 4, 1), each, {})]


def other_tiles(view: LayerView) -> Iterator[LayerView]:
    """Views that differ in one property of the packed tensors."""
    for name in ("records", "scales"):
        tiles = getattr(view, name)
        roomy = torch.zeros(2 * tiles.numel(), dtype=tiles.dtype)
        yield replace(view, **{name: tiles.clone()})
        yield replace(view, **{name: roomy[: tiles.numel()].view(tiles.shape)})
        yield replace(view, **{name: torch.stack(2 * [tiles], 2).flatten(2, 3)[:, :, ::2]})
        yield replace(view, **{name: roomy.view(*tiles.shape[:2], -1, *tiles.shape[3:])})
        yield replace(view, **{name: roomy.view(*tiles.shape[:2], -1, *tiles.shape[3:])[:, :, :2]})
    yield replace(view, records=view.records[:, :, :1])


def other_statistics(view: LayerView) -> Iterator[LayerView]:
    """Views that differ in one of the statistics."""
    statistics = view.preconditioner
    assert statistics is not None and statistics.rope is not None
    yield replace(view, preconditioner=None)
    changes: list[dict[str, Any]] = [
        {"rope": None},
        {"rope": replace(statistics.rope, interleaved=True)},
        *({name: getattr(statistics, name).clone()} for name in TENSORS),
    ]
    for change in changes:
        yield replace(view, preconditioner=replace(statistics, **change))


TENSORS = ("pre_mean", "post_mean", "balance", "value_mean")


def other_rows(view: LayerView) -> Iterator[LayerView]:
    """Views that differ in one property of the exact rows."""
    tail = view.recent[0]
    yield replace(view, recent=())
    yield replace(view, recent=(tail, tail))
    yield replace(view, recent=(tail, next(tail.spans(1))))
    shape = tail.keys.shape
    keys, values = torch.zeros(2, 2 * tail.keys.numel(), dtype=torch.float16)
    compact = [x[: x.numel() // 2].view(shape) for x in (keys, values)]
    roomy = [x.view(*shape[:2], -1, shape[3])[:, :, : shape[2]] for x in (keys, values)]
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in compact]
    key, value = compact
    for pair in (
        compact,
        roomy,
        turned,
        (key.view(torch.bfloat16), value),
        (key, value.view(torch.bfloat16)),
        (key.clone(), value),
        (key, value.clone()),
    ):
        rows = replace(tail, keys=pair[0], values=pair[1])
        yield replace(view, recent=(rows,))
        yield replace(view, sinks=replace(rows, first=0))


SCENARIOS: dict[str, Callable[[], Iterator[Call]]] = {
    "decoding": decoding,
    "storing decoding": storing_decoding,
    "masked decoding": masked_decoding,
    "speculative decoding": lambda: decoding(50, causal=True),
    "queries": queries_of_all_kinds,
    "options": options_of_all_kinds,
    "views": views_of_all_kinds,
}
# calls, and at least so many of them are like an earlier one
COUNTS = {
    "decoding": (200, 190),
    "storing decoding": (199, 180),
    "masked decoding": (200, 190),
    "speculative decoding": (200, 150),
    "queries": (27, 17),
    "options": (24, 11),
    "views": (96, 48),
}


@contextmanager
def memory_at(places: dict[Any, Tensor]) -> Iterator[None]:
    """Context in which memory of one size and type is always the same, and so are copies."""
    take, copy = torch.empty, Tensor.contiguous

    def empty(size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        size = size if isinstance(size, int) else tuple(size)
        if (size, dtype) not in places:
            places[size, dtype] = take(size, dtype=dtype, device=device)
        return places[size, dtype]

    def contiguous(self: Tensor) -> Tensor:
        return places.setdefault((self.data_ptr(), self.shape, self.stride()), copy(self))

    with (
        mock.patch.object(torch, "empty", empty),
        mock.patch.object(Tensor, "contiguous", contiguous),
    ):
        yield


def compared(scenario: str) -> tuple[int, int, list[str]]:
    """Makes each call twice, as one of many and as the first.

    Returns:
        Number of calls, how many of them were known, and what differed between the two.
    """
    import importlib

    from support.driver import fake_driver

    module = importlib.import_module("rq_hf.ops.triton.attend")
    calls, known, differences = 0, 0, []
    places: dict[Any, Tensor] = {}
    real = module.recall

    def recall(key: tuple) -> Any:
        nonlocal known
        found = real(key)
        known += found is not None
        return found

    with fake_driver() as notes:
        for query, view, options in SCENARIOS[scenario]():
            calls += 1
            options = {"scale": 0.1, **options}
            with memory_at(places), mock.patch.object(module, "recall", recall):
                module.attend(query, view, **options)
            mine = list(notes)
            notes.clear()
            with (
                memory_at(places),
                mock.patch.object(module, "recall", lambda _: None),
                mock.patch.object(module, "remember", lambda *_: None),
            ):
                module.attend(query, view, **options)
            assert [x.kernel for x in mine] == [x.kernel for x in notes] != []
            for one, other in zip(mine, notes, strict=True):
                if (one.compiled, one.grid) != (other.compiled, other.grid):
                    differences.append(f"{calls}: {one.kernel}")
                for name, value in one.arguments.items():
                    if value != other.arguments[name]:
                        differences.append(f"{calls}: {one.kernel} {name}")
            notes.clear()
    return calls, known, differences


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_known_calls_launch_what_first_calls_do(scenario: str) -> None:
    calls, known, differences = outside_interpreter("ops.test_replay:compared", scenario)
    assert differences == []
    assert calls == COUNTS[scenario][0] and COUNTS[scenario][1] <= known < calls


def left_behind() -> tuple[bool, int]:
    """Whether packed words outlive their view, and how many calls are known at most."""
    from support.driver import fake_driver

    from rq_hf.ops.triton import replay
    from rq_hf.ops.triton.attend import attend

    with fake_driver(), mock.patch.object(replay, "_MOST_REPLAYS", 5):
        view = make_view(300, HEAD_DIM, CPU)
        for scale in range(1, 10):
            attend(make_query(view, 4, 1), view, scale=scale)
        words = weakref.ref(view.records)
        del view
        gc.collect()
        return words() is not None, len(replay._replays)


def test_known_calls_are_few_and_keep_no_cache_alive() -> None:
    assert outside_interpreter("ops.test_replay:left_behind") == [False, 5]


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
def test_decoding_step_by_step(head_dim: int) -> None:
    device = place(head_dim)
    layer = make_layer(300, head_dim, device)
    for step in range(150):
        layer.update(*new_tokens(1, head_dim, device))
        view = layer.view()
        mask = None
        if step % 3 == 2:
            mask = torch.rand(1, 1, 1, view.length, device=device) > 0.5
        query = make_query(view, 4, 1)
        wanted, actual = (
            attend(q, view, scale=0.1, mask=mask, impl=impl)
            for q, impl in ((query.double(), "reference"), (query, "triton"))
        )
        assert wanted.norm() > 0
        assert (actual - wanted).norm() <= TOLERANCE * wanted.norm()


@pytest.mark.gpu
def test_known_calls_in_graphs_and_on_other_streams() -> None:
    from rq_hf.ops.triton import replay, tables

    device = torch.device("cuda")
    view = make_view(400, 128, device, batch=1)
    queries = [make_query(view, 4, 1) * factor for factor in (1.0, 0.5)]
    wanted = [attend(query, view, scale=0.1, impl="triton") for query in queries]
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert torch.equal(attend(queries[0], view, scale=0.1, impl="triton"), wanted[0])
    torch.cuda.synchronize()
    static = queries[0].clone()
    with torch.cuda.graph(graph):
        out = attend(static, view, scale=0.1, impl="triton")
    # a graph reads its tables after everybody else has forgotten them
    replay._replays.clear()
    tables._ropes.clear()
    gc.collect()
    others = [torch.full((n,), torch.nan, device=device) for n in 64 * [1000]]
    for query, expected in zip(queries, wanted, strict=True):
        static.copy_(query)
        graph.replay()
        assert torch.equal(attend(query, view, scale=0.1, impl="triton"), expected)
        assert torch.equal(out, expected)
    assert len(others) == 64
