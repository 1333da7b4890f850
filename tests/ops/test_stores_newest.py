# SPDX-License-Identifier: Apache-2.0
"""A token that attention by kernels reads beside the tail, and writes behind it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from ops.test_attend_kernels import HEAD_DIMS, KV_HEADS, make_query, make_view, place
from torch import Tensor

from rq_hf.ops import ExactRows, LayerView
from rq_hf.ops.attend import attend_with
from rq_hf.ops.look import place_in

pytest.importorskip("triton")

ROOM = 3


def with_room(rows: ExactRows) -> tuple[ExactRows, Tensor, Tensor]:
    """The same rows at the head of larger buffers, and these, whose other rows are -7."""
    batch, heads, tokens, dim = rows.keys.shape
    buffers = rows.keys.new_full((2, batch, heads, tokens + ROOM, dim), -7.0)
    buffers[0, :, :, :tokens], buffers[1, :, :, :tokens] = rows.keys, rows.values
    keys, values = buffers
    return replace(rows, keys=keys[:, :, :tokens], values=values[:, :, :tokens]), keys, values


def newest(view: LayerView, first: int) -> ExactRows:
    """One more token, laid out as a projection gives it: heads of a token side by side."""
    batch, heads, _, dim = view.sinks.keys.shape
    generator = torch.Generator().manual_seed(5)
    keys, values = torch.randn(2, batch, 1, heads, dim, generator=generator).to(view.sinks.keys)
    return ExactRows(keys.transpose(1, 2), values.transpose(1, 2), first)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize(
    # the last has more rows than a unit: several programs write the same
    ("tokens", "dtype", "group"),
    [(60, torch.float32, 1), (300, torch.bfloat16, 4), (200, torch.float32, 20)],
)
def test_writes_the_token_behind_the_tail(
    head_dim: int, tokens: int, dtype: torch.dtype, group: int
) -> None:
    view = make_view(tokens, head_dim, place(head_dim), dtype=dtype)
    tail, keys, values = with_room(view.recent[0])
    fresh = newest(view, view.length)
    view = replace(view, recent=(tail, fresh))
    query = make_query(view, group, 1)
    before = keys.clone(), values.clone()
    plain = attend_with(True, query, view, scale=0.1)
    assert torch.equal(keys, before[0]) and torch.equal(values, before[1])
    # a second time by a known call
    for _ in range(2):
        result = attend_with(True, query, view, scale=0.1, stores_newest=True)
        assert torch.equal(result, plain) and plain.norm() > 0
        at = tail.keys.shape[2]
        for buffer, old, new in zip(
            (keys, values), before, (fresh.keys, fresh.values), strict=True
        ):
            assert torch.equal(buffer[:, :, at : at + 1], new)
            assert torch.equal(buffer[:, :, :at], old[:, :, :at])
            assert (buffer[:, :, at + 1 :] == -7).all()
            buffer[:, :, at] = -7


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize(
    ("which", "batch", "head", "spoilt", "group"),
    [
        (0, 0, 0, float("nan"), 1),
        (1, 1, 1, float("-inf"), 1),
        # several programs of a head note the same
        (0, 1, 0, float("inf"), 20),
    ],
)
def test_notes_a_token_that_is_not_finite(
    head_dim: int, which: int, batch: int, head: int, spoilt: float, group: int
) -> None:
    view = make_view(60, head_dim, place(head_dim))
    tail, keys, values = with_room(view.recent[0])
    fresh = newest(view, view.length)
    good = replace(view, recent=(tail, fresh))
    query = make_query(view, group, 1)
    number = torch.zeros(1, dtype=torch.int32, device=keys.device)

    def attend(offset: int = 0, **options: Tensor) -> Tensor:
        each = replace(good, offset=offset)
        return attend_with(True, query, each, scale=0.1, stores_newest=True, **options)

    plain = attend()
    assert torch.equal(attend(not_finite=number), plain)
    assert place_in(int(number)) is None
    (fresh.keys, fresh.values)[which][batch, head, 0, head_dim - 1] = spoilt
    attend()
    assert place_in(int(number)) is None
    # a window has dropped tokens before the view's first
    for offset, noted in ((256, 316), (128, 188), (384, 188), (0, 60)):
        attend(offset, not_finite=number)
        assert place_in(int(number)) == noted
    written = (keys, values)[which][batch, head, tail.keys.shape[2]]
    assert not bool(written.isfinite().all())


def test_batch_and_heads_are_those_of_the_view() -> None:
    assert newest(make_view(60, 80, torch.device("cpu")), 60).keys.shape == (2, KV_HEADS, 1, 80)
