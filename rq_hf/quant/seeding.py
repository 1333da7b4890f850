# SPDX-License-Identifier: Apache-2.0
"""Named random streams: one seed, and a label for every use of it."""

import hashlib
import json

import torch


def generator(seed: int, *labels: str | int) -> torch.Generator:
    """CPU generator of the stream that belongs to `seed` and `labels`.

    The stream is chosen by SHA-256 of the JSON list `[seed, *labels]`, so that streams with
    different labels have nothing in common, and `"1"` is not `1`. Draw on the CPU and move the
    result: then every device sees the same numbers. The global generators are left alone.

    Args:
        seed: Any integer, also a negative one.
        labels: Names and numbers that say what the stream is for, such as `"rotation", 3`.

    Raises:
        ValueError: If the seed is not an integer or a label neither a string nor an integer.
    """
    _check(seed, labels)
    text = json.dumps([seed, *labels]).encode("ascii")
    # PyTorch's CPU generator reads the low 32 bits of its seed and no more
    stream = int.from_bytes(hashlib.sha256(text).digest()[:4], "little")
    return torch.Generator(device="cpu").manual_seed(stream)


def _check(seed: int, labels: tuple[str | int, ...]) -> None:
    if type(seed) is not int:
        raise ValueError(f"seed must be an int, got {seed!r}; convert it with int()")
    for label in labels:
        if type(label) not in (str, int):
            raise ValueError(f"labels must be of type str or int, got {label!r}; convert it")
