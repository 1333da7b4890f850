# SPDX-License-Identifier: Apache-2.0
"""What attention reads of one layer: a snapshot of its exact rows and packed tiles."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rq_hf.ops.decode import decode
from rq_hf.quant.preconditioning import Preconditioner
from rq_hf.quant.tiles import TileCodec


@dataclass(frozen=True, eq=False)
class ExactRows:
    """Tokens kept as they are.

    Attributes:
        keys: `[B, Hk, n, D]`, the model's dtype.
        values: Same shape and dtype.
        first: Place of the first row in the sequence; the others follow.
        shift: What is added to the places in each sequence, int64 `[B]`; None for nothing.
    """

    keys: Tensor
    values: Tensor
    first: int = 0
    shift: Tensor | None = None

    @property
    def index(self) -> Tensor:
        """Places of the rows in the sequence, int64 `[n]`, or `[B, n]` with a shift."""
        stop = self.first + self.keys.shape[2]
        index = torch.arange(self.first, stop, device=self.keys.device)
        return index if self.shift is None else self.shift[:, None] + index

    def spans(self, length: int) -> Iterator[ExactRows]:
        """Yields the rows in pieces of at most `length`."""
        for start in range(0, self.keys.shape[2], length):
            rows = slice(start, start + length)
            keys, values = self.keys[:, :, rows], self.values[:, :, rows]
            yield ExactRows(keys, values, self.first + start, self.shift)


@dataclass(frozen=True, eq=False)
class LayerView:
    """Keys and values of one layer as they were when the view was taken.

    The store never writes to a row that a view shows, so a view stays right whatever is stored
    later, until tokens are dropped (`crop`). The place of a token in the view ("index") counts
    padding, and begins with the first token left where a sliding window has dropped older ones.

    Attributes:
        sinks: The first tokens, exact. With left padding these are each sequence's first real
            tokens; they then hide the packed or exact rows of the same index.
        packed_start: Index of the first packed token.
        packed_length: Packed tokens; only the last tile may be partly used.
        records: Packed words, int32 `[B, Hk, tiles, W]`.
        scales: Scales, float16 `[B, Hk, tiles, S, T]`.
        codec: What decodes them.
        preconditioner: What was done to keys and values before; None for nothing.
        recent: The newest tokens, exact, oldest first, in one piece or more.
        padding: Left padding of each sequence, int64 `[B]`, as far as it is in the view; None for
            none.
        offset: Tokens dropped before the view's first: token `n` of the view has index
            `offset + n` in the sequence, which the key mean depends on.
        counts: What of the tensors is in use, int32 `[4]` where the tensors are: sinks, recent
            tokens, packed tokens, packed tiles. For buffers of a fixed size whose use only the
            device knows; there is then one piece of recent tokens. None: all of them.
    """

    sinks: ExactRows
    packed_start: int
    packed_length: int
    records: Tensor
    scales: Tensor
    codec: TileCodec
    preconditioner: Preconditioner | None
    recent: tuple[ExactRows, ...]
    padding: Tensor | None = None
    offset: int = 0
    counts: Tensor | None = None

    def counted(self) -> LayerView:
        """Returns the view of what is in use, without `counts`. Waits for the device."""
        if self.counts is None:
            return self
        sinks, recent, packed, tiles = self.counts.tolist()
        (tail,) = self.recent
        return replace(
            self,
            sinks=_head(self.sinks, sinks),
            packed_length=packed,
            records=self.records[:, :, :tiles],
            scales=self.scales[:, :, :tiles],
            recent=(replace(_head(tail, recent), first=sinks + packed),) if recent else (),
            counts=None,
        )

    @property
    def length(self) -> int:
        """Tokens of a sequence, or for how many there is room."""
        length = self.sinks.keys.shape[2] + self.packed_length
        for rows in self.recent:
            length += rows.keys.shape[2]
        return length

    @property
    def hidden_before(self) -> Tensor | None:
        """Index `[B]` before which packed and recent rows are padding or copies of the sinks."""
        return None if self.padding is None else self.padding + self.sinks.keys.shape[2]

    def decode_tiles(self, start: int, stop: int, *, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Returns keys and values of the tokens in tiles `start` to `stop`, `[B, Hk, n, D]`."""
        length = self.codec.layout.tile_length
        count = min(stop * length, self.packed_length) - start * length
        records, scales = self.records[:, :, start:stop], self.scales[:, :, start:stop]
        states = decode(self.codec, records, scales, dtype=torch.float32, rotated=False)
        key, value = (x[:, :, :count] for x in states)
        if self.preconditioner is not None:
            at = self.offset + self.packed_start + start * length
            key = self.preconditioner.restore_keys(key, at, dtype)
            value = self.preconditioner.restore_values(value, dtype)
        return key.to(dtype), value.to(dtype)

    def dense(self) -> tuple[Tensor, Tensor]:
        """Returns all keys and values `[B, Hk, length, D]` in order, packed ones decoded."""
        dtype = self.sinks.keys.dtype
        packed = self.decode_tiles(0, self.records.shape[2], dtype=dtype)
        keys = [self.sinks.keys, packed[0], *(rows.keys for rows in self.recent)]
        values = [self.sinks.values, packed[1], *(rows.values for rows in self.recent)]
        key, value = torch.cat(keys, 2), torch.cat(values, 2)
        if self.padding is not None:
            at = self.sinks.index[:, None, :, None].expand_as(self.sinks.keys)
            key.scatter_(2, at, self.sinks.keys)
            value.scatter_(2, at, self.sinks.values)
        return key, value


def _head(rows: ExactRows, count: int) -> ExactRows:
    """Returns the first `count` rows."""
    return replace(rows, keys=rows.keys[:, :, :count], values=rows.values[:, :, :count])
