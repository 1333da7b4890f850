# SPDX-License-Identifier: Apache-2.0
"""Buffers of a fixed size, whose use only the device knows: what is not in use changes nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from ops.test_attend_kernels import HEAD_DIMS, make_query, make_view, place
from torch import Tensor
from torch.nn import functional as F

from rq_hf.ops import ExactRows, LayerView, attend

ROOM = 70


def in_buffers(view: LayerView) -> LayerView:
    """The same tokens in larger tensors, with what must not be read behind them."""
    empty = ExactRows(view.sinks.keys[:, :, :0], view.sinks.values[:, :, :0])
    tail = view.recent[0] if view.recent else empty
    tiles = view.records.shape[2] if view.packed_length else 0
    used = [view.sinks.keys.shape[2], tail.keys.shape[2], view.packed_length, tiles]
    records = grown(view.records[:, :, :tiles], 3, -1)
    return replace(
        view,
        records=records,
        scales=grown(view.scales[:, :, :tiles], 3, torch.nan),
        packed_length=records.shape[2] * view.codec.layout.tile_length,
        recent=(ExactRows(*(grown(x, ROOM, torch.nan) for x in (tail.keys, tail.values))),),
        counts=torch.tensor(used, dtype=torch.int32, device=view.records.device),
    )


def grown(used: Tensor, room: int, fill: float) -> Tensor:
    behind = used.new_full((*used.shape[:2], room, *used.shape[3:]), fill)
    return torch.cat((used, behind), 2)


CASES: dict[str, dict[str, Any]] = {
    "tiles": {},
    "no tiles": {"tokens": 60},
    "padding": {"padding": [0, 200]},
    "8 rows": {"group": 8},
    "softcap": {"options": {"softcap": 3.0}},
    "causal": {"queries": 3, "options": {"causal": True}},
}


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("case", CASES)
def test_rows_beyond_those_in_use_are_not_read(case: str, head_dim: int, impl: str) -> None:
    pytest.importorskip("triton")
    wanted: dict[str, Any] = {"tokens": 420, "group": 4, "queries": 1, "options": {}, **CASES[case]}
    padding = wanted.get("padding")
    view = make_view(wanted["tokens"], head_dim, place(head_dim), padding=padding)
    query = make_query(view, wanted["group"], wanted["queries"])
    options = {"scale": 0.1, "impl": impl, **wanted["options"]}
    expected = attend(query, view, **options)
    actual = attend(query, in_buffers(view), **options)
    assert expected.norm() > 0
    # parts are cut elsewhere, and sums of them round otherwise
    assert (actual - expected).norm() <= 2**-18 * expected.norm()


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_a_mask_may_be_longer_than_the_sequence(head_dim: int) -> None:
    pytest.importorskip("triton")
    view = make_view(420, head_dim, place(head_dim))
    query = make_query(view, 4, 1)
    seen = torch.rand(2, 1, 1, 420, generator=torch.Generator().manual_seed(0)) > 0.5
    seen = seen.to(query.device)
    expected = attend(query, view, scale=0.1, mask=seen, impl="triton")
    longer = F.pad(seen, (0, 900), value=True)
    actual = attend(query, in_buffers(view), scale=0.1, mask=longer, impl="triton")
    assert (actual - expected).norm() <= 2**-18 * expected.norm()


def test_counted_reads_the_numbers() -> None:
    pytest.importorskip("triton")
    view = make_view(420, 80, torch.device("cpu"))
    again = in_buffers(view).counted()
    assert again.counts is None and again.length == view.length
    for mine, its in zip(again.dense(), view.dense(), strict=True):
        assert torch.equal(mine, its)
