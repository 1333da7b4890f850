# SPDX-License-Identifier: Apache-2.0
"""The codebook as it is used: rounding, ties, devices, dtypes and the distortion it states."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from rq_hf.quant.codebooks import Codebook, get_codebook
from rq_hf.quant.lloyd_max import Gaussian, UnitSphere

ACCEPTED = [(b, r) for b in range(1, 9) for r in ("int8", "none") if r == "none" or b <= 5]
SETTINGS = [
    (bits, dim, distribution, rounding)
    for bits, rounding in ACCEPTED
    for dim in (64, 80, 128, 256)
    for distribution in ("gaussian", "beta")
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RQ_HF_CACHE", str(tmp_path))


def unit_coordinates(dim: int, count: int = 20_000) -> torch.Tensor:
    x = torch.randn(count // dim, dim, generator=torch.Generator().manual_seed(dim))
    return torch.nn.functional.normalize(x, dim=-1)


def brute_force(codebook: Codebook, y: torch.Tensor) -> torch.Tensor:
    """Nearest level in float64; argmin takes the first, hence the lower, of a tie."""
    distance = (y.double()[..., None] - codebook.levels.double()).abs()
    return distance.argmin(dim=-1).to(torch.uint8)


def away_from_boundaries(codebook: Codebook, y: torch.Tensor) -> torch.Tensor:
    """Where no rounded boundary can decide otherwise than the exact midpoint: beyond one ulp."""
    boundaries = codebook.boundaries.double()
    ulp = torch.finfo(torch.float32).eps * boundaries.abs().max()
    return ((y.double()[..., None] - boundaries).abs() > ulp).all(dim=-1)


@pytest.mark.parametrize(("bits", "dim", "distribution", "rounding"), SETTINGS)
def test_levels_boundaries_and_codes(bits: int, dim: int, distribution: str, rounding: str) -> None:
    codebook = get_codebook(bits, dim, distribution=distribution, rounding=rounding)
    levels, boundaries = codebook.levels, codebook.boundaries
    assert levels.shape == (2**bits,) and boundaries.shape == (2**bits - 1,)
    assert levels.dtype == boundaries.dtype == torch.float32
    assert (levels.diff() > 0).all() and (boundaries.diff() > 0).all()
    assert torch.equal(levels, -levels.flip(0)) and torch.equal(boundaries, -boundaries.flip(0))
    assert torch.equal(boundaries, (levels[1:] + levels[:-1]) / 2)
    assert boundaries[2 ** (bits - 1) - 1] == 0

    every_code = torch.arange(2**bits, dtype=torch.uint8)
    assert torch.equal(codebook.nearest(levels), every_code)
    assert torch.equal(codebook.lookup(every_code), levels)
    # a tie goes to the lower code, the next float up to the upper one
    assert torch.equal(codebook.nearest(boundaries), every_code[:-1])
    above = torch.nextafter(boundaries, torch.tensor(torch.inf))
    assert torch.equal(codebook.nearest(above), every_code[1:])


@pytest.mark.parametrize(("bits", "rounding"), ACCEPTED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_nearest_is_the_brute_force_argmin(bits: int, rounding: str, dtype: torch.dtype) -> None:
    codebook = get_codebook(bits, 64, rounding=rounding)
    y = unit_coordinates(64).to(dtype)
    codes = codebook.nearest(y)
    assert codes.dtype == torch.uint8 and codes.shape == y.shape
    clear = away_from_boundaries(codebook, y)
    assert clear.float().mean() > 0.99
    assert torch.equal(codes[clear], brute_force(codebook, y)[clear])


@pytest.mark.parametrize("distribution", ["gaussian", "beta"])
@pytest.mark.parametrize("dim", [3, 16, 64, 80, 128, 256])
@pytest.mark.parametrize("bits", range(1, 6))
def test_int8_levels_are_exactly_the_step_times_integers(
    bits: int, dim: int, distribution: str
) -> None:
    codebook = get_codebook(bits, dim, distribution=distribution)
    exact = get_codebook(bits, dim, distribution=distribution, rounding="none")
    integers, step = codebook.int_levels, codebook.step
    assert integers is not None and step is not None
    assert integers.dtype == torch.int8 and codebook.levels.dtype == torch.float32
    assert torch.equal(codebook.levels, step * integers)
    assert torch.equal(codebook.levels, torch.tensor(step) * integers.float())
    assert torch.equal(integers, -integers.flip(0))
    assert integers[-1] == (63 if bits == 4 else 127)
    # half a step of rounding, and the last bit of float32
    off = (codebook.levels - exact.levels).abs().max()
    assert off <= step / 2 + torch.finfo(torch.float32).eps * exact.levels[-1]
    # rounding only ever costs, but for rounding errors: the sums cancel down to some 1e-15,
    # and float32 levels miss the optimum by about (2^-24)^2
    assert -1e-12 <= codebook.distortion - exact.distortion <= 0.02 * exact.distortion


def test_exact_codebook_has_no_integers() -> None:
    codebook = get_codebook(3, 128, rounding="none")
    assert codebook.int_levels is None and codebook.step is None


@pytest.mark.parametrize("bits", [6, 7, 8])
@pytest.mark.parametrize("distribution", ["gaussian", "beta"])
def test_int8_is_refused_where_it_costs_too_much(bits: int, distribution: str) -> None:
    reason = "coincide" if bits == 8 else "raise the distortion by"
    with pytest.raises(ValueError, match=f"{reason}.*rounding='none'"):
        get_codebook(bits, 128, distribution=distribution)


@pytest.mark.parametrize("distribution", ["gaussian", "beta"])
@pytest.mark.parametrize(("bits", "rounding"), ACCEPTED)
def test_distortion_is_what_is_measured(bits: int, rounding: str, distribution: str) -> None:
    dim, count = 8, 400_000
    codebook = get_codebook(bits, dim, distribution=distribution, rounding=rounding)
    x = torch.randn(count, dim, generator=torch.Generator().manual_seed(bits))
    # one coordinate a vector, as those of the same vector are not independent
    y = x[:, 0] / (x.norm(dim=-1) if distribution == "beta" else math.sqrt(dim))
    squared = (y - codebook.lookup(codebook.nearest(y))).double().square() * dim
    bound = 4 * squared.std() / math.sqrt(count)
    assert abs(squared.mean() - codebook.distortion) <= bound


@pytest.mark.parametrize("distribution", ["gaussian", "beta"])
@pytest.mark.parametrize(("bits", "rounding"), [b for b in ACCEPTED if b[0] <= 5])
def test_distortion_belongs_to_the_rounded_levels(
    bits: int, rounding: str, distribution: str
) -> None:
    dim = 64
    codebook = get_codebook(bits, dim, distribution=distribution, rounding=rounding)
    density = UnitSphere(dim) if distribution == "beta" else Gaussian()
    unit = density.std * dim**0.5
    ends = [0.0, *(codebook.boundaries[2 ** (bits - 1) :].double() * unit).tolist(), 1.0 * unit]
    error = 0.0
    for level, low, high in zip(codebook.levels[2 ** (bits - 1) :], ends, ends[1:], strict=False):
        value = level.item() * unit

        def squared(x: float, value: float = value) -> float:
            return (x - value) ** 2 * float(density.pdf(np.float64(x)))

        error += 2 * quad(squared, low, high, epsabs=0, epsrel=1e-10)[0]
    # from 2 bits on, rounding to int8 costs 3e-6 of the distortion or more
    assert codebook.distortion == pytest.approx(error / density.std**2, rel=1e-9)


@pytest.mark.parametrize("bits", range(1, 6))
def test_gaussian_levels_scale_with_the_dimension(bits: int) -> None:
    small, large = get_codebook(bits, 64), get_codebook(bits, 256)
    assert small.int_levels is not None and large.int_levels is not None
    assert torch.equal(small.int_levels, large.int_levels)
    # a power of two apart, hence exactly
    assert torch.equal(small.levels, 2 * large.levels)


def test_the_same_settings_give_the_same_object() -> None:
    codebook = get_codebook(3, 96)
    assert get_codebook(3, 96, distribution="gaussian", rounding="int8") is codebook
    assert get_codebook(3, 128) is not codebook


def test_tensors_follow_the_device(device: torch.device) -> None:
    codebook = get_codebook(3, 64)
    y = unit_coordinates(64).to(device)
    codes = codebook.nearest(y)
    assert codes.device.type == device.type
    assert torch.equal(codes.cpu(), codebook.nearest(y.cpu()))
    assert torch.equal(codebook.lookup(codes).cpu(), codebook.lookup(codes.cpu()))


def test_strided_and_empty_inputs() -> None:
    codebook = get_codebook(2, 64)
    y = unit_coordinates(64)
    assert torch.equal(codebook.nearest(y.T), codebook.nearest(y).T)
    assert codebook.nearest(y[:0]).shape == (0, 64)
    assert codebook.lookup(torch.zeros(0, 64, dtype=torch.uint8)).shape == (0, 64)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_lookup_takes_any_integer_dtype(dtype: torch.dtype) -> None:
    codebook = get_codebook(2, 64)
    codes = torch.tensor([[3, 0], [1, 1]], dtype=dtype)
    expected = torch.stack([codebook.levels[[3, 0]], codebook.levels[[1, 1]]])
    assert torch.equal(codebook.lookup(codes), expected)


def test_a_codebook_first_asked_for_in_inference_mode_serves_training() -> None:
    with torch.inference_mode(), torch.device("meta"):
        codebook = get_codebook(2, 7)
        codes = codebook.nearest(torch.tensor([0.1, -2.0], device="cpu"))
    assert codebook.levels.device.type == "cpu"
    scale = torch.ones(2, requires_grad=True)
    (scale * codebook.lookup(codes.clone())).sum().backward()
    assert scale.grad is not None
    assert torch.equal(scale.grad, codebook.levels[[2, 0]])


@pytest.mark.parametrize("bits", [0, 9, -1, 2.0, True, "3"])
def test_bits_outside_their_range_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match="from 1 to 8"):
        get_codebook(bits, 64)


@pytest.mark.parametrize("dim", [0, -64, 64.0, True, None])
def test_head_dim_outside_its_range_is_refused(dim: int) -> None:
    with pytest.raises(ValueError, match="from 1 up"):
        get_codebook(3, dim)


def test_names_are_checked() -> None:
    with pytest.raises(ValueError, match="gaussian, beta"):
        get_codebook(3, 64, distribution="laplace")
    with pytest.raises(ValueError, match="int8, none"):
        get_codebook(3, 64, rounding="int4")
    with pytest.raises(ValueError, match="head_dim >= 3"):
        get_codebook(3, 2, distribution="beta")
