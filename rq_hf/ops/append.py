# SPDX-License-Identifier: Apache-2.0
"""One new token to buffers of a fixed size: the public function and its reference."""

from __future__ import annotations

from torch import Tensor

from rq_hf.ops.dispatch import use_triton
from rq_hf.ops.encode import encode, why_not
from rq_hf.quant.precision import no_autocast
from rq_hf.quant.preconditioning import Preconditioner
from rq_hf.quant.tiles import TileCodec


def append(
    codec: TileCodec,
    preconditioner: Preconditioner,
    key: Tensor,
    value: Tensor,
    exact_keys: Tensor,
    exact_values: Tensor,
    records: Tensor,
    scales: Tensor,
    length: Tensor,
    base: Tensor,
    counts: Tensor,
    *,
    sink_length: int,
    residual_length: int,
    impl: str = "auto",
) -> None:
    """Stores one token a sequence, in place; packs a tile first where the tail is full.

    Which rows are in use follows from `length` and `base` alone, so that a step is the same calls
    on the same addresses, whatever it does. With `raw = length - base` tokens that were not packed
    after the prompt, S sinks, R tokens that stay exact and tiles of T tokens: when `raw - S - R` is
    a positive multiple of T, the oldest T tokens behind the sinks are packed and the R others move
    down to them.

    Args:
        codec: How to pack.
        preconditioner: What keys and values are freed of before.
        key: New keys `[B, Hk, 1, D]`.
        value: New values, same shape.
        exact_keys: Keys of sinks and tail `[B, Hk, S + R + T, D]`.
        exact_values: Their values.
        records: Packed words, int32 `[B, Hk, tiles, W]`.
        scales: Scales, float16 `[B, Hk, tiles, rows, T]`.
        length: Tokens stored before, int64, one number. Not changed.
        base: Tokens packed right after the prompt, int64, one number, a multiple of T.
        counts: int32 `[4]`, written: sinks, tokens of the tail, packed tokens and packed tiles of
            the sequence with its new token.
        sink_length: S.
        residual_length: R.
        impl: "auto" (kernels on a GPU, where they can run), "reference" or "triton".

    Raises:
        ValueError: Shapes do not match, there is no room for another tile (known to the reference
            alone), or kernels were asked for and cannot run.
    """
    _check(codec, key, value, exact_keys, exact_values, sink_length + residual_length)
    # on a CPU kernels are interpreted: for tests that ask for it
    if impl == "auto" and key.device.type == "cpu":
        impl = "reference"
    run = append_reference
    if use_triton(impl, why_not(codec, preconditioner, exact_keys, exact_values), key.device):
        from rq_hf.ops.triton.append_launch import append_tokens as run
    with no_autocast(key.device):
        run(
            codec,
            preconditioner,
            key,
            value,
            exact_keys,
            exact_values,
            records,
            scales,
            length,
            base,
            counts,
            sink_length=sink_length,
            residual_length=residual_length,
        )


def make_constants(
    codec: TileCodec,
    preconditioner: Preconditioner,
    exact: tuple[Tensor, Tensor],
    packed: tuple[Tensor, Tensor],
    *,
    sink_length: int,
    residual_length: int,
    impl: str = "auto",
) -> None:
    """Makes the tables that kernels keep for the life of the process; nothing where none run.

    A table made while a CUDA graph is recorded would lie in that graph's memory, and end with it.

    Args:
        codec: As for `append`.
        preconditioner: As for `append`.
        exact: Buffers of keys and values.
        packed: Buffers of records and scales.
        sink_length: S.
        residual_length: R.
        impl: As for `append`.
    """
    device, obstacle = exact[0].device, why_not(codec, preconditioner, *exact)
    if device.type != "cuda" or not use_triton(impl, obstacle, device):
        return
    from rq_hf.ops.triton.append_launch import append_arguments
    from rq_hf.ops.triton.tables import codec_tables, rope_operands

    key, value = (x[:, :, :1] for x in exact)
    append_arguments(
        codec,
        preconditioner,
        key,
        value,
        *exact,
        *packed,
        sink_length=sink_length,
        residual_length=residual_length,
    )
    codec_tables(codec, device)
    if preconditioner.rope is not None:
        rope_operands(
            preconditioner.rope,
            start=sink_length,
            length=codec.layout.tile_length,
            tiles=packed[0].shape[2],
            device=device,
        )


def append_reference(
    codec: TileCodec,
    preconditioner: Preconditioner,
    key: Tensor,
    value: Tensor,
    exact_keys: Tensor,
    exact_values: Tensor,
    records: Tensor,
    scales: Tensor,
    length: Tensor,
    base: Tensor,
    counts: Tensor,
    *,
    sink_length: int,
    residual_length: int,
) -> None:
    """See `append`. Waits for the device, to know the length."""
    tile, kept = codec.layout.tile_length, sink_length + residual_length
    packed = int(base)
    raw = int(length) - packed
    flushed = max(0, (raw - kept) // tile)
    if flushed and (raw - kept) % tile == 0:
        _flush(
            codec,
            preconditioner,
            (exact_keys, exact_values),
            (records, scales),
            packed // tile + flushed - 1,
            sink_length,
            residual_length,
        )
    packed += tile * flushed
    slot = raw - tile * flushed
    exact_keys[:, :, slot : slot + 1] = key
    exact_values[:, :, slot : slot + 1] = value
    sinks = min(sink_length, slot + 1)
    counts.copy_(counts.new_tensor([sinks, slot + 1 - sinks, packed, packed // tile]))


def _flush(
    codec: TileCodec,
    preconditioner: Preconditioner,
    exact: tuple[Tensor, Tensor],
    packed: tuple[Tensor, Tensor],
    tile: int,
    sink_length: int,
    residual_length: int,
) -> None:
    """Packs the oldest tokens of a full tail as tile number `tile`, and moves the others down."""
    length = codec.layout.tile_length
    if tile >= packed[0].shape[2]:
        raise ValueError(
            f"the cache is full: there is room for {packed[0].shape[2]} tiles of {length} tokens"
        )
    key, value = (x[:, :, sink_length : sink_length + length] for x in exact)
    start = sink_length + tile * length
    encoded = encode(codec, preconditioner, key, value, start, impl="reference")
    for buffer, new in zip(packed, encoded, strict=True):
        buffer[:, :, tile : tile + 1] = new
    end = sink_length + residual_length
    for rows in exact:
        # old and new places may overlap
        rows[:, :, sink_length:end] = rows[:, :, sink_length + length : end + length].clone()


def _check(
    codec: TileCodec,
    key: Tensor,
    value: Tensor,
    exact_keys: Tensor,
    exact_values: Tensor,
    kept: int,
) -> None:
    batch, heads, rows, head_dim = exact_keys.shape
    if key.shape != (batch, heads, 1, head_dim) or value.shape != key.shape:
        raise ValueError(
            f"key and value must be {[batch, heads, 1, head_dim]}, one token a sequence, got "
            f"{list(key.shape)} and {list(value.shape)}"
        )
    if rows != kept + codec.layout.tile_length or exact_values.shape != exact_keys.shape:
        raise ValueError(
            f"exact keys and values must have {kept + codec.layout.tile_length} rows: sinks, "
            f"residual and a tile; got {list(exact_keys.shape)} and {list(exact_values.shape)}"
        )
