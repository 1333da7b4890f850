# SPDX-License-Identifier: Apache-2.0
"""The three launches of an attention call: prepare, attend, combine."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rq_hf.ops.triton.attend_plain import attend_plain
from rq_hf.ops.triton.attend_tiles import attend_tiles
from rq_hf.ops.triton.combine import combine
from rq_hf.ops.triton.combine_few import combine_few
from rq_hf.ops.triton.launching import Launch, chains, interpreting, processors
from rq_hf.ops.triton.prepare import prepare
from rq_hf.ops.triton.tables import (
    RopeOperands,
    codec_tables,
    keep_for_graphs,
    padded_pairs,
    rope_operands,
)
from rq_hf.ops.triton.workspace import Sizes, Workspace
from rq_hf.ops.view import ExactRows, LayerView

_LOG2E = math.log2(math.e)
# rows of partial results that `combine` adds up at a time
_ROWS_AT_ONCE = 32
# numbers that `combine_few` adds up at a time, and of the rotation a program's columns: at most
_FEW_NUMBERS = 64 * 128
_MOST_NUMBERS = 128 * 128
_LEAST_COLUMNS = 32
# programs for each multiprocessor that have room for words of 256 dimensions in shared memory
_FEW_PROGRAMS = 4


class Inputs(NamedTuple):
    """What a call is given, in the layout that kernels read.

    Attributes:
        query: `[B, Hq, L, D]`, numbers of a query side by side.
        view: The layer.
        pieces: Its exact rows, oldest first: `sinks` and `recent` of the view, tokens side by side.
        mask: `[B, Hq, L, >= N]`; None for none.
        logits: `[Hq]`, see `sinks` of `rq_hf.ops.attend`; None for none.
        scale: Factor of the inner products.
        causal: Whether queries do not see all tokens.
        softcap: See `rq_hf.ops.attend`.
        stores_newest: See `rq_hf.ops.attend.attend_with`.
        not_finite: See `rq_hf.ops.attend.attend_with`.
    """

    query: Tensor
    view: LayerView
    pieces: list[ExactRows]
    mask: Tensor | None
    logits: Tensor | None
    scale: float
    causal: bool
    softcap: float | None
    stores_newest: bool = False
    not_finite: Tensor | None = None

    @property
    def last_seen(self) -> int:
        """Index of the last token that the first query may see, if causal."""
        return self.view.length - self.query.shape[2]

    @property
    def causal_in_tiles(self) -> bool:
        """Whether a packed token may be newer than a query: else causality need not be checked."""
        newest = self.view.packed_start + self.view.packed_length
        return self.causal and newest > self.last_seen + 1


class Call:
    """One call: its workspace, its result, and the arguments that launches share."""

    def __init__(self, inputs: Inputs) -> None:
        query, view = inputs.query, inputs.view
        self.query, self.view, self.pieces = query, view, inputs.pieces
        self.logits = inputs.logits
        scale, softcap = inputs.scale, inputs.softcap
        self.sizes = sizes = Sizes.of(query, view, self.pieces)
        layout, pre = view.codec.layout, view.preconditioner
        self.dim = layout.head_dim
        self.width = triton.next_power_of_2(self.dim)
        self.plain = layout.order == "plain"
        self.sketch = layout.sketch_size > 0
        self.tables = codec_tables(view.codec, query.device)
        # scores in units of log2; with a softcap, twice the argument of tanh
        self.factor = scale * _LOG2E if softcap is None else 2 * scale * _LOG2E / softcap
        self.cap = 0.0 if softcap is None else softcap * _LOG2E
        self.rope = pre.rope if pre is not None and sizes.splits else None
        self.pairs = 0 if self.rope is None else padded_pairs(self.rope)
        self.angles = self._angles()
        keep_for_graphs(self.angles, query.device)
        # groups of slow pairs; the plain kernel takes all pairs alike
        self.steps = 0 if self.angles is None or self.plain else self.angles.steps
        self.causal, self.causal_in_tiles = inputs.causal, inputs.causal_in_tiles
        self.last_seen = inputs.last_seen
        self.stores_newest, self.not_finite = inputs.stores_newest, inputs.not_finite
        mask = inputs.mask
        self.masked = 0 if mask is None else 1 if mask.dtype == torch.bool else 2
        # a tensor stands in for those that are not there
        self.counts = query if view.counts is None else view.counts
        self.mask = query if mask is None else mask
        self.mask_strides = (0, 0, 0, 0) if mask is None else mask.stride()
        self.chained = sizes.splits > 0 and not self.plain and chains(query.device)
        self.space = Workspace.allocate(
            sizes,
            self.dim,
            sides=2 if self.sketch else 1,
            pairs=self.pairs,
            steps=self.steps,
            plain=self.plain,
            device=query.device,
        )
        self.out = torch.empty(query.shape, dtype=query.dtype, device=query.device)

    def launches(self) -> list[Launch]:
        """What is launched, one after the other."""
        packed = [self.attend_packed()] if self.sizes.splits else []
        return [self.prepare(), *packed, self.combine()]

    def _angles(self) -> RopeOperands | None:
        if self.rope is None:
            return None
        return rope_operands(
            self.rope,
            start=self.view.offset + self.view.packed_start,
            length=self.view.codec.layout.tile_length,
            tiles=self.sizes.tiles,
            device=self.query.device,
        )

    def prepare(self) -> Launch:
        """Rotates queries, and attends to the exact rows."""
        sizes, view, pre, space = self.sizes, self.view, self.view.preconditioner, self.space
        some, angles = self.query, self.angles
        first, *recent = self.pieces
        none = ExactRows(first.keys[:, :, :0], first.values[:, :, :0])
        piece0, piece1 = (*recent, none, none)[:2]
        index0 = view.sinks.keys.shape[2] + view.packed_length
        half = some.dtype == first.keys.dtype != torch.float32 and not interpreting()
        return Launch(
            prepare,
            (2 + self.sketch + sizes.chunks, sizes.units),
            (
                some,
                some if pre is None else pre.balance,
                self.tables.key_rotation.parts,
                self.tables.sketched.parts,
                some if pre is None else pre.pre_mean,
                some if pre is None else pre.post_mean,
                some if angles is None else angles.origin,
                some if view.padding is None else view.padding,
                first.keys,
                first.values,
                piece0.keys,
                piece0.values,
                piece1.keys,
                piece1.values,
                self.mask,
                self.counts,
                self.counts if self.not_finite is None else self.not_finite,
                space.rows8,
                space.row_scales,
                space.rows,
                space.coef,
                space.constant,
                space.slow_coef,
                space.partial,
                space.weight,
                *some.stride()[:3],
                *first.keys.stride()[:2],
                *piece0.keys.stride()[:2],
                *piece1.keys.stride()[:2],
                *self.mask_strides,
                first.keys.shape[2],
                piece0.keys.shape[2],
                piece1.keys.shape[2],
                index0,
                index0 + piece0.keys.shape[2],
                sizes.kv_heads,
                sizes.group,
                sizes.queries,
                sizes.splits,
                sizes.parts,
                self.last_seen,
                view.offset,
                self.factor,
                self.cap,
            ),
            {
                "D": self.dim,
                "DP": self.width,
                "N": sizes.chunk,
                "H": sizes.block,
                "PAIRS": self.pairs,
                "TURNED": 0 if self.rope is None else self.rope.inv_freq.shape[0],
                "INTERLEAVED": self.rope is not None and bool(self.rope.interleaved),
                "SKETCH": self.sketch,
                "PLAIN": self.plain,
                "PACKED": sizes.splits > 0,
                "PRECONDITIONED": pre is not None,
                "PADDED": view.padding is not None,
                "CAUSAL": self.causal,
                "MASKED": self.masked,
                "CAPPED": self.cap > 0,
                "COMPUTE": _triton_type(first.keys.dtype) if half else tl.float32,
                "FIRST_SLOW": 0 if angles is None else 4 * angles.halves,
                "STEPS": self.steps,
                "SLOW_WIDTH": triton.next_power_of_2(8 * self.steps),
                "HAS_LOW": self.tables.key_rotation.has_low,
                "COUNTED": view.counts is not None,
                "STORED": self.stores_newest,
                "NOTED": self.not_finite is not None,
                "CHAINED": self.chained,
            },
            num_warps=8,
        )

    def attend_packed(self) -> Launch:
        """Attends to the packed tiles."""
        return self._attend_plain() if self.plain else self._attend_tiles()

    def _attend_tiles(self) -> Launch:
        space, tables, angles, some = self.space, self.tables, self.angles, self.query
        return Launch(
            attend_tiles,
            (self.sizes.splits, self.sizes.units),
            (
                self.view.records,
                self.view.scales,
                space.rows8,
                space.row_scales,
                space.coef,
                space.constant,
                space.slow_coef,
                some if angles is None else angles.operands,
                some if angles is None else angles.turned_terms,
                *self._common_arguments(),
                tables.key_step,
                tables.value_step,
                self.cap,
                *tables.key_words,
                *tables.value_words,
            ),
            {
                "D": self.dim,
                **self._codec_constants(),
                "HALVES": 0 if angles is None else angles.halves,
                "STEPS": self.steps,
                "STAGED": self._staged(),
                **self._mask_constants(),
                "CHAINED": self.chained,
            },
            num_warps=1,
            chained=self.chained,
        )

    def _staged(self) -> bool:
        """Whether words wait in shared memory: rows of 8 leave no registers for them.

        A wide head has no registers for them either, and in shared memory they are too large for
        as many programs as large caches want.
        """
        sizes = self.sizes
        few = sizes.splits * sizes.units <= processors(self.query.device) * _FEW_PROGRAMS
        return sizes.block == 8 or (self.dim == 256 and few)

    def _attend_plain(self) -> Launch:
        space, tables, angles, some = self.space, self.tables, self.angles, self.query
        return Launch(
            attend_plain,
            (self.sizes.splits, self.sizes.units),
            (
                self.view.records,
                self.view.scales,
                space.rows,
                tables.key_levels,
                tables.value_levels,
                space.coef,
                space.constant,
                some if angles is None else angles.rows,
                *self._common_arguments(),
                self.cap,
            ),
            {
                "D": self.dim,
                "DP": self.width,
                **self._codec_constants(),
                **self._mask_constants(),
            },
            num_warps=8 if self.width > 128 else 4,
            # more stages take more shared memory than cards before compute capability 9.0 have
            num_stages=1,
        )

    def _common_arguments(self) -> tuple:
        """What both kernels of the packed part take in the same order."""
        sizes, view, space, some = self.sizes, self.view, self.space, self.query
        return (
            some if self.angles is None else self.angles.tiles,
            some if view.padding is None else view.padding,
            self.mask,
            self.counts,
            space.partial,
            space.weight,
            *view.records.stride()[:2],
            *view.scales.stride()[:2],
            *self.mask_strides,
            view.packed_length,
            sizes.splits,
            sizes.parts,
            view.packed_start,
            self.last_seen - view.packed_start,
            sizes.kv_heads,
            sizes.group,
            sizes.queries,
        )

    def _codec_constants(self) -> dict[str, Any]:
        layout = self.view.codec.layout
        return {
            "T": layout.tile_length,
            "KEY_BITS": layout.key_bits,
            "VALUE_BITS": layout.value_bits,
            "SKETCH": self.sketch,
            "H": self.sizes.block,
            "PAIRS": self.pairs,
        }

    def _mask_constants(self) -> dict[str, Any]:
        return {
            "PADDED": self.view.padding is not None,
            "CAUSAL": self.causal_in_tiles,
            "MASKED": self.masked,
            "CAPPED": self.cap > 0,
            "COUNTED": self.view.counts is not None,
        }

    def combine(self) -> Launch:
        """Merges all parts, and logits that have no value, and turns packed sums back."""
        sizes, pre, space = self.sizes, self.view.preconditioner, self.space
        arguments = (
            space.partial,
            space.weight,
            self.tables.value_rotation.parts,
            space.weight if pre is None else pre.value_mean,
            space.weight if self.logits is None else self.logits,
            self.out,
            sizes.kv_heads,
            sizes.group,
            sizes.queries,
            sizes.splits,
            sizes.parts,
        )
        constants = {
            "PACKED": sizes.splits > 0,
            "PRECONDITIONED": pre is not None,
            "SINK": self.logits is not None,
            "HAS_LOW": self.tables.value_rotation.has_low,
            "CHAINED": self.chained,
        }
        if sizes.rows <= processors(self.query.device):
            return self._combine_few(arguments, constants)
        return self._combine_many(arguments, constants)

    def _combine_few(self, arguments: tuple, constants: dict[str, Any]) -> Launch:
        """A program for each row, or for some columns of it while multiprocessors are left."""
        sizes, width = self.sizes, self.width
        parts = triton.next_power_of_2(sizes.parts)
        small = parts * width <= _FEW_NUMBERS
        numbers = _FEW_NUMBERS // 2 if small else _FEW_NUMBERS
        columns = min(width, _MOST_NUMBERS // width)
        programs = processors(self.query.device) // sizes.rows
        while columns > _LEAST_COLUMNS and 2 * (width // columns) <= programs:
            columns //= 2
        return Launch(
            combine_few,
            (sizes.units, sizes.block * (width // columns)),
            arguments,
            {
                "D": self.dim,
                "DP": width,
                "H": sizes.block,
                "WIDTH": columns,
                "PARTS": parts,
                "BLOCK": min(parts, numbers // width),
                **constants,
            },
            num_warps=2 if small else 4,
            chained=self.chained,
        )

    def _combine_many(self, arguments: tuple, constants: dict[str, Any]) -> Launch:
        """A program for each row, or for all rows of a unit."""
        sizes = self.sizes
        parts, rows = triton.next_power_of_2(sizes.parts), sizes.combined_rows
        return Launch(
            combine,
            (sizes.units, sizes.block // rows),
            arguments,
            {
                "D": self.dim,
                "DP": self.width,
                "H": sizes.block,
                "ROWS": rows,
                "PARTS": max(16, parts),
                "BLOCK": max(16 // rows, min(parts, _ROWS_AT_ONCE // rows)),
                **constants,
            },
            num_warps=8 if self.width > 128 else 4,
            chained=self.chained,
        )


def _triton_type(dtype: torch.dtype) -> tl.dtype:
    return tl.bfloat16 if dtype == torch.bfloat16 else tl.float16
