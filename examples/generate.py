# SPDX-License-Identifier: Apache-2.0
"""Generates text with a packed key-value cache.

python -m examples.generate --model Qwen/Qwen2.5-0.5B-Instruct --prompt "Rotations in space"
"""

from __future__ import annotations

import argparse

import torch

from examples.loading import load_model
from rq_hf import RotorQuantCache


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="hub id, folder or .gguf file")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--nbits", type=int, default=3, help="bits a stored number: 2, 3, 4 or 8")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    args = parser.parse_args(argv)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model, tokenizer = load_model(args.model, dtype, device)
    inputs = tokenizer(args.prompt, return_tensors="pt").to(device)
    cache = RotorQuantCache(config=model.config, nbits=args.nbits)
    tokens = model.generate(**inputs, past_key_values=cache, max_new_tokens=args.max_new_tokens)
    print(tokenizer.decode(tokens[0], skip_special_tokens=True))
    print(cache.memory())


if __name__ == "__main__":
    main()
