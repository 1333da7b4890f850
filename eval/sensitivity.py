# SPDX-License-Identifier: Apache-2.0
"""Does divergence grow along a window because the cache gets worse, or the model more sensitive?

python -m eval.sensitivity --model google/gemma-3-270m --dataset wikitext --window 8192 \
    --windows 4 --noise 0.0186 --alone 5 11 17 --settings near-lossless:3 --out sensitivity.json

All by eighths of the window, in the layers that `RotorQuantCache` packs:

noise     KL from the exact model when white noise is added to the outputs of attention, in front of
          their projection: of one relative energy at every position and head. No cache takes part
errors    of keys, values and outputs of attention, squared by squared length, in the last window;
          each layer gets exact states, as in eval.fidelity
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel

from eval.capture import LayerStates, capture
from eval.fidelity import attend, relative_error, store
from eval.options import (
    add_model_options,
    add_text_options,
    describe_model,
    load_options_model,
    read_texts,
)
from eval.paired import PIECES, PairedSums
from eval.results_io import header, write_json
from eval.scoring import Reference, hidden_states
from eval.settings import Setting, parse_settings
from eval.windows import make_windows
from rq_hf import RotorQuantCache


class Noise:
    """White noise on outputs of attention, of a fixed part of each head's energy.

    Args:
        model: Its decoder's layers must have `self_attn.o_proj`, as most families' have.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._calls = 0

    @contextmanager
    def on(self, layers: Sequence[int], energy: float) -> Iterator[None]:
        """Adds noise of relative energy `energy` in these layers, in every forward within."""
        attentions = [self.model.get_decoder().layers[i].self_attn for i in layers]
        hooks = [
            attention.o_proj.register_forward_pre_hook(
                partial(self._add, head_dim=attention.head_dim, energy=energy)
            )
            for attention in attentions
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _add(
        self, module: nn.Module, args: tuple[Tensor, ...], *, head_dim: int, energy: float
    ) -> tuple[Tensor]:
        (outputs,) = args
        # a stream for every call: the next piece of a window must not see the same noise
        self._calls += 1
        stream = torch.Generator(outputs.device).manual_seed(self._calls)
        noise = torch.randn(outputs.shape, generator=stream, device=outputs.device)
        heads = outputs.unflatten(-1, (-1, head_dim))
        size = (energy * heads.square().mean(-1, keepdim=True)).sqrt()
        return ((heads + size * noise.view(heads.shape)).view(outputs.shape).to(outputs.dtype),)


@torch.no_grad()
def noise_row(
    noise: Noise, windows: Sequence[Tensor], layers: Sequence[int], energy: float, skip: int
) -> dict[str, Any]:
    """Returns the divergence by eighths of the windows with noise in these layers."""
    model, parts = noise.model, []
    for window in windows:
        tokens = window.to(model.device)
        exact = hidden_states(model, tokens, DynamicCache(config=model.config))
        with noise.on(layers, energy):
            noisy = hidden_states(model, tokens, DynamicCache(config=model.config))
        reference = Reference(model, exact[skip:-1], tokens[0, skip + 1 :])
        parts.append(PairedSums.of(reference.compare(noisy[skip:-1])))
    metrics = PairedSums.total(parts).metrics()
    kept = {name: metrics[name] for name in ("tokens", "kl_by_piece")}
    return {"layers": list(layers), "energy": energy, **kept}


@torch.no_grad()
def error_row(states: LayerStates, setting: Setting, model: PreTrainedModel) -> dict[str, Any]:
    """Returns the errors of one layer by eighths of the window."""
    key, value, output = store(states, setting.make(model.config))
    pairs = {
        "key_error": (states.key, key),
        "value_error": (states.value, value),
        "output_error": (attend(states, states.key, states.value), output),
    }
    errors = {name: _by_piece(*pair) for name, pair in pairs.items()}
    return {"setting": setting.label, "layer": states.layer, **errors}


def _by_piece(exact: Tensor, other: Tensor) -> list[float]:
    pieces = zip(exact.tensor_split(PIECES, 2), other.tensor_split(PIECES, 2), strict=True)
    return [relative_error(*piece) for piece in pieces]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_options(parser)
    add_text_options(parser)
    parser.add_argument("--window", type=int, default=8192, help="tokens of a window")
    parser.add_argument("--windows", type=int, default=4, help="how many windows")
    parser.add_argument("--skip", type=int, default=128, help="first positions, not scored")
    parser.add_argument(
        "--noise", nargs="+", type=float, default=[0.0186], help="relative energies"
    )
    parser.add_argument(
        "--alone", nargs="*", type=int, default=[], help="layers to put the first noise on alone"
    )
    parser.add_argument("--settings", nargs="*", default=[], help="see eval/settings.py")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    settings = parse_settings(args.settings, strict=True)
    texts = read_texts(args)
    model, tokenizer = load_options_model(args)
    windows = make_windows(tokenizer, texts, count=args.windows, length=args.window, bos=args.bos)
    packed = [layer.layer_idx for layer in RotorQuantCache(config=model.config).packed_layers]
    result = {
        **header("eval.sensitivity", argv, args.device),
        "config": {
            "model": describe_model(args, model),
            "texts": [text.describe() for text in texts],
            "window": args.window,
            "windows": args.windows,
            "scored": [args.skip, args.window - 1],
            "settings": {setting.label: setting.options for setting in settings},
        },
        "noise": [],
        "errors": [],
    }
    states = capture(model, windows[-1].to(args.device)) if settings else []
    result["errors"] = [error_row(layer, one, model) for one in settings for layer in states]
    noise = Noise(model)
    plan = [(packed, energy) for energy in args.noise] + [([i], args.noise[0]) for i in args.alone]
    for layers, energy in tqdm(plan, unit="noise", disable=None):
        result["noise"].append(noise_row(noise, windows, layers, energy, args.skip))
        write_json(args.out, result)
    print(json.dumps(result["noise"], indent=1))


if __name__ == "__main__":
    main()
