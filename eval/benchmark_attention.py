# SPDX-License-Identifier: Apache-2.0
"""Time of attention of one new token over one layer's cache, packed against bf16.

python -m eval.benchmark_attention --out eval/results/attention-speed.json

A packed row is all of `rq_hf.ops.attend` on what a cache holds of so many tokens: exact sinks and
tail, packed tiles, means and balance. Beside it stands the fastest of three bf16 kernels over as
many dense tokens, in the same run: cuDNN's, flash attention, and a split-K kernel with its layout
swept. Calls read different buffers in turn, of 300 MB together (but at most 40), so that the GPU's
cache is cold. Every result is checked against plain torch before it is timed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from eval import goals
from eval.bf16_attention import (
    BASELINES,
    check_close,
    random_dense,
    random_query,
    time_baseline,
)
from eval.random_view import first_sequence, random_view, view_bytes
from eval.read_rate import read_rate
from eval.results_io import header, write_json
from eval.shapes import Shape, parse_shape
from eval.timing import Timing, buffers_for, first_line, measure
from rq_hf.ops import attend, reference
from rq_hf.quant.tiles import TileCodec

DTYPE = torch.bfloat16
# what --bits names: bits of keys and values, and how keys are stored
SETTINGS = {"2": (2, "mse"), "3": (3, "mse"), "4": (4, "mse"), "prod": (3, "prod")}
CASES = {
    "llama-3-8b": ("1x4k", "1x32k", "1x128k", "8x4k", "8x32k", "8x128k", "32x4k", "32x32k"),
    "qwen2.5-7b": ("1x32k", "1x128k", "8x8k", "8x32k"),
    "qwen2.5-0.5b": ("1x32k", "8x8k", "8x32k"),
    "gemma-3-270m": ("1x32k", "8x8k", "8x32k"),
}
SHAPES = [f"{model}:{case}" for model, cases in CASES.items() for case in cases]
QUICK_SHAPES = ["llama-3-8b:1x32k", "llama-3-8b:1x128k", "llama-3-8b:8x32k"]


@dataclass(frozen=True)
class Row:
    """One kernel at one shape.

    Attributes:
        shape: Model and case.
        attention: A baseline, or the packed setting as --bits names it.
        packed: Whether the cache is packed.
        bytes: What a call has to read of the cache.
        buffers: How many buffers the calls read in turn.
        timing: The times; None if it could not run.
        read_rate_percent: Bytes a second of the measured read rate.
        error: Why it could not run.
        layout: What the sweep chose.
        relative_error: Length of the difference from plain torch, relative.
        best_bf16_us: Time of the fastest baseline.
        ratio: How many times faster than that.
        byte_ceiling: How many times fewer bytes than the baselines read.
        goal: The ratio that is aimed for.
    """

    shape: str
    attention: str
    packed: bool
    bytes: int
    buffers: int
    timing: Timing | None = None
    read_rate_percent: float | None = None
    error: str | None = None
    layout: str | None = None
    relative_error: float | None = None
    best_bf16_us: float | None = None
    ratio: float | None = None
    byte_ceiling: float | None = None
    goal: float | None = None


def measure_shape(
    shape: Shape, settings: Sequence[str], device: torch.device, rate: float, *, quick: bool
) -> Iterator[Row]:
    """Yields the rows of a shape: baselines, then the packed settings."""
    query = random_query(shape, dtype=DTYPE, device=device)
    baselines = []
    for row in _baseline_rows(shape, query, rate, quick):
        baselines.append(row)
        yield row
    times = [row.timing.us for row in baselines if row.timing is not None]
    best = min(times, default=None)
    for name in settings:
        yield _packed_row(shape, name, query, rate, best, baselines[0].bytes)


def _baseline_rows(shape: Shape, query: torch.Tensor, rate: float, quick: bool) -> Iterator[Row]:
    dense = random_dense(shape, query)
    for name in BASELINES:
        row = partial(Row, str(shape), name, False, dense.nbytes, len(dense.buffers))
        try:
            timing, layout = time_baseline(name, dense, quick=quick)
        except Exception as error:
            yield row(error=first_line(error))
            continue
        share = _percent(dense.nbytes, timing, rate)
        yield row(timing=timing, read_rate_percent=share, layout=layout)


def _packed_row(
    shape: Shape,
    name: str,
    query: torch.Tensor,
    rate: float,
    best: float | None,
    dense_bytes: int,
) -> Row:
    bits, key_codec = SETTINGS[name]
    codec = TileCodec(shape.heads.dim, key_bits=bits, value_bits=bits, key_codec=key_codec)
    draw = partial(random_view, shape, codec, dtype=DTYPE, device=query.device)
    views = [draw()]
    nbytes = view_bytes(views[0])
    views += [draw() for _ in range(buffers_for(nbytes) - 1)]
    row = partial(
        Row,
        str(shape),
        name,
        True,
        nbytes,
        len(views),
        best_bf16_us=best,
        byte_ceiling=dense_bytes / nbytes,
        goal=goals.ATTENTION.get(str(shape), {}).get(name),
    )
    scale = shape.heads.dim**-0.5
    try:
        expected = reference.attend(query[:1].float(), first_sequence(views[0]), scale=scale)
        error = check_close(attend(query, views[0], scale=scale)[:1], expected)
        calls = [partial(attend, query, view, scale=scale) for view in views]
        timing = measure(calls, query.device)
    except Exception as failure:
        return row(error=first_line(failure))
    return row(
        timing=timing,
        read_rate_percent=_percent(nbytes, timing, rate),
        relative_error=error,
        ratio=None if best is None else best / timing.us,
    )


def _percent(nbytes: int, timing: Timing, rate: float) -> float:
    return 100 * nbytes / (timing.us * 1e-6) / rate


def print_row(row: Row) -> None:
    start = f"{row.shape:<22}{row.attention:<12}{row.bytes / 1e6:>9.1f} MB"
    if row.timing is None:
        print(f"{start}  {row.error}", flush=True)
        return
    line = f"{start}{row.timing.us:>10.1f} us{row.read_rate_percent:>6.0f}% of read rate"
    if row.ratio is not None:
        goal = "" if row.goal is None else f", goal {row.goal}"
        line += f"  {row.ratio:.2f}x of {row.byte_ceiling:.2f}x{goal}"
    if row.timing.method == "eager":
        line += f"  eager ({row.timing.note})"
    print(f"{line}  {row.layout or ''}", flush=True)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--shapes", nargs="+", metavar="MODEL:BATCHxTOKENS", help="all by default")
    parser.add_argument("--bits", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--quick", action="store_true", help="few shapes, a smaller sweep")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    return parser.parse_args(argv)


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = _parse(argv)
    words = args.shapes or (QUICK_SHAPES if args.quick else SHAPES)
    shapes = [parse_shape(word) for word in words]
    torch.manual_seed(0)
    rate = read_rate(args.device)
    result: dict[str, Any] = {
        **header("eval.benchmark_attention", argv, args.device),
        "config": {
            "dtype": str(DTYPE).removeprefix("torch."),
            "settings": {name: SETTINGS[name] for name in args.bits},
            "quick": args.quick,
        },
        "read_rate_gb_per_s": rate / 1e9,
        "rows": [],
    }
    print(json.dumps({**result["environment"], "read rate, GB/s": round(rate / 1e9)}, indent=1))
    for shape in shapes:
        for row in measure_shape(shape, args.bits, args.device, rate, quick=args.quick):
            print_row(row)
            result["rows"].append(asdict(row))
            write_json(args.out, result)


if __name__ == "__main__":
    main()
