# SPDX-License-Identifier: Apache-2.0
"""Sizes that the speed of attention depends on, by model, and names of cases such as `8x32k`."""

from __future__ import annotations

import re
from dataclasses import dataclass

K = 1024


@dataclass(frozen=True)
class Heads:
    """Attention heads of a model.

    Attributes:
        query: Query heads, Hq.
        kv: KV heads, Hk.
        dim: head_dim, D.
        rope_theta: Base of the position embedding.
    """

    query: int
    kv: int
    dim: int
    rope_theta: float


MODELS = {
    "llama-3-8b": Heads(32, 8, 128, 500_000.0),
    "qwen2.5-7b": Heads(28, 4, 128, 1_000_000.0),
    "qwen2.5-0.5b": Heads(14, 2, 64, 1_000_000.0),
    "gemma-3-270m": Heads(4, 1, 256, 1_000_000.0),
    "tiny": Heads(4, 2, 64, 10_000.0),
}


@dataclass(frozen=True)
class Case:
    """A batch of sequences: so many of so many tokens each."""

    batch: int
    context: int

    def __str__(self) -> str:
        whole = self.context % K == 0
        return f"{self.batch}x{f'{self.context // K}k' if whole else self.context}"


@dataclass(frozen=True)
class Shape:
    """A model's heads at a case, written `llama-3-8b:8x32k`."""

    model: str
    case: Case

    @property
    def heads(self) -> Heads:
        return MODELS[self.model]

    def __str__(self) -> str:
        return f"{self.model}:{self.case}"


def parse_case(word: str) -> Case:
    """Returns the case that `word` names: `8x32k` is 8 sequences of 32 * 1024 tokens.

    Raises:
        ValueError: It names none.
    """
    match = re.fullmatch(r"(\d+)x(\d+)(k?)", word)
    if match is None or 0 in map(int, match.group(1, 2)):
        raise ValueError(f"a case is written BATCHxTOKENS, as in 8x32k or 1x500; got {word!r}")
    return Case(int(match[1]), int(match[2]) * (K if match[3] else 1))


def parse_shape(word: str) -> Shape:
    """Returns the shape that `word` names.

    Raises:
        ValueError: The model or the case is unknown.
    """
    model, _, case = word.partition(":")
    if model not in MODELS:
        raise ValueError(f"unknown model {model!r}; choose one of {', '.join(MODELS)}")
    return Shape(model, parse_case(case))
