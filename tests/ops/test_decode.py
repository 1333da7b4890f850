# SPDX-License-Identifier: Apache-2.0
"""The decode kernel against the quantizers, on records of random bits."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch
from support.compile import compile_call, outside_interpreter
from torch import Tensor

from rq_hf.ops.decode import decode
from rq_hf.ops.dispatch import device_obstacle
from rq_hf.quant.tiles import TileCodec

pytest.importorskip("triton")


@pytest.fixture
def device(device: torch.device) -> torch.device:
    """Devices that run kernels; a CPU does in the interpreter."""
    obstacle = device_obstacle(device)
    if obstacle is not None:
        pytest.skip(obstacle)
    return device


def make_codec(head_dim: int, key_bits: int, value_bits: int, **settings: Any) -> TileCodec:
    return TileCodec(head_dim, key_bits=key_bits, value_bits=value_bits, **settings)


def make_records(codec: TileCodec, device: torch.device, tiles: int = 2) -> tuple[Tensor, Tensor]:
    """Random words and scales, as parts of longer buffers."""
    generator = torch.Generator().manual_seed(0)
    layout, grid = codec.layout, (2, 3, tiles + 1)
    words = torch.randint(
        -(2**31), 2**31, (*grid, layout.record_words), dtype=torch.int32, generator=generator
    )
    shape = (*grid, layout.scale_rows, layout.tile_length)
    scales = torch.randn(shape, generator=generator).half()
    return tuple(x.to(device)[:, :, :tiles] for x in (words, scales))


MSE = [
    (128, 1, 1),
    (128, 2, 2),
    (128, 3, 3),
    (128, 4, 4),
    (128, 4, 2),
    (64, 1, 4),
    (64, 2, 3),
    (64, 3, 1),
    (64, 4, 4),
    (64, 4, 3),
    (256, 3, 2),
    (384, 2, 3),
    (80, 3, 5),
    (96, 4, 4),
    (7, 8, 1),
]


@pytest.mark.parametrize(("head_dim", "key_bits", "value_bits"), MSE)
def test_rotated_rows_are_equal(
    device: torch.device, head_dim: int, key_bits: int, value_bits: int
) -> None:
    codec = make_codec(head_dim, key_bits, value_bits)
    records, scales = make_records(codec, device, tiles=1)
    options: dict[str, Any] = {"dtype": torch.float32, "rotated": True}
    made = decode(codec, records, scales, impl="triton", **options)
    wanted = codec.decode(records, scales, **options)
    assert all(map(torch.equal, made, wanted))
    assert made[0].shape == (2, 3, codec.layout.tile_length, head_dim)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rotated", [False, True])
def test_dtypes_and_rotation_back(device: torch.device, dtype: torch.dtype, rotated: bool) -> None:
    codec = make_codec(64, 3, 3, rotation="dense")
    records, scales = make_records(codec, device)
    made = decode(codec, records, scales, dtype=dtype, rotated=rotated, impl="triton")
    wanted = codec.decode(records, scales, dtype=dtype, rotated=rotated)
    assert made[0].dtype == dtype
    # sums of the same 64 products in another order, then one rounding
    torch.testing.assert_close(made, wanted, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_decoding_in_parts_changes_nothing(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = make_codec(64, 2, 2)
    records, scales = make_records(codec, device, tiles=3)
    options: dict[str, Any] = {"dtype": torch.float32, "rotated": False, "impl": "triton"}
    at_once = decode(codec, records, scales, **options)
    monkeypatch.setattr("rq_hf.ops.decode._NUMBERS_AT_ONCE", 1)
    in_parts = decode(codec, records, scales, **options)
    torch.testing.assert_close(in_parts, at_once, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"head_dim": 128},
        {"head_dim": 64, "sketch": "gaussian"},
        {"head_dim": 64, "key_bits": 5, "value_bits": 4},
        {"head_dim": 128, "sketch_size": 256},
        {"head_dim": 96, "sketch": "gaussian", "sketch_size": 33},
    ],
    ids=str,
)
def test_signs(device: torch.device, settings: dict[str, Any]) -> None:
    codec = make_codec(**{"key_bits": 3, "value_bits": 3, "key_codec": "prod", **settings})
    records, scales = make_records(codec, device, tiles=1)
    options: dict[str, Any] = {"dtype": torch.float32, "rotated": True}
    made = decode(codec, records, scales, impl="triton", **options)
    wanted = codec.decode(records, scales, **options)
    assert torch.equal(made[1], wanted[1])
    # the sketch as a sum of two bfloat16 matrices is right to 2**-17; M terms of a few times 1
    bound = 2.0**-16 * codec.layout.sketch_size * 4
    weight = scales[:, :, :, 2].float().abs().max()
    assert (made[0] - wanted[0]).abs().max() <= bound * weight
    assert wanted[0].abs().max() > 100 * bound * weight


def test_no_tiles(device: torch.device) -> None:
    codec = make_codec(64, 3, 3)
    records, scales = make_records(codec, device, tiles=0)
    for rotated in (False, True):
        made = decode(codec, records, scales, dtype=torch.float16, rotated=rotated, impl="triton")
        assert all(x.shape == (2, 3, 0, 64) for x in made)


def test_what_kernels_cannot_do_is_said_and_left_to_the_reference(device: torch.device) -> None:
    codec = make_codec(64, 3, 3)
    records, scales = make_records(codec, device)
    options: dict[str, Any] = {"dtype": torch.float64, "rotated": True}
    with pytest.raises(
        ValueError, match=r"cannot run: it decodes to float32, .*, not torch.float64"
    ):
        decode(codec, records, scales, impl="triton", **options)
    made = decode(codec, records, scales, **options)
    assert all(map(torch.equal, made, codec.decode(records, scales, **options)))
    with pytest.raises(ValueError, match="records must be"):
        decode(codec, records[..., 1:], scales, **options)
    with pytest.raises(ValueError, match="scales must be"):
        decode(codec, records, scales[..., 1:], **options)


COMPILED: dict[str, dict[str, Any]] = {
    "3 bits": {"key_bits": 3, "value_bits": 3},
    "prod": {"key_bits": 3, "value_bits": 3, "key_codec": "prod"},
}


def compiled_usage(name: str, capability: int) -> dict[str, int]:
    """What a variant takes of a GPU; called where Triton does not interpret."""
    from rq_hf.ops.triton.decode import decode_kernel
    from rq_hf.ops.triton.decode_launch import decode_arguments

    codec = make_codec(head_dim=128, **COMPILED[name])
    records, scales = make_records(codec, torch.device("cpu"), tiles=16)
    rows = torch.empty(2, 3, 16 * codec.layout.tile_length, 128, dtype=torch.bfloat16)
    arguments, options = decode_arguments(codec, records, scales, rows, rows)
    return asdict(compile_call(decode_kernel, arguments, capability=capability, **options))


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_compiles_without_spills(name: str) -> None:
    usage = outside_interpreter("ops.test_decode:compiled_usage", name, 90)
    assert usage["stack"] == usage["spills"] == 0
