# SPDX-License-Identifier: Apache-2.0
"""Random streams: reproducible, independent of each other and of the global generator."""

import hashlib
import itertools
import math
from typing import Any

import pytest
import torch

from rq_hf.quant.seeding import generator

STREAMS: list[tuple[Any, ...]] = [
    (0,),
    (1,),
    (-1,),
    (2**70,),
    (0, "key"),
    (0, "value"),
    (0, "key", 1),
    (0, "key", "1"),
    (0, 1, "key"),
    (0, "ab", "c"),
    (0, "a", "bc"),
    (0, "abc"),
    (0, "ключ"),
    (0, 'a", "b'),
    (0, "a", "b"),
]


def draw(*names: Any, size: int = 4096) -> torch.Tensor:
    return torch.randn(size, generator=generator(*names), dtype=torch.float64)


@pytest.mark.parametrize("names", STREAMS, ids=repr)
def test_equal_labels_give_equal_streams(names: tuple[Any, ...]) -> None:
    assert torch.equal(draw(*names), draw(*names))


@pytest.mark.parametrize(("first", "second"), list(itertools.combinations(STREAMS, 2)), ids=repr)
def test_streams_of_different_labels_are_uncorrelated(
    first: tuple[Any, ...], second: tuple[Any, ...]
) -> None:
    x, y = draw(*first), draw(*second)
    # The mean product of independent standard normals has standard deviation 1 / sqrt(n). Five of
    # these keep the chance of one failure among all pairs below 1e-4; equal streams would give 1.
    assert abs((x * y).mean()) <= 5 / math.sqrt(len(x))


def test_stream_is_sha_256_of_the_json_list() -> None:
    digest = hashlib.sha256(b'[7, "rotation", 3]').digest()
    assert generator(7, "rotation", 3).initial_seed() == int.from_bytes(digest[:4], "little")


def test_numbers_are_the_same_on_every_platform() -> None:
    drawn = torch.randint(2**31, (3,), generator=generator(0, "pinned"))
    assert drawn.tolist() == [1156045652, 1325529155, 1611205652]


def test_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    draw(3, "anything")
    assert torch.equal(before, torch.get_rng_state())


def test_default_device_does_not_matter() -> None:
    with torch.device("meta"):
        assert generator(0).device.type == "cpu"


@pytest.mark.parametrize("names", [(1.5,), ("1",), (True,), (0, 1.5), (0, None), (0, True)])
def test_other_types_are_refused(names: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match="must be"):
        generator(*names)
