# SPDX-License-Identifier: Apache-2.0
"""Attention of a few queries to a layer's view by three launches: prepare, attend, combine."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from rq_hf.ops.triton.attend_plain import attend_plain
from rq_hf.ops.triton.attend_tiles import attend_tiles
from rq_hf.ops.triton.combine import combine
from rq_hf.ops.triton.launching import on_device, processors
from rq_hf.ops.triton.prepare import prepare
from rq_hf.ops.triton.tables import codec_tables, padded_pairs, rope_operands
from rq_hf.ops.view import ExactRows, LayerView

MAX_QUERIES = 32
# programs of one warp that share a multiprocessor, as registers allow
_PROGRAMS = 8
_MAX_SPLITS = 256
_LOG2E = math.log2(math.e)
_PIECES = 2


def obstacle(query: Tensor, view: LayerView) -> str | None:
    """Why the kernels cannot compute this on the device at hand; None if they can."""
    layout = view.codec.layout
    if query.shape[2] > MAX_QUERIES:
        return f"it takes at most {MAX_QUERIES} queries, got {query.shape[2]}"
    if torch.float64 in (query.dtype, view.sinks.keys.dtype):
        return "it computes in float32, got float64"
    if len(view.recent) > _PIECES:
        return f"it reads at most {_PIECES} pieces of recent tokens, got {len(view.recent)}"
    if query.device.type == "cpu" and layout.order == "fragment":
        return "tiles in fragment order need a GPU: the interpreter has no tensor cores"
    if layout.sketch_size not in (0, layout.head_dim):
        return f"a sketch must have head_dim rows, got {layout.sketch_size}"
    return None


@dataclass(frozen=True)
class Sizes:
    """Numbers that all launches of one call share."""

    batch: int
    kv_heads: int
    group: int
    queries: int
    block: int
    units: int
    splits: int
    chunk: int
    chunks: int

    @property
    def parts(self) -> int:
        return self.splits + self.chunks


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
    pieces = [_dense_rows(rows) for rows in (view.sinks, *view.recent)]
    sizes = _sizes(query, view, pieces)
    call = _Call(query, view, pieces, sizes, scale, mask, causal, softcap, sinks)
    with on_device(query.device):
        call.prepare()
        if sizes.splits:
            call.attend_packed()
        return call.combine()


class _Call:
    """One call: its workspace and the arguments that launches share."""

    def __init__(
        self,
        query: Tensor,
        view: LayerView,
        pieces: list[ExactRows],
        sizes: Sizes,
        scale: float,
        mask: Tensor | None,
        causal: bool,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> None:
        self.query, self.view, self.pieces, self.sizes = query, view, pieces, sizes
        self.logits = sinks
        layout, pre = view.codec.layout, view.preconditioner
        self.dim = layout.head_dim
        self.plain = layout.order == "plain"
        self.sketch = layout.sketch_size > 0
        self.tables = codec_tables(view.codec, query.device)
        # scores in units of log2; with a softcap, twice the argument of tanh
        self.factor = scale * _LOG2E if softcap is None else 2 * scale * _LOG2E / softcap
        self.cap = 0.0 if softcap is None else softcap * _LOG2E
        self.rope = None if pre is None else pre.rope
        self.pairs = 0 if self.rope is None else padded_pairs(self.rope)
        self.angles = None
        if self.rope is not None and sizes.splits:
            self.angles = rope_operands(
                self.rope,
                start=_first_position(view),
                length=layout.tile_length,
                tiles=view.records.shape[2],
                device=query.device,
            )
        self.mask = mask
        self.masked = 0 if mask is None else 1 if mask.dtype == torch.bool else 2
        if mask is not None:
            shape = (sizes.batch, query.shape[1], sizes.queries, mask.shape[3])
            self.mask = mask.expand(shape)
        self.mask_strides = (0, 0, 0, 0) if self.mask is None else self.mask.stride()
        self.causal = causal and sizes.queries > 1
        self.last_seen = view.length - sizes.queries
        self._allocate()

    def _allocate(self) -> None:
        sizes, dim, device = self.sizes, self.dim, self.query.device
        sides = 2 if self.sketch else 1
        rows = sizes.units * sizes.block
        counts = {
            "partial": rows * sizes.parts * dim,
            "weight": rows * sizes.parts * 2,
            "coef": rows * 2 * self.pairs,
            "row_scales": rows * sides,
            "constant": rows,
            "rows": rows * sides * dim if self.plain else 0,
            "rows8": 0 if self.plain else rows * sides * 2 * dim // 4,
        }
        space = torch.empty(sum(_aligned(n) for n in counts.values()), device=device)
        at = 0
        for name, count in counts.items():
            setattr(self, name, space[at : at + count])
            at += _aligned(count)
        self.rows8 = self.rows8.view(torch.int8)

    def prepare(self) -> None:
        sizes, view, pre, dim = self.sizes, self.view, self.view.preconditioner, self.dim
        some = self.query
        first, *recent = self.pieces
        none = ExactRows(first.keys[:, :, :0], first.values[:, :, :0], first.index)
        piece0, piece1 = (*recent, none, none)[:2]
        index0 = view.sinks.keys.shape[2] + view.packed_length
        half = all(t.dtype in (torch.bfloat16, torch.float16) for t in (some, first.keys))
        width = triton.next_power_of_2(dim)
        prepare[(1 + sizes.chunks, sizes.units)](
            some,
            some if pre is None else pre.balance,
            self.tables.key_rotation,
            self.tables.sketched,
            some if pre is None else pre.pre_mean,
            some if pre is None else pre.post_mean,
            some if self.angles is None else self.angles.origin,
            some if view.padding is None else view.padding,
            first.keys,
            first.values,
            piece0.keys,
            piece0.values,
            piece1.keys,
            piece1.values,
            some if self.mask is None else self.mask,
            self.rows8,
            self.row_scales,
            self.rows,
            self.coef,
            self.constant,
            self.partial,
            self.weight,
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
            self.factor,
            self.cap,
            D=dim,
            DP=width,
            DK=32 if width > 128 else min(width, 64),
            N=sizes.chunk,
            H=sizes.block,
            PAIRS=self.pairs if sizes.splits else 0,
            TURNED=0 if self.rope is None else self.rope.inv_freq.shape[0],
            INTERLEAVED=self.rope is not None and bool(self.rope.interleaved),
            SKETCH=self.sketch,
            PLAIN=self.plain,
            PACKED=sizes.splits > 0,
            PRECONDITIONED=pre is not None,
            PADDED=view.padding is not None,
            CAUSAL=self.causal,
            MASKED=self.masked,
            CAPPED=self.cap > 0,
            PRECISION="tf32" if half else "tf32x3",
            num_warps=8 if width > 128 else 4,
        )

    def attend_packed(self) -> None:
        sizes, view, some = self.sizes, self.view, self.query
        layout = view.codec.layout
        first_token = view.packed_start
        # no query may be older than the newest packed token, or causality is to be checked
        causal = self.causal and first_token + view.packed_length > self.last_seen + 1
        shared: dict[str, Any] = dict(
            D=self.dim,
            T=layout.tile_length,
            KEY_BITS=layout.key_bits,
            VALUE_BITS=layout.value_bits,
            SKETCH=self.sketch,
            H=sizes.block,
            PAIRS=self.pairs,
            PADDED=view.padding is not None,
            CAUSAL=causal,
            MASKED=self.masked,
            CAPPED=self.cap > 0,
        )
        before = (view.records, view.scales)
        angles = self.angles
        middle = (
            self.coef,
            self.constant,
            some if angles is None else angles.rows if self.plain else angles.operands,
            some if angles is None else angles.tiles,
            some if view.padding is None else view.padding,
            some if self.mask is None else self.mask,
            self.partial,
            self.weight,
            *view.records.stride()[:2],
            *view.scales.stride()[:2],
            *self.mask_strides,
            view.packed_length,
            sizes.splits,
            sizes.parts,
            first_token,
            self.last_seen - first_token,
            sizes.kv_heads,
            sizes.group,
            sizes.queries,
        )
        grid = (sizes.splits, sizes.units)
        tables = self.tables
        if self.plain:
            attend_plain[grid](
                *before,
                self.rows,
                tables.key_levels,
                tables.value_levels,
                *middle,
                self.cap,
                DP=triton.next_power_of_2(self.dim),
                **shared,
                num_warps=4,
            )
        else:
            attend_tiles[grid](
                *before,
                self.rows8,
                self.row_scales,
                *middle,
                tables.key_step,
                tables.value_step,
                self.cap,
                *tables.key_words,
                *tables.value_words,
                **shared,
                num_warps=1,
            )

    def combine(self) -> Tensor:
        sizes, pre, dim = self.sizes, self.view.preconditioner, self.dim
        shape = (*self.query.shape[:3], dim)
        out = torch.empty(shape, dtype=self.query.dtype, device=self.query.device)
        width = triton.next_power_of_2(dim)
        rows = sizes.block
        # few units: more programs, each with fewer rows, share the work
        while rows > 1 and sizes.units * sizes.block // rows < 2 * processors(out.device):
            rows //= 2
        logits = self.logits
        combine[(sizes.units * sizes.block // rows,)](
            self.partial,
            self.weight,
            self.tables.value_rotation,
            self.weight if pre is None else pre.value_mean,
            self.weight if logits is None else logits.reshape(-1),
            out,
            sizes.kv_heads,
            sizes.group,
            sizes.queries,
            sizes.splits,
            sizes.parts,
            D=dim,
            DP=width,
            DK=32 if width > 128 else min(width, 64),
            H=sizes.block,
            ROWS=rows,
            BLOCK=16 if rows < 4 else 4,
            PRECONDITIONED=pre is not None,
            SINK=logits is not None,
            num_warps=8 if width > 128 else 4,
        )
        return out


def _sizes(query: Tensor, view: LayerView, pieces: list[ExactRows]) -> Sizes:
    batch, heads, queries, head_dim = query.shape
    kv_heads = view.records.shape[1]
    rows = heads // kv_heads * queries
    block = 4 if rows <= 4 else 8
    units = batch * kv_heads * -(-rows // block)
    tiles = view.records.shape[2] if view.packed_length else 0
    wanted = processors(query.device) * _PROGRAMS // units
    chunk = 64 if head_dim <= 128 else 32
    return Sizes(
        batch=batch,
        kv_heads=kv_heads,
        group=heads // kv_heads,
        queries=queries,
        block=block,
        units=units,
        splits=min(tiles, max(1, min(wanted, _MAX_SPLITS))),
        chunk=chunk,
        chunks=sum(-(-rows.keys.shape[2] // chunk) for rows in pieces),
    )


def _first_position(view: LayerView) -> int:
    return view.packed_start + getattr(view, "offset", 0)


def _dense_rows(rows: ExactRows) -> ExactRows:
    """The same rows, with keys and values in one layout and tokens side by side."""
    dim = rows.keys.shape[3]
    strides = rows.keys.stride()
    if strides == rows.values.stride() and strides[2:] == (dim, 1):
        return rows
    return ExactRows(rows.keys.contiguous(), rows.values.contiguous(), rows.index)


def _aligned(count: int) -> int:
    """Numbers of 4 bytes, up to the next 128 bytes."""
    return -(-count // 32) * 32
