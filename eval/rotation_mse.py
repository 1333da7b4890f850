# SPDX-License-Identifier: Apache-2.0
"""Error of plain quantisation by rotation and bits, on the keys and values of a model.

python -m eval.rotation_mse --model google/gemma-3-270m --dataset wikitext \
    --out eval/results/rotation_mse.json

Every vector is rotated, rounded to the codebook and turned back. The error is |x - x'|^2 / |x|^2
over all vectors of a layer, averaged over layers and seeds. A Gaussian source has the error in the
last row, whatever the rotation.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from eval.capture import LayerStates, capture
from eval.fidelity import relative_error, store
from eval.options import add_first_window_options, load_first_window
from eval.results_io import header, write_json
from rq_hf import RotorQuantCache
from rq_hf.quant.codebooks import get_codebook
from rq_hf.quant.quantizers import MSEQuantizer
from rq_hf.quant.rotations import ROTATIONS, make_rotation

BITS = (2, 3, 4)
SCALES = ("norm", "least_squares")
INPUTS = ("keys", "preconditioned keys", "values", "centred values")


def inputs(states: LayerStates, model: PreTrainedModel) -> dict[str, Tensor]:
    """Returns what is quantised: the layer's states without the sinks, raw and prepared.

    Preconditioned keys are what the default cache rounds: freed of their mean, then balanced.
    """
    cache = RotorQuantCache(config=model.config, strict=True)
    store(states, cache)
    preconditioner = cache.layers[states.layer].preconditioner
    start = cache.quantization.sink_length
    key, value = states.key[:, :, start:], states.value[:, :, start:]
    prepared = (preconditioner.precondition_keys(key, start), preconditioner.center_values(value))
    return dict(zip(INPUTS, (key, prepared[0], value, prepared[1]), strict=True))


def round_trip(x: Tensor, rotation: str, bits: int, scale: str, seed: int) -> Tensor:
    """Returns `x` `[..., D]` quantised and decoded."""
    head_dim = x.shape[-1]
    quantizer = MSEQuantizer(
        make_rotation(rotation, head_dim, seed), get_codebook(bits, head_dim), scale=scale
    )
    return quantizer.dequantize(quantizer.quantize(x))


@torch.no_grad()
def measure(layers: Sequence[dict[str, Tensor]], seeds: Iterable[int]) -> Iterator[dict[str, Any]]:
    """Yields a row for each input, rotation, width and scale."""
    for name, rotation, bits, scale in product(INPUTS, ROTATIONS, BITS, SCALES):
        by_seed = [
            mean(
                relative_error(layer[name], round_trip(layer[name], rotation, bits, scale, seed))
                for layer in layers
            )
            for seed in seeds
        ]
        yield {
            "input": name,
            "rotation": rotation,
            "bits": bits,
            "scale": scale,
            "relative_mse": mean(by_seed),
            "spread_over_seeds": stdev(by_seed) if len(by_seed) > 1 else float("nan"),
        }


def print_table(rows: Sequence[dict[str, Any]], expected: dict[int, float], scale: str) -> None:
    print(f"\nscale={scale}" + " " * 20 + "".join(f"{bits:>7} bits" for bits in BITS))
    for name, rotation in product(INPUTS, ROTATIONS):
        errors = [
            row["relative_mse"]
            for row in rows
            if (row["input"], row["rotation"], row["scale"]) == (name, rotation, scale)
        ]
        print(f"{name:<22}{rotation:<10}" + "".join(f"{error:>12.5f}" for error in errors))
    print(f"{'Gaussian source':<32}" + "".join(f"{expected[bits]:>12.5f}" for bits in BITS))


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_first_window_options(parser)
    parser.add_argument("--seeds", type=int, default=4, help="rotations drawn of each kind")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args(argv)
    model, tokens, described = load_first_window(args)
    states = capture(model, tokens)
    head = header("eval.rotation_mse", argv, args.device)
    config = {
        **described,
        "layers": [layer.layer for layer in states],
        "key_shape": list(states[0].key.shape),
        "seeds": args.seeds,
    }
    print(json.dumps({**head["environment"], **config}, indent=1))
    layers = [inputs(layer, model) for layer in states]
    total = len(INPUTS) * len(ROTATIONS) * len(BITS) * len(SCALES)
    rows = list(tqdm(measure(layers, range(args.seeds)), total=total, unit="row", disable=None))
    head_dim = states[0].key.shape[-1]
    expected = {bits: float(get_codebook(bits, head_dim).distortion) for bits in BITS}
    write_json(args.out, {**head, "config": config, "gaussian": expected, "rows": rows})
    for scale in SCALES:
        print_table(rows, expected, scale)


if __name__ == "__main__":
    main()
