# SPDX-License-Identifier: Apache-2.0
"""Continues several texts of different lengths at once, padded on the left.

python -m examples.batch --model Qwen/Qwen2.5-0.5B "The sea" "A rotation of space that keeps"
"""

from __future__ import annotations

import argparse

import torch

from examples.loading import load_model
from rq_hf import RotorQuantCache


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompts", nargs="+", metavar="TEXT")
    parser.add_argument("--model", required=True, help="hub id, folder or .gguf file")
    parser.add_argument("--nbits", type=int, default=3, help="bits a stored number: 2, 3, 4 or 8")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    args = parser.parse_args(argv)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model, tokenizer = load_model(args.model, dtype, device)
    # new tokens follow the last column, so texts must end there
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        # any token will do, as the mask hides it
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    inputs = tokenizer(args.prompts, return_tensors="pt", padding=True).to(device)

    cache = RotorQuantCache(config=model.config, nbits=args.nbits)
    tokens = model.generate(
        input_ids=inputs.input_ids,
        attention_mask=inputs.attention_mask,
        past_key_values=cache,
        max_new_tokens=args.max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    new = tokens[:, inputs.input_ids.shape[1] :]
    for prompt, text in zip(args.prompts, tokenizer.batch_decode(new), strict=True):
        print(f"{prompt}|{text}\n")
    print(cache.memory())


if __name__ == "__main__":
    main()
