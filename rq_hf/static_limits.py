# SPDX-License-Identifier: Apache-2.0
"""What layers refuse whose buffers keep their sizes and their places."""

from __future__ import annotations

import torch

from rq_hf.layers import RotorQuantLayer


def check_room(stored: int, new: int, room: int, name: str) -> int:
    """Returns the tokens of a sequence with the `new` ones.

    Raises:
        ValueError: They are more than there is `room` for.
    """
    if stored + new > room:
        raise ValueError(
            f"{name}: {stored} tokens and {new} new ones are more than max_cache_len = {room}; "
            "make a cache with a larger max_cache_len"
        )
    return stored + new


class FixedLayer(RotorQuantLayer):
    """A `RotorQuantLayer` that drops no tokens, keeps its batch size and does not move."""

    is_croppable = False

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refuses to change the batch size.

        Raises:
            ValueError: `repeats` is not 1.
        """
        if repeats != 1:
            raise ValueError(
                f"{self.name}: a static cache keeps its batch size; use RotorQuantCache"
            )

    def check_crop(self, tokens_to_remove: int) -> None:
        """Refuses to drop tokens.

        Raises:
            ValueError: Any but 0 tokens are to be dropped.
        """
        if int(tokens_to_remove):
            raise ValueError(
                f"{self.name}: a static cache drops no tokens: use RotorQuantCache for "
                "speculative decoding, or reset()"
            )

    def crop(self, tokens_to_remove: int) -> None:
        """Refuses to drop tokens, see `check_crop`."""
        self.check_crop(tokens_to_remove)

    def to(self, device: torch.device | str) -> None:
        """Refuses to move.

        Raises:
            ValueError: Always: compiled steps know the buffers by their addresses.
        """
        raise ValueError(f"{self.name}: the buffers of a static cache do not move; make a new one")

    def offload(self) -> None:
        """Refuses to move, see `to`."""
        self.to("cpu")
