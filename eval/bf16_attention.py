# SPDX-License-Identifier: Apache-2.0
"""The baselines: attention of one token over dense keys and values, by the fastest that there is.

torch's cuDNN and flash attention, and a split-K kernel (`eval.split_k`) with its layout swept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from eval.shapes import Shape
from eval.timing import Timing, buffers_for, measure

SDPA = {"cuDNN SDPA": SDPBackend.CUDNN_ATTENTION, "flash SDPA": SDPBackend.FLASH_ATTENTION}
SPLIT_K = "split-K"
BASELINES = (*SDPA, SPLIT_K)


@dataclass(frozen=True)
class Dense:
    """Buffers of keys and values to be read in turn, and a query.

    Attributes:
        query: `[B, Hq, 1, D]`.
        buffers: Keys and values `[B, Hk, N, D]`.
        scale: Factor of the inner products.
    """

    query: Tensor
    buffers: list[tuple[Tensor, Tensor]]
    scale: float

    @property
    def nbytes(self) -> int:
        """Bytes that one call has to read of keys and values."""
        return sum(tensor.nbytes for tensor in self.buffers[0])

    @cached_property
    def expected(self) -> Tensor:
        """What the first sequence's query gets of the first buffer, `[1, Hq, 1, D]`, float32."""
        keys, values = (tensor[0].float() for tensor in self.buffers[0])
        q = self.query[0].float().unflatten(0, (keys.shape[0], -1)).flatten(1, 2)
        weights = (q @ keys.transpose(1, 2) * self.scale).softmax(-1)
        return (weights @ values).flatten(0, 1)[None, :, None]


def random_query(shape: Shape, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns a query that looks at some keys far more than at others, `[B, Hq, 1, D]`."""
    size = (shape.case.batch, shape.heads.query, 1, shape.heads.dim)
    return 3 * torch.randn(size, dtype=dtype, device=device)


def random_dense(shape: Shape, query: Tensor) -> Dense:
    """Returns random keys and values, in as many buffers as keep the cache cold."""
    case, heads = shape.case, shape.heads
    size = (case.batch, heads.kv, case.context, heads.dim)
    nbytes = 2 * query.element_size() * case.batch * heads.kv * case.context * heads.dim

    def draw() -> Tensor:
        return torch.randn(size, dtype=query.dtype, device=query.device)

    buffers = [(draw(), draw()) for _ in range(buffers_for(nbytes))]
    return Dense(query, buffers, heads.dim**-0.5)


def time_baseline(name: str, dense: Dense, *, quick: bool) -> tuple[Timing, str | None]:
    """Returns the time of one call of a baseline, and its layout where one was chosen.

    Raises:
        Exception: Whatever it raises where it cannot run.
        ValueError: Its result is wrong.
    """
    device = dense.query.device
    if name in SDPA:
        with sdpa_kernel(SDPA[name]):
            _check(dense, lambda k, v: _sdpa(dense, k, v))
            return _time(dense, lambda k, v: _sdpa(dense, k, v)), None
    best: tuple[Timing, str] | None = None
    for call, layout in _split_k_calls(dense, quick):
        _check(dense, call)
        timing = _time(dense, call)
        if best is None or timing.us < best[0].us:
            best = timing, layout
    if best is None:
        raise ValueError(f"no layout of the kernel fits {device}")
    return best


def _sdpa(dense: Dense, keys: Tensor, values: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(
        dense.query, keys, values, scale=dense.scale, enable_gqa=True
    )


def _split_k_calls(dense: Dense, quick: bool) -> Iterator[tuple[Callable[..., Tensor], str]]:
    # needs triton, which not every machine has
    from triton.runtime.errors import OutOfResources

    from eval.split_k import attend, configs

    keys = dense.buffers[0][0]
    batch, heads, tokens, head_dim = keys.shape
    processors = torch.cuda.get_device_properties(keys.device).multi_processor_count
    for config in configs(batch * heads, tokens, head_dim, processors, quick=quick):

        def call(k: Tensor, v: Tensor, config=config) -> Tensor:
            return attend(dense.query, k, v, scale=dense.scale, config=config)

        try:
            call(*dense.buffers[0])
        except OutOfResources:
            # another GPU than the layouts were chosen for
            continue
        layout = f"{config.splits} splits, {config.block} tokens a step, {config.warps} warps, "
        yield call, layout + f"{config.stages} stages"


def _time(dense: Dense, call: Callable[..., Tensor]) -> Timing:
    calls = [lambda k=k, v=v: call(k, v) for k, v in dense.buffers]
    return measure(calls, dense.query.device)


def _check(dense: Dense, call: Callable[..., Tensor]) -> None:
    check_close(call(*dense.buffers[0])[:1], dense.expected)


def check_close(result: Tensor, expected: Tensor) -> float:
    """Returns |result - expected| / |expected|.

    Raises:
        ValueError: It is more than roundings to the dtype of `result` explain.
    """
    error = float((result.float() - expected).norm() / expected.norm())
    # weights and output are rounded to the dtype once each, all else is finer
    if not error <= 2 * torch.finfo(result.dtype).eps:
        raise ValueError(f"the result is wrong: it is {error:.2g} of its length off")
    return error
