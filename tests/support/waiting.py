# SPDX-License-Identifier: Apache-2.0
"""Layers that do as where kernels run, on the CPU: plain torch computes in their place.

A single token then waits for its attention, which writes it behind the tail, as kernels would.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from torch import Tensor

from rq_hf import packed_states, sources
from rq_hf.ops import LayerView, reference
from rq_hf.ops.dispatch import MAX_QUERIES
from rq_hf.ops.encode import encode
from rq_hf.sources import ViewSource

# what attention is told beyond these is for kernels alone
_OPTIONS = set(inspect.signature(reference.attend).parameters)


@contextmanager
def kernels_by_torch() -> Iterator[None]:
    """Puts plain torch in place of kernels, for layers with `impl="triton"`."""
    with (
        patch.object(packed_states, "encode", _encode),
        patch.object(sources, "attend_with", _attend_with),
        patch.object(ViewSource, "_chooses_kernels", _chooses_kernels),
    ):
        yield


def _encode(*args: Any, impl: str) -> tuple[Tensor, Tensor]:
    return encode(*args, impl="reference")


def _chooses_kernels(source: ViewSource, query: Tensor) -> bool:
    return source.layer.config.impl == "triton" and query.shape[2] <= MAX_QUERIES


def _attend_with(
    kernels: bool, query: Tensor, view: LayerView, *, stores_newest: bool = False, **options: Any
) -> Tensor:
    if stores_newest:
        assert kernels
        _write_newest(view)
    known = {name: option for name, option in options.items() if name in _OPTIONS}
    return reference.attend(query, view, **known)


def _write_newest(view: LayerView) -> None:
    """Writes the newest token behind the tail, into the buffer that the tail is part of."""
    tail, newest = view.recent
    for rows, new in ((tail.keys, newest.keys), (tail.values, newest.values)):
        end = rows.storage_offset() + rows.shape[2] * rows.stride(2)
        rows.as_strided(new.shape, rows.stride(), end).copy_(new)
