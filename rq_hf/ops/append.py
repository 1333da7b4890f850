# SPDX-License-Identifier: Apache-2.0
"""One new token to buffers of a fixed size: the public function and its reference."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rq_hf.ops.dispatch import use_triton
from rq_hf.ops.encode import encode, why_not
from rq_hf.quant.precision import no_autocast
from rq_hf.quant.preconditioning import Preconditioner
from rq_hf.quant.tiles import TileCodec


class Buffers(NamedTuple):
    """What steps of one layer store in and count by. S sinks, R tokens that stay exact.

    Attributes:
        exact_keys: Keys of sinks and tail `[B, Hk, S + R + T, D]`.
        exact_values: Their values.
        records: Packed words, int32 `[B, Hk, tiles, W]`.
        scales: Scales, float16 `[B, Hk, tiles, rows, T]`.
        counts: int32 `[4]`: sinks, tokens of the tail, packed tokens and packed tiles of the
            sequence with its new token.
        not_finite: int32, one number: 1 from the first token on that was NaN or infinite.
        length: Tokens stored before, int64, one number.
        base: Tokens packed right after the prompt, int64, one number, a multiple of T.
        sink_length: S.
        residual_length: R.
        max_length: Tokens that may be stored.
    """

    exact_keys: Tensor
    exact_values: Tensor
    records: Tensor
    scales: Tensor
    counts: Tensor
    not_finite: Tensor
    length: Tensor
    base: Tensor
    sink_length: int
    residual_length: int
    max_length: int


def append(
    codec: TileCodec,
    preconditioner: Preconditioner,
    key: Tensor,
    value: Tensor,
    buffers: Buffers,
    *,
    impl: str = "auto",
) -> None:
    """Stores one token a sequence, in place; packs a tile first where the tail is full.

    Which rows are in use follows from `length` and `base` alone, so that a step is the same calls
    on the same addresses, whatever it does. With `raw = length - base` tokens that were not packed
    after the prompt, S sinks, R tokens that stay exact and tiles of T tokens: when `raw - S - R` is
    a positive multiple of T, the oldest T tokens behind the sinks are packed and the R others move
    down to them. With `max_length` tokens stored, all stays as it is: a loop that runs on reads old
    numbers, and none from outside of the buffers or of a mask for `max_length` tokens.

    Args:
        codec: How to pack.
        preconditioner: What keys and values are freed of before.
        key: New keys `[B, Hk, 1, D]`.
        value: New values, same shape.
        buffers: Where to, written to but for `length` and `base`.
        impl: "auto" (kernels on a GPU, where they can run), "reference" or "triton".

    Raises:
        ValueError: Shapes do not match, or kernels were asked for and cannot run.
    """
    _check(codec, key, value, buffers)
    # on a CPU kernels are interpreted: for tests that ask for it
    if impl == "auto" and key.device.type == "cpu":
        impl = "reference"
    run = append_reference
    if use_triton(impl, _why_not(codec, preconditioner, buffers), key.device):
        from rq_hf.ops.triton.append_launch import append_tokens as run
    with no_autocast(key.device):
        run(codec, preconditioner, key, value, buffers)


def make_constants(
    codec: TileCodec, preconditioner: Preconditioner, buffers: Buffers, *, impl: str = "auto"
) -> None:
    """Makes the tables that kernels keep for the life of the process; nothing where none run.

    A table made while a CUDA graph is recorded would lie in that graph's memory, and end with it.
    Arguments are those of `append`.
    """
    device, obstacle = buffers.records.device, _why_not(codec, preconditioner, buffers)
    if device.type != "cuda" or not use_triton(impl, obstacle, device):
        return
    from rq_hf.ops.triton.append_launch import shared_arguments
    from rq_hf.ops.triton.tables import codec_tables, rope_operands

    shared_arguments(codec, preconditioner, buffers)
    codec_tables(codec, device)
    if preconditioner.rope is not None:
        rope_operands(
            preconditioner.rope,
            start=buffers.sink_length,
            length=codec.layout.tile_length,
            tiles=buffers.records.shape[2],
            device=device,
        )


def append_reference(
    codec: TileCodec, preconditioner: Preconditioner, key: Tensor, value: Tensor, buffers: Buffers
) -> None:
    """See `append`. Waits for the device, to know the length."""
    if int(buffers.length) >= buffers.max_length:
        return
    tile, kept = codec.layout.tile_length, buffers.sink_length + buffers.residual_length
    packed = int(buffers.base)
    raw = int(buffers.length) - packed
    flushed = max(0, (raw - kept) // tile)
    if flushed and (raw - kept) % tile == 0:
        _flush(codec, preconditioner, buffers, packed // tile + flushed - 1)
    packed += tile * flushed
    slot = raw - tile * flushed
    buffers.exact_keys[:, :, slot : slot + 1] = key
    buffers.exact_values[:, :, slot : slot + 1] = value
    if not all(bool(torch.isfinite(new).all()) for new in (key, value)):
        buffers.not_finite.fill_(1)
    sinks = min(buffers.sink_length, slot + 1)
    counts = buffers.counts
    counts.copy_(counts.new_tensor([sinks, slot + 1 - sinks, packed, packed // tile]))


def _flush(codec: TileCodec, preconditioner: Preconditioner, buffers: Buffers, tile: int) -> None:
    """Packs the oldest tokens of a full tail as tile number `tile`, and moves the others down."""
    length, first = codec.layout.tile_length, buffers.sink_length
    exact = buffers[:2]
    key, value = (x[:, :, first : first + length] for x in exact)
    start = first + tile * length
    encoded = encode(codec, preconditioner, key, value, start, impl="reference")
    for buffer, new in zip((buffers.records, buffers.scales), encoded, strict=True):
        buffer[:, :, tile : tile + 1] = new
    end = first + buffers.residual_length
    for rows in exact:
        # old and new places may overlap
        rows[:, :, first:end] = rows[:, :, first + length : end + length].clone()


def _why_not(codec: TileCodec, preconditioner: Preconditioner, buffers: Buffers) -> str | None:
    return why_not(codec, preconditioner, buffers.exact_keys, buffers.exact_values)


def _check(codec: TileCodec, key: Tensor, value: Tensor, buffers: Buffers) -> None:
    batch, heads, rows, head_dim = buffers.exact_keys.shape
    if key.shape != (batch, heads, 1, head_dim) or value.shape != key.shape:
        raise ValueError(
            f"key and value must be {[batch, heads, 1, head_dim]}, one token a sequence, got "
            f"{list(key.shape)} and {list(value.shape)}"
        )
    tile, tiles = codec.layout.tile_length, buffers.records.shape[2]
    expected = buffers.sink_length + buffers.residual_length + tile
    if rows != expected or buffers.exact_values.shape != buffers.exact_keys.shape:
        raise ValueError(
            f"exact keys and values must have {expected} rows: sinks, residual and a tile; got "
            f"{list(buffers.exact_keys.shape)} and {list(buffers.exact_values.shape)}"
        )
    if buffers.max_length > rows + tiles * tile:
        raise ValueError(
            f"{rows} exact rows and {tiles} tiles of {tile} tokens have no room for "
            f"{buffers.max_length} tokens"
        )
