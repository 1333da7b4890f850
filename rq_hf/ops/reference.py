# SPDX-License-Identifier: Apache-2.0
"""Attention over a layer's view in plain torch: the oracle of every kernel.

With a packed key k = mean_n + R^T y / D and a packed value v = mean + R^T z (mean_n, D and mean of
`quant.preconditioning`, R a rotation, y and z decoded rotated coordinates):

    q . k = (R (q / D)) . y + q . mean_n
    sum_n p_n v_n = R^T (sum_n p_n z_n) + mean sum_n p_n

so the query is rotated once, values are summed in rotated coordinates, and the sum is turned back.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rq_hf.ops.masks import KeyMask
from rq_hf.ops.softmax import OnlineSoftmax, grouped_product
from rq_hf.ops.view import ExactRows, LayerView

# scores and decoded numbers in work at once
_NUMBERS_AT_ONCE = 1 << 23

EXACT, PACKED = 0, 1


def attend(
    query: Tensor,
    view: LayerView,
    *,
    scale: float,
    mask: Tensor | None = None,
    causal: bool = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """See `rq_hf.ops.attend`. Computed in float32, or in float64 for float64 queries."""
    heads, queries, head_dim = query.shape[1:]
    kv_heads = view.records.shape[1]
    dtype = torch.promote_types(query.dtype, torch.float32)
    q = query.to(dtype).unflatten(1, (kv_heads, heads // kv_heads)) * scale
    hide = KeyMask(mask, causal, queries, view.length, kv_heads)
    state = OnlineSoftmax(q, kinds=2, head_dim=head_dim)
    if sinks is not None:
        logits = sinks.to(dtype).reshape(1, kv_heads, -1, 1)
        state.add_logit(logits.expand(q.shape[:-1]))
    for rows, hidden_before in _exact_rows(view, q):
        scores = grouped_product(q, rows.keys.to(dtype).transpose(2, 3))
        scores = hide.apply(_cap(scores, softcap), rows.index, hidden_before)
        state.add(scores, rows.values.to(dtype), EXACT)
    rotated = _rotate_query(q, view)
    for start, stop in _tile_ranges(view, q):
        scores, values, index = _packed_scores(q, rotated, view, start, stop)
        scores = hide.apply(_cap(scores, softcap), index, view.hidden_before)
        state.add(scores, values, PACKED)
    sums, shares = state.finish()
    out = sums[EXACT] + _restore_values(sums[PACKED], shares[PACKED], view)
    return out.flatten(1, 2).to(query.dtype)


def scores(query: Tensor, view: LayerView, *, scale: float = 1.0) -> Tensor:
    """Returns all inner products `[B, Hq, L, N]` in the order of the sequence, float32."""
    kv_heads = view.records.shape[1]
    q = query.float().unflatten(1, (kv_heads, -1)) * scale
    rotated = _rotate_query(q, view)
    parts = [grouped_product(q, view.sinks.keys.float().transpose(2, 3))]
    parts += [_packed_scores(q, rotated, view, *tiles)[0] for tiles in _tile_ranges(view, q)]
    parts += [grouped_product(q, x.keys.float().transpose(2, 3)) for x in view.recent]
    result = torch.cat(parts, -1)
    if view.padding is not None:
        at = view.sinks.index[:, None, None, None].expand_as(parts[0])
        result.scatter_(-1, at, parts[0])
    return result.flatten(1, 2)


def mix(weights: Tensor, view: LayerView) -> Tensor:
    """Returns values weighted by `weights` `[B, Hq, L, N]`, `[B, Hq, L, D]`, float32."""
    kv_heads = view.records.shape[1]
    p = weights.float().unflatten(1, (kv_heads, -1))
    count = view.sinks.keys.shape[2]
    sink_weights = p[..., :count]
    if view.padding is not None:
        sink_index = view.sinks.index[:, None, None, None]
        sink_weights = p.gather(-1, sink_index.expand(*p.shape[:-1], count))
        index = torch.arange(view.length, device=p.device)
        hidden = index < (view.padding + count)[:, None]
        p = p.masked_fill(hidden[:, None, None, None], 0.0)
    exact = grouped_product(sink_weights, view.sinks.values.float())
    summed = torch.zeros_like(exact)
    at = count
    for start, stop in _tile_ranges(view, p):
        _, values = _decode_rotated(view, start, stop, torch.float32)
        part = p[..., at : at + values.shape[2]]
        summed += grouped_product(part, values)
        at += values.shape[2]
    share = p[..., count:at].sum(-1)
    for rows in view.recent:
        part = p[..., at : at + rows.keys.shape[2]]
        exact += grouped_product(part, rows.values.float())
        at += rows.keys.shape[2]
    return (exact + _restore_values(summed, share, view)).flatten(1, 2)


def _exact_rows(view: LayerView, q: Tensor) -> Iterator[tuple[ExactRows, Tensor | None]]:
    """Yields exact rows, so many at a time that their scores fit the working memory."""
    batch, heads, group, queries = q.shape[:4]
    step = max(1, _NUMBERS_AT_ONCE // (batch * heads * group * queries))
    for rows in view.sinks.spans(step):
        yield rows, None
    for piece in view.recent:
        for rows in piece.spans(step):
            yield rows, view.hidden_before


def _cap(scores: Tensor, softcap: float | None) -> Tensor:
    return scores if softcap is None else softcap * (scores / softcap).tanh()


def _tile_ranges(view: LayerView, q: Tensor) -> Iterator[tuple[int, int]]:
    """Yields ranges of tiles whose scores and decoded numbers fit the working memory."""
    tiles, length = view.records.shape[2], view.codec.layout.tile_length
    batch, heads, group, queries = q.shape[:4]
    a_tile = length * batch * heads * (group * queries + 4 * view.codec.head_dim)
    step = max(1, _NUMBERS_AT_ONCE // a_tile)
    for start in range(0, tiles, step):
        yield start, min(start + step, tiles)


def _rotate_query(q: Tensor, view: LayerView) -> Tensor:
    """Returns R (q / D), `[B, Hk, G, L, D]`."""
    if view.preconditioner is not None:
        q = q / view.preconditioner.balance[:, :, None, None]
    return view.codec.key_quantizer.rotation.forward(q)


def _packed_scores(
    q: Tensor, rotated: Tensor, view: LayerView, start: int, stop: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns scores `[B, Hk, G, L, n]`, rotated values `[B, Hk, n, D]` and index `[n]`."""
    keys, values = _decode_rotated(view, start, stop, q.dtype)
    result = grouped_product(rotated, keys.transpose(2, 3))
    first = view.packed_start + start * view.codec.layout.tile_length
    if view.preconditioner is not None:
        result += view.preconditioner.mean_scores(q, view.offset + first, keys.shape[2])
    index = torch.arange(first, first + keys.shape[2], device=q.device)
    return result, values, index


def _decode_rotated(
    view: LayerView, start: int, stop: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Returns rotated coordinates of keys and values of the used tokens of some tiles."""
    length = view.codec.layout.tile_length
    count = min(stop * length, view.packed_length) - start * length
    records, scales = view.records[:, :, start:stop], view.scales[:, :, start:stop]
    keys, values = view.codec.decode(records, scales, dtype=dtype, rotated=True)
    return keys[:, :, :count], values[:, :, :count]


def _restore_values(summed: Tensor, share: Tensor, view: LayerView) -> Tensor:
    """Returns R^T of summed rotated values plus the mean value's share."""
    out = view.codec.value_quantizer.rotation.inverse(summed)
    if view.preconditioner is not None:
        mean = view.preconditioner.value_mean[:, :, None, None]
        out = out + mean * share[..., None]
    return out
