# SPDX-License-Identifier: Apache-2.0
"""Runs tasks of the LM Evaluation Harness with a packed cache (pip install lm-eval).

python -m examples.lm_eval --model Qwen/Qwen2.5-0.5B --tasks gsm8k --limit 50 --nbits 3

Tasks that generate run as users would: the prompt is exact, what is generated reads it packed.
Tasks that compare likelihoods read each text in one forward, in which an ordinary cache takes no
part; here they run with `strict=True`, so that every query reads decoded keys and values.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from examples.loading import load_model
from rq_hf import RotorQuantCache, use_rotorquant


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="hub id, folder or .gguf file")
    parser.add_argument("--tasks", nargs="+", required=True, help="names as in the harness")
    parser.add_argument("--include-path", type=Path, help="folder with tasks of your own")
    parser.add_argument("--limit", type=int, help="the first so many documents of each task")
    parser.add_argument("--nbits", type=int, default=3, help="bits a stored number: 2, 3, 4 or 8")
    parser.add_argument("--exact", action="store_true", help="the usual cache, to compare with")
    args = parser.parse_args(argv)
    harness = import_harness()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model, tokenizer = load_model(args.model, dtype, device)
    folder = None if args.include_path is None else str(args.include_path)
    options = {
        "tasks": args.tasks,
        "limit": args.limit,
        "task_manager": harness.tasks.TaskManager(include_path=folder),
        "log_samples": False,
    }
    if args.exact:
        exact = harness.models.huggingface.HFLM(pretrained=model, tokenizer=tokenizer)
        results = harness.simple_evaluate(model=exact, **options)
    else:
        packed = wrap(harness, model, tokenizer, args.nbits)
        with use_rotorquant(model, nbits=args.nbits):
            results = harness.simple_evaluate(model=packed, **options)
    print(json.dumps(results["results"], indent=1, default=str))


def import_harness() -> Any:
    """Returns the harness's package, with its model for transformers loaded."""
    try:
        import lm_eval
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError as error:
        raise SystemExit(f"the harness cannot be used: {error}; pip install lm-eval") from error
    return lm_eval


def wrap(harness: Any, model: Any, tokenizer: Any, nbits: int) -> Any:
    """Returns the harness's model for transformers, scoring likelihoods with a strict cache."""

    class PackedLM(harness.models.huggingface.HFLM):  # type: ignore[name-defined, misc]
        def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            cache = RotorQuantCache(config=self.model.config, nbits=nbits, strict=True)
            with torch.no_grad():
                return self.model(inps, past_key_values=cache).logits

    # one text at a time: padding would count among the tokens that statistics are measured on
    return PackedLM(pretrained=model, tokenizer=tokenizer, batch_size=1)


if __name__ == "__main__":
    main()
