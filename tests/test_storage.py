# SPDX-License-Identifier: Apache-2.0
"""Growing buffers: what is appended comes back, whatever happens between."""

import pytest
import torch

from rq_hf.storage import LayerStore, RowBuffer


def make_rows(count: int, start: int = 0) -> torch.Tensor:
    """Rows `[2, 3, count, 4]`, each number unlike every other."""
    rows = torch.arange(start, start + count, dtype=torch.float32)[:, None] + torch.arange(4) / 8
    offsets = torch.arange(6, dtype=torch.float32).reshape(2, 3, 1, 1) * 1000
    return rows + offsets


def make_store(sinks: int = 2, tile: int = 8) -> LayerStore:
    empty = make_rows(0)
    tiles = RowBuffer(torch.empty(2, 3, 0, 5, dtype=torch.int32), torch.empty(2, 3, 0, 2, tile))
    return LayerStore(
        sink_length=sinks, tile_length=tile, exact=RowBuffer(empty, empty.clone()), tiles=tiles
    )


def push(store: LayerStore, mark: int, tokens: int, count: int = 1) -> None:
    records = torch.full((2, 3, count, 5), mark, dtype=torch.int32)
    scales = torch.full((2, 3, count, 2, store.tile_length), float(mark))
    store.push_tiles(records, scales, tokens)


def test_appended_rows_come_back_in_order() -> None:
    buffer = RowBuffer(make_rows(0))
    for start, count in ((0, 1), (1, 63), (64, 0), (64, 500)):
        buffer.append(make_rows(count, start))
    assert torch.equal(buffer.view()[0], make_rows(564))
    assert torch.equal(buffer.view(10, 20)[0], make_rows(10, 10))


def test_spare_room_is_a_32nd_and_growth_is_amortised() -> None:
    buffer = RowBuffer(make_rows(0))
    buffer.append(make_rows(1000))
    assert buffer.capacity == 1000
    pointers = set()
    for start in range(1000, 1300):
        buffer.append(make_rows(1, start))
        assert buffer.capacity <= buffer.length * 33 / 32 + 1
        pointers.add(buffer.tensors[0].data_ptr())
    assert len(pointers) <= 300 / (1000 / 32) + 1


def test_views_outlive_whatever_is_stored_later() -> None:
    store = make_store()
    store.exact.append(make_rows(5), make_rows(5))
    push(store, mark=1, tokens=3)
    views = [*store.exact.view(), *store.tiles.view()]
    before = [view.clone() for view in views]
    store.replace_exact(make_rows(3, 50), make_rows(3, 60))
    store.exact.append(make_rows(20, 70), make_rows(20, 80))
    push(store, mark=1, tokens=5 + 24, count=4)
    assert all(torch.equal(view, old) for view, old in zip(views, before, strict=True))
    assert torch.equal(store.exact.view(0, 3)[1], make_rows(3, 60))


def test_buffers_made_in_inference_mode_can_be_written_outside() -> None:
    buffer = RowBuffer(make_rows(0))
    with torch.inference_mode():
        buffer.append(make_rows(3))
        buffer.map(lambda t: t[[1]])
    buffer.append(make_rows(1, 3)[[1]])
    assert torch.equal(buffer.view()[0], make_rows(4)[[1]])


def test_lengths_count_sinks_tiles_and_tail() -> None:
    store = make_store()
    store.exact.append(make_rows(1), make_rows(1))
    assert (store.sinks, store.tail, store.length) == (1, 0, 1)
    store.exact.append(make_rows(4, 1), make_rows(4, 1))
    push(store, mark=1, tokens=16, count=2)
    assert (store.sinks, store.tail, store.length) == (2, 3, 21)


@pytest.mark.parametrize("removed", range(22))
def test_crop_takes_tail_then_tiles_then_sinks(removed: int) -> None:
    store = make_store()
    store.exact.append(make_rows(5), make_rows(5))
    push(store, mark=1, tokens=8)
    push(store, mark=2, tokens=8)
    store.crop(removed)
    left = 21 - removed
    assert store.length == left
    assert store.tail == max(0, left - 18)
    assert store.packed_length == min(16, max(0, left - 2))
    assert store.tiles.length == -(-store.packed_length // 8)
    assert torch.equal(store.exact.view()[0], make_rows(5)[:, :, : store.sinks + store.tail])
    assert store.tiles.view()[0][0, 0, :, 0].tolist() == [1, 2][: store.tiles.length]


def test_an_open_tile_is_replaced_by_the_next_push() -> None:
    store = make_store()
    store.exact.append(make_rows(2), make_rows(2))
    push(store, mark=1, tokens=8)
    push(store, mark=2, tokens=3)
    assert store.open_tokens == 3
    push(store, mark=3, tokens=5 + 8, count=2)
    assert store.packed_length == 24
    assert store.tiles.view()[0][0, 0, :, 0].tolist() == [1, 3, 3]


def test_map_selects_sequences_in_every_buffer() -> None:
    store = make_store()
    store.exact.append(make_rows(4), make_rows(4, 100))
    push(store, mark=1, tokens=8)
    store.map(lambda t: t[[1, 1, 0]])
    assert all(t.shape[0] == 3 for t in store.tensors())
    assert torch.equal(store.exact.view()[1], make_rows(4, 100)[[1, 1, 0]])


def test_a_head_is_sliced_once_while_its_rows_stay() -> None:
    buffer = RowBuffer(make_rows(0))
    buffer.append(make_rows(40))
    buffer.reserve(50)
    head = buffer.head(7)
    buffer.append(make_rows(10, 40))
    assert buffer.head(7) is head and torch.equal(head[0], make_rows(7))
    assert buffer.head(9)[0].shape[2] == 9
    for change in (
        lambda: buffer.reserve(100),
        lambda: buffer.drop(3),
        lambda: buffer.map(lambda t: t.flip(0)),
    ):
        stale = buffer.head(7)
        change()
        # nothing holds on to memory that was given up
        assert buffer._head is None
        (new,) = buffer.head(7)
        assert new.data_ptr() != stale[0].data_ptr()
        assert torch.equal(new, buffer.tensors[0][:, :, :7])
