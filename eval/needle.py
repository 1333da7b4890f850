# SPDX-License-Identifier: Apache-2.0
"""Needle in a haystack: facts found again in a long context, by its length, their depth, the cache.

python -m eval.needle --model Qwen/Qwen2.5-7B-Instruct --text essay.txt --dtype bfloat16 \
    --settings dynamic near-lossless:3 --contexts 4096 16384 32768 --out needle.json --plot

The context goes into the cache in one forward, exact as every prompt. The question is a second
forward and the answer a third, so that both read the packed context. All caches get the same
prompts, in the same forwards.

score     1 if greedy decoding gives the answer; with several facts, the share of those it gives.
          The right answer is fed in: as long as the first choice is its next token, that is what
          greedy decoding would do, and after another choice the answer is wrong in any case.
logprob   log-probability of the whole answer, natural, mean over the facts: finer than the score,
          and a measure for base models too

A run that was cut short goes on where it stopped when it is started again with the same --out; so
do further contexts, depths, seeds, kinds and settings.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eval.needle_prompts import KINDS, Case, PromptMaker
from eval.needle_reading import read_prompt
from eval.needle_run import NeedleRun
from eval.options import (
    add_model_options,
    add_text_options,
    describe_model,
    load_options_model,
    read_texts,
)
from eval.perplexity import usable
from eval.results_io import header
from eval.settings import Setting, parse_settings
from eval.shards import add_shard_option


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_options(parser)
    add_text_options(parser)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["single"])
    parser.add_argument("--contexts", nargs="+", type=int, default=[1024, 4096], help="tokens")
    parser.add_argument("--depths", type=int, default=5, help="how many, from 0 to 1")
    parser.add_argument("--seeds", type=int, default=3, help="prompts a cell")
    parser.add_argument("--several", type=int, default=4, help="facts of a prompt of that kind")
    parser.add_argument(
        "--template",
        choices=("auto", "always", "never"),
        default="auto",
        help="chat template of the prompt; auto: where the tokenizer has one",
    )
    parser.add_argument("--settings", nargs="+", required=True, help="see eval/settings.py")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write or continue")
    parser.add_argument("--plot", action="store_true", help="draw OUT as .png beside it")
    add_shard_option(parser)
    return parser.parse_args(argv)


def make_cases(args: argparse.Namespace) -> list[Case]:
    """Returns the shard's part of every prompt that the options ask for.

    Whole grids one after the other, so that a run that is cut short has all cells.

    Raises:
        ValueError: No depth, no seed, or a context of no tokens.
    """
    if args.depths < 1 or args.seeds < 1 or min(args.contexts) < 1 or args.several < 1:
        raise ValueError("--contexts, --depths, --seeds and --several take numbers of at least 1")
    steps = max(1, args.depths - 1)
    depths = [round(i / steps, 4) for i in range(args.depths)] if args.depths > 1 else [0.5]
    grid = product(range(args.seeds), args.kinds, sorted(args.contexts), depths)
    cases = [Case(kind, context, depth, seed) for seed, kind, context, depth in grid]
    return [case for i, case in enumerate(cases) if args.shard.takes(i)]


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    maker: PromptMaker,
    cases: Sequence[Case],
    settings: Sequence[Setting],
    run: NeedleRun,
) -> None:
    """Reads every prompt with every cache and adds what is not in `run` yet."""
    progress = tqdm(total=len(cases) * len(settings), unit="prompt", disable=None)
    for case in cases:
        missing = [setting for setting in settings if not run.holds(case, setting.label)]
        progress.update(len(settings) - len(missing))
        prompt = maker.make(case) if missing else None
        for setting in missing:
            assert prompt is not None
            progress.set_postfix_str(f"{case}; {setting.label}")
            run.add({**asdict(case), **read_prompt(model, tokenizer, prompt, setting)})
            progress.update()
    progress.close()


def print_table(summary: Sequence[dict[str, Any]]) -> None:
    print(f"{'setting':<34}bits   prompts    score  change   log p   change  packed  s/prompt")
    for row in summary:
        if row["prompts"] == 0:
            continue
        score, logprob = (_signed(row[f"{name}_change"]) for name in ("score", "logprob"))
        print(
            f"{row['setting']:<33} {row['bits_nominal']:<7.3g}{row['prompts']:>7}"
            f"{row['score']:>9.3f}{score:>8}{row['logprob']:>8.2f}{logprob:>9}"
            f"{row['least_packed_tokens']:>8}{row['seconds_per_prompt']:>10.1f}"
        )


def _signed(change: float | None) -> str:
    return "-" if change is None else f"{change:+.3f}"


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    cases = make_cases(args)
    settings = parse_settings(args.settings, strict=False)
    texts = read_texts(args)
    model, tokenizer = load_options_model(args)
    has_template = tokenizer.chat_template is not None
    template = args.template == "always" or (args.template == "auto" and has_template)
    haystack = "\n\n".join(text.content for text in texts)
    maker = PromptMaker(tokenizer, haystack, several=args.several, template=template, bos=args.bos)
    head = header("eval.needle", argv, args.device)
    config = {
        "model": describe_model(args, model),
        "texts": [text.describe() for text in texts],
        "haystack_tokens": len(maker.haystack),
        "several": args.several,
        "chat_template": _digest(str(tokenizer.chat_template)) if template else None,
        "first_tokens": maker.start[:1],
    }
    print(json.dumps({**head["environment"], **config}, indent=1))
    run = NeedleRun(args.out, head, config)
    chosen = usable(settings, model, run, strict=False)
    # the command too, however soon the run is stopped
    run.save()
    measure(model, tokenizer, maker, cases, chosen, run)
    run.save()
    print_table(run.content["summary"])
    if args.plot:
        # drawing is optional, and so is what it needs
        from eval.needle_plot import plot_needle

        plot_needle(run.content, args.out.with_suffix(".png"))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


if __name__ == "__main__":
    main()
