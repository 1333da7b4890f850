# SPDX-License-Identifier: Apache-2.0
"""Tests of the tile codec: records hold what the quantizers say, in bounded memory."""

from typing import Any

import pytest
import torch
from torch import Tensor

from rq_hf.quant import tiles
from rq_hf.quant.packing import unpack_scales
from rq_hf.quant.prod_quantizer import ProdQuantizer
from rq_hf.quant.quantizers import QUANTIZERS, MSEQuantizer
from rq_hf.quant.seeding import generator
from rq_hf.quant.tiles import TileCodec

SETTINGS: dict[str, dict[str, Any]] = {
    "2 bits, D 64": {"head_dim": 64, "key_bits": 2, "value_bits": 2},
    "3 bits, D 128": {"head_dim": 128, "key_bits": 3, "value_bits": 3},
    "4 bits, short tiles": {"head_dim": 128, "key_bits": 4, "value_bits": 4},
    "mixed": {"head_dim": 64, "key_bits": 4, "value_bits": 2},
    "plain order": {"head_dim": 80, "key_bits": 3, "value_bits": 5, "scale": "norm"},
    "prod": {"head_dim": 128, "key_bits": 3, "value_bits": 3, "key_codec": "prod"},
    "prod, plain, papers": {
        "head_dim": 96,
        "key_bits": 2,
        "value_bits": 3,
        "key_codec": "prod",
        "sketch": "gaussian",
        "sketch_size": 33,
        "estimator": "unbiased",
        "codebook": "beta",
        "rotation": "rotor",
    },
    "prod, wide sketch, short tiles": {
        "head_dim": 64,
        "key_bits": 5,
        "value_bits": 4,
        "key_codec": "prod",
        "sketch_size": 128,
    },
}


@pytest.fixture(params=SETTINGS)
def codec(request: pytest.FixtureRequest) -> TileCodec:
    return TileCodec(**SETTINGS[request.param])


def tokens(codec: TileCodec, batch: int = 2, heads: int = 3, count: int = 2) -> list[Tensor]:
    shape = (batch, heads, count * codec.layout.tile_length, codec.head_dim)
    return [torch.randn(shape, generator=generator(0, label)) for label in ("key", "value")]


def test_decode_gives_what_the_quantizers_store(codec: TileCodec) -> None:
    keys, values = tokens(codec)
    records, scales = codec.encode(keys, values)
    layout = codec.layout
    assert records.shape == (2, 3, 2, layout.record_words)
    assert records.dtype == torch.int32
    assert scales.shape == (2, 3, 2, layout.scale_rows, layout.tile_length)
    assert scales.dtype == torch.float16
    back_keys, back_values = codec.decode(records, scales)
    for back, quantizer, x in (
        (back_keys, codec.key_quantizer, keys),
        (back_values, codec.value_quantizer, values),
    ):
        expected = quantizer.dequantize(quantizer.quantize(x))  # type: ignore[arg-type]
        # the same sums, which may be taken in another order for another shape of the product
        torch.testing.assert_close(back, expected)
        # at the least, one bit, whose unbiased weight of 33 signs for 96 coordinates adds noise of
        # 0.36 pi/2 96/33 = 1.6 times the energy: a cosine of 0.6
        assert torch.nn.functional.cosine_similarity(back.flatten(), x.flatten(), dim=0) > 0.5


def test_records_hold_the_codes_and_scales(codec: TileCodec) -> None:
    keys, values = tokens(codec)
    records, scales = codec.encode(keys, values)
    length = codec.layout.tile_length
    key_codes, value_codes, signs = codec.layout.unpack(records)
    rows = unpack_scales(scales).unbind(3)
    key = codec.key_quantizer.quantize(keys.unflatten(2, (2, length)))
    value = codec.value_quantizer.quantize(values.unflatten(2, (2, length)))
    stored = [key_codes, rows[0], signs, rows[-1]][: len(key)]
    for name, got, expected in zip(key._fields, stored, key, strict=True):
        assert got is not None
        # another order of summing can move a coordinate across a boundary, but hardly ever
        assert torch.isclose(got.float(), expected.float()).float().mean() > 0.999, name
    assert (value_codes == value.codes).float().mean() > 0.999
    torch.testing.assert_close(rows[1], value.scale)


