# SPDX-License-Identifier: Apache-2.0
"""Continues one text with several settings, and shows how long each follows the exact cache.

python -m examples.compare_settings --model Qwen/Qwen2.5-0.5B --prompt-file text.txt

Greedy texts part at the first near-tie, so this is an impression. `python -m eval.perplexity` and
`python -m eval.needle` measure.
"""

from __future__ import annotations

import argparse
import time
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from examples.loading import load_model
from rq_hf import RotorQuantCache

SETTINGS: dict[str, dict[str, Any]] = {
    "4 bits": {"nbits": 4},
    "3 bits": {"nbits": 3},
    "3 bits, Prod keys": {"nbits": 3, "key_codec": "prod"},
    "4-bit keys, 2-bit values": {"key_bits": 4, "value_bits": 2},
    "2 bits": {"nbits": 2},
    "2 bits, first layer 4": {"nbits": 2, "layer_bits": {0: 4}},
    "RotorQuant, 3 bits": {"preset": "rotorquant", "nbits": 3},
    "TurboQuant, 3 bits": {"preset": "turboquant", "nbits": 3},
}
PROMPT = Path(__file__).with_name("prompt.txt")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="hub id, folder or .gguf file")
    parser.add_argument("--prompt-file", type=Path, default=PROMPT, help="a long text")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    args = parser.parse_args(argv)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model, tokenizer = load_model(args.model, dtype, device)
    text = args.prompt_file.read_text(encoding="utf-8").rstrip()
    prompt = tokenizer(text, return_tensors="pt").input_ids.to(device)

    print(f"{prompt.shape[1]} tokens of prompt, {args.max_new_tokens} to generate\n")
    print(f"{'setting':<28}tokens agreeing  bits a number  MiB held  MiB in bf16  seconds")
    exact, _ = continue_text(model, prompt, DynamicCache(config=model.config), args.max_new_tokens)
    for name, settings in SETTINGS.items():
        cache = RotorQuantCache(config=model.config, **settings)
        tokens, seconds = continue_text(model, prompt, cache, args.max_new_tokens)
        memory = cache.memory()
        held, dense = (size / 2**20 for size in (memory.held_bytes, memory.dense_bf16_bytes))
        print(
            f"{name:<28}{agreeing(tokens, exact):>15}{memory.nominal_bits:>15.2f}"
            f"{held:>10.2f}{dense:>13.2f}{seconds:>9.1f}",
            flush=True,
        )


def continue_text(model: Any, prompt: Tensor, cache: Any, count: int) -> tuple[list[int], float]:
    """Returns the tokens that follow, and how long they took."""
    start = time.perf_counter()
    tokens = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        past_key_values=cache,
        max_new_tokens=count,
        do_sample=False,
    )
    return tokens[0, prompt.shape[1] :].tolist(), time.perf_counter() - start


def agreeing(first: list[int], second: list[int]) -> int:
    """Returns how many tokens are equal before the first that differ."""
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


if __name__ == "__main__":
    main()
