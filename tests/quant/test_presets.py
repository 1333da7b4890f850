# SPDX-License-Identifier: Apache-2.0
"""What a layer with a preset stores, against the papers' formulae in float64."""

import math

import pytest
import torch
from torch import Tensor

from rq_hf import RotorQuantConfig
from rq_hf.layers import RotorQuantLayer
from rq_hf.quant.clifford import embed, extract, sandwich
from rq_hf.quant.codebooks import Codebook
from rq_hf.quant.lloyd_max import UnitSphere, solve
from rq_hf.quant.rotations.rotor import RotorRotation
from rq_hf.quant.seeding import generator

HALF_EPS = 2.0**-11
EPS = torch.finfo(torch.float32).eps
DIM, TOKENS = 64, 256
# float32 coordinates this close to a boundary may fall on either side of it
CLOSE = 64 * EPS


def states() -> tuple[Tensor, Tensor]:
    """Keys and values with means and large channels, which the papers do nothing about."""
    spread = torch.exp(torch.randn(DIM, generator=generator(0, "spread")))
    keys, values = (
        torch.randn(1, 2, TOKENS, DIM, generator=generator(0, name)) * spread + 1
        for name in ("keys", "values")
    )
    return keys, values


def stored(preset: str, **settings: object) -> RotorQuantLayer:
    """A layer that has packed all of `states()`."""
    config = RotorQuantConfig.from_preset(preset, residual_length=0, path="dense", **settings)
    layer = RotorQuantLayer(config)
    layer.update(*states())
    assert (layer.store.sinks, layer.store.packed_length) == (0, TOKENS)
    return layer


def nearest(z: Tensor, codebook: Codebook) -> tuple[Tensor, Tensor]:
    """Returns the nearest level of each coordinate, and which vectors leave no doubt about it."""
    distance, order = (z[..., None] - codebook.levels.double()).abs().sort(-1)
    clear = (distance[..., 1] - distance[..., 0] > CLOSE).all(-1)
    return codebook.levels.double()[order[..., 0]], clear


def half(x: Tensor) -> Tensor:
    return x.half().double()


@pytest.mark.parametrize("nbits", [2, 3, 4])
@pytest.mark.parametrize("preset", ["rotorquant", "turboquant"])
def test_algorithm_1(preset: str, nbits: int) -> None:
    """x' = |x| R^T l, l the levels nearest to R x / |x| (TurboQuant, Algorithm 1)."""
    layer = stored(preset, nbits=nbits)
    quantizers = (layer.codec.key_quantizer, layer.codec.value_quantizer)
    for x, read, quantizer in zip(states(), (layer.keys, layer.values), quantizers, strict=True):
        rotation = quantizer.rotation.matrix(dtype=torch.float64)
        norm = x.double().norm(dim=-1, keepdim=True)
        levels, clear = nearest(x.double() / norm @ rotation.T, quantizer.codebook)
        expected = norm * levels @ rotation
        # the norm is kept in float16; products of 64 float32 numbers
        error = (read - expected).norm(dim=-1)[clear]
        assert (error <= (HALF_EPS + 64 * EPS) * expected.norm(dim=-1)[clear]).all()
        assert clear.double().mean() > 0.9


@pytest.mark.parametrize("preset", ["rotorquant", "turboquant"])
def test_algorithm_2(preset: str) -> None:
    """x' = the above with a bit less, and sqrt(pi / 2) / D |r| S^T sign(S r) for the residual r."""
    layer = stored(preset, nbits=3, key_codec="prod")
    quantizer = layer.codec.key_quantizer
    rotation = quantizer.rotation.matrix(dtype=torch.float64)
    sketch = quantizer.sketch.matrix(dtype=torch.float64)
    assert quantizer.codebook.bits == 2 and sketch.shape == (DIM, DIM)
    x = states()[0].double()
    norm = x.norm(dim=-1, keepdim=True)
    levels, clear = nearest(x / norm @ rotation.T, quantizer.codebook)
    rough = half(norm) * levels
    residual = x @ rotation.T - rough
    projected = residual @ sketch.T
    clear &= (projected.abs() > CLOSE * norm * sketch.norm(dim=-1)).all(-1)
    weight = math.sqrt(math.pi / 2) / DIM * residual.norm(dim=-1, keepdim=True)
    correction = weight * projected.sign() @ sketch
    expected = (rough + correction) @ rotation
    size = (rough.norm(dim=-1) + correction.norm(dim=-1))[clear]
    assert ((layer.keys - expected).norm(dim=-1)[clear] <= (HALF_EPS + 64 * EPS) * size).all()
    assert clear.double().mean() > 0.9


def test_rotorquant_turns_triples_by_rotors() -> None:
    """R x is the sandwich of each three coordinates; 64 leaves one that stays."""
    layer = stored("rotorquant")
    x = states()[0].double()
    for quantizer in (layer.codec.key_quantizer, layer.codec.value_quantizer):
        rotation = quantizer.rotation
        assert isinstance(rotation, RotorRotation)
        turned = extract(sandwich(rotation.rotors, embed(x)), DIM)
        torch.testing.assert_close(rotation.forward(x), turned)
        assert torch.equal(rotation.forward(x)[..., -1], x[..., -1])


def test_turboquant_rotates_densely_and_has_the_levels_of_the_sphere() -> None:
    """Levels of the exact marginal (TurboQuant, lemma 1), rounded to multiples of their step."""
    layer = stored("turboquant", nbits=2)
    for quantizer in (layer.codec.key_quantizer, layer.codec.value_quantizer):
        matrix = quantizer.rotation.matrix(dtype=torch.float64)
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(DIM, dtype=torch.float64))
        # no blocks: of random entries with variance 1 / D, one in a thousand is this small
        assert (matrix.abs() > 1e-3 / math.sqrt(DIM)).double().mean() > 0.99
        exact = torch.from_numpy(solve(UnitSphere(DIM), 2))
        off = (quantizer.codebook.levels - exact).abs().max()
        assert off <= quantizer.codebook.step / 2 + EPS * exact.max()


def test_nothing_is_treated_apart() -> None:
    statistics = stored("turboquant").preconditioner
    assert statistics is not None and statistics.rope is None
    assert not any(x.any() for x in (statistics.pre_mean, statistics.post_mean))
    assert not statistics.value_mean.any()
    assert torch.equal(statistics.balance, torch.ones_like(statistics.balance))
