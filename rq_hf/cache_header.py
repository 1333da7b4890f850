# SPDX-License-Identifier: Apache-2.0
"""What a saved cache says about itself: settings, layers, and which tensors there must be."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from rq_hf.config import RotorQuantConfig
from rq_hf.quant.packing import TileLayout

PACKED = "packed"
MEANS = ("pre_mean", "post_mean", "balance", "value_mean")
# names of states, before their numbers
CONV, RECURRENT = "conv_states", "recurrent_states"

# dtype, then shape
Form = tuple[str | int | None, ...]


def dtype_name(tensor: Tensor) -> str:
    """Returns a dtype as in "bfloat16"."""
    return str(tensor.dtype).removeprefix("torch.")


def form_of(tensor: Tensor) -> tuple[str | int, ...]:
    """Returns dtype and shape as the header has them."""
    return (dtype_name(tensor), *tensor.shape)


@dataclass(frozen=True)
class LinearRecord:
    """What a layer holds of linear attention, Mamba or convolutions; see `cache_linear`.

    Attributes:
        states: Of how many there is room for a convolution's and a recurrent one.
        filled: Whether there have been tokens, for each of them.
        kernels: How many states its convolution reads; None while there is none.
        record_past: Whether more of them are kept, to be cropped.
        forms: Dtype and shape of each tensor by its name.

    Raises:
        ValueError: No layer can hold this.
    """

    states: int
    filled: list[bool]
    kernels: list[int | None]
    record_past: bool
    forms: dict[str, list[str | int]]

    def __post_init__(self) -> None:
        numbers = range(self.states)
        known = {f"{name}.{j}" for name in (CONV, RECURRENT) for j in numbers}
        if not len(self.filled) == len(self.kernels) == self.states or self.forms.keys() - known:
            raise ValueError(f"other states of linear attention than {self.states}")
        for j, kernel in zip(numbers, self.kernels, strict=True):
            form = self.forms.get(f"{CONV}.{j}", [None])
            # one that records its past holds what it has met, which may be less or more
            free = self.record_past and len(form) > 1 and kernel is not None
            if not free and form[-1:] != [kernel]:
                raise ValueError(f"a convolution over {kernel} states holds {form[-1:]}")


@dataclass(frozen=True)
class LayerRecord:
    """What one layer holds. An empty layer has no tensors and its lengths are 0.

    Attributes:
        kind: `PACKED`, or the name of the host's class.
        tensors: Names of the tensors.
        dtype: Of keys and values, as "bfloat16".
        batch: Sequences.
        kv_heads: Heads of keys and values.
        head_dim: Numbers of a key.
        sinks: Exact tokens at the start.
        packed_length: Packed tokens behind them.
        tiles: Tiles that these are in.
        tail: Exact tokens at the end; all tokens of a layer of the host.
        rope: Place in `Header.ropes` of what the keys went through; None if it is not known.
        mean_rope: Of what the frozen key mean goes through.
        sliding_window: Window of a layer that has one.
        cumulative_length: Tokens that such a layer has seen.
        record_past: Whether it keeps more than its window, to be cropped.
        linear: What it holds of linear attention; None for a layer of another kind.
    """

    kind: str
    tensors: list[str] = field(default_factory=list)
    dtype: str | None = None
    batch: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    sinks: int = 0
    packed_length: int = 0
    tiles: int = 0
    tail: int = 0
    rope: int | None = None
    mean_rope: int | None = None
    sliding_window: int | None = None
    cumulative_length: int = 0
    record_past: bool = False
    linear: LinearRecord | None = None

    @classmethod
    def of(cls, fields: dict[str, Any]) -> LayerRecord:
        """Returns the record with these entries of a header."""
        linear = fields.get("linear")
        return cls(**{**fields, "linear": None if linear is None else LinearRecord(**linear)})

    def entries(self) -> dict[str, Any]:
        """Returns what `of` reads; without `linear` where readers older than that need none."""
        fields = asdict(self)
        if self.linear is None:
            del fields["linear"]
        return fields

    @property
    def dropped(self) -> int:
        """Tokens that a packed layer with a window has dropped."""
        if self.sliding_window is None:
            return 0
        return self.cumulative_length - self.sinks - self.packed_length - self.tail

    def forms(self, layout: TileLayout | None) -> Iterator[tuple[str, Form]]:
        """Yields name and form of the tensors whose form is known; `layout` of packed layers."""
        heads = (self.batch, self.kv_heads)
        if self.batch:
            exact = (self.dtype, *heads, self.sinks + self.tail, self.head_dim)
            yield "keys", exact
        if self.linear is not None:
            for name, form in self.linear.forms.items():
                yield name, tuple(form)
        if layout is None:
            return
        tiles = -(-self.packed_length // layout.tile_length)
        yield "values", exact
        yield "records", ("int32", *heads, tiles, layout.record_words)
        yield "scales", ("float16", *heads, tiles, layout.scale_rows, layout.tile_length)
        for name in (*MEANS, "query_total"):
            yield name, ("float32", *heads, self.head_dim)
        yield "query_count", ("float32", self.batch)
        for name in ("query_padding", "padding"):
            yield name, ("int64", self.batch)


@dataclass(frozen=True)
class Header:
    """What a cache holds.

    Attributes:
        quantization: Fields of `RotorQuantConfig`.
        layers: One record a layer.
        ropes: `interleaved` of each position embedding.
        grows: Whether layers appear with their first update, in a cache without a model's config.
    """

    quantization: dict[str, Any]
    layers: list[LayerRecord]
    ropes: list[bool | None]
    grows: bool

    @cached_property
    def settings(self) -> RotorQuantConfig:
        """How the cache stores; TypeError or ValueError if this version does not know it."""
        fields = dict(self.quantization)
        if fields.get("layer_bits"):
            # JSON has no keys but strings
            fields["layer_bits"] = {int(layer): x for layer, x in fields["layer_bits"].items()}
        return RotorQuantConfig(**fields)

    def coding(self, index: int) -> tuple[RotorQuantConfig, int] | None:
        """Returns settings and head_dim of a packed layer; None if it holds nothing packed."""
        record, settings = self.layers[index], self.settings.for_layer(index)
        if record.kind != PACKED or not record.tensors or settings is None:
            return None
        return settings, record.head_dim

    def to_json(self) -> str:
        """Returns the text that `parse` reads."""
        return json.dumps({**asdict(self), "layers": [layer.entries() for layer in self.layers]})

    @classmethod
    def parse(cls, text: str) -> Header:
        """Returns the header that `to_json` wrote.

        Raises:
            ValueError: The text is something else.
        """
        try:
            fields = json.loads(text)
            layers = [LayerRecord.of(layer) for layer in fields["layers"]]
            header = cls(**{**fields, "layers": layers})
            # settings are checked as they are made
            header.settings  # noqa: B018
            if any(layer.kind == PACKED and layer.dropped < 0 for layer in layers):
                raise ValueError("a layer holds more tokens than it has seen")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"not a header of this format: {error}") from error
        return header
