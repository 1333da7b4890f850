# SPDX-License-Identifier: Apache-2.0
"""Attention from packed bytes: the public function."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from rq_hf.ops import reference
from rq_hf.ops.dispatch import device_obstacle, use_triton
from rq_hf.ops.view import LayerView
from rq_hf.quant.precision import no_autocast


def attend(
    query: Tensor,
    view: LayerView,
    *,
    scale: float,
    mask: Tensor | None = None,
    causal: bool = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Returns softmax(scale q k^T) v over all tokens of a layer, `[B, Hq, L, D]`, query's dtype.

    Args:
        query: `[B, Hq, L, D]`, Hq a multiple of the layer's Hk, not rotated.
        view: The layer's keys and values, N tokens; with `counts`, so many as these say.
        scale: Factor of the inner products.
        mask: `[B | 1, Hq | 1, L | 1, >= N]`, bool (True: visible) or additive float; None: all
            visible. A row with everything hidden gives 0.
        causal: The queries are the newest L tokens and see no later ones. Independent of `mask`.
        softcap: Scores become `softcap * tanh(scores / softcap)` before masking.
        sinks: One logit a query head, `[Hq]`, that takes weight and has no value (gpt-oss).
        impl: "auto" (kernels where they can run: few queries on a GPU), "reference" or "triton".

    Raises:
        ValueError: Shapes do not match, or the kernels were asked for and cannot run.
    """
    _check(query, view, mask, sinks)
    kernels = chooses_triton(query, view, impl)
    return _attend(kernels, query, view, scale, mask, causal, softcap, sinks)


def attend_with(
    kernels: bool,
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
    """See `attend`: for callers who know from `chooses_triton` whether `kernels` run.

    Args:
        stores_newest: The last of two pieces of recent rows is a single token, and the rows of the
            first are part of a buffer with room for it: kernels, which read it anyway, write it
            there, behind them.
        not_finite: Where they then note that it is NaN or infinite, int32, one number, see
            `rq_hf.ops.look`; None: nowhere.
    """
    _check(query, view, mask, sinks)
    assert (kernels or not stores_newest) and (stores_newest or not_finite is None)
    stored = (stores_newest, not_finite)
    return _attend(kernels, query, view, scale, mask, causal, softcap, sinks, *stored)


def _attend(
    kernels: bool,
    query: Tensor,
    view: LayerView,
    scale: float,
    mask: Tensor | None,
    causal: bool,
    softcap: float | None,
    sinks: Tensor | None,
    stores_newest: bool = False,
    not_finite: Tensor | None = None,
) -> Tensor:
    run: Callable[..., Tensor] = reference.attend
    if kernels:
        from rq_hf.ops.triton.attend import attend as by_kernels

        run = partial(by_kernels, stores_newest=stores_newest, not_finite=not_finite)
    # which tokens are the newest is known to the host alone
    if view.counts is not None and (not kernels or (causal and query.shape[2] > 1)):
        view = view.counted()
    with no_autocast(query.device):
        return run(
            query,
            view,
            scale=scale,
            mask=mask,
            causal=causal,
            softcap=softcap,
            sinks=sinks,
        )


def chooses_triton(query: Tensor, view: LayerView, impl: str = "auto") -> bool:
    """Tells whether `attend` would run kernels; raises as `attend` would."""
    return use_triton(impl, obstacle(query, view), query.device)


def obstacle(query: Tensor, view: LayerView) -> str | None:
    """Why the kernels cannot compute this; None if they can."""
    device = device_obstacle(query.device)
    if device is not None:
        return device
    from rq_hf.ops.triton.attend import obstacle as of_kernels

    return of_kernels(query, view)


def _check(query: Tensor, view: LayerView, mask: Tensor | None, sinks: Tensor | None) -> None:
    batch, kv_heads, _, head_dim = view.sinks.keys.shape
    if query.dim() != 4 or query.shape[0] != batch or query.shape[3] != head_dim:
        raise ValueError(
            f"query must be [{batch}, heads, queries, {head_dim}], got {list(query.shape)}"
        )
    _, heads, queries, _ = query.shape
    if heads % kv_heads:
        raise ValueError(f"query heads must be a multiple of {kv_heads} KV heads, got {heads}")
    # of buffers of a fixed size, not all need be in use
    tokens = view.length if view.counts is None else 1
    if mask is not None and not _mask_fits(mask, (batch, heads, queries), tokens):
        raise ValueError(
            f"mask must be [{batch} or 1, {heads} or 1, {queries} or 1, at least {tokens}], "
            f"got {list(mask.shape)}"
        )
    if sinks is not None and sinks.numel() != heads:
        raise ValueError(f"sinks must hold one logit for each of {heads} heads, got {sinks.shape}")


def _mask_fits(mask: Tensor, rows: tuple[int, int, int], length: int) -> bool:
    fits = mask.dim() == 4 and mask.shape[3] >= length
    return fits and all(n in (1, full) for n, full in zip(mask.shape, rows, strict=False))
