# SPDX-License-Identifier: Apache-2.0
"""Perplexity with quantised caches, and divergence from the unquantised model, on the same windows.

python -m eval.perplexity --model Qwen/Qwen2.5-0.5B --dataset wikitext \
    --settings near-lossless:3 turboquant:3 --out perplexity.json

--mode strict     one forward a window; every query reads decoded keys and values of all tokens, its
                  own included, so all quantisation error counts
--mode generate   the window as users run it: a prompt (exact), then chunks that read the packed
                  prefix; positions of the prompt are not scored

The unquantised model reads the same windows in the same forwards, or in pieces of them where these
are long: its keys and values are exact either way. A run that was cut short goes on
where it stopped when it is started again with the same --out; so do further windows and settings.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel

from eval.options import (
    add_model_options,
    add_text_options,
    describe_model,
    load_options_model,
    read_texts,
)
from eval.paired import PairedSums
from eval.results_io import header
from eval.run import Run
from eval.scoring import Reference, hidden_states
from eval.settings import Setting, bits_per_number, parse_settings, reason_to_skip
from eval.shards import WHOLE, Shard, add_shard_option
from eval.windows import first_tokens, make_windows

Spans = list[tuple[int, int]]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_options(parser)
    add_text_options(parser)
    parser.add_argument("--mode", choices=("strict", "generate"), default="strict")
    parser.add_argument("--window", type=int, default=1024, help="tokens of a window")
    parser.add_argument("--windows", type=int, default=8, help="how many windows")
    parser.add_argument("--skip", type=int, default=128, help="first positions, not scored")
    parser.add_argument("--first", type=int, help="generate: tokens of the prompt (half a window)")
    parser.add_argument("--chunk", type=int, help="generate: tokens of each later forward (64)")
    parser.add_argument(
        "--stats-tokens",
        type=int,
        help="strict: forward so many tokens first, so that statistics are measured on these alone",
    )
    parser.add_argument(
        "--switch-at", type=int, help="where windows turn to the second of two --text"
    )
    parser.add_argument("--settings", nargs="+", required=True, help="see eval/settings.py")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write or continue")
    parser.add_argument("--plot", action="store_true", help="draw OUT as .png beside it")
    add_shard_option(parser)
    return parser.parse_args(argv)


def plan(args: argparse.Namespace) -> tuple[Spans, int]:
    """Returns the forwards of a window as spans of tokens, and the first position scored.

    Raises:
        ValueError: Options that do not belong to the mode, or lengths that leave nothing to score.
    """
    if args.mode == "strict":
        if args.first is not None or args.chunk is not None:
            raise ValueError("--first and --chunk belong to --mode generate")
        first, chunk = args.stats_tokens or args.window, args.window
    else:
        if args.stats_tokens is not None:
            raise ValueError("--stats-tokens belongs to --mode strict; here --first does the same")
        first = args.window // 2 if args.first is None else args.first
        chunk = 64 if args.chunk is None else args.chunk
    start = max(args.skip, first) if args.mode == "generate" else args.skip
    if chunk < 1 or not 0 < first <= args.window or not 0 <= start < args.window - 1:
        raise ValueError(
            f"nothing to score: a window of {args.window} tokens, a first forward of {first}, "
            f"chunks of {chunk}, {args.skip} positions skipped"
        )
    edges = [0, *range(first, args.window, chunk), args.window]
    return list(pairwise(edges)), start


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    windows: Sequence[Tensor],
    settings: Sequence[Setting],
    spans: Spans,
    start: int,
    run: Run,
    shard: Shard = WHOLE,
) -> None:
    """Measures every setting on the shard's windows and adds what is not in `run` yet."""
    mine = [i for i in range(len(windows)) if shard.takes(i)]
    progress = tqdm(total=len(mine) * len(settings), unit="run", disable=None)
    for i in mine:
        missing = [setting for setting in settings if not run.has(i, setting.label)]
        progress.update(len(settings) - len(missing))
        if not missing:
            continue
        tokens = windows[i].to(model.device)
        exact = hidden_states(model, tokens, DynamicCache(config=model.config), spans)
        reference = Reference(model, exact[start:-1], tokens[0, start + 1 :])
        for setting in missing:
            progress.set_postfix_str(f"window {i}, {setting.label}")
            begin = time.perf_counter()
            cache = setting.make(model.config)
            hidden = hidden_states(model, tokens, cache, spans)
            sums = PairedSums.of(reference.compare(hidden[start:-1]))
            nominal, held = bits_per_number(cache)
            run.add(
                {
                    "window": i,
                    "setting": setting.label,
                    "sums": asdict(sums),
                    "bits_nominal": nominal,
                    "bits_held": held,
                    "seconds": time.perf_counter() - begin,
                }
            )
            progress.update()
    progress.close()


def print_table(summary: Sequence[dict[str, Any]]) -> None:
    print(f"{'setting':<28}bits  (held)      PPL   change, %        KL      top-1, %  s/window")
    for row in summary:
        if row["windows"] == 0:
            continue
        print(
            f"{row['setting']:<28}{row['bits_nominal']:<6.3g}({row['bits_held']:5.3f})"
            f"{row['perplexity']:>10.3f}"
            f"{row['delta_percent']:>+9.2f} ±{row['delta_percent_error']:<5.2f}"
            f"{row['kl']:>9.5f} ±{row['kl_error']:.5f}{row['top1_agreement_percent']:>7.1f}"
            f"{row['seconds_per_window']:>9.1f}"
        )


def usable(
    settings: Sequence[Setting], model: PreTrainedModel, run: Run, *, strict: bool
) -> list[Setting]:
    """Returns the settings that can be measured, prints why others cannot, and notes both."""
    chosen = []
    for setting in settings:
        reason = reason_to_skip(setting, model.config, strict=strict)
        if reason is None:
            run.add_setting(setting)
            chosen.append(setting)
        else:
            print(f"{setting.label} is left out: {reason}")
            run.content["skipped"][setting.label] = reason
    return chosen


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    spans, start = plan(args)
    strict = args.mode == "strict"
    settings = parse_settings(args.settings, strict=strict)
    texts = read_texts(args)
    model, tokenizer = load_options_model(args)
    windows = make_windows(
        tokenizer,
        texts,
        count=args.windows,
        length=args.window,
        bos=args.bos,
        switch_at=args.switch_at,
    )
    head = header("eval.perplexity", argv, args.device)
    config = {
        "model": describe_model(args, model),
        "texts": [text.describe() for text in texts],
        "switch_at": args.switch_at,
        "first_tokens": first_tokens(tokenizer, args.bos),
        "mode": args.mode,
        "window": args.window,
        "first_forwards": [list(span) for span in spans[:2]],
        "scored": [start, args.window - 1],
    }
    print(json.dumps({**head["environment"], **config}, indent=1))
    run = Run(args.out, head, config)
    chosen = usable(settings, model, run, strict=strict)
    # the command too, however soon the run is stopped
    run.save()
    measure(model, windows, chosen, spans, start, run, args.shard)
    run.save()
    print_table(run.content["summary"])
    if args.plot:
        # drawing is optional, and so is what it needs
        from eval.plot import plot_perplexity

        plot_perplexity(run.content, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
