# SPDX-License-Identifier: Apache-2.0
"""Settings of a packed key-value cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

CHOICES: dict[str, tuple[str, ...]] = {
    "rotation": ("hadamard", "butterfly", "rotor", "dense", "none"),
    "key_codec": ("mse", "prod"),
    "codebook": ("gaussian", "beta"),
    "scale": ("search", "least_squares", "norm"),
    "sketch": ("orthogonal", "gaussian"),
    "estimator": ("mmse", "unbiased"),
    "key_mean": ("auto", "pre_rope", "post_rope", "none"),
    "sliding": ("exact", "packed"),
    "path": ("auto", "dense"),
    "impl": ("auto", "reference", "triton"),
}
BITS = (2, 3, 4, 8)
EXACT_BITS = 16

# the papers' methods: vectors as they come, norms stored, no token or channel treated apart
_PAPER: dict[str, Any] = {
    "scale": "norm",
    "sketch": "gaussian",
    "estimator": "unbiased",
    "key_mean": "none",
    "balance": False,
    "value_mean": False,
    "sink_length": 0,
}
PRESETS: dict[str, dict[str, Any]] = {
    "near-lossless": {},
    "rotorquant": {**_PAPER, "rotation": "rotor"},
    "turboquant": {**_PAPER, "rotation": "dense", "codebook": "beta"},
}


@dataclass(frozen=True)
class RotorQuantConfig:
    """How keys and values are stored.

    Args:
        nbits: Bits a stored number for keys and values alike: 2, 3, 4 or 8.
        key_bits: Bits of a key coordinate, `nbits` if None. With `key_codec="prod"` one of them
            is the sign bit of the residual's sketch.
        value_bits: Bits of a value coordinate, `nbits` if None.
        layer_bits: Bits of single layers, by their place in the model, for keys and values alike:
            2, 3, 4, 8, or 16 for a layer that stays exact.
        residual_length: The newest tokens of a sequence that always stay exact. Tokens older
            than these are packed a whole tile (64 or 128 tokens) at a time.
        sink_length: The first tokens of a sequence that always stay exact: attention leans on
            them ("attention sinks", arXiv 2309.17453).
        rotation: What mixes the coordinates before they are rounded: "hadamard" (a Hadamard
            matrix with random signs), "butterfly" (layers of equalised Cl(3,0) rotors), "rotor"
            (one layer of random rotors, the original RotorQuant), "dense" (TurboQuant, arXiv
            2504.19874) or "none".
        key_codec: "mse" (nearest levels) or "prod" (one bit fewer, and QJL signs of the
            residual, TurboQuant Algorithm 2).
        codebook: Distribution that the Lloyd-Max levels are made for: "gaussian" or "beta", the
            exact marginal of a random unit vector.
        scale: The stored factor of a vector: "norm" (the papers), "least_squares", or "search"
            (least squares over several input scales, slowest and most exact).
        sketch: Rows of the QJL sketch: "gaussian" (the papers) or "orthogonal".
        sketch_size: Rows of the sketch, head_dim if None.
        estimator: Weight of the residual's signs: "unbiased" (the papers) or "mmse".
        key_mean: Mean that keys are freed of before they are packed, measured on the first
            tokens: "pre_rope" (a constant before the position embedding), "post_rope", "none",
            or "auto", the one that leaves the least.
        balance: Scale key channels by sqrt(rms of queries / rms of keys), so that errors fall
            where queries do not look.
        value_mean: Free values of their mean.
        sliding: What becomes of layers with a sliding window, or attention in chunks: "exact"
            (the host's own layers) or "packed" (like all others, but without sinks, and the
            tiles that have left the window are dropped). Windows that the exact tail would
            cover, of at most `residual_length` + 1 tokens, are exact in any case.
        path: What attention is given: "auto" (handles that are read packed, where the model's
            attention can take them) or "dense" (decoded tensors, layer by layer).
        impl: What computes on packed tiles: "auto" (kernels on an NVIDIA GPU, plain torch
            elsewhere), "reference" (plain torch) or "triton" (kernels, or an error that says why
            not). More than 32 new tokens at a time are read by torch's matrix products in any case.
        strict: Evaluation only: every query reads decoded keys and values of all tokens, its own
            included; nothing but the sinks stays exact. Give it a prompt: of one token at a time it
            packs the first before there is anything to measure.
        seed: Seed of rotations and sketches.

    Raises:
        ValueError: A field is out of range; the message names the accepted values.
    """

    nbits: int = 3
    key_bits: int | None = None
    value_bits: int | None = None
    layer_bits: Mapping[int, int] | None = field(default=None, hash=False)
    residual_length: int = 128
    sink_length: int = 4
    rotation: str = "hadamard"
    key_codec: str = "mse"
    codebook: str = "gaussian"
    scale: str = "search"
    sketch: str = "orthogonal"
    sketch_size: int | None = None
    estimator: str = "mmse"
    key_mean: str = "auto"
    balance: bool = True
    value_mean: bool = True
    sliding: str = "exact"
    path: str = "auto"
    impl: str = "auto"
    strict: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        _check_choice("nbits", self.nbits, BITS)
        for name in ("key_bits", "value_bits"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, self.nbits)
            _check_choice(name, getattr(self, name), BITS)
        if self.layer_bits is not None:
            object.__setattr__(self, "layer_bits", _check_layer_bits(self.layer_bits))
        for name, choices in CHOICES.items():
            _check_choice(name, getattr(self, name), choices)
        _check_count("residual_length", self.residual_length, minimum=0)
        _check_count("sink_length", self.sink_length, minimum=0)
        _check_count("seed", self.seed, minimum=0)
        if self.sketch_size is not None:
            _check_count("sketch_size", self.sketch_size, minimum=1)
        for name in ("balance", "value_mean", "strict"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")

    @classmethod
    def from_preset(cls, preset: str, **settings: Any) -> RotorQuantConfig:
        """Returns the configuration of a named method, with `settings` in place of its own.

        Args:
            preset: "near-lossless" (the defaults), "rotorquant" (one layer of random rotors, the
                original) or "turboquant" (dense rotation, Beta codebook, arXiv 2504.19874). The
                latter two store keys by Algorithm 1; `key_codec="prod"` gives Algorithm 2.
            **settings: Fields of this class.

        Raises:
            ValueError: Unknown preset, or a setting out of range.
        """
        _check_choice("preset", preset, tuple(PRESETS))
        return cls(**{**PRESETS[preset], **settings})

    def for_layer(self, layer_idx: int) -> RotorQuantConfig | None:
        """Returns the configuration of one layer; None for a layer that stays exact."""
        bits = (self.layer_bits or {}).get(layer_idx)
        if bits is None:
            return self
        if bits == EXACT_BITS:
            return None
        return replace(self, key_bits=bits, value_bits=bits)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as plain values; `RotorQuantConfig(**d)` builds an equal object."""
        return asdict(self)


def _check_choice(name: str, value: object, accepted: Sequence[object]) -> None:
    if (type(value), value) not in [(type(choice), choice) for choice in accepted]:
        listed = ", ".join(repr(choice) for choice in accepted)
        raise ValueError(f"{name} must be one of {listed}, got {value!r}")


def _check_layer_bits(layer_bits: object) -> dict[int, int]:
    accepted = (*BITS, EXACT_BITS)
    if not isinstance(layer_bits, Mapping):
        raise ValueError(f"layer_bits must be a mapping of layers to bits, got {layer_bits!r}")
    for layer, bits in layer_bits.items():
        _check_count("a layer in layer_bits", layer, minimum=0)
        _check_choice(f"layer_bits[{layer}]", bits, accepted)
    return dict(layer_bits)


def _check_count(name: str, value: object, *, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r}")
