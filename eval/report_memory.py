# SPDX-License-Identifier: Apache-2.0
"""How many tokens of one sequence fit beside a model's weights, computed from sizes alone.

Weights count 2 bytes a parameter, the cache what its layout takes, and `RESERVE` is left for
activations, the library and fragments. Nothing here is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from rq_hf import RotorQuantConfig
from rq_hf.quant.tiles import TileCodec

GB = 10**9
BF16_BYTES = 2
BF16_BITS = 16
RESERVE = 3 * GB // 2
CARDS = (24, 48, 80)
BITS = (16, 4, 3, 2)
_DEFAULTS = RotorQuantConfig()


@dataclass(frozen=True)
class ModelSize:
    """What memory depends on.

    Attributes:
        parameters: How many.
        layers: Layers with full attention.
        kv_heads: KV heads of each.
        head_dim: Numbers of a key.
    """

    parameters: float
    layers: int
    kv_heads: int
    head_dim: int

    @property
    def numbers_a_token(self) -> int:
        """Numbers that a token adds to the cache."""
        return 2 * self.layers * self.kv_heads * self.head_dim


MODELS = {
    "Qwen2.5-7B": ModelSize(7.62e9, 28, 4, 128),
    "Llama-3.1-8B": ModelSize(8.03e9, 32, 8, 128),
    "Qwen3-8B": ModelSize(8.19e9, 36, 8, 128),
    "Qwen2.5-14B": ModelSize(14.8e9, 48, 8, 128),
    "Qwen2.5-32B": ModelSize(32.8e9, 64, 8, 128),
}


@cache
def _layout(head_dim: int, bits: int) -> tuple[float, int]:
    """Returns bits a packed number, scales included, and tokens of a tile."""
    layout = TileCodec(head_dim, key_bits=bits, value_bits=bits).layout
    return layout.nominal_bits, layout.tile_length


def cache_bytes(model: ModelSize, tokens: int, bits: int) -> float:
    """Returns the bytes of a cache of one sequence; 16 bits is the exact one in bfloat16."""
    if bits == BF16_BITS:
        return model.numbers_a_token * BF16_BYTES * float(tokens)
    nominal, tile = _layout(model.head_dim, bits)
    # at most: sinks, the exact tail, and a tile that is not full yet
    exact = min(tokens, _DEFAULTS.sink_length + _DEFAULTS.residual_length + tile - 1)
    packed = tokens - exact
    return model.numbers_a_token * (packed * nominal / 8 + exact * BF16_BYTES)


def largest_context(model: ModelSize, memory: float, bits: int) -> int:
    """Returns how many tokens fit into so many bytes together with the weights; 0 if none."""
    room = memory - model.parameters * BF16_BYTES - RESERVE
    low, high = 0, 1 << 32
    while high - low > 1:
        middle = (low + high) // 2
        fits = cache_bytes(model, middle, bits) <= room
        low, high = (middle, high) if fits else (low, middle)
    return low


def context_rows() -> list[list[str]]:
    """Returns a table of the largest contexts, its header first."""
    header = ["model", "bits a number", *(f"{size} GB" for size in CARDS)]
    rows = [header]
    for name, model in MODELS.items():
        for bits in BITS:
            counts = [largest_context(model, size * GB, bits) for size in CARDS]
            label = "16 (bfloat16)" if bits == BF16_BITS else str(bits)
            rows.append([name, label, *(_tokens(count) for count in counts)])
    return rows


def _tokens(count: int) -> str:
    return "the weights do not fit" if count == 0 else f"{count / 1000:,.0f}k"


def plot_memory(path: Path, model: str = "Llama-3.1-8B", lengths: Sequence[int] = ()) -> None:
    """Draws weights and cache of one model against the length of one sequence."""
    size = MODELS[model]
    tokens = list(lengths) or [1 << k for k in range(12, 21)]
    figure, axes = plt.subplots(figsize=(6.5, 4.8), layout="constrained")
    for bits in BITS:
        total = [(size.parameters * BF16_BYTES + cache_bytes(size, n, bits)) / GB for n in tokens]
        label = "bfloat16" if bits == BF16_BITS else f"{bits} bits"
        axes.plot(tokens, total, marker="o", label=label, color="black" if bits == 16 else None)
    for card in CARDS:
        axes.axhline(card - RESERVE / GB, color="grey", linestyle=":")
        axes.text(tokens[0], card - RESERVE / GB, f" {card} GB card", va="bottom", fontsize=8)
    axes.set(xscale="log", xlabel="tokens of one sequence", ylabel="weights and cache, GB")
    axes.set(title=f"{model}, computed", ylim=(0, 1.25 * CARDS[-1]))
    axes.set_xticks(tokens, [f"{n // 1024}k" for n in tokens], minor=False)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=len(BITS), fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)
