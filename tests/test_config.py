# SPDX-License-Identifier: Apache-2.0
"""Settings: resolution, validation, and agreement with the registries they name."""

import dataclasses
import re

import pytest

from rq_hf import RotorQuantConfig
from rq_hf.config import CHOICES
from rq_hf.quant.measurement import KEY_MEANS
from rq_hf.quant.qjl import ESTIMATORS, SKETCHES
from rq_hf.quant.quantizers import QUANTIZERS
from rq_hf.quant.rotations import ROTATIONS
from rq_hf.quant.scale_fit import SCALE_RULES


def test_bits_default_to_nbits_and_can_differ() -> None:
    config = RotorQuantConfig(nbits=4, value_bits=2)
    assert (config.key_bits, config.value_bits) == (4, 2)
    assert RotorQuantConfig() == RotorQuantConfig(nbits=3, key_bits=3, value_bits=3)


def test_config_is_frozen_and_round_trips_through_a_dict() -> None:
    config = RotorQuantConfig(nbits=2, key_codec="prod", sketch_size=128, seed=7)
    assert RotorQuantConfig(**config.to_dict()) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.nbits = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("nbits", 1),
        ("nbits", 5),
        ("nbits", 3.0),
        ("key_bits", 7),
        ("layer_bits", [3]),
        ("value_bits", 0),
        ("residual_length", -1),
        ("residual_length", 1.5),
        ("sink_length", -4),
        ("rotation", "givens"),
        ("key_codec", "kivi"),
        ("codebook", "uniform"),
        ("scale", "max"),
        ("sketch", "sparse"),
        ("sketch_size", 0),
        ("estimator", "map"),
        ("seed", -1),
        ("strict", "yes"),
    ],
)
def test_a_field_out_of_range_is_named_with_what_is_accepted(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{field} must be .*got {re.escape(repr(value))}"):
        RotorQuantConfig(**{field: value})


@pytest.mark.parametrize(
    ("field", "registry"),
    [
        ("rotation", ROTATIONS),
        ("key_codec", QUANTIZERS),
        ("scale", SCALE_RULES),
        ("sketch", SKETCHES),
        ("estimator", ESTIMATORS),
        ("key_mean", KEY_MEANS),
    ],
)
def test_every_registered_method_can_be_chosen(field: str, registry: object) -> None:
    assert set(CHOICES[field]) == set(registry)


def test_presets_are_the_papers_methods_and_can_be_varied() -> None:
    rotorquant = RotorQuantConfig.from_preset("rotorquant", nbits=4)
    assert (rotorquant.rotation, rotorquant.scale, rotorquant.nbits) == ("rotor", "norm", 4)
    turboquant = RotorQuantConfig.from_preset("turboquant", key_codec="prod")
    assert (turboquant.rotation, turboquant.codebook) == ("dense", "beta")
    assert (turboquant.sketch, turboquant.estimator) == ("gaussian", "unbiased")
    assert RotorQuantConfig.from_preset("near-lossless") == RotorQuantConfig()
    with pytest.raises(ValueError, match="preset must be one of 'near-lossless', 'rotorquant'"):
        RotorQuantConfig.from_preset("kivi")


def test_single_layers_can_have_their_own_bits() -> None:
    config = RotorQuantConfig(key_bits=4, layer_bits={0: 8, 5: 16})
    assert config.for_layer(1) is config
    first = config.for_layer(0)
    assert (first.key_bits, first.value_bits) == (8, 8)
    assert config.for_layer(5) is None
    assert RotorQuantConfig(**config.to_dict()) == config
    with pytest.raises(ValueError, match=r"layer_bits\[3\] must be one of 2, 3, 4, 8, 16, got 5"):
        RotorQuantConfig(layer_bits={3: 5})
    with pytest.raises(ValueError, match="a layer in layer_bits must be an integer"):
        RotorQuantConfig(layer_bits={-1: 8})
