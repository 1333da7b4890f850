# SPDX-License-Identifier: Apache-2.0
"""Time of packing a layer's keys and values, and of decoding them.

python -m eval.benchmark_encode --out eval/results/encode-speed.json

All of a call of `rq_hf.ops.encode` or `rq_hf.ops.decode` (to rotated rows) with whole tiles, a mean
of keys before RoPE and of values, and a balance of channels. Calls read different buffers in turn,
of 300 MB together, so that the GPU's cache is cold. What a sequence needs once is not in the time:
matrices, means, angles.
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
from torch import Tensor

from eval.results_io import header, write_json
from eval.timing import Timing, buffers_for, measure
from rq_hf.ops.decode import decode
from rq_hf.ops.encode import encode
from rq_hf.quant.preconditioning import Preconditioner
from rq_hf.quant.rope import RopeTable
from rq_hf.quant.scale_fit import SCALE_RULES
from rq_hf.quant.tiles import TileCodec

# bits and codec of the keys, by the name that a row has
SETTINGS: dict[str, dict[str, Any]] = {
    "2": {"key_bits": 2, "value_bits": 2},
    "3": {"key_bits": 3, "value_bits": 3},
    "4": {"key_bits": 4, "value_bits": 4},
    "prod-3": {"key_bits": 3, "value_bits": 3, "key_codec": "prod"},
    "prod-4": {"key_bits": 4, "value_bits": 4, "key_codec": "prod"},
}


@dataclass(frozen=True)
class Row:
    """What was measured.

    Attributes:
        operation: "encode" or "decode".
        setting: Name in `SETTINGS`.
        rotation: Name of the rotation.
        scale: Scale rule.
        bytes: What a call has to read and to write.
        timing: The times.
    """

    operation: str
    setting: str
    rotation: str
    scale: str
    bytes: int
    timing: Timing


class States:
    """Random keys and values in several buffers, and statistics that fit them."""

    def __init__(self, heads: int, tokens: int, dim: int, device: torch.device) -> None:
        shape = (1, heads, tokens, dim)
        draw = partial(torch.randn, shape, dtype=torch.bfloat16, device=device)
        self.nbytes = 2 * 2 * heads * tokens * dim
        self.pairs = [(draw(), draw()) for _ in range(buffers_for(self.nbytes))]
        mean = torch.randn(1, heads, dim, device=device)
        rope = RopeTable(500_000.0 ** -torch.linspace(0, 1, dim // 2, device=device))
        self.preconditioner = Preconditioner(
            mean, torch.zeros_like(mean), mean.abs() + 0.5, mean, rope
        )


def measure_codec(
    states: States, codec: TileCodec, device: torch.device
) -> Iterator[tuple[str, int, Timing]]:
    """Yields operation, bytes and time of encoding and of decoding."""
    pack = partial(encode, codec, states.preconditioner, start=4)
    packed = [pack(*pair) for pair in states.pairs]
    nbytes = states.nbytes + sum(_nbytes(x) for x in packed[0])
    yield "encode", nbytes, measure([partial(pack, *pair) for pair in states.pairs], device)
    unpack = partial(decode, codec, dtype=torch.bfloat16, rotated=True)
    yield "decode", nbytes, measure([partial(unpack, *x) for x in packed], device)


def _nbytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def print_row(row: Row) -> None:
    rate = row.bytes / row.timing.us / 1e3
    print(
        f"{row.operation:<8}{row.setting:<8}{row.rotation:<11}{row.scale:<15}"
        f"{row.timing.us:>10.1f} us{rate:>8.0f} GB/s  {row.timing.method}",
        flush=True,
    )


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--scales", nargs="+", choices=SCALE_RULES, default=list(SCALE_RULES))
    parser.add_argument("--rotations", nargs="+", default=["hadamard", "dense"])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32 * 1024)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--registers", type=int, help="most of a thread where three programs fit")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    return parser.parse_args(argv)


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = _parse(argv)
    torch.manual_seed(0)
    if args.registers is not None:
        from rq_hf.ops.triton import encode_launch

        encode_launch.REGISTERS = args.registers
    result: dict[str, Any] = {
        **header("eval.benchmark_encode", argv, args.device),
        "config": {
            "heads": args.heads,
            "tokens": args.tokens,
            "head_dim": args.head_dim,
            "registers": args.registers,
        },
        "rows": [],
    }
    print(json.dumps({**result["environment"], **result["config"]}, indent=1))
    states = States(args.heads, args.tokens, args.head_dim, args.device)
    for rotation in args.rotations:
        for name in args.settings:
            for scale in args.scales:
                codec = TileCodec(args.head_dim, rotation=rotation, scale=scale, **SETTINGS[name])
                for operation, nbytes, timing in measure_codec(states, codec, args.device):
                    row = Row(operation, name, rotation, scale, nbytes, timing)
                    print_row(row)
                    result["rows"].append(asdict(row))
                    write_json(args.out, result)


if __name__ == "__main__":
    main()
