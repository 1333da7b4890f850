# SPDX-License-Identifier: Apache-2.0
"""The packed cache in buffers of a fixed size, whose steps can be compiled."""

from __future__ import annotations

import os
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from rq_hf.cache import RotorQuantCache
from rq_hf.config import RotorQuantConfig
from rq_hf.model_layers import make_static_layers
from rq_hf.static_layer import RotorQuantStaticLayer


class RotorQuantStaticCache(RotorQuantCache):
    """A `RotorQuantCache` with room for `max_cache_len` tokens, all of it held from the start.

    With it `generate()` compiles the model's steps on a GPU by itself, as with the host's
    `StaticCache`, and a whole step fits one CUDA graph; so does `torch.compile(model)` by hand, for
    steps of one token. Prompts are not compiled. `rq_hf.cuda_graph` does without a compiler.

    Statistics are frozen at the end of the first prompt, however short that is. Sliding layers and
    all others that are not packed are the host's static ones. Sequences keep their number, dtype
    and device from the first use on, beyond `reset()`; tokens cannot be dropped.

    Args:
        config: The model's config; it tells the kind of every layer.
        max_cache_len: Tokens to make room for, padding included.
        quantization: How to store, in full.
        preset: A named method to start from, see `RotorQuantCache`.
        **settings: Fields of `RotorQuantConfig`, in place of the preset's: `nbits=4`, ...

    Raises:
        ValueError: A setting is out of range, or one that only `RotorQuantCache` takes.

    Example:
        >>> cache = RotorQuantStaticCache(config=model.config, max_cache_len=4096)
        >>> model.generate(**inputs, past_key_values=cache)
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        max_cache_len: int,
        *,
        quantization: RotorQuantConfig | None = None,
        preset: str | None = None,
        **settings: Any,
    ) -> None:
        if isinstance(max_cache_len, bool) or not isinstance(max_cache_len, int):
            raise ValueError(f"max_cache_len must be a number of tokens, got {max_cache_len!r}")
        if max_cache_len < 1:
            raise ValueError(f"max_cache_len must be at least 1, got {max_cache_len}")
        if settings.pop("offloading", False):
            raise ValueError("the buffers of a static cache do not move; use RotorQuantCache")
        super().__init__(quantization=quantization, preset=preset, **settings)
        _check(self.quantization)
        layers, self.exact_because = make_static_layers(config, self.quantization, max_cache_len)
        Cache.__init__(self, layers=layers)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stores the new states of one layer; see `RotorQuantStaticLayer.update`."""
        # past the packed cache's own, which counts its calls: numbers that change are compiled anew
        return Cache.update(self, key_states, value_states, layer_idx, *args, **kwargs)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Returns length and offset of the keys that `query_length` new tokens will see.

        Raises:
            ValueError: There is more than one, and `check_steps` finds something.
        """
        if not torch.compiler.is_compiling():
            self._store_prompts()
            if query_length > 1:
                # before the first layer stores what a later one would refuse
                self.check_steps()
        return super().get_mask_sizes(query_length, layer_idx)

    def _store_prompts(self) -> None:
        """Stores what waits for queries still: a compiled step could not."""
        for layer in self.layers:
            if isinstance(layer, RotorQuantStaticLayer) and layer.is_waiting:
                layer.settle()

    def check_steps(self) -> None:
        """Looks at what steps have noted on the device, and waits for it.

        Compiled and recorded steps, and all on a GPU, do not wait to learn whether their keys and
        values are finite. A prompt, `memory`, `describe` and the end of `cuda_graph` do.

        Raises:
            ValueError: A layer has stored numbers that are not finite; so it is until `reset`.
        """
        for layer in self.packed_layers:
            if isinstance(layer, RotorQuantStaticLayer):
                layer.check_steps()

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """Returns the tokens that there is room for."""
        return self.get_max_length(layer_idx)

    def reset(self, keep_statistics: bool = False) -> None:
        """Forgets all tokens; buffers stay, so that nothing is compiled anew.

        Args:
            keep_statistics: Pack the next prompt with the statistics of this one, see
                `RotorQuantLayer.reset`.
        """
        for layer in self.layers:
            if isinstance(layer, RotorQuantStaticLayer):
                layer.reset(keep_statistics)
            else:
                layer.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Refuses to drop tokens.

        Raises:
            ValueError: Any but 0 tokens are to be dropped.
        """
        # layers of the host do not know how to drop none either
        if int(tokens_to_remove):
            raise ValueError(
                "a static cache drops no tokens: use RotorQuantCache for speculative decoding, or "
                "reset()"
            )

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refuses to change the batch size.

        Raises:
            ValueError: `repeats` is not 1.
        """
        if repeats != 1:
            raise ValueError("a static cache keeps its batch size; use RotorQuantCache")

    def batch_select_indices(self, indices: Tensor) -> None:
        """Puts the sequences `indices` in place of those here, see `reorder_cache`.

        Args:
            indices: Integer `[B]`, or boolean `[B]` with all of them true.

        Raises:
            ValueError: The batch size would change; the cache is as it was.
        """
        indices = torch.as_tensor(indices)
        self.reorder_cache(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Puts the sequences `beam_idx`, int64 `[B]`, in place of those here.

        Raises:
            ValueError: The batch size would change; the cache is as it was.
        """
        # before the host's layers, which take any number, are changed
        for layer in self.packed_layers:
            if isinstance(layer, RotorQuantStaticLayer):
                layer.check_indices(beam_idx)
        super().reorder_cache(beam_idx)  # type: ignore[arg-type] # the host's stub is narrower

    def to(self, device: torch.device | str) -> NoReturn:
        """Refuses to move.

        Raises:
            ValueError: Always.
        """
        raise ValueError("the buffers of a static cache do not move; make a new one")

    def save(self, path: str | os.PathLike[str]) -> NoReturn:
        """Refuses to save.

        Raises:
            ValueError: Always.
        """
        raise ValueError("a static cache cannot be saved; use RotorQuantCache")

    @classmethod
    def load(cls, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuses to load.

        Raises:
            ValueError: Always.
        """
        raise ValueError("a static cache cannot be loaded; use RotorQuantCache.load")


def _check(quantization: RotorQuantConfig) -> None:
    if quantization.strict:
        raise ValueError("strict=True is for evaluation; use RotorQuantCache")
    if quantization.sliding == "packed":
        raise ValueError("a static cache keeps sliding layers exact; use RotorQuantCache")