@pytest.mark.parametrize("rotation", ["none", "butterfly"])
@pytest.mark.parametrize("key_codec", QUANTIZERS)
def test_slices_give_the_result_of_one_pass_and_bound_the_work(
    key_codec: str, rotation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = TileCodec(64, key_bits=3, value_bits=2, key_codec=key_codec, rotation=rotation)
    keys, values = tokens(codec, count=3)
    whole = codec.encode(keys, values)
    whole_back = codec.decode(*whole)

    seen: list[int] = []

    def spy(quantizer: Any, method: str) -> None:
        original = getattr(type(quantizer), method)

        def spied(x: Any, **options: Any) -> Any:
            seen.append(x.numel() if isinstance(x, Tensor) else x.codes.numel())
            return original(quantizer, x, **options)

        monkeypatch.setattr(quantizer, method, spied)

    for quantizer in (codec.key_quantizer, codec.value_quantizer):
        spy(quantizer, "quantize")
        spy(quantizer, "dequantize")
    # five tiles of 128 x 64 numbers: 18 tiles make three full slices and one of three
    monkeypatch.setattr(tiles, "_NUMBERS_AT_ONCE", 5 * 128 * 64 + 1)
    sliced = codec.encode(keys, values)
    sliced_back = codec.decode(*sliced)
    assert sorted(set(seen)) == [3 * 128 * 64, 5 * 128 * 64]
    for got, expected in zip((*sliced, *sliced_back), (*whole, *whole_back), strict=True):
        assert torch.equal(got, expected)
        assert (got != 0).any()


def test_strided_and_half_inputs_are_encoded_alike(codec: TileCodec) -> None:
    keys, values = (x.bfloat16() for x in tokens(codec))
    records, scales = codec.encode(keys.float(), values.float())
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (keys, values)]
    assert not strided[0].is_contiguous()
    for inputs in ((keys, values), strided):
        again = codec.encode(*inputs)
        assert torch.equal(again[0], records)
        assert torch.equal(again[1], scales)
    assert records.unique().numel() > 100


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_decode_rounds_once_to_the_dtype_asked_for(codec: TileCodec, dtype: torch.dtype) -> None:
    encoded = codec.encode(*tokens(codec))
    for got, full in zip(codec.decode(*encoded, dtype=dtype), codec.decode(*encoded), strict=True):
        assert got.dtype == dtype
        assert torch.equal(got, full.to(dtype))
        assert got.abs().mean() > 0.1


def test_no_tiles_and_strided_records(codec: TileCodec) -> None:
    keys, values = tokens(codec)
    empty = codec.encode(keys[:, :, :0], values[:, :, :0])
    assert empty[0].shape == (2, 3, 0, codec.layout.record_words)
    assert [x.shape for x in codec.decode(*empty)] == [keys[:, :, :0].shape] * 2
    records, scales = codec.encode(keys, values)
    some = codec.decode(records[:, ::2, 1:], scales[:, ::2, 1:])
    for got, full in zip(some, codec.decode(records, scales), strict=True):
        torch.testing.assert_close(got, full[:, ::2, codec.layout.tile_length :])
        assert (got != 0).any()


def test_streams_are_independent_and_repeatable() -> None:
    def build(**options: Any) -> TileCodec:
        return TileCodec(64, key_bits=3, value_bits=3, key_codec="prod", **options)

    def matrices(codec: TileCodec) -> list[Tensor]:
        key = codec.key_quantizer
        assert isinstance(key, ProdQuantizer)
        value = codec.value_quantizer
        return [key.rotation.matrix(), value.rotation.matrix(), key.sketch.matrix() / 8]

    for rotation in ("dense", "butterfly"):
        first = matrices(build(rotation=rotation))
        others = [
            *matrices(build(rotation=rotation, layer_idx=1)),
            *matrices(build(rotation=rotation, seed=1)),
        ]
        drawn = first + others
        for i, one in enumerate(drawn):
            for other in drawn[:i]:
                # |A B^T|^2 / D is D for equal matrices and about 1 an entry for independent ones
                assert (one @ other.mT).diagonal().abs().mean() < 0.5
        for again, one in zip(matrices(build(rotation=rotation)), first, strict=True):
            assert torch.equal(again, one)


def test_the_sign_bit_of_prod_is_counted_in_key_bits() -> None:
    codec = TileCodec(64, key_bits=3, value_bits=3, key_codec="prod")
    assert isinstance(codec.key_quantizer, ProdQuantizer)
    assert isinstance(codec.value_quantizer, MSEQuantizer)
    assert codec.key_quantizer.codebook.bits == codec.layout.key_bits == 2
    assert codec.key_quantizer.sketch.sketch_size == codec.layout.sketch_size == 64
    words = TileCodec(64, key_bits=3, value_bits=3).layout.record_words
    assert codec.layout.record_words == words
    assert codec.layout.scale_rows == 3


def test_refused_arguments_say_what_is_accepted() -> None:
    with pytest.raises(ValueError, match="mse, prod"):
        TileCodec(64, key_bits=3, value_bits=3, key_codec="qjl")
    with pytest.raises(ValueError, match="key_bits >= 2"):
        TileCodec(64, key_bits=1, value_bits=3, key_codec="prod")
    with pytest.raises(ValueError, match="rotation"):
        TileCodec(64, key_bits=3, value_bits=3, rotation="twist")
    with pytest.raises(ValueError, match="uniform"):
        TileCodec(64, key_bits=3, value_bits=3, codebook="uniform")
    codec = TileCodec(64, key_bits=3, value_bits=3)
    keys, values = tokens(codec)
    with pytest.raises(ValueError, match="whole tiles of 128"):
        codec.encode(keys[:, :, 1:], values[:, :, 1:])
    with pytest.raises(ValueError, match="shape of the keys"):
        codec.encode(keys, values[:1])
    records, scales = codec.encode(keys, values)
    with pytest.raises(ValueError, match="records must be"):
        codec.decode(records[..., 1:], scales)
    with pytest.raises(ValueError, match="scales must be"):
        codec.decode(records, scales[:, :, 1:])
