# SPDX-License-Identifier: Apache-2.0
"""Error of keys, values, attention logits and attention outputs, layer by layer.

python -m eval.fidelity --model Qwen/Qwen2.5-0.5B --dataset wikitext \
    --settings near-lossless:3 turboquant:3 --out fidelity.json

Each layer gets the exact queries, keys and values of the unquantised model, so errors do not pile
up from layer to layer. Every query reads decoded keys and values of all tokens, its own included.
The file is written after every setting.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from eval.capture import LayerStates, capture
from eval.options import add_first_window_options, load_first_window
from eval.results_io import header, write_json
from eval.settings import Setting, parse_settings, reason_to_skip

METRICS = ("key_error", "key_error_centred", "value_error", "logit_error", "output_error")
# logits in work at once
LOGITS_AT_ONCE = 1 << 25


def attend(states: LayerStates, key: Tensor, value: Tensor) -> Tensor:
    """Returns causal attention `[1, Hq, n, D]` of the layer's queries."""
    grouped = states.query.shape[1] != states.key.shape[1]
    return F.scaled_dot_product_attention(
        states.query, key, value, is_causal=True, scale=states.scaling, enable_gqa=grouped
    )


def store(states: LayerStates, cache: Cache) -> tuple[Tensor, Tensor, Tensor]:
    """Returns keys and values as `cache` gives them back, and attention from them."""
    output = attend(states, *cache.update(states.key, states.value, states.layer))
    layer = cache.layers[states.layer]
    return layer.keys, layer.values, output


def relative_error(exact: Tensor, other: Tensor, centre: Tensor | float = 0.0) -> float:
    """Returns |exact - other|^2 / |exact - centre|^2 over all elements."""
    error = (exact.double() - other.double()).square().sum()
    return float(error / (exact.double() - centre).square().sum())


def logit_error(states: LayerStates, key: Tensor) -> float:
    """Returns the root mean square error of the logits that softmax feels.

    What a query's logits have in common cancels in its softmax, so the mean error of each query
    over the keys that it sees is taken off first.
    """
    heads, tokens = states.query.shape[1], states.key.shape[2]
    difference = (key - states.key).repeat_interleave(heads // states.key.shape[1], 1).float()
    index = torch.arange(tokens, device=key.device)
    total = 0.0
    for rows in index.split(max(1, LOGITS_AT_ONCE // (heads * tokens))):
        error = states.query[:, :, rows].float() @ difference.transpose(2, 3) * states.scaling
        visible = index <= rows[:, None]
        seen = visible.sum(-1, keepdim=True)
        average = (error * visible).sum(-1, keepdim=True) / seen
        total += float(((error - average) * visible).square().sum())
    return (total / (heads * tokens * (tokens + 1) / 2)) ** 0.5


@torch.no_grad()
def measure(states: LayerStates, setting: Setting, config: PreTrainedConfig) -> dict[str, float]:
    """Returns the metrics of one layer."""
    key, value, output = store(states, setting.make(config))
    return {
        "layer": states.layer,
        "key_error": relative_error(states.key, key),
        "key_error_centred": relative_error(states.key, key, states.key.double().mean(2, True)),
        "value_error": relative_error(states.value, value),
        "logit_error": logit_error(states, key),
        "output_error": relative_error(attend(states, states.key, states.value), output),
    }


def summarise(label: str, layers: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Returns mean and median over layers of each metric."""
    columns = {name: [layer[name] for layer in layers] for name in METRICS}
    return {
        "setting": label,
        "mean": {name: mean(values) for name, values in columns.items()},
        "median": {name: median(values) for name, values in columns.items()},
        "layers": layers,
    }


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    print("median over layers" + " " * 10 + "".join(f"{name:>19}" for name in METRICS))
    for row in rows:
        print(f"{row['setting']:<28}" + "".join(f"{row['median'][n]:>19.5f}" for n in METRICS))


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_first_window_options(parser)
    parser.add_argument("--settings", nargs="+", required=True, help="see eval/settings.py")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args(argv)
    settings = parse_settings(args.settings, strict=True)
    model, tokens, described = load_first_window(args)
    head = header("eval.fidelity", argv, args.device)
    config = {
        **described,
        "settings": {setting.label: setting.options for setting in settings},
    }
    print(json.dumps({**head["environment"], "model": config["model"]}, indent=1))
    layers = capture(model, tokens)
    rows = []
    for setting in tqdm(settings, unit="setting", disable=None):
        reason = reason_to_skip(setting, model.config, strict=True)
        if reason is not None:
            print(f"{setting.label} is left out: {reason}")
            continue
        results = [measure(states, setting, model.config) for states in layers]
        rows.append(summarise(setting.label, results))
        write_json(args.out, {**head, "config": config, "rows": rows})
    print_table(rows)


if __name__ == "__main__":
    main()
