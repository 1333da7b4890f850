# SPDX-License-Identifier: Apache-2.0
"""Attention of a few queries to a layer's view by three launches: prepare, attend, combine."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rq_hf.ops.dispatch import MAX_QUERIES
from rq_hf.ops.triton.attend_plain import attend_plain
from rq_hf.ops.triton.attend_tiles import attend_tiles
from rq_hf.ops.triton.combine import combine
from rq_hf.ops.triton.launching import interpreting, launch, on_device
from rq_hf.ops.triton.prepare import prepare
from rq_hf.ops.triton.tables import RopeOperands, codec_tables, padded_pairs, rope_operands
from rq_hf.ops.triton.workspace import Sizes, Workspace
from rq_hf.ops.view import ExactRows, LayerView

_LOG2E = math.log2(math.e)
# pieces of recent tokens: the tail, and tokens that are not stored yet
_PIECES = 2
# parts that `combine` adds up at a time
_PARTS_AT_ONCE = 32


def obstacle(query: Tensor, view: LayerView) -> str | None:
    """Why the kernels cannot compute this on the device at hand; None if they can."""
    layout = view.codec.layout
    if query.shape[2] > MAX_QUERIES:
        return f"it takes at most {MAX_QUERIES} queries, got {query.shape[2]}"
    if torch.float64 in (query.dtype, view.sinks.keys.dtype):
        return "it computes in float32, got float64"
    if layout.head_dim > 256:
        return f"head_dim must be at most 256, got {layout.head_dim}"
    if len(view.recent) > _PIECES:
        return f"it reads at most {_PIECES} pieces of recent tokens, got {len(view.recent)}"
    if query.device.type == "cpu" and layout.order == "fragment":
        return "tiles in fragment order need a GPU: the interpreter has no tensor cores"
    if layout.sketch_size not in (0, layout.head_dim):
        return f"a sketch must have head_dim rows, got {layout.sketch_size}"
    return None


# launches are not for torch.compile to look into
@torch.compiler.disable
def attend(
    query: Tensor,
    view: LayerView,
    *,
    scale: float,
    mask: Tensor | None = None,
    causal: bool = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """See `rq_hf.ops.attend`. Products of codes are exact, sums are float32."""
    if query.stride(3) != 1:
        query = query.contiguous()
    with on_device(query.device):
        call = _Call(query, view, scale, mask, causal, softcap)
        call.prepare()
        if call.sizes.splits:
            call.attend_packed()
        return call.combine(sinks)


class _Call:
    """One call: its workspace, and the arguments that launches share."""

    def __init__(
        self,
        query: Tensor,
        view: LayerView,
        scale: float,
        mask: Tensor | None,
        causal: bool,
        softcap: float | None,
    ) -> None:
        self.query, self.view = query, view
        self.pieces = [_dense_rows(rows) for rows in (view.sinks, *view.recent)]
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
        self.slow = self.angles is not None and self.angles.slow and not self.plain
        self.causal = causal and sizes.queries > 1
        self.last_seen = view.length - sizes.queries
        self.masked = 0 if mask is None else 1 if mask.dtype == torch.bool else 2
        # a tensor stands in for those that are not there
        self.counts = query if view.counts is None else view.counts
        self.mask = query
        self.mask_strides: tuple[int, ...] = (0, 0, 0, 0)
        if mask is not None:
            self.mask = mask.expand(*query.shape[:3], mask.shape[3])
            self.mask_strides = self.mask.stride()
        self.space = Workspace.allocate(
            sizes,
            self.dim,
            sides=2 if self.sketch else 1,
            pairs=self.pairs,
            slow=self.slow,
            plain=self.plain,
            device=query.device,
        )

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

    def prepare(self) -> None:
        """Rotates queries, and attends to the exact rows."""
        sizes, view, pre, space = self.sizes, self.view, self.view.preconditioner, self.space
        some, angles = self.query, self.angles
        first, *recent = self.pieces
        none = ExactRows(first.keys[:, :, :0], first.values[:, :, :0])
        piece0, piece1 = (*recent, none, none)[:2]
        index0 = view.sinks.keys.shape[2] + view.packed_length
        half = some.dtype == first.keys.dtype != torch.float32 and not interpreting()
        blocks = -(-sizes.rows // 16) * -(-sizes.tiles // 16) if self.slow else 0
        launch(
            prepare,
            (1 + sizes.chunks + -(-blocks // sizes.units), sizes.units),
            (
                some,
                some if pre is None else pre.balance,
                self.tables.key_rotation.parts,
                self.tables.sketched.parts,
                some if pre is None else pre.pre_mean,
                some if pre is None else pre.post_mean,
                some if angles is None else angles.origin,
                some if angles is None else angles.turned_terms,
                some if view.padding is None else view.padding,
                first.keys,
                first.values,
                piece0.keys,
                piece0.values,
                piece1.keys,
                piece1.values,
                self.mask,
                self.counts,
                space.rows8,
                space.row_scales,
                space.rows,
                space.coef,
                space.constant,
                space.basis,
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
                sizes.units,
                sizes.tiles,
                0 if angles is None else angles.turned_terms.shape[-1],
                sizes.splits,
                sizes.parts,
                self.last_seen,
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
                "SLOW": self.slow,
                "PRECONDITIONED": pre is not None,
                "PADDED": view.padding is not None,
                "CAUSAL": self.causal,
                "MASKED": self.masked,
                "CAPPED": self.cap > 0,
                "COMPUTE": _triton_type(first.keys.dtype) if half else tl.float32,
                "FIRST_SLOW": angles.first_slow if angles is not None and self.slow else 0,
                "HAS_LOW": self.tables.key_rotation.has_low,
                "COUNTED": view.counts is not None,
            },
            num_warps=8,
        )

    def attend_packed(self) -> None:
        """Attends to the packed tiles."""
        if self.plain:
            self._attend_plain()
        else:
            self._attend_tiles()

    def _attend_tiles(self) -> None:
        space, tables, angles, some = self.space, self.tables, self.angles, self.query
        launch(
            attend_tiles,
            (self.sizes.splits, self.sizes.units),
            (
                self.view.records,
                self.view.scales,
                space.rows8,
                space.row_scales,
                space.coef,
                space.constant,
                space.basis,
                some if angles is None else angles.operands,
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
                "SLOW": self.slow,
                **self._mask_constants(),
            },
            num_warps=1,
        )

    def _attend_plain(self) -> None:
        space, tables, angles, some = self.space, self.tables, self.angles, self.query
        launch(
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
            sizes.tiles,
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
        view = self.view
        # where the newest packed token is older than every query, causality need not be checked
        newest = view.packed_start + view.packed_length
        return {
            "PADDED": view.padding is not None,
            "CAUSAL": self.causal and newest > self.last_seen + 1,
            "MASKED": self.masked,
            "CAPPED": self.cap > 0,
            "COUNTED": view.counts is not None,
        }

    def combine(self, logits: Tensor | None) -> Tensor:
        """Merges all parts, with `logits` `[Hq]` that have no value, and turns packed sums back."""
        sizes, pre, space = self.sizes, self.view.preconditioner, self.space
        out = torch.empty(self.query.shape, dtype=self.query.dtype, device=self.query.device)
        parts = triton.next_power_of_2(sizes.parts)
        launch(
            combine,
            (sizes.units, sizes.block),
            (
                space.partial,
                space.weight,
                self.tables.value_rotation.parts,
                space.weight if pre is None else pre.value_mean,
                space.weight if logits is None else logits.reshape(-1),
                out,
                sizes.kv_heads,
                sizes.group,
                sizes.queries,
                sizes.splits,
                sizes.parts,
            ),
            {
                "D": self.dim,
                "DP": self.width,
                "H": sizes.block,
                "PARTS": max(16, parts),
                "BLOCK": max(16, min(parts, _PARTS_AT_ONCE)),
                "PACKED": sizes.splits > 0,
                "PRECONDITIONED": pre is not None,
                "SINK": logits is not None,
                "HAS_LOW": self.tables.value_rotation.has_low,
            },
            num_warps=8 if self.width > 128 else 4,
        )
        return out


def _triton_type(dtype: torch.dtype) -> tl.dtype:
    return tl.bfloat16 if dtype == torch.bfloat16 else tl.float16


def _dense_rows(rows: ExactRows) -> ExactRows:
    """The same rows, with keys and values in one layout and tokens side by side."""
    dim = rows.keys.shape[3]
    strides = rows.keys.stride()
    if strides == rows.values.stride() and strides[2:] == (dim, 1):
        return rows
    return ExactRows(rows.keys.contiguous(), rows.values.contiguous(), rows.first, rows.shift)
