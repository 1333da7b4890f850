# SPDX-License-Identifier: Apache-2.0
"""Layers that can be pickled, as those of the host can."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

from rq_hf.packed_states import make_codec
from rq_hf.watched_states import WatchedStates


class PickledLayer(WatchedStates):
    """A layer whose pickle holds its states, statistics and settings, and no other object.

    The codec is made anew from the settings, and shared with all other layers; so a pickle is for
    the version that wrote it, other than the files of `RotorQuantCache.save`. The cache makes
    itself known at the next update. What was in force within a pass is not kept.

    Attributes:
        gives_handles: Tells whether the model's attention takes handles. Read from a pickle, which
            knows no model, it gives the answer of the time of writing.
    """

    gives_handles: Callable[[], bool]

    def __getstate__(self) -> dict[str, Any]:
        if self.store is not None:
            # each view would be written with all of its buffer
            self.store.exact._head = self.store.tiles._head = None
        return self.__dict__ | {
            "codec": None if self.codec is None else self.codec.head_dim,
            "gives_handles": self.gives_handles(),
            "holder": None,
            "_before": None,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        head_dim, answer = state["codec"], state["gives_handles"]
        self.codec = None if head_dim is None else make_codec(self.config, head_dim)
        self.gives_handles = partial(bool, answer)
        self.holder = _no_cache

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # a copy stays with the model, and keeps what a pickle leaves out
        again = type(self).__new__(type(self))
        memo[id(self)] = again
        again.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return again


def _no_cache() -> None:
    """What gives a layer's cache where it is in none."""
