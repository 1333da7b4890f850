# SPDX-License-Identifier: Apache-2.0
"""Whether a model spread over several devices generates the same tokens as on one.

python -m eval.multi_gpu --out eval/results/multi_gpu.json
python -m eval.multi_gpu --model Qwen/Qwen2.5-0.5B --text essay.txt --out multi_gpu-qwen.json

Runs a random Llama, or the model and text given, on one device, then with its layers on two
(accelerate's device_map), then with its heads on two processes (tensor parallel: NCCL, or Gloo
with --device cpu), each time with a packed cache and with the host's exact one; compares the
tokens and prints what each device held.
Sums over processes round in another order, and a tie decided otherwise leads elsewhere: the exact
cache shows whether that happens, and the logits whether it was a tie (see `eval.parting`).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.cache_utils import Cache

from eval.options import DTYPES
from eval.parting import Decoded, find_parting
from eval.results_io import header, write_json
from eval.windows import make_windows, read_text
from rq_hf import RotorQuantCache

PROCESSES = 2
SEQUENCES = 2
KINDS = ("tokens", "exact_tokens")


class Generated(NamedTuple):
    """What one way to run the model gave.

    Attributes:
        result: Tokens by kind of cache, and what was held where, as plain values.
        logits: Of every step by kind of cache, `[steps, sequences, vocabulary]`, on the CPU.
    """

    result: dict[str, Any]
    logits: dict[str, Tensor]

    def sequences(self, kind: str) -> list[Decoded]:
        """Returns each sequence's tokens and logits."""
        tokens = torch.tensor(self.result[kind])
        return [Decoded(*pair) for pair in zip(tokens, self.logits[kind].unbind(1), strict=True)]


def main() -> None:
    args = _parse()
    if args.worker is not None:
        run_tensor_parallel(args)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.model is None:
            args.model = str(folder / "model")
            save_model(Path(args.model))
        torch.save(make_prompt(args), folder / "prompt.pt")
        runs = {"one device": run_on_one(folder, args)}
        runs["layers on two devices"] = run_device_map(folder, args)
        runs["tensor parallel"] = start_tensor_parallel(folder, args)
    for way, run in runs.items():
        compare(way, run, runs["one device"])
    head = header("eval.multi_gpu", sys.argv[1:], torch.device(args.device))
    results = {way: run.result for way, run in runs.items()}
    write_json(args.out, {**head, "config": _described(args), "results": results})
    if not all(result["equal"] for result in results.values()):
        sys.exit("the tokens differ")


def compare(way: str, run: Generated, one: Generated) -> None:
    """Adds to a result how far it follows that of one device, and prints it."""
    for kind in KINDS:
        pairs = zip(one.sequences(kind), run.sequences(kind), strict=True)
        partings = [find_parting(*pair) for pair in pairs]
        run.result[f"{kind}_agreeing"] = [parting.agreeing for parting in partings]
        run.result[f"{kind}_partings"] = [asdict(parting) for parting in partings]
        for parting in partings:
            print(f"{way:24}{'packed' if kind == 'tokens' else 'exact':8}{parting}")
    run.result["equal"] = run.result["tokens"] == one.result["tokens"]
    print(f"{way:24}{run.result['held']}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", help="hub id or folder; a random Llama if none is given")
    parser.add_argument("--text", type=Path, help="file to take the prompts of --model from")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of weights and states")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--nbits", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=1000)
    parser.add_argument("--new-tokens", type=int, default=200)
    parser.add_argument("--worker", type=Path, help="(set by the script itself)")
    args = parser.parse_args()
    if args.worker is None and (args.model is None) != (args.text is None):
        parser.error("--model and --text belong together")
    return args


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    names = ("device", "nbits", "prompt_tokens", "new_tokens", "dtype")
    return {name: getattr(args, name) for name in names}


def _described(args: argparse.Namespace) -> dict[str, Any]:
    given = args.text is not None
    name = Path(args.model).name if Path(args.model).exists() else args.model
    return {
        **_settings(args),
        "model": name if given else "a random Llama",
        "text": read_text(args.text).describe() if given else None,
    }


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


