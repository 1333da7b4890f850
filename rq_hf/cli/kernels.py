# SPDX-License-Identifier: Apache-2.0
"""Which kernels would run on a device, setting by setting, and why not."""

from __future__ import annotations

import torch
from torch import Tensor

from rq_hf.cache import RotorQuantCache
from rq_hf.layers import RotorQuantLayer
from rq_hf.ops import encode as encoding
from rq_hf.ops.attend import obstacle

HEAD_DIMS = (64, 128, 256)
SETTINGS = ((2, "mse"), (3, "mse"), (3, "prod"), (4, "mse"), (8, "mse"))
KV_HEADS, QUERY_HEADS = 2, 4
# sinks, two tiles of any size and the exact tail
TOKENS = 4 + 2 * 128 + 128
RUNS = "kernels"


def report(device: torch.device) -> list[str]:
    """Returns lines that say what attention and packing are computed by.

    Nothing is computed by kernels here, as each would be compiled first, which takes seconds.
    """
    reasons = {
        (dim, *setting): obstacles(dim, *setting, device)
        for dim in HEAD_DIMS
        for setting in SETTINGS
    }
    return [
        *_lines("attention of a decode step", {key: pair[0] for key, pair in reasons.items()}),
        *_lines("packing", {key: pair[1] for key, pair in reasons.items()}),
    ]


def obstacles(
    head_dim: int, bits: int, codec: str, device: torch.device
) -> tuple[str | None, str | None]:
    """Returns why kernels cannot attend, and cannot pack, with such a setting; None: they can."""
    dtype = usual_dtype(device)
    # whoever fills a layer, kernels are asked about its form alone
    layer = filled_layer(head_dim, device, dtype, nbits=bits, key_codec=codec, impl="reference")
    return obstacles_of(layer)


def obstacles_of(layer: RotorQuantLayer) -> tuple[str | None, str | None]:
    """Returns why kernels cannot attend to a filled layer, and cannot pack for it."""
    view = layer.view()
    assert layer.codec is not None and layer.preconditioner is not None
    head_dim, some = layer.codec.head_dim, view.sinks.keys
    query = some.new_zeros(1, QUERY_HEADS, 1, head_dim)
    tile = some.new_zeros(1, KV_HEADS, layer.codec.layout.tile_length, head_dim)
    return obstacle(query, view), encoding.why_not(layer.codec, layer.preconditioner, tile, tile)


def usual_dtype(device: torch.device) -> torch.dtype:
    """Returns the dtype that models have on such a device."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def filled_layer(
    head_dim: int, device: torch.device, dtype: torch.dtype, **settings: object
) -> RotorQuantLayer:
    """Returns a layer that holds random keys and values, most of them packed."""
    cache = RotorQuantCache(**settings)  # type: ignore[arg-type]
    cache.update(*random_states(head_dim, device, dtype), 0)
    (layer,) = cache.packed_layers
    layer.settle()
    return layer


def random_states(head_dim: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns keys and values `[1, Hk, N, D]`, the same at every call."""
    stream = torch.Generator().manual_seed(0)
    states = torch.randn(2, 1, KV_HEADS, TOKENS, head_dim, generator=stream)
    key, value = states.to(device, dtype)
    return key, value


def _lines(what: str, reasons: dict[tuple[int, int, str], str | None]) -> list[str]:
    """Returns one line for each reason, with what it holds for; one line if that is everything."""
    by_reason: dict[str, list[str]] = {}
    for (dim, bits, codec), reason in reasons.items():
        text = RUNS if reason is None else f"plain torch: {reason}"
        by_reason.setdefault(text, []).append(f"{bits}{'p' if codec == 'prod' else ''}/{dim}")
    if len(by_reason) == 1:
        return [f"{what}: {next(iter(by_reason))}"]
    heading = f"{what} (bits/head_dim; p: key_codec=prod):"
    return [heading, *(f"  {text}: {' '.join(of)}" for text, of in by_reason.items())]
