# SPDX-License-Identifier: Apache-2.0
"""Whether a model spread over several devices generates the same tokens as on one.

python -m eval.multi_gpu --out eval/results/multi_gpu.json

Runs a random Llama on one device, then with its layers on two (accelerate's device_map), then with
its heads on two processes (tensor parallel: NCCL, or Gloo with --device cpu), each time with a
packed cache and with the host's exact one; compares the tokens and prints what each device held.
Sums over processes round in another order, and a tie decided otherwise leads elsewhere: the exact
cache shows whether that happens.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from eval.results_io import header, write_json
from rq_hf import RotorQuantCache

PROCESSES = 2


def main() -> None:
    args = _parse()
    if args.worker is not None:
        run_tensor_parallel(args)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder)
        results = {"one device": run_on_one(folder, args)}
        results["layers on two devices"] = run_device_map(folder, args)
        results["tensor parallel"] = start_tensor_parallel(folder, args)
    for way, result in results.items():
        for kind in ("tokens", "exact_tokens"):
            pairs = zip(result[kind], results["one device"][kind], strict=True)
            result[f"{kind}_agreeing"] = [_agreeing(mine, theirs) for mine, theirs in pairs]
        result["equal"] = result["tokens"] == results["one device"]["tokens"]
        print(
            f"{way:24}tokens agreeing: packed {result['tokens_agreeing']}, "
            f"exact {result['exact_tokens_agreeing']}   {result['held']}"
        )
    run = header("eval.multi_gpu", sys.argv[1:], torch.device(args.device))
    write_json(args.out, {**run, "config": _settings(args), "results": results})
    if not all(result["equal"] for result in results.values()):
        sys.exit("the tokens differ")


def _agreeing(mine: list[int], theirs: list[int]) -> int:
    """Returns how many tokens from the start on are the same."""
    pairs = enumerate(zip(mine, theirs, strict=True))
    return next((i for i, (a, b) in pairs if a != b), len(mine))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--nbits", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=1000)
    parser.add_argument("--new-tokens", type=int, default=200)
    parser.add_argument("--worker", type=Path, help="(set by the script itself)")
    return parser.parse_args()


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    names = ("device", "nbits", "prompt_tokens", "new_tokens")
    return {name: getattr(args, name) for name in names}


def save_model(folder: Path) -> None:
    """Saves a random Llama with 8 KV heads of 64 numbers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=8192,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.08)
    model.save_pretrained(folder)


def generate(model: PreTrainedModel, args: argparse.Namespace, device: str) -> dict[str, Any]:
    """Returns the tokens that follow a fixed prompt, and the bytes held by device."""
    stream = torch.Generator().manual_seed(1)
    prompt = torch.randint(3, 1000, (2, args.prompt_tokens), generator=stream).to(device)
    cache = RotorQuantCache(config=model.config, nbits=args.nbits)
    tokens, exact_tokens = (
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=one,
            max_new_tokens=args.new_tokens,
            do_sample=False,
            pad_token_id=0,
        )[:, args.prompt_tokens :].tolist()
        for one in (cache, DynamicCache(config=model.config))
    )
    held: dict[str, int] = {}
    for layer in cache.packed_layers:
        for tensor in layer.store.tensors():
            key = f"{tensor.device}, {tensor.shape[1]} KV heads"
            held[key] = held.get(key, 0) + tensor.untyped_storage().nbytes()
    described = cache.describe().splitlines()
    return {"tokens": tokens, "exact_tokens": exact_tokens, "held": held, "layers": described}


def run_on_one(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    device = "cuda:0" if args.device == "cuda" else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    return generate(model, args, device)


def run_device_map(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    names = ["cuda:0", "cuda:1"] if args.device == "cuda" else ["cpu", "cpu"]
    placed = {f"model.layers.{i}": names[i // 2] for i in range(4)}
    placed |= {"model.embed_tokens": names[0], "model.rotary_emb": names[0]}
    placed |= {"model.norm": names[1], "lm_head": names[1]}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map=placed)
    return generate(model.eval(), args, names[0])


def start_tensor_parallel(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={PROCESSES}", "-m", "eval.multi_gpu", "--worker", str(folder)]
    for name, value in _settings(args).items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    subprocess.run([*command, "--out", str(args.out)], check=True)
    ranks = [json.loads((folder / f"rank{i}.json").read_text()) for i in range(PROCESSES)]
    if any(rank["tokens"] != ranks[0]["tokens"] for rank in ranks):
        raise RuntimeError("the processes of one tensor-parallel run disagree")
    return {**ranks[0], "held": {f"rank {i}": rank["held"] for i, rank in enumerate(ranks)}}


def run_tensor_parallel(args: argparse.Namespace) -> None:
    rank = int(os.environ["LOCAL_RANK"])
    device = f"cuda:{rank}" if args.device == "cuda" else "cpu"
    if args.device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    model = AutoModelForCausalLM.from_pretrained(
        args.worker, dtype=torch.float32, tp_plan="auto", tp_size=PROCESSES
    )
    result = generate(model.eval(), args, device)
    write_json(args.worker / f"rank{rank}.json", result)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
