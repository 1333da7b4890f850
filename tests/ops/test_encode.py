# SPDX-License-Identifier: Apache-2.0
"""The encode kernel against the quantizers, and what it takes of a GPU.

Kernel and quantizers may differ where rounding decides: at a coordinate on a boundary of two codes,
or between two input scales of "search" that explain a vector equally well.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from support.compile import compile_call, outside_interpreter
from torch import Tensor

from eval import benchmark_encode
from rq_hf.ops.dispatch import device_obstacle
from rq_hf.ops.encode import encode, encode_reference
from rq_hf.quant.mse_quantizer import MSEQuantizer
from rq_hf.quant.packing import unpack_scales
from rq_hf.quant.preconditioning import Preconditioner
from rq_hf.quant.prod_quantizer import ProdQuantizer
from rq_hf.quant.qjl import OrthogonalSketch
from rq_hf.quant.rope import RopeTable
from rq_hf.quant.tiles import TileCodec

pytest.importorskip("triton")

# how near to a boundary rounding may decide, in norms of a row: products of halves leave 2**-16
NEAR = 2.0**-15
# a number and its neighbours in float16
HALF = {"rtol": 2.0**-10, "atol": 6e-8}
START = 77


class States(NamedTuple):
    preconditioner: Preconditioner
    keys: Tensor
    values: Tensor


class Part(NamedTuple):
    """Rotated keys or values, [rows, D], and what was made of them, by kernel and by quantizer."""

    y: Tensor
    codes: tuple[Tensor, Tensor]
    scale: tuple[Tensor, Tensor]
    near: float

    @property
    def same(self) -> Tensor:
        """Rows whose records are equal."""
        return (self.codes[0] == self.codes[1]).all(-1) & (self.scale[0] == self.scale[1])

    def errors(self, levels: Tensor) -> list[Tensor]:
        """Squared errors, relative."""
        decoded = (
            s.double()[:, None] * levels.double()[c.long()]
            for s, c in zip(self.scale, self.codes, strict=True)
        )
        energy = self.y.double().square().sum(-1)
        return [(self.y - x).square().sum(-1) / energy for x in decoded]


@pytest.fixture
def device(device: torch.device) -> torch.device:
    """Devices that run kernels; a CPU does in the interpreter."""
    obstacle = device_obstacle(device)
    if obstacle is not None:
        pytest.skip(obstacle)
    return device


def make_codec(head_dim: int, key_bits: int, value_bits: int, **settings: Any) -> TileCodec:
    options = {"scale": "least_squares", **settings}
    return TileCodec(head_dim, key_bits=key_bits, value_bits=value_bits, **options)


def make_rope(pairs: int, *, interleaved: bool = False) -> RopeTable:
    return RopeTable(10000.0 ** -torch.linspace(0, 1, pairs), interleaved=interleaved)


def make_states(
    codec: TileCodec,
    device: torch.device,
    *,
    rope: RopeTable | None = None,
    tiles: int = 2,
    dtype: torch.dtype = torch.bfloat16,
) -> States:
    """Keys and values of two heads with the means of the statistics: before RoPE, or behind it."""
    generator = torch.Generator().manual_seed(codec.head_dim)
    dim, tokens = codec.head_dim, tiles * codec.layout.tile_length

    def normal(*shape: int) -> Tensor:
        return torch.randn(1, 2, *shape, generator=generator)

    mean, zero = 3 * normal(dim), torch.zeros(1, 2, dim)
    preconditioner = Preconditioner(
        pre_mean=zero if rope is None else mean,
        post_mean=mean if rope is None else zero,
        balance=normal(dim).abs() + 0.5,
        value_mean=normal(dim),
        rope=rope,
    )
    keys = normal(tokens, dim) * torch.linspace(0.2, 2, dim)
    keys += preconditioner.key_mean(START, tokens)
    values = normal(tokens, dim) + preconditioner.value_mean[:, :, None]
    moved = preconditioner.map(lambda x: x.to(device))
    return States(moved, keys.to(device, dtype), values.to(device, dtype))


def check(codec: TileCodec, states: States) -> None:
    """Compares what the kernel makes of states with what the quantizers make on the CPU."""
    mine = tuple(x.cpu() for x in encode(codec, *states, START, impl="triton"))
    cpu = States(states[0].map(Tensor.cpu), states[1].cpu(), states[2].cpu())
    theirs = encode_reference(codec, *cpu, START)
    keys = cpu.preconditioner.precondition_keys(cpu.keys, START)
    values = cpu.preconditioner.center_values(cpu.values)
    # 16-bit values are freed of their mean behind the rotation: rounding is that of the whole
    swell = float((cpu.values.float().norm(dim=-1) / values.norm(dim=-1)).max())
    codes = list(zip(*(codec.layout.unpack(x[0]) for x in (mine, theirs)), strict=True))
    scales = list(zip(*(unpack_scales(x[1]).unbind(3) for x in (mine, theirs)), strict=True))
    for i, (quantizer, x, near) in enumerate(
        ((codec.key_quantizer, keys, NEAR), (codec.value_quantizer, values, NEAR * max(1, swell)))
    ):
        part = Part(
            quantizer.rotation.forward(x).flatten(0, 2),
            tuple(c.flatten(0, 3) for c in codes[i]),
            tuple(s.flatten() for s in scales[i]),
            near,
        )
        check_part(part, quantizer)
        if isinstance(quantizer, ProdQuantizer):
            signs = tuple(c.flatten(0, 3) for c in codes[2])
            check_signs(part, quantizer, signs, tuple(s.flatten() for s in scales[2]))


def check_part(part: Part, quantizer: MSEQuantizer | ProdQuantizer) -> None:
    book, differs = quantizer.codebook, part.codes[0] != part.codes[1]
    mse = quantizer.mse if isinstance(quantizer, ProdQuantizer) else quantizer
    errors = part.errors(book.levels)
    equal = ~differs.any(-1)
    off = (errors[0] - errors[1]).abs()
    assert (off[equal] <= 2 * part.near).all()
    # codes on both sides of a boundary tie before the scale is fitted, and not quite behind it: of
    # 20,000 random rows changed by 2**-16 of their norm, none changed its error by more than 2.4%
    assert (off <= torch.clamp_min(0.04 * errors[1], 2 * part.near)).all()
    if mse.scale == "search":
        # another input scale changes many codes of a row; at 8 bits scales are hardly different
        assert book.bits > 4 or part.same.float().mean() > 0.5
        return
    torch.testing.assert_close(part.scale[0][equal], part.scale[1][equal], **HALF)
    # 2**b boundaries, spread over five standard deviations of 1 / sqrt(D)
    density = 2**book.bits / 5 * math.sqrt(quantizer.head_dim)
    assert differs.float().mean() <= 2 * part.near * density
    low, high = torch.minimum(*part.codes)[differs].long(), torch.maximum(*part.codes)[differs]
    assert (high == low + 1).all()
    z = (part.y / part.y.norm(dim=-1, keepdim=True))[differs]
    assert ((z - book.boundaries[low]).abs() <= part.near).all()


def check_signs(
    part: Part,
    quantizer: ProdQuantizer,
    signs: tuple[Tensor, Tensor],
    weight: tuple[Tensor, Tensor],
) -> None:
    """Checks rows with equal records, hence equal residuals."""
    same, levels = part.same, quantizer.codebook.levels
    assert same.float().mean() > 0.5
    residual = part.y - part.scale[1].float()[:, None] * levels[part.codes[1].long()]
    length = math.sqrt(quantizer.head_dim) * part.y.norm(dim=-1, keepdim=True)
    projected = (quantizer.sketch.project(residual) / length)[same]
    differs = (signs[0] != signs[1])[same]
    assert (projected[differs].abs() <= part.near).all()
    assert differs.float().mean() <= 2 * part.near * math.sqrt(quantizer.head_dim) * 2**3
    equal = same
    if quantizer.estimator == "mmse" and not isinstance(quantizer.sketch, OrthogonalSketch):
        # another sign, where rounding decides it, comes with another weight
        equal = same & (signs[0] == signs[1]).all(-1)
        assert equal.float().mean() > 0.5
    torch.testing.assert_close(weight[0][equal], weight[1][equal], **HALF)


@pytest.mark.parametrize(
    ("head_dim", "key_bits", "value_bits"),
    [
        (128, 1, 1),
        (128, 2, 2),
        (128, 3, 3),
        (128, 4, 4),
        (128, 4, 3),
        (128, 2, 4),
        (64, 1, 3),
        (64, 2, 4),
        (64, 3, 2),
        (64, 4, 4),
        (64, 4, 1),
        (256, 3, 2),
        (256, 4, 4),
        (80, 3, 5),
        (96, 4, 4),
        (96, 8, 1),
        (8, 2, 3),
    ],
)
def test_layouts(device: torch.device, head_dim: int, key_bits: int, value_bits: int) -> None:
    codec = make_codec(head_dim, key_bits, value_bits)
    check(codec, make_states(codec, device, rope=make_rope(head_dim // 2), tiles=1))


@pytest.mark.parametrize("scale", ["norm", "search"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_scale_rules(device: torch.device, scale: str, bits: int) -> None:
    codec = make_codec(64, bits, bits, scale=scale)
    check(codec, make_states(codec, device, tiles=1))


@pytest.mark.parametrize("rotation", ["hadamard", "butterfly", "dense", "none"])
@pytest.mark.parametrize("codebook", ["gaussian", "beta"])
def test_rotations_and_codebooks(device: torch.device, rotation: str, codebook: str) -> None:
    codec = make_codec(64, 3, 3, rotation=rotation, codebook=codebook)
    check(codec, make_states(codec, device, tiles=1))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "pairs"), [(128, 64), (128, 16), (80, 40), (80, 9)])
def test_rope(device: torch.device, head_dim: int, pairs: int, interleaved: bool) -> None:
    codec = make_codec(head_dim, 3, 3)
    rope = make_rope(pairs, interleaved=interleaved)
    check(codec, make_states(codec, device, rope=rope))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(device: torch.device, dtype: torch.dtype) -> None:
    codec = make_codec(128, 3, 4, rotation="butterfly")
    check(codec, make_states(codec, device, dtype=dtype, tiles=1))


PROD: list[dict[str, Any]] = [
    {"head_dim": 128},
    {"head_dim": 128, "sketch": "gaussian", "rotation": "dense"},
    {"head_dim": 128, "estimator": "unbiased", "key_bits": 4, "value_bits": 4},
    {"head_dim": 128, "sketch_size": 256},
    {"head_dim": 64, "key_bits": 2},
    {"head_dim": 64, "sketch": "gaussian", "sketch_size": 128},
    {"head_dim": 128, "key_bits": 5, "value_bits": 4},
    {"head_dim": 96, "sketch": "gaussian", "sketch_size": 33, "estimator": "unbiased"},
    {"head_dim": 80},
]


@pytest.mark.parametrize("settings", PROD, ids=str)
def test_prod(device: torch.device, settings: dict[str, Any]) -> None:
    codec = make_codec(**{"key_bits": 3, "value_bits": 3, "key_codec": "prod", **settings})
    rope = make_rope(codec.head_dim // 2)
    check(codec, make_states(codec, device, rope=rope, tiles=1))


def test_many_tiles_and_strides(device: torch.device) -> None:
    codec = make_codec(64, 2, 2)
    states = make_states(codec, device, rope=make_rope(32), tiles=9)
    check(codec, states)
    tokens_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in states[1:]]
    wanted = encode(codec, *states, START, impl="triton")
    for keys, values in (tokens_first, [x.mT.contiguous().mT for x in states[1:]]):
        made = encode(codec, states.preconditioner, keys, values, START, impl="triton")
        assert all(map(torch.equal, made, wanted))


def test_zero_vectors_and_large_ones(device: torch.device) -> None:
    codec = make_codec(64, 3, 3)
    tokens = codec.layout.tile_length
    keys = torch.zeros(1, 1, tokens, 64, device=device)
    keys[:, :, 1::2] = 1e7
    _, scales = encode(codec, Preconditioner.identity(keys), keys, keys, 0, impl="triton")
    rows = unpack_scales(scales)[0, 0, 0]
    assert (rows[:, 0::2] == 0).all()
    assert (rows[:, 1::2] == torch.finfo(torch.float16).max).all()


def test_no_tiles(device: torch.device) -> None:
    codec = make_codec(64, 3, 3)
    states = make_states(codec, device, tiles=0)
    records, scales = encode(codec, *states, START, impl="triton")
    assert records.shape == (1, 2, 0, codec.layout.record_words)
    assert scales.shape == (1, 2, 0, 2, 128)


def test_what_kernels_cannot_do_is_said_and_left_to_the_reference(device: torch.device) -> None:
    codec = make_codec(64, 3, 3)
    states = make_states(codec, device, tiles=1, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"cannot run: it takes float32, .*got torch.float64"):
        encode(codec, *states, START, impl="triton")
    made = encode(codec, *states, START)
    assert all(map(torch.equal, made, encode_reference(codec, *states, START)))
    signs = make_codec(64, 5, 4, key_codec="prod")
    with pytest.raises(ValueError, match="cannot pack 64 signs a key in tiles of 64"):
        encode(signs, *make_states(signs, device), START, impl="triton")
    odd = make_codec(7, 3, 3)
    with pytest.raises(ValueError, match="it takes even head_dim up to 256, got 7"):
        encode(odd, *make_states(odd, device), START, impl="triton")


def test_wrong_shapes_are_refused(device: torch.device) -> None:
    codec = make_codec(64, 3, 3)
    preconditioner, keys, values = make_states(codec, device)
    with pytest.raises(ValueError, match=r"keys must be .* whole tiles of 128 tokens"):
        encode(codec, preconditioner, keys[:, :, 1:], values[:, :, 1:], START)
    with pytest.raises(ValueError, match=r"values must be .* like the keys"):
        encode(codec, preconditioner, keys, values[:, :, :128], START)
    with pytest.raises(ValueError, match="the preconditioner is for"):
        encode(codec, preconditioner, keys[:, :1], values[:, :1], START)


def test_benchmark_runs_on_a_cpu(tmp_path: Path) -> None:
    options = ["--device", "cpu", "--tokens", "128", "--heads", "1", "--head-dim", "64"]
    choice = ["--settings", "2", "prod-3", "--scales", "norm", "--rotations", "hadamard"]
    benchmark_encode.main(["--out", str(tmp_path / "x.json"), *options, *choice])
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert [(row["operation"], row["setting"]) for row in rows] == [
        ("encode", "2"),
        ("decode", "2"),
        ("encode", "prod-3"),
        ("decode", "prod-3"),
    ]
    # 128 tokens, keys and values: 64 numbers of 2 bytes; as many of 2 bits, and two scales
    assert rows[0]["bytes"] == 2 * 128 * (64 * 2 + 64 // 4 + 2)
    assert all(row["timing"]["us"] > 0 for row in rows)


THREE = {"key_bits": 3, "value_bits": 3}
COMPILED: dict[str, dict[str, Any]] = {
    "2 bits": {"key_bits": 2, "value_bits": 2},
    "3 bits": THREE,
    "3 bits, float32": THREE,
    "4 bits": {"key_bits": 4, "value_bits": 4},
    "search": {**THREE, "scale": "search"},
    "dense": {**THREE, "rotation": "dense"},
    "prod": {**THREE, "key_codec": "prod"},
    "prod, gaussian": {**THREE, "key_codec": "prod", "sketch": "gaussian"},
}
# bytes that a thread spills with Triton 3.6 and with 3.9, which finds no registers for some
# addresses. Before compute capability 9.0 no product reads both operands from shared memory
SPILLED = {
    ("2 bits", 90): (0, 40),
    ("3 bits", 90): (0, 40),
    ("3 bits", 80): (0, 120),
    ("3 bits, float32", 90): (8, 40),
    ("3 bits, float32", 80): (72, 416),
    ("4 bits", 90): (0, 24),
    ("search", 90): (0, 56),
    ("dense", 90): (0, 0),
    ("prod", 90): (0, 24),
    ("prod", 80): (0, 120),
    ("prod, gaussian", 90): (232, 264),
}


def compiled_usage(name: str, capability: int) -> dict[str, int]:
    """What a variant takes of a GPU; called where Triton does not interpret."""
    from rq_hf.ops.triton import encode_launch
    from rq_hf.ops.triton.encode import encode_kernel

    codec = make_codec(**{"head_dim": 128, "rotation": "hadamard", **COMPILED[name]})
    layout = codec.layout
    dtype = torch.float32 if "float32" in name else torch.bfloat16
    states = make_states(codec, torch.device("cpu"), rope=make_rope(64), dtype=dtype)
    records = torch.empty(1, 2, 2, layout.record_words, dtype=torch.int32)
    scales = torch.empty(1, 2, 2, layout.scale_rows, layout.tile_length, dtype=torch.float16)
    encode_launch.generation = lambda device: capability // 10
    arguments, options = encode_launch.encode_arguments(codec, *states, START, records, scales)
    # numbers that are 1 would be compiled for
    arguments |= {"heads": 8, "tiles": 256, "tiles_each": 8}
    return asdict(compile_call(encode_kernel, arguments, capability=capability, **options))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "capability"), SPILLED)
def test_compiles_without_spills(name: str, capability: int) -> None:
    triton = pytest.importorskip("triton")
    usage = outside_interpreter("ops.test_encode:compiled_usage", name, capability)
    later = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8)
    assert usage["stack"] <= SPILLED[name, capability][later] * 1.2
    assert usage["spills"] == 0
    # as many programs on a processor as registers allow: three or two
    assert usage["shared"] <= (75 if usage["registers"] <= 168 else 80) * 1024
