# SPDX-License-Identifier: Apache-2.0
"""Caches to compare, by name.

A setting is written `name[:bits][,field=value ...]`, for example `near-lossless:3`,
`turboquant:4,seed=1`, `near-lossless:3,value_bits=2`, `quantized:4` or `dynamic`. Fields are those
of `RotorQuantConfig`.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import DynamicCache, PreTrainedConfig, QuantizedCache
from transformers.cache_utils import Cache

from rq_hf import RotorQuantCache, RotorQuantConfig

# what neither paper has
PLAIN: dict[str, Any] = {
    "scale": "norm",
    "key_mean": "none",
    "balance": False,
    "value_mean": False,
    "sink_length": 0,
}
# read with key_codec="prod" alone
QJL = {"sketch": "gaussian", "estimator": "unbiased"}
ROTORQUANT = {**PLAIN, **QJL, "rotation": "rotor"}
TURBOQUANT = {**PLAIN, **QJL, "rotation": "dense", "codebook": "beta"}

# every step keeps what those above it added
LADDER: dict[str, dict[str, Any]] = {
    "step0-dense": {**PLAIN, "rotation": "dense"},
    "step1-post-rope-mean": {"key_mean": "post_rope"},
    "step2-pre-rope-mean": {"key_mean": "pre_rope"},
    "step3-value-mean": {"value_mean": True},
    "step4-balance": {"balance": True},
    "step5-sinks": {"sink_length": 4},
    "step6-least-squares": {"scale": "least_squares"},
    "step7-search": {"scale": "search"},
    "step8-butterfly": {"rotation": "butterfly"},
    "step9-hadamard": {"rotation": "hadamard"},
}


def _climb(steps: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    reached: dict[str, Any] = {}
    return {name: dict(reached := {**reached, **step}) for name, step in steps.items()}


NAMED: dict[str, dict[str, Any]] = {
    "near-lossless": {},
    "rotorquant": ROTORQUANT,
    "rotorquant-prod": {**ROTORQUANT, "key_codec": "prod"},
    "turboquant": TURBOQUANT,
    "turboquant-prod": {**TURBOQUANT, "key_codec": "prod"},
    **_climb(LADDER),
}
# transformers' own quantised caches, by backend
BACKENDS = {"quantized": "quanto", "quantized-hqq": "hqq"}
STATE_BITS = 16


@dataclass(frozen=True)
class Setting:
    """A cache to measure.

    Attributes:
        label: As it was asked for.
        options: All that defines it, as plain values.
        make: Returns a new cache for a model of that config.
        strict: Whether queries read the quantised form of their own forward's tokens too.
    """

    label: str
    options: dict[str, Any]
    make: Callable[[PreTrainedConfig], Cache]
    strict: bool


def parse_settings(words: Sequence[str], *, strict: bool) -> list[Setting]:
    """Returns the settings that `words` name; `ladder:3` stands for all steps at 3 bits.

    Args:
        words: Settings as described above.
        strict: Make packed caches strict.

    Raises:
        ValueError: A name, a number of bits or a field is unknown.
    """
    expanded: list[str] = []
    for word in words:
        name, mark, rest = word.partition(":")
        expanded += [step + mark + rest for step in LADDER] if name == "ladder" else [word]
    return [_parse(word, strict) for word in dict.fromkeys(expanded)]


def _parse(word: str, strict: bool) -> Setting:
    head, *assignments = word.split(",")
    name, _, bits = head.partition(":")
    fields = dict(map(_assignment, assignments))
    if name == "dynamic":
        return Setting(word, {}, lambda config: DynamicCache(config=config), True)
    if name not in (*NAMED, *BACKENDS):
        known = ", ".join(("dynamic", *NAMED, *BACKENDS, "ladder"))
        raise ValueError(f"unknown setting {name!r}; choose one of {known}")
    if not bits.isdigit():
        raise ValueError(f"{word!r} needs a number of bits, as in {name}:4")
    if name in BACKENDS:
        options = {"backend": BACKENDS[name], "nbits": int(bits), **fields}
        return Setting(word, options, partial(_quantized, options), False)
    quantization = RotorQuantConfig(
        **{**NAMED[name], "nbits": int(bits), "strict": strict, **fields}
    )
    make = partial(_packed, quantization)
    return Setting(word, quantization.to_dict(), make, quantization.strict)


def _assignment(word: str) -> tuple[str, Any]:
    name, mark, value = word.partition("=")
    if not mark:
        raise ValueError(f"expected field=value behind the bits of a setting, got {word!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _packed(quantization: RotorQuantConfig, config: PreTrainedConfig) -> Cache:
    return RotorQuantCache(config=config, quantization=quantization)


def _quantized(options: dict[str, Any], config: PreTrainedConfig) -> Cache:
    return QuantizedCache(config=config, **options)


def same_options(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Tells whether options from a result file are those of a setting of today.

    The package may have got fields since, whose defaults are what it did before it had them.
    """
    defaults = RotorQuantConfig().to_dict()
    if now.keys() == defaults.keys():
        before = {**defaults, **before}
    return before == now


def reason_to_skip(setting: Setting, config: PreTrainedConfig, *, strict: bool) -> str | None:
    """Returns why a setting cannot be measured here, or None."""
    if strict and not setting.strict:
        return "keeps the tokens of a forward exact until the next: measured in --mode generate"
    try:
        setting.make(config)
    except (ImportError, ValueError) as error:
        # a missing backend, or a kind of layer that a cache does not take
        return " ".join(str(error).split())
    return None


def bits_per_number(cache: Cache) -> tuple[float, float]:
    """Returns bits a quantised number, nominal and held, for a model in 16 bits.

    Nominal bits count codes and their scales; held ones are those of the buffers, nan where they
    cannot be counted.
    """
    if isinstance(cache, RotorQuantCache):
        memory = cache.memory()
        return memory.nominal_bits, memory.bits_per_number
    if isinstance(cache, QuantizedCache):
        layer = cache.layers[0]
        # each group has a scale and an offset
        return layer.nbits + 2 * STATE_BITS / layer.q_group_size, float("nan")
    return STATE_BITS, STATE_BITS
