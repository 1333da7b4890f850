# SPDX-License-Identifier: Apache-2.0
"""Sources of several tokens that tell their static layer when attention refuses them."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from rq_hf.sources import PromptSource, ViewSource


class Keeper(Protocol):
    """A static layer, as handles know it."""

    def count(self, door: str) -> None:
        """Notes which way attention was computed."""

    def check_usable(self) -> None:
        """Refuses what would go on with a cache that must be reset, see `refused`."""

    def refused(self, error: Exception, tokens: int) -> None:
        """Tells that attention of the newest `tokens` tokens has failed."""


class StaticPromptSource(PromptSource):
    """A prompt in a static layer."""

    layer: Any

    def sdpa(self, query: Tensor, **options: Any) -> Tensor | None:
        """Returns attention for queries `[B, Hq, L, D]`."""
        self.layer.check_usable()
        try:
            return super().sdpa(query, **options)
        except Exception as error:
            self.layer.refused(error, self.shape[2])
            raise


class StaticViewSource(ViewSource):
    """Several tokens behind others in a static layer."""

    layer: Any

    def attend(self, query: Tensor, **options: Any) -> Tensor:
        """Returns attention from the packed store."""
        self.layer.check_usable()
        try:
            return super().attend(query, **options)
        except Exception as error:
            self.layer.refused(error, self.new_tokens)
            raise
