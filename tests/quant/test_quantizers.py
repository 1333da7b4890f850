# SPDX-License-Identifier: Apache-2.0
"""Tests of both quantizers: distortion, scale rules, estimators, packed records."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from rq_hf.quant.codebook_store import CodebookKey
from rq_hf.quant.codebooks import Codebook, get_codebook
from rq_hf.quant.lloyd_max import distortion
from rq_hf.quant.prod_quantizer import ProdQuantizer
from rq_hf.quant.qjl import ESTIMATORS, SKETCHES, Sketch, make_sketch, unfold_signs
from rq_hf.quant.quantizers import QUANTIZERS, MSEQuantizer
from rq_hf.quant.rotations import ROTATIONS, make_rotation
from rq_hf.quant.scale_fit import INPUT_SCALES, SCALE_RULES, fit_codes, look_up, nearest_codes
from rq_hf.quant.seeding import generator
from rq_hf.quant.types import MSECodes, ProdCodes

HALF_EPS = 2.0**-11
HALF_MAX = 65504.0

Quantizer = MSEQuantizer | ProdQuantizer


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For thousands of tiny products: threads would spend their time on waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def normal(*shape: int, label: str = "x", dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=generator(0, label), dtype=torch.float64).to(dtype)


def unit(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = normal(*shape, dtype=torch.float64)
    return (x / x.norm(dim=-1, keepdim=True)).to(dtype)


def mse(dim: int, bits: int, rotation: str = "butterfly", scale: str = "norm") -> MSEQuantizer:
    return MSEQuantizer(
        make_rotation(rotation, dim, 0, "key"), get_codebook(bits, dim), scale=scale
    )


def prod(
    dim: int,
    bits: int,
    sketch: Sketch | None = None,
    estimator: str = "mmse",
    scale: str = "least_squares",
) -> ProdQuantizer:
    return ProdQuantizer(
        make_rotation("butterfly", dim, 0, "key"),
        get_codebook(bits - 1, dim),
        sketch or make_sketch("orthogonal", dim, dim, 0),
        scale=scale,
        estimator=estimator,
    )


def build(codec: str, dim: int, scale: str = "least_squares") -> Quantizer:
    return mse(dim, 3, scale=scale) if codec == "mse" else prod(dim, 3, scale=scale)


def squared_error(y: Tensor, codes: Tensor, scale: Tensor, codebook: Codebook) -> Tensor:
    return (y - scale[..., None] * look_up(codes, codebook, y.dtype)).square().sum(-1)


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("rotation", ROTATIONS)
def test_distortion_is_that_of_the_codebook(rotation: str, bits: int, dim: int) -> None:
    """TurboQuant (arXiv 2504.19874), Theorem 1: the error of a unit vector is D times that of a
    coordinate, which has the exact density of the "beta" codebook.
    """
    codebook = get_codebook(bits, dim, distribution="beta")
    quantizer = MSEQuantizer(make_rotation(rotation, dim, 0), codebook, scale="norm")
    x = unit(6000 if dim <= 128 else 3000, dim)
    errors = (x - quantizer.dequantize(quantizer.quantize(x))).square().sum(-1)
    assert abs(errors.mean().item() / codebook.distortion - 1) < 0.02
    # the sample is large enough for the 2%
    assert 4 * errors.std() / math.sqrt(len(errors)) < 0.02 * codebook.distortion


@pytest.mark.parametrize("dim", [64, 256])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_gaussian_levels_serve_unit_vectors_as_their_density_says(bits: int, dim: int) -> None:
    """A coordinate of a unit vector has lighter tails than a Gaussian, hence less error."""
    x = unit(6000, dim)
    quantizer = mse(dim, bits)
    errors = (x - quantizer.dequantize(quantizer.quantize(x))).square().sum(-1).mean().item()
    density = CodebookKey(bits, "beta", dim).density()
    levels = quantizer.codebook.levels.double().numpy() * math.sqrt(dim) * density.std
    assert abs(errors / distortion(density, levels) - 1) < 0.02
    assert 0.9 < errors / quantizer.codebook.distortion < 1


@pytest.mark.parametrize("bits", range(1, 9))
def test_nearest_codes_are_those_of_the_codebook(bits: int) -> None:
    codebook = get_codebook(bits, 96, rounding="int8" if bits <= 4 else "none")
    edges = codebook.boundaries
    infinity = torch.full_like(edges, math.inf)
    beside = [edges, torch.nextafter(edges, infinity), torch.nextafter(edges, -infinity)]
    z = torch.cat([*beside, torch.tensor([0.0, -0.0, 9.0, -9.0]), unit(40, 96).flatten()])
    codes = nearest_codes(z, codebook)
    assert codes.dtype == torch.uint8
    assert torch.equal(codes, codebook.nearest(z))
    assert len(codes.unique()) == 2**bits
    distances = (z.double()[:, None] - codebook.levels.double()).abs()
    chosen = distances.gather(1, codes.long()[:, None])[:, 0]
    # the midpoint of two levels is rounded to float32, so it can favour the farther by that much
    assert (chosen <= distances.amin(1) + 2.0**-23 * codebook.levels.abs().amax()).all()
    assert torch.equal(look_up(codes, codebook), codebook.levels[codes.int()])


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5])
def test_scale_rules_improve_on_each_other_for_every_vector(bits: int) -> None:
    codebook = get_codebook(bits, 64)
    y = normal(800, 64, dtype=torch.float64)
    fits = {rule: fit_codes(y, codebook, rule) for rule in SCALE_RULES}
    errors = {rule: squared_error(y, *fit, codebook) for rule, fit in fits.items()}
    rounding = 64 * 2.0**-52 * y.square().sum(-1)
    assert (errors["least_squares"] <= errors["norm"] + rounding).all()
    assert (errors["search"] <= errors["least_squares"] + rounding).all()
    assert errors["least_squares"].mean() < errors["norm"].mean() < 0.5 * 64
    if bits > 1:
        assert errors["search"].mean() < 0.99 * errors["least_squares"].mean()

    # by Pythagoras, rounding the least-squares scale adds the squared change of the vector
    stored = {rule: fit.scale.to(torch.float16).double() for rule, fit in fits.items()}
    for rule, fit in fits.items():
        after = squared_error(y, fit.codes, stored[rule], codebook)
        added = (HALF_EPS * fit.scale).square() * look_up(fit.codes, codebook).square().sum(-1)
        if rule != "norm":
            assert (after <= errors[rule] + added + rounding).all()


def test_search_finds_the_best_of_its_scales() -> None:
    codebook = get_codebook(3, 64)
    y = normal(500, 64, dtype=torch.float64)
    z = y / y.norm(dim=-1, keepdim=True)
    best = torch.full((500,), math.inf, dtype=torch.float64)
    for a in INPUT_SCALES:
        levels = codebook.lookup(codebook.nearest(a * z)).double()
        scale = (y * levels).sum(-1) / levels.square().sum(-1)
        best = best.minimum((y - scale[:, None] * levels).square().sum(-1))
    found = squared_error(y, *fit_codes(y, codebook, "search"), codebook)
    torch.testing.assert_close(found, best)


@pytest.mark.parametrize("scale", SCALE_RULES)
@pytest.mark.parametrize("codec", QUANTIZERS)
def test_zero_vectors_are_exact_among_others(codec: str, scale: str) -> None:
    quantizer = build(codec, 64, scale)
    x = normal(3, 64)
    x[1] = 0
    back = quantizer.dequantize(quantizer.quantize(x))
    assert (back[1] == 0).all()
    assert (back[[0, 2]] != 0).any(-1).all()


@pytest.mark.parametrize("scale", SCALE_RULES)
@pytest.mark.parametrize("codec", QUANTIZERS)
def test_doubling_a_vector_doubles_its_scales_only(codec: str, scale: str) -> None:
    quantizer = build(codec, 96, scale)
    x = normal(200, 96)
    once, twice = quantizer.quantize(x), quantizer.quantize(2 * x)
    assert torch.equal(twice.codes, once.codes)
    assert torch.equal(twice.scale, 2 * once.scale)
    assert (once.scale > 0).all()
    if isinstance(once, ProdCodes) and isinstance(twice, ProdCodes):
        assert torch.equal(twice.signs, once.signs)
        assert torch.equal(twice.residual_scale, 2 * once.residual_scale)


@pytest.mark.parametrize("scale", SCALE_RULES)
@pytest.mark.parametrize("codec", QUANTIZERS)
@pytest.mark.parametrize("size", [1e6, 1e30])
def test_scales_beyond_float16_saturate(codec: str, scale: str, size: float) -> None:
    quantizer = build(codec, 64, scale)
    x = size * unit(20, 64)
    record = quantizer.quantize(x)
    assert (record.scale == HALF_MAX).all()
    # the codes do not notice: where float16 would hold the scale they are the same
    assert torch.equal(record.codes, quantizer.quantize(x / 2.0 ** round(math.log2(size))).codes)
    back = quantizer.dequantize(record)
    assert back.isfinite().all()
    assert (back.norm(dim=-1) > 0.5 * HALF_MAX).all()
    if codec == "mse":
        cosine = torch.nn.functional.cosine_similarity(back, unit(20, 64), dim=-1)
        # 3 bits leave 3.5% of the energy, so the mean cosine is about 0.98
        assert (cosine > 0.9).all()


@pytest.mark.parametrize("codec", QUANTIZERS)
def test_half_inputs_are_promoted_and_float64_is_kept(codec: str) -> None:
    quantizer = build(codec, 64)
    for dtype in (torch.float16, torch.bfloat16):
        x = normal(50, 64, dtype=dtype)
        for half, full in zip(quantizer.quantize(x), quantizer.quantize(x.float()), strict=True):
            assert torch.equal(half, full)
    record = quantizer.encode(normal(50, 64))
    query = normal(7, 64, label="query", dtype=torch.float64)
    assert quantizer.inner_product(query, record).dtype == torch.float64
    assert quantizer.inner_product(query.bfloat16(), record).dtype == torch.float32
    assert quantizer.decode(record).dtype == torch.float32
    assert (quantizer.decode(record) != 0).any(-1).all()


@pytest.mark.parametrize("shape", [(1, 64), (63, 64), (2, 3, 33, 64), (2, 0, 64), (128, 80)])
@pytest.mark.parametrize("codec", QUANTIZERS)
def test_packed_records_hold_the_codes_exactly(codec: str, shape: tuple[int, ...]) -> None:
    quantizer = build(codec, shape[-1])
    x = normal(*shape)
    record, codes = quantizer.encode(x), quantizer.quantize(x)
    for packed, plain in zip(quantizer.unpack(record), codes, strict=True):
        assert torch.equal(packed, plain)
    back = quantizer.decode(record)
    assert torch.equal(back, quantizer.dequantize(codes))
    # 3 bits leave about 3.5% of the energy of a long sample, 5% with 2 bits and signs
    assert (x - back).norm() <= 0.4 * x.norm()
    vectors = math.prod(shape[:-2]) * (-(-shape[-2] // 32) * 32)
    scales = (2 if codec == "mse" else 4) * math.prod(shape[:-1])
    assert record.nbytes == vectors * shape[-1] * 3 // 8 + scales
    assert record.length == shape[-2]


@pytest.mark.parametrize("codec", QUANTIZERS)
def test_inner_product_is_that_of_the_decoded_vectors(codec: str) -> None:
    dim = 80
    quantizer = build(codec, dim)
    x, query = normal(2, 3, 45, dim), normal(2, 3, 7, dim, label="query")
    record = quantizer.encode(x)
    got = quantizer.inner_product(query, record)
    back = quantizer.decode(record)
    assert got.shape == (2, 3, 7, 45)
    # three products of D terms on the way, the rotation of either side and the sum itself
    bound = 3 * dim * 2.0**-24 * query.norm(dim=-1)[..., None] * x.norm(dim=-1)[..., None, :]
    assert ((got - query @ back.mT).abs() <= bound).all()
    assert got.abs().mean() > 1


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("sketch", SKETCHES)
def test_prod_inner_product_is_the_formula(sketch: str, estimator: str) -> None:
    """<q, s l(c)> + w <S q, sign(S r)>, r what the stored MSE record leaves, all in float64."""
    dim, size = 64, 96
    quantizer = prod(dim, 3, make_sketch(sketch, dim, size, 0), estimator)
    x = normal(40, dim, dtype=torch.float64)
    query = normal(5, dim, label="query", dtype=torch.float64)
    rotation = quantizer.rotation.matrix(dtype=torch.float64)
    s_matrix = quantizer.sketch.matrix(dtype=torch.float64)
    record = quantizer.encode(x)
    codes = quantizer.unpack(record)
    y, q = x @ rotation.mT, query @ rotation.mT
    stored = codes.scale.double()[:, None] * quantizer.codebook.levels.double()[codes.codes.int()]
    signs = torch.where(((y - stored) @ s_matrix.mT) < 0, -1.0, 1.0).double()
    weight = {
        "unbiased": (y - stored).norm(dim=-1) * quantizer.sketch.unbiased_weight,
        "mmse": ((y - stored) * (signs @ s_matrix)).sum(-1) / (signs @ s_matrix).square().sum(-1),
    }[estimator]
    torch.testing.assert_close(
        codes.residual_scale.double(), weight, rtol=HALF_EPS * (1 + 1e-9), atol=0
    )
    expected = q @ stored.mT + codes.residual_scale.double() * (q @ s_matrix.mT @ signs.mT)
    torch.testing.assert_close(quantizer.inner_product(query, record), expected)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", SKETCHES)
def test_unbiased_prod_over_fresh_sketches(name: str) -> None:
    """The mean error vanishes, up to the rounding of the weight to float16."""
    dim, fresh = 16, 1000
    x, query = normal(4, dim), normal(3, dim, label="query")
    errors = torch.empty(fresh, 3, 4)
    truth = query @ x.mT
    first_bits = mse(dim, 1, scale="least_squares")
    left = truth - first_bits.inner_product(query, first_bits.encode(x))
    for draw in range(fresh):
        quantizer = prod(dim, 2, SKETCHES[name](dim, dim, generator(draw, name)), "unbiased")
        errors[draw] = quantizer.inner_product(query, quantizer.encode(x)) - truth
    tolerance = 4 * errors.std(0) / math.sqrt(fresh)
    # the estimate of <q, r> has the mean <q, r>, its weight a relative error of HALF_EPS at most
    assert (errors.mean(0).abs() <= tolerance + HALF_EPS * left.abs()).all()
    # while the bits without signs are off by more than that
    assert (left.abs() > tolerance).any()


@pytest.mark.parametrize("sketch", SKETCHES)
def test_mmse_has_the_smaller_error_and_signs_help_it(sketch: str) -> None:
    dim = 64
    x = normal(500, dim)
    matrix = make_sketch(sketch, dim, dim, 0)
    error = {
        name: (x - q.dequantize(q.quantize(x))).square().sum(-1)
        for name, q in {
            "mmse": prod(dim, 3, matrix, "mmse"),
            "unbiased": prod(dim, 3, matrix, "unbiased"),
            "none": mse(dim, 2, scale="least_squares"),
        }.items()
    }
    # rounding the weight to float16 adds at most this part of the energy, by Pythagoras
    slack = 1 + HALF_EPS**2 + 1e-5
    assert (error["mmse"] <= error["unbiased"] * slack).all()
    assert (error["mmse"] <= error["none"] * slack).all()
    assert error["mmse"].mean() < 0.9 * min(error["unbiased"].mean(), error["none"].mean())


@pytest.mark.parametrize("codec", QUANTIZERS)
def test_rotated_vectors_stay_rotated(codec: str) -> None:
    quantizer = build(codec, 96)
    x = normal(20, 96)
    record = quantizer.quantize(x)
    y = quantizer.dequantize(record, rotated=True)
    assert torch.equal(quantizer.rotation.inverse(y), quantizer.dequantize(record))
    error = (quantizer.rotation.forward(x) - y).norm() / x.norm()
    assert error < 0.4


@pytest.mark.parametrize("codec", QUANTIZERS)
def test_autocast_changes_nothing(codec: str) -> None:
    quantizer = build(codec, 64)
    x, query = normal(40, 64), normal(5, 64, label="query")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        record = quantizer.encode(x)
        inside = quantizer.decode(record), quantizer.inner_product(query, record)
    assert torch.equal(record.words, quantizer.encode(x).words)
    assert torch.equal(inside[0], quantizer.decode(record))
    assert torch.equal(inside[1], quantizer.inner_product(query, record))
    assert all((x != 0).any() for x in inside)


def test_grade_bits_must_give_everything_to_vectors() -> None:
    rotation, codebook = make_rotation("rotor", 96, 0), get_codebook(3, 96)
    for allowed in ({1: 3}, {0: 0, 1: 3, 2: 0, 3: 0}, None):
        MSEQuantizer(rotation, codebook, grade_bits=allowed)
    for grade in (0, 2, 3):
        with pytest.raises(ValueError, match=r"grades 0, 2 and 3 .* are zero"):
            MSEQuantizer(rotation, codebook, grade_bits={1: 3, grade: 2})
    for refused in ({1: 2}, {}, {0: 0}):
        with pytest.raises(ValueError, match="grade 1 the bits of the codebook"):
            MSEQuantizer(rotation, codebook, grade_bits=refused)
    with pytest.raises(ValueError, match="grades 0 to 3"):
        MSEQuantizer(rotation, codebook, grade_bits={1: 3, 4: 0})


def test_refused_arguments_say_what_is_accepted() -> None:
    rotation, codebook = make_rotation("none", 64, 0), get_codebook(2, 64)
    with pytest.raises(ValueError, match="norm, least_squares, search"):
        MSEQuantizer(rotation, codebook, scale="max")
    with pytest.raises(ValueError, match="64 and the codebook for 96"):
        MSEQuantizer(rotation, get_codebook(2, 96))
    sketch = make_sketch("gaussian", 64, 64, 0)
    with pytest.raises(ValueError, match="unbiased, mmse"):
        ProdQuantizer(rotation, codebook, sketch, estimator="median")
    with pytest.raises(ValueError, match="sketch is for head_dim 32"):
        ProdQuantizer(rotation, codebook, make_sketch("gaussian", 32, 64, 0))
    quantizer = MSEQuantizer(rotation, codebook)
    with pytest.raises(ValueError, match=r"\[\.\.\., 64\]"):
        quantizer.quantize(torch.zeros(3, 65))
    with pytest.raises(ValueError, match="floating-point"):
        quantizer.quantize(torch.zeros(3, 64, dtype=torch.int32))
    with pytest.raises(ValueError, match="no signs"):
        ProdQuantizer(rotation, codebook, sketch).decode(quantizer.encode(torch.zeros(3, 64)))


def test_records_know_their_shapes() -> None:
    x = normal(2, 5, 64)
    assert isinstance(mse(64, 3).quantize(x), MSECodes)
    record = prod(64, 3, make_sketch("gaussian", 64, 100, 0)).quantize(x)
    assert [tuple(t.shape) for t in record] == [(2, 5, 64), (2, 5), (2, 5, 100), (2, 5)]
    half = torch.float16
    assert [t.dtype for t in record] == [torch.uint8, half, torch.uint8, half]
    assert unfold_signs(record.signs).unique().tolist() == [-1, 1]
