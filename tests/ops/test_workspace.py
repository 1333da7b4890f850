# SPDX-License-Identifier: Apache-2.0
"""How many tiles a program takes."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from rq_hf.ops.triton.workspace import _PROGRAMS, _tiles_of_a_program

MULTIPROCESSORS = 132


@pytest.mark.parametrize("tiles", [1, 100, 527, 528, 2032, 10_000, 10**6])
@pytest.mark.parametrize("enough", [3, 4, _PROGRAMS])
@pytest.mark.parametrize("tile_length", [64, 128])
def test_no_more_programs_than_fit_and_no_tile_waits_where_few_would_run(
    tiles: int, enough: int, tile_length: int
) -> None:
    each = _tiles_of_a_program(MULTIPROCESSORS, tiles, tile_length=tile_length, enough=enough)
    programs = -(-tiles // each)
    assert each >= 1 and programs <= MULTIPROCESSORS * _PROGRAMS
    # another tile each is taken only where that leaves enough programs, or where it must be
    if each > 1:
        crowded = tiles > (each - 1) * MULTIPROCESSORS * _PROGRAMS
        assert crowded or tiles > (each - 1) * MULTIPROCESSORS * enough
    if each * tile_length > 384:
        assert tiles > (each - 1) * MULTIPROCESSORS * _PROGRAMS


def test_one_tile_each_while_there_are_few() -> None:
    each = [_tiles_of_a_program(132, n, tile_length=128, enough=4) for n in (500, 1000, 1500, 9000)]
    assert each == [1, 2, 3, 9]