def make_prompt(args: argparse.Namespace) -> Tensor:
    """Returns the prompts `[sequences, tokens]`: of the text, or random."""
    if args.text is None:
        stream = torch.Generator().manual_seed(1)
        return torch.randint(3, 1000, (SEQUENCES, args.prompt_tokens), generator=stream)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = [read_text(args.text)]
    return torch.cat(make_windows(tokenizer, texts, count=SEQUENCES, length=args.prompt_tokens))


def generate(
    model: PreTrainedModel, folder: Path, args: argparse.Namespace, device: str
) -> Generated:
    """Returns what follows the prompts in `folder`, and the bytes held by device."""
    prompt = torch.load(folder / "prompt.pt").to(device)
    # whatever the model would stop at or penalise; all runs go on to the same length
    model.generation_config = GenerationConfig(pad_token_id=0)
    cache = RotorQuantCache(config=model.config, nbits=args.nbits)
    caches: dict[str, Cache] = dict(
        zip(KINDS, (cache, DynamicCache(config=model.config)), strict=True)
    )
    tokens, logits = {}, {}
    for kind, one in caches.items():
        output: Any = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=one,
            max_new_tokens=args.new_tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens[kind] = output.sequences[:, args.prompt_tokens :].tolist()
        logits[kind] = torch.stack([step.float().cpu() for step in output.logits])
    held: dict[str, int] = {}
    for layer in cache.packed_layers:
        for tensor in layer.store.tensors():
            key = f"{tensor.device}, {tensor.shape[1]} KV heads"
            held[key] = held.get(key, 0) + tensor.untyped_storage().nbytes()
    described = cache.describe().splitlines()
    return Generated({**tokens, "held": held, "layers": described}, logits)


def run_on_one(folder: Path, args: argparse.Namespace) -> Generated:
    device = "cuda:0" if args.device == "cuda" else "cpu"
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=DTYPES[args.dtype])
    return generate(model.to(device).eval(), folder, args, device)


def run_device_map(folder: Path, args: argparse.Namespace) -> Generated:
    names = ["cuda:0", "cuda:1"] if args.device == "cuda" else ["cpu", "cpu"]
    config = AutoConfig.from_pretrained(args.model)
    layers = config.num_hidden_layers
    placed = {f"model.layers.{i}": names[2 * i // layers] for i in range(layers)}
    placed |= {"model.embed_tokens": names[0], "model.rotary_emb": names[0]}
    # weights that are tied lie on one device
    head = names[0 if config.tie_word_embeddings else 1]
    placed |= {"model.norm": names[1], "lm_head": head}
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=DTYPES[args.dtype], device_map=placed
    )
    return generate(model.eval(), folder, args, names[0])


def start_tensor_parallel(folder: Path, args: argparse.Namespace) -> Generated:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={PROCESSES}", "-m", "eval.multi_gpu", "--worker", str(folder)]
    for name, value in {**_settings(args), "model": args.model}.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    subprocess.run([*command, "--out", str(args.out)], check=True)
    ranks = [json.loads((folder / f"rank{i}.json").read_text()) for i in range(PROCESSES)]
    if any(rank["tokens"] != ranks[0]["tokens"] for rank in ranks):
        raise RuntimeError("the processes of one tensor-parallel run disagree")
    held = {f"rank {i}": rank["held"] for i, rank in enumerate(ranks)}
    return Generated({**ranks[0], "held": held}, torch.load(folder / "logits.pt"))


def run_tensor_parallel(args: argparse.Namespace) -> None:
    rank = int(os.environ["LOCAL_RANK"])
    device = f"cuda:{rank}" if args.device == "cuda" else "cpu"
    if args.device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=DTYPES[args.dtype], tp_plan="auto", tp_size=PROCESSES
    )
    run = generate(model.eval(), args.worker, args, device)
    write_json(args.worker / f"rank{rank}.json", run.result)
    if rank == 0:
        torch.save(run.logits, args.worker / "logits.pt")
    # one that has gone may take the others' connections with it
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
