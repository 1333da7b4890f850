# SPDX-License-Identifier: Apache-2.0
"""Generates text with a cache of a fixed size, whose steps a GPU runs from one graph.

python -m examples.compiled --model Qwen/Qwen2.5-0.5B-Instruct --prompt "Rotations in space"
python -m examples.compiled --model Qwen/Qwen2.5-0.5B-Instruct --prompt "Rotations in space" --graph

On a GPU `generate()` compiles the steps by itself, which takes a while at first; with `--graph`
they are recorded as they are, and nothing is compiled. The second run shows what a token takes
then. On the CPU steps are neither.
"""

from __future__ import annotations

import argparse
import time
from contextlib import nullcontext

import torch

from examples.loading import load_model
from rq_hf import RotorQuantStaticCache, cuda_graph


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="hub id, folder or .gguf file")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--nbits", type=int, default=3, help="bits a stored number: 2, 3, 4 or 8")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--graph", action="store_true", help="record steps, do not compile them")
    args = parser.parse_args(argv)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model, tokenizer = load_model(args.model, dtype, device)
    inputs = tokenizer(args.prompt, return_tensors="pt").to(device)
    room = inputs.input_ids.shape[1] + args.max_new_tokens
    cache = RotorQuantStaticCache(config=model.config, max_cache_len=room, nbits=args.nbits)
    with cuda_graph(model, cache) if args.graph else nullcontext():
        for run in ("first", "second"):
            cache.reset()
            start = time.perf_counter()
            tokens = model.generate(
                input_ids=inputs.input_ids,
                attention_mask=inputs.attention_mask,
                past_key_values=cache,
                max_new_tokens=args.max_new_tokens,
                do_sample=False,
            )
            seconds = time.perf_counter() - start
            new = tokens.shape[1] - inputs.input_ids.shape[1]
            print(f"{run} run: {seconds:.2f} s, {1e3 * seconds / new:.1f} ms a token")
    print(tokenizer.decode(tokens[0], skip_special_tokens=True))
    print(cache.memory())


if __name__ == "__main__":
    main()
