# SPDX-License-Identifier: Apache-2.0
"""The plainest cache with the same numbers: every token dense, quantised ones decoded.

It keeps each token's exact and decoded vector side by side and counts how many have left the
exact tail. Vectors are quantised one by one, so it needs neither tiles nor packing. Statistics
and left padding are not its business: it takes none, or those of the layer that it is compared
with. Rows of padding are anyone's guess once tokens are packed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from rq_hf import RotorQuantCache, RotorQuantConfig
from rq_hf.layers import RotorQuantLayer
from rq_hf.packed_states import make_codec
from rq_hf.quant.preconditioning import Preconditioner


class OracleLayer(DynamicLayer):
    """Dense rows; `packed` of them, behind the sinks, are read decoded."""

    def __init__(self, config: RotorQuantConfig, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.config = config
        self.packed = 0
        self.preconditioner: Preconditioner | None = None
        self.padding: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.codec = make_codec(self.config, key_states.shape[3])

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        first = self.get_seq_length() == 0
        super().update(key_states.detach(), value_states.detach())
        if self.config.strict:
            self.packed = max(0, self.keys.shape[2] - self.config.sink_length)
            return self.read()
        view = (key_states, value_states) if first else self.read()
        spare = self.keys.shape[2] - self.config.sink_length - self.config.residual_length
        tile = self.codec.layout.tile_length
        self.packed = max(self.packed, spare // tile * tile, 0)
        return view

    def read(self) -> tuple[Tensor, Tensor]:
        """Returns keys and values as attention sees them."""
        statistics = self.preconditioner or Preconditioner.identity(self.keys)
        start = self.config.sink_length
        span = slice(start, start + self.packed)
        key = statistics.precondition_keys(self.keys[:, :, span], start)
        value = statistics.center_values(self.values[:, :, span])
        key = _round_trip(self.codec.key_quantizer, key)
        value = _round_trip(self.codec.value_quantizer, value)
        decoded = (
            statistics.restore_keys(key, start, self.keys.dtype),
            statistics.restore_values(value, self.keys.dtype),
        )
        return self._place(self.keys, decoded[0]), self._place(self.values, decoded[1])

    def _place(self, exact: Tensor, decoded: Tensor) -> Tensor:
        """Returns the exact rows with decoded ones in place of those behind the sinks."""
        start, rows = self.config.sink_length, exact.clone()
        rows[:, :, start : start + self.packed] = decoded
        if self.padding is None or self.packed == 0:
            return rows
        # the sinks of a padded sequence are its first real tokens
        first = self.padding[:, None, None, None]
        index = torch.arange(exact.shape[2])[:, None]
        return torch.where((index >= first) & (index < first + start), exact, rows)

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        length = self.keys.shape[2]
        self.packed = min(self.packed, max(0, length - self.config.sink_length))

    def reset(self) -> None:
        super().reset()
        self.packed, self.preconditioner, self.padding = 0, None, None


def _round_trip(quantizer: Any, states: Tensor) -> Tensor:
    return quantizer.dequantize(quantizer.quantize(states))


def make_oracle(cache: RotorQuantCache) -> Cache:
    """Returns an oracle for an empty `cache`: packed layers replaced, others of the same kind."""
    layers = [
        OracleLayer(layer.config) if isinstance(layer, RotorQuantLayer) else _twin(layer)
        for layer in cache.layers
    ]
    return Cache(layers=layers)


def _twin(layer: Any) -> Any:
    window = getattr(layer, "sliding_window", None)
    return type(layer)(**({} if window is None else {"sliding_window": window}))
