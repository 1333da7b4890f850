# SPDX-License-Identifier: Apache-2.0
"""Time and memory of prefill and decode steps inside `generate()`, by cache.

python -m eval.benchmark_generate --out eval/results/generate-speed.json

The model has the shape of Llama-3-8B, but 8 of its 32 layers, a vocabulary of 32000 instead of
128256, and random weights. The prompt is random and half the steps shorter than the case says, so
that the measured steps lie around it, the packing of a tile among them.

A step is timed from token to token as a streamer gets them (`eval.step_clock`), which is what a
user waits for: the median, without the first steps, that may compile. Prefill is timed twice, from
the prompt to the first token, and the faster time counts. Memory is what is allocated on top of
the weights, and what the cache's own buffers hold.

Of recorded steps it is also measured what the device takes for them: the mean of steps that are
launched one behind the other, in a loop that waits for none of them.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from eval import goals
from eval.cache_rows import ROWS, CacheRow
from eval.random_llama import MODELS, make_model, make_prompt
from eval.results_io import header, write_json
from eval.shapes import Case, parse_case
from eval.step_clock import StepClock
from eval.timing import first_line
from rq_hf import cuda_graph
from rq_hf.memory import MIB, reachable_tensors, storage_bytes

CASES = ("1x4k", "1x32k", "8x32k", "1x128k")
# steps that may compile, record a graph or allocate for the first time
FIRST_STEPS = 4
# long enough to pack tiles, and another one during the steps behind it
WARM_UP_TOKENS = 512
WARM_UP_STEPS = 8
# where the host keeps the compiled forward of a model
_COMPILED = "_compiled_call"


@dataclass(frozen=True)
class Result:
    """One way to run one case.

    Attributes:
        row: Key in `cache_rows.ROWS`.
        case: Batch and tokens.
        error: Why it did not run; everything below is then None.
        step_ms: Median time of a decode step.
        step_mean_ms: Mean, the packing of a tile included.
        step_slowest_ms: The slowest of them.
        steps_ms: Each of them, in order: whether the host was disturbed shows there.
        steps_timed: How many.
        first_steps_s: Time of all steps before those: compiling, if there is any.
        prefill_s: The faster of two prefills.
        prefill_peak_bytes: Most bytes allocated until the first token, weights not counted.
        decode_peak_bytes: Most bytes allocated behind it.
        cache_bytes: Bytes of all buffers that the cache holds at the end.
        goal_ms: The step's time that is aimed for.
        queued_ms: A recorded step's time on the device.
    """

    row: str
    case: str
    error: str | None = None
    step_ms: float | None = None
    step_mean_ms: float | None = None
    step_slowest_ms: float | None = None
    steps_ms: list[float] | None = None
    steps_timed: int | None = None
    first_steps_s: float | None = None
    prefill_s: float | None = None
    prefill_peak_bytes: int | None = None
    decode_peak_bytes: int | None = None
    cache_bytes: int | None = None
    goal_ms: float | None = None
    queued_ms: float | None = None


def generate(
    model: PreTrainedModel,
    prompt: Tensor,
    row: CacheRow,
    *,
    steps: int,
    seconds: float,
    compiled: bool = False,
) -> tuple[StepClock, Cache]:
    """Runs prefill and `steps` steps, or what begins within `seconds`; returns clock and cache."""
    clock = StepClock(model.device)
    cache = row.make(model.config, prompt.shape[1] + steps + 1)
    with row.around(model, cache):
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=cache,
            max_new_tokens=steps + 1,
            max_time=seconds,
            do_sample=False,
            disable_compile=not compiled,
            streamer=clock,
        )
    return clock, cache


def queued_seconds(
    model: PreTrainedModel, prompt: Tensor, row: CacheRow, *, steps: int
) -> float | None:
    """Returns the time of a recorded step on the device; None if steps are not recorded."""
    if row.around is not cuda_graph:
        return None
    cache = row.make(model.config, prompt.shape[1] + FIRST_STEPS + steps)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.no_grad(), row.around(model, cache):
        logits = model(prompt, past_key_values=cache, logits_to_keep=1).logits
        token = logits.argmax(-1)
        for step in range(FIRST_STEPS + steps):
            if step == FIRST_STEPS:
                begin.record()
            model(token, past_key_values=cache, logits_to_keep=1)
        end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / steps


def measure(model: PreTrainedModel, name: str, case: Case, *, steps: int, seconds: float) -> Result:
    """Returns the result of one row at one case, or why there is none."""
    row = ROWS[name]
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(row.attention)
        return _measure(model, name, case, steps, seconds)
    except Exception as error:
        # a missing package, a kernel that fails, no memory: the other rows go on
        return Result(name, str(case), error=first_line(error))
    finally:
        model.set_attn_implementation(before)
        _clean_up(model)


def _measure(model: PreTrainedModel, name: str, case: Case, steps: int, seconds: float) -> Result:
    row = ROWS[name]
    warm_up = make_prompt(model, case.batch, min(case.context, WARM_UP_TOKENS))
    generate(model, warm_up, row, steps=min(steps, WARM_UP_STEPS), seconds=seconds)
    prompt = make_prompt(model, case.batch, max(1, case.context - steps // 2))
    first_prefill = generate(model, prompt, row, steps=0, seconds=seconds)[0].prefill_seconds
    # the allocator keeps its blocks, so that the second prefill is not slowed by asking for them
    gc.collect()
    clock, cache = generate(model, prompt, row, steps=steps, seconds=seconds, compiled=row.compiled)
    if row.compiled and not hasattr(model, _COMPILED):
        raise RuntimeError(f"generate() does not compile steps on {model.device.type}")
    times = clock.step_seconds
    cache_bytes = storage_bytes(reachable_tensors(cache))
    del cache
    timed = times[FIRST_STEPS:]
    if not timed:
        raise TimeoutError(f"{len(times)} steps in {seconds:.0f} s; raise --seconds")
    queued = queued_seconds(model, prompt, row, steps=steps)
    return Result(
        row=name,
        case=str(case),
        step_ms=1e3 * median(timed),
        step_mean_ms=1e3 * mean(timed),
        step_slowest_ms=1e3 * max(timed),
        steps_ms=[round(1e3 * second, 3) for second in timed],
        steps_timed=len(timed),
        first_steps_s=sum(times[:FIRST_STEPS]),
        prefill_s=min(first_prefill, clock.prefill_seconds),
        prefill_peak_bytes=clock.prefill_peak,
        decode_peak_bytes=clock.decode_peak,
        cache_bytes=cache_bytes,
        goal_ms=goals.STEP.get(row.goal or "", {}).get(str(case)),
        queued_ms=None if queued is None else 1e3 * queued,
    )


def _clean_up(model: PreTrainedModel) -> None:
    if model.__dict__.pop(_COMPILED, None) is not None:
        # its graphs hold the cache
        torch.compiler.reset()
    gc.collect()
    if model.device.type == "cuda":
        torch.cuda.empty_cache()


def print_result(result: Result) -> None:
    start = f"{result.case:<8}{result.row:<26}"
    if result.error is not None:
        print(f"{start}{result.error}", flush=True)
        return
    goal = "" if result.goal_ms is None else f" (goal {result.goal_ms})"
    goal += "" if result.queued_ms is None else f", {result.queued_ms:.2f} on the device"
    sizes = (result.prefill_peak_bytes, result.decode_peak_bytes, result.cache_bytes)
    peak, later_peak, held = ("-" if size is None else f"{size / MIB:.0f}" for size in sizes)
    print(
        f"{start}{result.step_ms:8.2f} ms a step{goal}, slowest {result.step_slowest_ms:.2f}, "
        f"first steps {result.first_steps_s:.2f} s; prefill {result.prefill_s:.3f} s; "
        f"MiB: peaks {peak} and {later_peak}, cache {held}",
        flush=True,
    )


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--model", choices=MODELS, default="llama-3-8b")
    parser.add_argument("--cases", nargs="+", default=CASES, metavar="BATCHxTOKENS")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--steps", type=int, default=24, help="decode steps")
    parser.add_argument("--seconds", type=float, default=120.0, help="the longest a row may take")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = _parse(argv)
    cases = [parse_case(word) for word in args.cases]
    model = make_model(args.model, args.device)
    result: dict[str, Any] = {
        **header("eval.benchmark_generate", argv, args.device),
        "config": {
            "model": {"name": args.model, **MODELS[args.model]},
            "dtype": "bfloat16",
            "steps": args.steps,
        },
        "labels": {name: ROWS[name].label for name in args.rows},
        "rows": [],
    }
    print(json.dumps({**result["environment"], "model": result["config"]["model"]}, indent=1))
    for case in cases:
        for name in args.rows:
            one = measure(model, name, case, steps=args.steps, seconds=args.seconds)
            print_result(one)
            result["rows"].append(asdict(one))
            write_json(args.out, result)


if __name__ == "__main__":
    main()
