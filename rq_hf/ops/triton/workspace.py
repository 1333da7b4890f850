# SPDX-License-Identifier: Apache-2.0
"""Sizes of one attention call, and the memory that its launches hand to one another."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rq_hf.ops.triton.launching import processors
from rq_hf.ops.view import ExactRows, LayerView

# programs of one warp that share a multiprocessor, as their registers allow
_PROGRAMS = 8
# so many `combine` reads at once
_MAX_PARTS = 256


@dataclass(frozen=True)
class Sizes:
    """Numbers that all launches of one call share.

    Attributes:
        batch: Sequences, B.
        kv_heads: KV heads, Hk.
        group: Query heads of a KV head, G.
        queries: Queries of a sequence, L.
        block: Rows of a unit, H: 4 or 8 of the G L rows of a KV head.
        units: Blocks of rows of all sequences and KV heads.
        tiles: Packed tiles of a KV head.
        splits: Parts that the tiles of a unit are divided among.
        chunk: Exact tokens of a part.
        chunks: Parts of exact tokens.
        combined_rows: Rows of a unit that one program merges.
    """

    batch: int
    kv_heads: int
    group: int
    queries: int
    block: int
    units: int
    tiles: int
    splits: int
    chunk: int
    chunks: int
    combined_rows: int

    @classmethod
    def of(cls, query: Tensor, view: LayerView, pieces: list[ExactRows]) -> Sizes:
        batch, heads, queries, head_dim = query.shape
        kv_heads = view.records.shape[1]
        rows = heads // kv_heads * queries
        # a tensor-core product has 8 or 16 columns, two a row
        block = 4 if rows <= 4 else 8
        units = batch * kv_heads * -(-rows // block)
        tiles = view.records.shape[2] if view.packed_length else 0
        chunk = exact_chunk(head_dim)
        chunks = sum(-(-rows.keys.shape[2] // chunk) for rows in pieces)
        # programs of a unit that run at once
        most = processors(query.device) * _PROGRAMS // units
        most = max(1, min(most, max(_MAX_PARTS - chunks, _MAX_PARTS // 2)))
        tiles_each = max(1, -(-tiles // most))
        return cls(
            batch=batch,
            kv_heads=kv_heads,
            group=heads // kv_heads,
            queries=queries,
            block=block,
            units=units,
            tiles=tiles,
            splits=-(-tiles // tiles_each),
            chunk=chunk,
            chunks=chunks,
            # a program for each row, until one a unit is enough for all multiprocessors
            combined_rows=1 if units < processors(query.device) else block,
        )

    @property
    def parts(self) -> int:
        """Partial results of a unit."""
        return self.splits + self.chunks

    @property
    def rows(self) -> int:
        """Rows of all units."""
        return self.units * self.block


@dataclass(frozen=True, eq=False)
class Workspace:
    """Results of one launch that the next reads, as the kernels describe them.

    All are float32 but for `rows8` (int8) and `slow_coef` (float16).

    Attributes:
        whole: The memory that the others are pieces of.
    """

    whole: Tensor
    partial: Tensor
    weight: Tensor
    coef: Tensor
    slow_coef: Tensor
    constant: Tensor
    row_scales: Tensor
    rows: Tensor
    rows8: Tensor

    @classmethod
    def allocate(
        cls,
        sizes: Sizes,
        head_dim: int,
        *,
        sides: int,
        pairs: int,
        steps: int,
        plain: bool,
        device: torch.device,
    ) -> Workspace:
        """Takes all of it in one piece.

        Args:
            sizes: Sizes of the call.
            head_dim: D.
            sides: 2 if rows are sketched too, else 1.
            pairs: Pairs that RoPE turns, padded; 0 for none.
            steps: Groups of eight slow pairs.
            plain: Whether rows are read as float32, not as bytes.
            device: Where.
        """
        rows = sizes.rows
        numbers = rows * sides * head_dim
        counts = {
            "partial": rows * sizes.parts * head_dim,
            "weight": rows * sizes.parts * 2,
            "coef": rows * 2 * pairs,
            # two numbers of two bytes for every coefficient
            "slow_coef": rows * steps * 16,
            "constant": rows,
            "row_scales": rows * sides,
            "rows": numbers if plain else 0,
            # two bytes a number
            "rows8": 0 if plain else numbers // 2,
        }
        whole = take_memory(sum(map(_aligned, counts.values())), device)
        pieces, at = {}, 0
        for name, count in counts.items():
            pieces[name] = whole[at : at + count]
            at += _aligned(count)
        pieces["rows8"] = pieces["rows8"].view(torch.int8)
        pieces["slow_coef"] = pieces["slow_coef"].view(torch.float16)
        return cls(whole, **pieces)

    @property
    def pieces(self) -> list[Tensor]:
        """All that has any numbers."""
        return [t for name, t in vars(self).items() if name != "whole" and t.numel()]


def take_memory(count: int, device: torch.device) -> Tensor:
    """Takes memory for `count` numbers of 4 bytes, aligned to more than kernels care for."""
    return torch.empty(count, dtype=torch.float32, device=device)


def exact_chunk(head_dim: int) -> int:
    """Exact tokens of a part."""
    return 64 if head_dim <= 128 else 32


def _aligned(count: int) -> int:
    """Numbers of 4 bytes, up to the next 128 bytes."""
    return -(-count // 32) * 32
