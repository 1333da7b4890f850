# SPDX-License-Identifier: Apache-2.0
"""A model with one cache that lives as long as the conversation."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import groupby, takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextStreamer,
)
from transformers.cache_utils import Cache

from rq_hf.cache import RotorQuantCache
from rq_hf.cli.text import mib
from rq_hf.loading import load_model
from rq_hf.memory import reachable_tensors, storage_bytes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BF16_BYTES = 2


@dataclass(frozen=True)
class CacheChoice:
    """Which cache the user asked for.

    Attributes:
        nbits: Bits a number; None for the default.
        preset: Name of a method; None for the default.
        settings: Other fields of `RotorQuantConfig`.
        exact: transformers' own cache instead.
    """

    nbits: int | None = None
    preset: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    exact: bool = False

    def make(self, config: PreTrainedConfig | None) -> Cache:
        """Returns an empty cache; without a config, one that shows whether the settings fit.

        Raises:
            ValueError: A setting is out of range, or given beside `exact`.
        """
        nbits = {} if self.nbits is None else {"nbits": self.nbits}
        settings = {**nbits, **self.settings}
        if not self.exact:
            return RotorQuantCache(config=config, preset=self.preset, **settings)
        if settings or self.preset:
            raise ValueError("--exact stores nothing packed: leave out --nbits, --preset and --set")
        return DynamicCache(config=config)


class Meter(TextStreamer):
    """Prints text as it comes, and takes the time of every token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.times = [time.perf_counter()]

    def put(self, value: Tensor) -> None:
        """Takes the prompt, and then token by token."""
        if not self.next_tokens_are_prompt:
            self.times.append(time.perf_counter())
        super().put(value)

    @property
    def tokens(self) -> int:
        """Tokens generated."""
        return len(self.times) - 1

    def speed(self) -> str:
        """Returns what to say about the time of the prompt and of the steps behind it."""
        first = f"first after {self.times[1] - self.times[0]:.2f} s" if self.tokens else "none"
        if self.tokens < 2:
            return f"{self.tokens} tokens ({first})"
        rate = (self.tokens - 1) / (self.times[-1] - self.times[1])
        return f"{self.tokens} tokens ({first}, then {rate:.1f} a second)"


class Session:
    """A model, its tokenizer, a cache, and the tokens that the cache holds.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        choice: Which cache.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, choice: CacheChoice
    ) -> None:
        # the host's types do not tell that a model generates
        self.model: Any = model
        self.tokenizer = tokenizer
        self.choice = choice
        self.meter = Meter(tokenizer)
        self.read = 0
        self.reset()

    @classmethod
    def load(
        cls, name: str, choice: CacheChoice, *, device: str | None, dtype: str | None
    ) -> Session:
        """Returns a session with a model from the hub, a folder or a GGUF file.

        Raises:
            ValueError: An unknown dtype, or settings that this model's cache does not take.
            ImportError: A GGUF file, and nothing to read it with.
            OSError: There is no such model.
        """
        where = device or ("cuda" if torch.cuda.is_available() else "cpu")
        name_of_type = dtype or ("bfloat16" if where.startswith("cuda") else "float32")
        if name_of_type not in DTYPES:
            raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {name_of_type!r}")
        # before a model is loaded, which takes long
        choice.make(None)
        _check_gguf(name)
        return cls(*load_model(name, DTYPES[name_of_type], where), choice)

    def reset(self) -> None:
        """Starts anew with an empty cache."""
        self.cache = self.choice.make(self.model.config)
        self.held: list[int] = []

    def encode(self, text: str) -> list[int]:
        """Returns a text's tokens, with those that the tokenizer puts before every text."""
        return self.tokenizer(text).input_ids

    def as_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Returns the tokens of a conversation that waits for a reply.

        Raises:
            ValueError: The tokenizer has no chat template.
        """
        if self.tokenizer.chat_template is None:
            raise ValueError("this model's tokenizer has no chat template; use rq-hf generate")
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def generate(self, tokens: list[int], *, max_new_tokens: int, temperature: float) -> str:
        """Prints and returns what follows `tokens`; only what the cache does not hold is read."""
        self._keep_common(tokens)
        self.read = len(tokens) - len(self.held)
        self.meter = Meter(self.tokenizer)
        prompt = torch.tensor([tokens], device=self.model.device)
        sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None}
        if temperature > 0:
            sampling = {"do_sample": True, "temperature": temperature}
        output = self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=self.cache,
            max_new_tokens=max_new_tokens,
            streamer=self.meter,
            pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
            **sampling,
        )[0].tolist()
        # the last token was never fed back
        self.held = output[: self.cache.get_seq_length()]
        return str(self.tokenizer.decode(output[len(tokens) :], skip_special_tokens=True))

    def _keep_common(self, tokens: list[int]) -> None:
        """Leaves in the cache what it shares with the beginning of `tokens`.

        A template may write an earlier reply otherwise than the model did, for instance without
        its thoughts; the conversation is then read again from there, or from the start where the
        cache cannot be cut so far. One token at least must be new.
        """
        pairs = zip(self.held, tokens[:-1], strict=False)
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        if common == len(self.held):
            return
        try:
            self.cache.crop(common - len(self.held))
        except (ValueError, RuntimeError, AttributeError):
            self.reset()
        else:
            self.held = self.held[:common]

    def status(self) -> str:
        """Returns one line: speed, context, memory."""
        held, dense = self._bytes()
        memory = f"cache {mib(held)}"
        if not self.choice.exact:
            memory += f", in bfloat16 {mib(dense)}"
            # short contexts are exact, and statistics and tables come on top
            memory += f", {dense / held:.1f} times as much" if dense > held else ""
        context = f"context {self.cache.get_seq_length()} tokens, {self.read} of them read now"
        return f"[{self.meter.speed()} | {context} | {memory}]"

    def _bytes(self) -> tuple[int, int]:
        """Returns the bytes that the cache holds, and those of the same tokens in bfloat16."""
        if isinstance(self.cache, RotorQuantCache):
            memory = self.cache.memory()
            return memory.held_bytes, memory.dense_bf16_bytes
        tensors = reachable_tensors(self.cache)
        return storage_bytes(tensors), sum(t.numel() for t in tensors) * BF16_BYTES

    def describe(self) -> str:
        """Returns what the cache holds, layer by layer, and its memory."""
        if isinstance(self.cache, RotorQuantCache):
            return f"{join_equal_layers(self.cache.describe())}\n{self.cache.memory()}"
        return self.status()


def join_equal_layers(text: str) -> str:
    """Returns lines such as "layer 3: ..." with one line for layers in a row that say the same."""
    lines = [line.partition(": ") for line in text.splitlines()]
    groups = [list(group) for _, group in groupby(lines, key=lambda parts: parts[2])]
    return "\n".join(f"{_span(group[0][0], group[-1][0])}: {group[0][2]}" for group in groups)


def _span(first: str, last: str) -> str:
    """Returns "layers 0 to 3" for "layer 0" and "layer 3", or the one name that both are."""
    return first if first == last else f"{first.replace('layer', 'layers')} to {last.split()[-1]}"


def _check_gguf(name: str) -> None:
    if name.endswith(".gguf") and Path(name).expanduser().is_file() and find_spec("gguf") is None:
        raise ImportError('to read .gguf files install the extra for them: pip install ".[gguf]"')
