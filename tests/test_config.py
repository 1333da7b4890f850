# SPDX-License-Identifier: Apache-2.0
"""Settings: resolution, validation, and agreement with the registries they name."""

import dataclasses

import pytest

from rq_hf import RotorQuantConfig
from rq_hf.config import CHOICES
from rq_hf.quant.qjl import ESTIMATORS, SKETCHES
from rq_hf.quant.quantizers import QUANTIZERS, SCALES
from rq_hf.quant.rotations import ROTATIONS


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
        ("key_bits", 8),
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
    with pytest.raises(ValueError, match=rf"^{field} must be .*got {value!r}"):
        RotorQuantConfig(**{field: value})


@pytest.mark.parametrize(
    ("field", "registry"),
    [
        ("rotation", ROTATIONS),
        ("key_codec", QUANTIZERS),
        ("scale", SCALES),
        ("sketch", SKETCHES),
        ("estimator", ESTIMATORS),
    ],
)
def test_every_registered_method_can_be_chosen(field: str, registry: object) -> None:
    assert set(CHOICES[field]) == set(registry)
