# SPDX-License-Identifier: Apache-2.0
"""Launch of the append kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rq_hf.ops.triton.append import append_kernel
from rq_hf.ops.triton.arguments import Statistics
from rq_hf.ops.triton.encode_launch import codec_arguments, rows_of
from rq_hf.ops.triton.launching import on_device
from rq_hf.ops.triton.means import Pairing, pairs, turns
from rq_hf.ops.triton.tables import keep_for_graphs
from rq_hf.quant.preconditioning import Preconditioner
from rq_hf.quant.tiles import TileCodec


# launches are not for torch.compile to look into
@torch.compiler.disable
def append_tokens(
    codec: TileCodec,
    preconditioner: Preconditioner,
    key: Tensor,
    value: Tensor,
    exact_keys: Tensor,
    exact_values: Tensor,
    records: Tensor,
    scales: Tensor,
    length: Tensor,
    base: Tensor,
    counts: Tensor,
    *,
    sink_length: int,
    residual_length: int,
) -> None:
    """See `rq_hf.ops.append`."""
    arguments, options = append_arguments(
        codec,
        preconditioner,
        key,
        value,
        exact_keys,
        exact_values,
        records,
        scales,
        sink_length=sink_length,
        residual_length=residual_length,
    )
    places = {"LENGTH": length, "BASE": base, "COUNTS": counts}
    with on_device(key.device):
        append_kernel[(key.shape[0] * key.shape[1], 2)](**arguments, **places, **options)


def append_arguments(
    codec: TileCodec,
    preconditioner: Preconditioner,
    key: Tensor,
    value: Tensor,
    exact_keys: Tensor,
    exact_values: Tensor,
    records: Tensor,
    scales: Tensor,
    *,
    sink_length: int,
    residual_length: int,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns arguments of `append_kernel`, without the numbers on the device, and options."""
    device, pre = key.device, preconditioner
    batch, heads, rows, _ = exact_keys.shape
    pairing = Pairing.of(pre.rope)
    constants, options = codec_arguments(codec, exact_values.dtype, pairing, device)
    padded = constants["shape"].padded.value
    angles = turns(pre.rope, sink_length, records.shape[2], codec, device)
    dims = pairs(pairing, codec.head_dim, device)[0]
    # where they come from, those asked for last push out the others
    keep_for_graphs((angles, dims, constants), device)
    arguments = {
        "new_keys": rows_of(key),
        "new_values": rows_of(value),
        "EXACT_KEYS": exact_keys,
        "EXACT_VALUES": exact_values,
        "statistics": Statistics(pre.pre_mean, pre.post_mean, pre.balance, pre.value_mean),
        "turns": angles,
        "PAIRS": dims,
        "RECORDS": records,
        "SCALES": scales,
        "SCRATCH": torch.empty(batch * heads, 2, 8 * padded, device=device),
        "heads": heads,
        "tiles": records.shape[2],
        "rows": rows,
        "sinks": sink_length,
        "kept": residual_length,
        **constants,
    }
    return arguments, options
