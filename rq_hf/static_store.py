# SPDX-License-Identifier: Apache-2.0
"""A layer's store whose buffers have their full size, and their addresses, from the start."""

from __future__ import annotations

import torch
from torch import Tensor

from rq_hf.ops.append import Buffers
from rq_hf.quant.preconditioning import Preconditioner
from rq_hf.quant.rope import RopeTable
from rq_hf.static_ops import StaticTensors
from rq_hf.storage import LayerStore, RowBuffer


class StaticStore(LayerStore):
    """Exact rows and packed tiles of one layer, statistics and padding, at fixed addresses.

    Steps change the tensors alone. What the host knows of their use, which is all that
    `LayerStore` tells, is as old as the last `refresh`.

    Args:
        empty: A store without rows, which gives sizes, dtypes and device.
        residual_length: The newest tokens that stay exact.
        max_length: Tokens to make room for.

    Attributes:
        tensors_read: What attention reads.
        buffers: What steps store in; `exact` and `tiles`, and `counts` of `tensors_read`, again.
    """

    def __init__(self, empty: LayerStore, residual_length: int, max_length: int) -> None:
        tile = empty.tile_length
        rows = empty.sink_length + residual_length + tile
        # the exact rows hold the others
        tiles = max(1, -(-max_length // tile))
        exact = [_at_full_size(t, rows) for t in empty.exact.tensors]
        packed = [_at_full_size(t, tiles) for t in empty.tiles.tensors]
        super().__init__(
            sink_length=empty.sink_length,
            tile_length=tile,
            exact=RowBuffer(*exact),
            tiles=RowBuffer(*packed),
        )
        neutral = Preconditioner.identity(exact[0])
        with torch.inference_mode(False):
            padding = exact[0].new_zeros(exact[0].shape[0], dtype=torch.int64)
            counts, not_finite = (padding.new_zeros(n, dtype=torch.int32) for n in ((4,), ()))
            stored, base = (padding.new_zeros(()) for _ in range(2))
            statistics = (tensor.clone() for tensor in _statistics(neutral))
        self.tensors_read = StaticTensors._make((*exact, *packed, counts, padding, *statistics))
        numbers = (counts, not_finite, stored, base)
        sizes = (empty.sink_length, residual_length, max_length)
        self.buffers = Buffers._make((*exact, *packed, *numbers, *sizes))
        for tensor in (*self.tensors_read, *numbers):
            torch._dynamo.mark_static_address(tensor)

    @property
    def changed_by_steps(self) -> list[Tensor]:
        """What a step changes; in the buffers of tiles it writes free rows alone."""
        own = self.buffers
        return [own.exact_keys, own.exact_values, own.counts, own.not_finite, own.length]

    def refresh(self) -> None:
        """Reads from the device what is in use."""
        sinks, tail, self.packed_length, self.tiles.length = self.tensors_read.counts.tolist()
        self.exact.length = sinks + tail

    def clear(self) -> None:
        """Forgets all tokens; the buffers stay where they are."""
        own = self.buffers
        for tensor in (own.length, own.base, own.counts, own.not_finite, self.tensors_read.padding):
            tensor.zero_()
        self.exact.length = self.tiles.length = self.packed_length = 0

    def working_copy(self) -> LayerStore:
        """Returns a store of the same tokens that may grow: tiles shared, exact rows copied.

        The tiles that are packed into it come into the buffers here.
        """
        exact = RowBuffer(*(tensor[:, :, :0] for tensor in self.exact.tensors))
        exact.append(*self.exact.view())
        tiles = RowBuffer(*self.tiles.tensors)
        tiles.length = self.tiles.length
        copy = LayerStore(
            sink_length=self.sink_length, tile_length=self.tile_length, exact=exact, tiles=tiles
        )
        copy.packed_length = self.packed_length
        return copy

    def take(self, copy: LayerStore) -> None:
        """Puts the tokens of a `working_copy` in place of those here."""
        for mine, new in zip(self.exact.tensors, copy.exact.view(), strict=True):
            mine[:, :, : copy.exact.length] = new
        self.exact.length, self.tiles.length = copy.exact.length, copy.tiles.length
        self.packed_length = copy.packed_length
        self.buffers.length.fill_(copy.length)
        self.buffers.base.fill_(copy.packed_length)
        counts = (copy.sinks, copy.tail, copy.packed_length, copy.tiles.length)
        # one by one: a copy from the host would wait for the device
        for i, count in enumerate(counts):
            self.tensors_read.counts[i].fill_(count)

    def set_statistics(self, preconditioner: Preconditioner, padding: Tensor | None) -> None:
        """Sets what tiles are packed and read with."""
        tensors = self.tensors_read
        for old, new in zip(tensors.statistics, _statistics(preconditioner), strict=True):
            old.copy_(new)
        tensors.padding.copy_(padding if padding is not None else torch.zeros_like(tensors.padding))

    def reorder(self, indices: Tensor) -> None:
        """Puts the sequences `indices`, int64 `[B]`, in place of those here."""
        for tensor in self.tensors_read:
            if tensor is not self.tensors_read.counts:
                tensor.copy_(tensor[indices])

    def preconditioner(self, rope: RopeTable | None) -> Preconditioner:
        """Returns the statistics."""
        return self.tensors_read.preconditioner(rope)


def _statistics(of: Preconditioner) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return of.pre_mean, of.post_mean, of.balance, of.value_mean


def _at_full_size(empty: Tensor, rows: int) -> Tensor:
    # a buffer made in inference mode could not be written outside of it
    with torch.inference_mode(False):
        return empty.new_zeros(*empty.shape[:2], rows, *empty.shape[3:])
