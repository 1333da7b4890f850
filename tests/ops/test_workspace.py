# SPDX-License-Identifier: Apache-2.0
"""How many programs share the tiles of a call."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from ops.test_attend_kernels import make_query, make_view

pytest.importorskip("triton")

PROGRAMS = 8


def sizes(
    monkeypatch: pytest.MonkeyPatch, tiles: int, *, batch: int, group: int, bits: int = 3
) -> object:
    """Sizes of a call on a GPU of 132 multiprocessors, two KV heads."""
    from rq_hf.ops.triton import workspace

    monkeypatch.setattr(workspace, "processors", lambda device: 132)
    view = make_view(400, 128, torch.device("cpu"), batch=1, nbits=bits)
    shape = (batch, 2, tiles)
    view = replace(
        view,
        records=view.records[:1, :, :1].expand(*shape, -1),
        scales=view.scales[:1, :, :1].expand(*shape, -1, -1),
        packed_length=tiles * view.codec.layout.tile_length,
    )
    query = make_query(view, group, 1).expand(batch, -1, -1, -1)
    return workspace.Sizes.of(query, view, [view.sinks, *view.recent])


@pytest.mark.parametrize("tiles", [1, 30, 62, 126, 254, 509, 1022, 8190])
@pytest.mark.parametrize(("batch", "group"), [(1, 4), (4, 4), (32, 4), (128, 4), (1, 7), (8, 20)])
@pytest.mark.parametrize("bits", [3, 4])
def test_all_programs_run_at_once_and_share_all_tiles(
    monkeypatch: pytest.MonkeyPatch, tiles: int, batch: int, group: int, bits: int
) -> None:
    found = sizes(monkeypatch, tiles, batch=batch, group=group, bits=bits)
    each = -(-found.tiles // found.splits)
    assert found.splits >= 1 and found.parts <= 256 and each * found.splits >= tiles
    # programs of a second round would double the time
    assert found.splits * found.units <= 132 * PROGRAMS or found.splits == 1


@pytest.mark.parametrize(
    ("tiles", "each"), [(62, 1), (126, 1), (132, 1), (133, 2), (254, 2), (509, 4), (1022, 8)]
)
def test_a_program_takes_no_more_tiles_than_it_must(
    monkeypatch: pytest.MonkeyPatch, tiles: int, each: int
) -> None:
    found = sizes(monkeypatch, tiles, batch=4, group=4)
    assert found.splits == -(-tiles // each)


def test_no_tiles_no_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    from rq_hf.ops.triton import workspace

    view = make_view(40, 128, torch.device("cpu"))
    assert view.packed_length == 0
    found = workspace.Sizes.of(make_query(view, 4, 1), view, [view.sinks, *view.recent])
    assert found.splits == 0 and found.parts == found.chunks > 0
