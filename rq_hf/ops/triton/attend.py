# SPDX-License-Identifier: Apache-2.0
"""Attention of a few queries to a layer's view by kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from rq_hf.ops.dispatch import MAX_QUERIES
from rq_hf.ops.triton.attend_launch import Call, Inputs
from rq_hf.ops.triton.launching import launch, on_device
from rq_hf.ops.triton.replay import Replay, recall, remember, signature
from rq_hf.ops.view import ExactRows, LayerView

# pieces of recent tokens: the tail, and tokens that are not stored yet
_PIECES = 2


def obstacle(query: Tensor, view: LayerView) -> str | None:
    """Why the kernels cannot compute this on the device at hand; None if they can."""
    layout = view.codec.layout
    if query.shape[2] > MAX_QUERIES:
        return f"it takes at most {MAX_QUERIES} queries, got {query.shape[2]}"
    if torch.float64 in (query.dtype, view.sinks.keys.dtype):
        return "it computes in float32, got float64"
    if layout.head_dim > 256:
        return f"head_dim must be at most 256, got {layout.head_dim}"
    if len(view.recent) > _PIECES:
        return f"it reads at most {_PIECES} pieces of recent tokens, got {len(view.recent)}"
    if query.device.type == "cpu" and layout.order == "fragment":
        return "tiles in fragment order need a GPU: the interpreter has no tensor cores"
    if layout.sketch_size not in (0, layout.head_dim):
        return f"a sketch must have head_dim rows, got {layout.sketch_size}"
    return None


# launches are not for torch.compile to look into
@torch.compiler.disable
def attend(
    query: Tensor,
    view: LayerView,
    *,
    scale: float,
    mask: Tensor | None = None,
    causal: bool = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    stores_newest: bool = False,
    not_finite: Tensor | None = None,
) -> Tensor:
    """See `rq_hf.ops.attend`. Products of codes are exact, sums are float32."""
    inputs = _inputs(query, view, scale, mask, causal, softcap, sinks, stores_newest, not_finite)
    with on_device(query.device):
        key = signature(inputs)
        known = recall(key)
        if known is not None:
            return known.run(inputs)
        call = Call(inputs)
        launches = call.launches()
        # nothing in the interpreter
        launched = [each for each in map(launch, launches) if each is not None]
        if launched:
            remember(key, Replay(call, launches, launched))
        return call.out


def _inputs(
    query: Tensor,
    view: LayerView,
    scale: float,
    mask: Tensor | None,
    causal: bool,
    softcap: float | None,
    sinks: Tensor | None,
    stores_newest: bool,
    not_finite: Tensor | None,
) -> Inputs:
    if query.stride(3) != 1:
        query = query.contiguous()
    if mask is not None:
        mask = mask.expand(*query.shape[:3], mask.shape[3])
    if sinks is not None:
        sinks = sinks.reshape(-1)
    pieces = [_dense_rows(rows) for rows in (view.sinks, *view.recent)]
    # what is written behind a copy is lost
    assert not stores_newest or pieces[1] is view.recent[0]
    causal = causal and query.shape[2] > 1
    stored = (stores_newest, not_finite)
    return Inputs(query, view, pieces, mask, sinks, scale, causal, softcap, *stored)


def _dense_rows(rows: ExactRows) -> ExactRows:
    """The same rows, with keys and values in one layout and tokens side by side."""
    tokens, dim = rows.keys.shape[2:]
    batch, head, token, number = rows.keys.stride()
    # of one token, nobody asks where the next lies
    alone = tokens == 1 and rows.values.stride() == (batch, head, rows.values.stride(2), number)
    if number == 1 and (alone or (token == dim and rows.values.stride() == rows.keys.stride())):
        return rows
    return ExactRows(rows.keys.contiguous(), rows.values.contiguous(), rows.first, rows.shift)
