# SPDX-License-Identifier: Apache-2.0
"""Records beyond 2**31 words: addresses are counted in 64 bits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from ops.test_attend_kernels import make_query, make_view
from torch import Tensor

from rq_hf.ops import LayerView, attend

pytestmark = pytest.mark.gpu

SMALL = 2**31
# gigabytes that the largest of these takes
NEEDED = 40


@pytest.fixture(autouse=True)
def enough_memory() -> None:
    if torch.cuda.mem_get_info()[0] < NEEDED << 30:
        pytest.skip(f"needs {NEEDED} GiB of free GPU memory")


def check(view: LayerView, far: LayerView) -> None:
    query = make_query(view, 4, 1)
    expected, actual = (attend(query, x, scale=0.1, impl="triton") for x in (view, far))
    assert expected.norm() > 0
    # parts are cut elsewhere, and sums of them round otherwise
    assert (actual - expected).norm() <= 2**-18 * expected.norm()


def behind(tiles: Tensor, skipped: int) -> Tensor:
    """The same tiles behind `skipped` others."""
    batch, heads, count, *rest = tiles.shape
    far = tiles.new_zeros(batch, heads, skipped + count, *rest)
    far[:, :, skipped:] = tiles
    return far


@pytest.mark.parametrize("head_dim", [64, 80])
def test_tiles_of_a_very_long_sequence(head_dim: int) -> None:
    view = make_view(172 + 256, head_dim, torch.device("cuda"), batch=1, key_mean="none")
    length, words = view.codec.layout.tile_length, view.records.shape[3]
    assert view.packed_length == view.records.shape[2] * length
    skipped = SMALL // words + 1
    far = replace(
        view,
        records=behind(view.records, skipped),
        scales=behind(view.scales, skipped),
        packed_length=view.packed_length + skipped * length,
        padding=torch.tensor([skipped * length], device="cuda"),
    )
    assert far.records[0, 0].numel() > SMALL
    check(view, far)


@pytest.mark.parametrize("head_dim", [64, 80])
def test_sequences_far_from_one_another(head_dim: int) -> None:
    view = make_view(172 + 256, head_dim, torch.device("cuda"))
    shape, stride = view.records.shape, view.records.stride()
    memory = torch.zeros(SMALL + view.records.numel(), dtype=torch.int32, device="cuda")
    records = memory.as_strided(shape, (SMALL, *stride[1:]))
    records.copy_(view.records)
    check(view, replace(view, records=records))
