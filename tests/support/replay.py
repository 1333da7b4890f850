# SPDX-License-Identifier: Apache-2.0
"""A dense twin that reads what the packed layers of another run held, decoded.

A packed run is recorded: what each update of a packed layer stands for, as dense tensors. The
same calls of the model are then made with a cache that hands these tensors out, so that the
host's own attention reads the very numbers that were read packed. No rounding to codes happens
twice, and whatever differs is a mistake, not a quantiser's choice.

The twin also keeps every token exactly, in the host's own class, and compares: what was recorded
must be these tokens, in this order, up to the error of the codes.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar
from unittest.mock import patch

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from rq_hf.handle import Handle
from rq_hf.layers import RotorQuantLayer
from rq_hf.sliding import RotorQuantSlidingLayer
from rq_hf.sources import PromptSource, ViewSource

Result = TypeVar("Result")


class Recording:
    """What the updates of packed layers stood for, in the order of the calls."""

    def __init__(self) -> None:
        self.states: deque[tuple[Tensor, Tensor]] = deque()

    def __deepcopy__(self, memo: Any) -> Recording:
        """Copies of a cache take part in the same run."""
        return self


@contextmanager
def recorded() -> Iterator[Recording]:
    """Records the updates of all packed layers within the context."""
    recording = Recording()
    update = RotorQuantLayer.update

    def recording_update(layer: RotorQuantLayer, *args: Any, **kwargs: Any) -> Any:
        key, value = update(layer, *args, **kwargs)
        # at once: rows that a crop frees are written to later
        recording.states.append(_dense(key, value))
        return key, value

    with patch.object(RotorQuantLayer, "update", recording_update):
        yield recording


def _dense(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    source = key.source if isinstance(key, Handle) else None
    if isinstance(source, ViewSource):
        # past the handle, which would remember that it was decoded
        return source.view.dense()
    if isinstance(source, PromptSource):
        return source.key.detach().clone(), source.value.detach().clone()
    return key.detach().clone(), value.detach().clone()


class ReplayLayer(DynamicLayer):
    """Dense rows, of which attention reads the recorded ones.

    Args:
        recording: Of a run with the same calls.
        tolerance: Allowed relative error of a recorded tensor, as a whole.
    """

    def __init__(self, recording: Recording, tolerance: float) -> None:
        super().__init__()
        self.recording = recording
        self.tolerance = tolerance

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Returns the recorded keys and values `[B, Hk, n, D]`."""
        exact = super().update(key_states, value_states)
        return _replay(self.recording, exact, self.tolerance)


class ReplaySlidingLayer(DynamicSlidingWindowLayer):
    """The same, for the host's own window: of the recorded rows it hands out the newest.

    Args:
        recording: Of a run with the same calls.
        tolerance: As for `ReplayLayer`.
        sliding_window: The window.
    """

    def __init__(self, recording: Recording, tolerance: float, sliding_window: int) -> None:
        super().__init__(sliding_window)
        self.recording = recording
        self.tolerance = tolerance

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Returns the recorded keys and values in the window, `[B, Hk, n, D]`."""
        exact = super().update(key_states, value_states)
        return _replay(self.recording, exact, self.tolerance)


def _replay(
    recording: Recording, exact: tuple[Tensor, Tensor], tolerance: float
) -> tuple[Tensor, Tensor]:
    """Returns the newest of the next recorded rows, as many as there are exact ones."""
    key, value = exact
    decoded = [x[:, :, -key.shape[2] :] for x in recording.states.popleft()]
    for mine, theirs in zip(exact, decoded, strict=True):
        assert mine.shape == theirs.shape
        assert _relative_error(theirs, mine) < tolerance
    return decoded[0].to(key.dtype), decoded[1].to(value.dtype)


def _relative_error(x: Tensor, exact: Tensor) -> float:
    return float((x - exact).detach().float().norm() / exact.detach().float().norm())


def make_replay(cache: Cache, recording: Recording, *, tolerance: float = 0.35) -> Cache:
    """Returns a twin of an empty `cache`: its packed layers replay, others are of the same kind."""
    if not cache.layers:
        return Cache(layer_class_to_replicate=partial(ReplayLayer, recording, tolerance))
    return Cache(layers=[_twin(layer, recording, tolerance) for layer in cache.layers])


def _twin(layer: Any, recording: Recording, tolerance: float) -> Any:
    if isinstance(layer, RotorQuantSlidingLayer):
        return ReplaySlidingLayer(recording, tolerance, layer.sliding_window)
    if isinstance(layer, RotorQuantLayer):
        return ReplayLayer(recording, tolerance)
    return copy.deepcopy(layer)


def run_with_twin(cache: Cache, flow: Callable[[Cache], Result]) -> tuple[Result, Result]:
    """Returns what a flow gives with an empty packed cache, and what with its twin."""
    with recorded() as recording:
        twin = make_replay(cache, recording)
        mine = flow(cache)
    theirs = flow(twin)
    assert not recording.states
    return mine, theirs
