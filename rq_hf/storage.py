# SPDX-License-Identifier: Apache-2.0
"""Growing buffers of one layer: exact rows and packed tiles. No mathematics.

The tokens of a sequence lie, oldest first, in

    | sinks: exact | packed tiles of T tokens | tail: exact |

Sinks and tail share one buffer, sinks first. Only the last tile may hold fewer than T tokens: it
was cut open by a crop, or sealed early. Every buffer has rows for a whole batch, so all sequences
of a batch have the same length; padding counts as tokens. A store without sinks may drop its oldest
tiles; it then begins at the token of index `dropped`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class RowBuffer:
    """Tensors that grow together along dimension 2, of which the first `length` rows are used."""

    def __init__(self, *empty: Tensor) -> None:
        """Starts from tensors `[B, Hk, 0, ...]`, which give batch, heads, dtype and device."""
        self.tensors = list(empty)
        self.length = 0
        self._head: tuple[int, list[Tensor]] | None = None

    @property
    def capacity(self) -> int:
        return self.tensors[0].shape[2]

    def append(self, *rows: Tensor) -> None:
        """Copies `rows`, one tensor `[B, Hk, n, ...]` for each of the buffer's, behind the last.

        Rows in use are never written to, so views of them stay as they are until rows are dropped.
        """
        end = self.length + rows[0].shape[2]
        self.reserve(end)
        for tensor, new in zip(self.tensors, rows, strict=True):
            tensor[:, :, self.length : end] = new
        self.length = end

    def reserve(self, rows: int) -> None:
        """Makes room for `rows` rows: exactly that at first, later with 1/32 to spare.

        A small surplus keeps the held bytes near the nominal ones; appends stay amortised, since
        each growth copies at most 32 times what it adds.
        """
        if rows <= self.capacity:
            return
        capacity = rows if self.capacity == 0 else rows + max(1, rows // 32)
        self._head = None
        for i, old in enumerate(self.tensors):
            # a buffer made in inference mode could not be written outside of it
            with torch.inference_mode(False):
                new = old.new_empty(*old.shape[:2], capacity, *old.shape[3:])
            if self.length:
                new[:, :, : self.length] = old[:, :, : self.length]
            self.tensors[i] = new

    def drop(self, rows: int) -> None:
        """Drops the oldest `rows` rows. The others are copied, so views of any stay as they are."""
        kept = RowBuffer(*(tensor[:, :, :0] for tensor in self.tensors))
        kept.append(*self.view(rows))
        self.tensors, self.length, self._head = kept.tensors, kept.length, None

    def view(self, start: int = 0, stop: int | None = None) -> list[Tensor]:
        """Returns views of rows `start` to `stop` (the last used row if None)."""
        stop = self.length if stop is None else stop
        return [tensor[:, :, start:stop] for tensor in self.tensors]

    def head(self, stop: int) -> list[Tensor]:
        """Returns views of the first `stop` rows: the same ones as long as these stay in place."""
        if self._head is None or self._head[0] != stop:
            self._head = stop, self.view(0, stop)
        return self._head[1]

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replaces the used rows of every tensor by `function` of them, without spare room."""
        self._head = None
        with torch.inference_mode(False):
            # in the same list, which a mark of the store may hold: no old tensor stays with it
            self.tensors[:] = [function(t[:, :, : self.length]).contiguous() for t in self.tensors]


class StoreMark(NamedTuple):
    """What a store held, without a copy: rows that were in use are not written to.

    A buffer that has grown since holds the same rows; one that was replaced is kept by its mark.
    An open tile that was filled since keeps the codes of its first tokens.
    """

    exact: RowBuffer
    exact_length: int
    tiles: list[Tensor]
    tiles_length: int
    packed_length: int
    dropped: int

    @property
    def length(self) -> int:
        """Tokens of a sequence, dropped ones included."""
        return self.exact_length + self.packed_length + self.dropped


class LayerStore:
    """Exact rows and packed tiles of one layer."""

    def __init__(self, *, sink_length: int, tile_length: int, exact: RowBuffer, tiles: RowBuffer):
        """Takes empty buffers: `exact` of (keys, values), `tiles` of (records, scales)."""
        self.sink_length = sink_length
        self.tile_length = tile_length
        self.exact = exact
        self.tiles = tiles
        self.packed_length = 0
        self.dropped = 0

    @property
    def sinks(self) -> int:
        """Exact rows at the head of the sequence."""
        return min(self.sink_length, self.exact.length)

    @property
    def tail(self) -> int:
        """Exact rows at the end of the sequence."""
        return self.exact.length - self.sinks

    @property
    def length(self) -> int:
        """Tokens stored."""
        return self.exact.length + self.packed_length

    @property
    def open_tokens(self) -> int:
        """Tokens in the last tile if it is not full, else 0."""
        return self.packed_length % self.tile_length

    def push_tiles(self, records: Tensor, scales: Tensor, tokens: int) -> None:
        """Appends tiles `[B, Hk, n, ...]`; an open last tile is replaced by the first of them.

        Args:
            records: Packed words of the tiles, the open tile's own tokens merged in.
            scales: Their scales.
            tokens: Packed tokens by which the store grows.
        """
        self.tiles.length -= int(self.open_tokens > 0)
        self.tiles.append(records, scales)
        self.packed_length += tokens

    def replace_exact(self, keys: Tensor, values: Tensor) -> None:
        """Puts other exact rows, sinks first, in place of all that are there.

        They get buffers of their own, with room for a tile more.
        """
        exact = RowBuffer(*(tensor[:, :, :0] for tensor in self.exact.tensors))
        exact.reserve(keys.shape[2] + self.tile_length)
        exact.append(keys, values)
        self.exact = exact

    def drop(self, tokens: int) -> None:
        """Drops the oldest `tokens` tokens, which are whole tiles of a store without sinks."""
        assert self.sink_length == 0 and tokens % self.tile_length == 0
        self.tiles.drop(tokens // self.tile_length)
        self.packed_length -= tokens
        self.dropped += tokens

    def skip(self, tokens: int) -> None:
        """Drops all packed tokens, and as many of the next that will never be packed."""
        self.tiles.drop(self.tiles.length)
        self.dropped += self.packed_length + tokens
        self.packed_length = 0

    def crop(self, tokens: int) -> None:
        """Drops the newest `tokens` tokens. What stays keeps its codes bit for bit."""
        from_tail = min(tokens, self.tail)
        from_packed = min(tokens - from_tail, self.packed_length)
        self.exact.length -= from_tail
        self.packed_length -= from_packed
        self.tiles.length = -(-self.packed_length // self.tile_length)
        self.exact.length = max(0, self.exact.length - (tokens - from_tail - from_packed))

    def mark(self) -> StoreMark:
        """Returns what `go_back` takes; of no use after a crop, a selection or a move."""
        exact, tiles = self.exact, self.tiles
        return StoreMark(
            exact, exact.length, tiles.tensors, tiles.length, self.packed_length, self.dropped
        )

    def go_back(self, mark: StoreMark) -> None:
        """Puts back what there was at the mark."""
        self.exact, self.exact.length = mark.exact, mark.exact_length
        self.tiles.tensors, self.tiles.length = mark.tiles, mark.tiles_length
        self.packed_length, self.dropped = mark.packed_length, mark.dropped
        self.exact._head = self.tiles._head = None

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replaces all tensors by `function` of their used part (batch selection, device)."""
        self.exact.map(function)
        self.tiles.map(function)

    def tensors(self) -> Iterator[Tensor]:
        """Yields every tensor held."""
        yield from self.exact.tensors
        yield from self.tiles.tensors
