# SPDX-License-Identifier: Apache-2.0
"""Generates with a model spread over several GPUs, each layer's cache where the layer is.

Whole layers on each GPU, in one process:
    python -m examples.multi_gpu --model Qwen/Qwen2.5-7B --prompt "Rotations in space"

A share of the heads of every layer on each GPU (tensor parallel), one process a GPU:
    torchrun --nproc-per-node 2 -m examples.multi_gpu --model Qwen/Qwen2.5-7B --prompt "..."
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

from rq_hf import RotorQuantCache


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="hub id or folder")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--nbits", type=int, default=3, help="bits a stored number: 2, 3, 4 or 8")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    args = parser.parse_args(argv)

    # torchrun says how many processes there are
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    model = load_share(args.model, processes) if processes > 1 else load_layers(args.model)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    inputs = tokenizer(args.prompt, return_tensors="pt").to(model.device)
    cache = RotorQuantCache(config=model.config, nbits=args.nbits)
    tokens = model.generate(
        input_ids=inputs.input_ids,
        attention_mask=inputs.attention_mask,
        past_key_values=cache,
        max_new_tokens=args.max_new_tokens,
        do_sample=False,
    )
    # all processes have the same text, and each its own share of the cache
    if int(os.environ.get("RANK", "0")) == 0:
        print(tokenizer.decode(tokens[0], skip_special_tokens=True))
        print(describe(cache))
    if processes > 1:
        # one that has gone may take the others' connections with it
        dist.barrier()
        dist.destroy_process_group()


def load_layers(name: str) -> Any:
    """Returns the model with its layers spread over all GPUs, or on the CPU if there is none."""
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, device_map="auto").eval()


def load_share(name: str, processes: int) -> Any:
    """Returns this process's share of the model."""
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if gpu else "gloo")
    dtype = torch.bfloat16 if gpu else torch.float32
    model = AutoModelForCausalLM.from_pretrained(
        name, dtype=dtype, tp_plan="auto", tp_size=processes
    )
    return model.eval()


def describe(cache: RotorQuantCache) -> str:
    """Returns how many layers lie where, and the memory of this process's cache."""
    places = Counter(
        f"{layer.device}, {layer.store.tiles.tensors[0].shape[1]} KV heads"
        for layer in cache.packed_layers
        if layer.store is not None
    )
    lines = [f"{count} layers on {place}" for place, count in places.items()]
    return "\n".join([*lines, str(cache.memory())])


if __name__ == "__main__":
    main()
