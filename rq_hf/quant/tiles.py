# SPDX-License-Identifier: Apache-2.0
"""Tiles: the keys and values of a run of tokens of one KV head, as one packed record."""

import math
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

from rq_hf.quant.codebook_store import Distribution
from rq_hf.quant.codebooks import get_codebook
from rq_hf.quant.mse_quantizer import MSEQuantizer
from rq_hf.quant.packing import TileLayout, pack_scales, unpack_scales
from rq_hf.quant.prod_quantizer import ProdQuantizer
from rq_hf.quant.qjl import make_sketch
from rq_hf.quant.quantizers import QUANTIZERS
from rq_hf.quant.rotations import make_rotation
from rq_hf.quant.types import MSECodes, ProdCodes

# numbers of keys (or values) in work at once: temporary memory is a few times 4 MiB, which also
# suits the caches of a CPU
_NUMBERS_AT_ONCE = 2**20


class TileCodec:
    """Encodes whole tiles of one layer's keys and values, and decodes them.

    Keys, values and sketch have independent streams in every layer. All numbers a tile needs are
    in its record and its scales; the codec itself holds only what the settings determine.

    Args:
        head_dim: Numbers of a key or value, D.
        key_bits: Bits of a number of a key, the sign bit of "prod" included.
        value_bits: Bits of a number of a value.
        key_codec: "mse" or "prod". Values are "mse" always: they are summed, not multiplied.
        rotation: Name in `rotations.ROTATIONS`.
        codebook: Distribution the levels are made for, "gaussian" or "beta".
        scale: "norm", "least_squares" or "search", see `scale_fit.fit_codes`.
        sketch: Name in `qjl.SKETCHES`; read for "prod" only, as are the next two.
        sketch_size: Sign bits of a key, M; head_dim if None.
        estimator: Name in `qjl.ESTIMATORS`.
        seed: Seed of all streams.
        layer_idx: Layer of the model.

    Attributes:
        layout: Sizes and bit order of a record.
        key_quantizer: Quantizer of the keys.
        value_quantizer: Quantizer of the values.

    Raises:
        ValueError: For settings outside of the above.
    """

    def __init__(
        self,
        head_dim: int,
        *,
        key_bits: int,
        value_bits: int,
        key_codec: str = "mse",
        rotation: str = "hadamard",
        codebook: str = "gaussian",
        scale: str = "search",
        sketch: str = "orthogonal",
        sketch_size: int | None = None,
        estimator: str = "mmse",
        seed: int = 0,
        layer_idx: int = 0,
    ) -> None:
        if key_codec not in QUANTIZERS:
            raise ValueError(f"key_codec must be one of {', '.join(QUANTIZERS)}, got {key_codec!r}")
        if key_codec == "prod" and key_bits < 2:
            raise ValueError(
                "key_codec='prod' needs key_bits >= 2, one of them for the sign of the sketch, "
                f"got {key_bits}"
            )

        def build_mse(bits: int, role: str) -> MSEQuantizer:
            return MSEQuantizer(
                make_rotation(rotation, head_dim, seed, "layer", layer_idx, role),
                # integers serve the fragment order, which ends at 4 bits; wider ones would collide
                get_codebook(
                    bits,
                    head_dim,
                    distribution=cast(Distribution, codebook),
                    rounding="int8" if bits <= 4 else "none",
                ),
                scale=scale,
            )

        self.head_dim = head_dim
        self.value_quantizer = build_mse(value_bits, "value")
        self.key_quantizer: MSEQuantizer | ProdQuantizer
        if key_codec == "mse":
            self.key_quantizer = build_mse(key_bits, "key")
            self.layout = TileLayout(head_dim, key_bits, value_bits)
        else:
            size = head_dim if sketch_size is None else sketch_size
            inner = build_mse(key_bits - 1, "key")
            self.key_quantizer = ProdQuantizer(
                inner.rotation,
                inner.codebook,
                make_sketch(sketch, head_dim, size, seed, "layer", layer_idx, "sketch"),
                scale=scale,
                estimator=estimator,
            )
            self.layout = TileLayout(head_dim, key_bits - 1, value_bits, size)

    def encode(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Packed records and scales of whole tiles.

        Temporary memory does not grow with the number of tiles.

        Args:
            keys: [B, Hk, n * T, D], any floating dtype, finite, any strides.
            values: The same shape.

        Returns:
            records, [B, Hk, n, W], int32, and scales, [B, Hk, n, S, T], float16, in the order of
            `packing.pack_scales`: rows of keys, values and, for "prod", residuals.

        Raises:
            ValueError: For shapes that do not match, or tokens that do not fill whole tiles.
        """
        self._check_tokens(keys, values)
        length = self.layout.tile_length
        grid = (*keys.shape[:2], keys.shape[2] // length)
        key_tiles = keys.unflatten(2, (grid[2], length))
        value_tiles = values.unflatten(2, (grid[2], length))
        records = keys.new_empty((math.prod(grid), self.layout.record_words), dtype=torch.int32)
        shape = (math.prod(grid), self.layout.scale_rows, length)
        scales = keys.new_empty(shape, dtype=torch.float16)
        for part in self._parts(len(records)):
            # gathered by index, so that strided inputs are never copied as a whole
            flat = torch.arange(part.start, part.stop, device=keys.device)
            index = torch.unravel_index(flat, grid)
            records[part], scales[part] = self._encode_tiles(key_tiles[index], value_tiles[index])
        return records.unflatten(0, grid), scales.unflatten(0, grid)

    def decode(
        self,
        records: Tensor,
        scales: Tensor,
        *,
        dtype: torch.dtype = torch.float32,
        rotated: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of records, both [B, Hk, n * T, D] in `dtype`.

        Computed in float32. Beyond the result, memory does not grow with the number of tiles.

        Args:
            records: [B, Hk, n, W], int32.
            scales: [B, Hk, n, S, T], float16.
            dtype: Floating dtype of the result.
            rotated: Leave keys and values in the rotated coordinates of their quantizers.

        Raises:
            ValueError: For shapes that do not match each other or the layout.
        """
        self._check_records(records, scales)
        grid, length = records.shape[:3], self.layout.tile_length
        shape = (math.prod(grid), length, self.head_dim)
        keys = records.new_empty(shape, dtype=dtype)
        values = torch.empty_like(keys)
        flat_records, flat_scales = records.flatten(0, 2), scales.flatten(0, 2)
        for part in self._parts(len(keys)):
            decoded = self._decode_tiles(flat_records[part], flat_scales[part], rotated)
            keys[part], values[part] = decoded
        return keys.unflatten(0, grid).flatten(2, 3), values.unflatten(0, grid).flatten(2, 3)

    def _encode_tiles(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """[m, T, D] twice -> [m, W] and [m, S, T]."""
        key = self.key_quantizer.quantize(keys)
        value = self.value_quantizer.quantize(values)
        rows, signs = [key.scale, value.scale], None
        if isinstance(key, ProdCodes):
            rows.append(key.residual_scale)
            signs = key.signs
        return self.layout.pack(key.codes, value.codes, signs), pack_scales(torch.stack(rows, 1))

    def _decode_tiles(
        self, records: Tensor, scales: Tensor, rotated: bool
    ) -> tuple[Tensor, Tensor]:
        """[m, W] and [m, S, T] -> [m, T, D] twice, float32."""
        key_codes, value_codes, signs = self.layout.unpack(records)
        rows = unpack_scales(scales).unbind(1)
        value = MSECodes(value_codes, rows[1])
        values = self.value_quantizer.dequantize(value, rotated=rotated)
        if isinstance(self.key_quantizer, MSEQuantizer):
            key = MSECodes(key_codes, rows[0])
            return self.key_quantizer.dequantize(key, rotated=rotated), values
        # only a ProdQuantizer has signs, and its layout always holds them
        assert signs is not None
        record = ProdCodes(key_codes, rows[0], signs, rows[2])
        return self.key_quantizer.dequantize(record, rotated=rotated), values

    def _parts(self, tiles: int) -> Iterator[slice]:
        numbers = self.layout.tile_length * max(self.head_dim, self.layout.sketch_size)
        step = max(1, _NUMBERS_AT_ONCE // numbers)
        return (slice(start, min(start + step, tiles)) for start in range(0, tiles, step))

    def _check_tokens(self, keys: Tensor, values: Tensor) -> None:
        length = self.layout.tile_length
        if keys.ndim != 4 or keys.shape[2] % length or keys.shape[3] != self.head_dim:
            raise ValueError(
                f"keys must be [B, Hk, n * {length}, {self.head_dim}]: whole tiles of {length} "
                f"tokens, got {list(keys.shape)}; keep the last incomplete tile unpacked"
            )
        if values.shape != keys.shape:
            raise ValueError(
                f"values must have the shape of the keys, {list(keys.shape)}, "
                f"got {list(values.shape)}"
            )

    def _check_records(self, records: Tensor, scales: Tensor) -> None:
        layout = self.layout
        if records.ndim != 4 or records.shape[3] != layout.record_words:
            raise ValueError(
                f"records must be [B, Hk, n, {layout.record_words}], got {list(records.shape)}"
            )
        expected = (*records.shape[:3], layout.scale_rows, layout.tile_length)
        if tuple(scales.shape) != expected:
            raise ValueError(f"scales must be {list(expected)}, got {list(scales.shape)}")

    def __deepcopy__(self, memo: object) -> "TileCodec":
        # nothing in it changes: copies of a cache share it
        return self

    def __repr__(self) -> str:
        return f"TileCodec(key={self.key_quantizer!r}, value={self.value_quantizer!r})"
