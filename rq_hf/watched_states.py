# SPDX-License-Identifier: Apache-2.0
"""Whether new tokens are finite: looked at by the host at once, or left to kernels."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Protocol

from torch import Tensor
from torch.compiler import is_compiling

from rq_hf.config import RotorQuantConfig
from rq_hf.packed_states import PackedStates
from rq_hf.quant.rope import RopeTable
from rq_hf.validation import check_finite, late_error, looks_at_once
from rq_hf.watch import Watch

# up to so many new tokens are appended before attention, more are read beside the store
APPENDED_FIRST = 32


class Holder(Protocol):
    """The cache that holds a layer.

    Attributes:
        packs: Whether a layer has packed tokens in the pass under way.
    """

    packs: bool

    def before_packing(self) -> None:
        """Waits, and refuses to pack where tokens of any layer were not finite."""


class WatchedStates(PackedStates):
    """Keys and values of one layer, none of which is packed before somebody has looked at it.

    A GPU would have to be waited for in every layer of every step, so few tokens there are left to
    kernels, which note what they find.

    Attributes:
        watch: Looks after new tokens that the host does not look at.
        holder: Gives the cache, which looks at the notes of all its layers.
    """

    def __init__(self, config: RotorQuantConfig, layer_idx: int, rope: RopeTable | None) -> None:
        super().__init__(config, layer_idx, rope)
        self.watch = Watch(config.impl)
        self.holder: Callable[[], Holder | None] = lambda: None

    @abstractmethod
    def get_seq_length(self) -> int:
        """Returns the number of tokens of a sequence so far."""

    @abstractmethod
    def settle(self) -> None:
        """Stores states that wait for their attention."""

    @abstractmethod
    def crop_obstacle(self, tokens_to_remove: int) -> str | None:
        """Returns why `crop` cannot drop so many tokens; None if it can."""

    @abstractmethod
    def crop(self, tokens_to_remove: int) -> None:
        """Drops the newest tokens."""

    def check_numbers(self, key: Tensor, value: Tensor) -> None:
        """Looks for NaN and infinity, or leaves few tokens on a GPU to kernels.

        What is to be packed is looked at again, and what compiled steps stored for the first time.
        """
        tokens, store = key.shape[2], self.store
        self.watch.unseen = False
        if store is None or store.length == 0:
            check_finite(key, value, self.name)
        elif self.leaving(tokens) > 0:
            self._wait_before_packing()
            # sinks were looked at before the first tokens were packed
            stored = store.exact.view(store.sinks if store.packed_length else 0)
            end = self.get_seq_length()
            check_finite(key, value, self.name, stored=stored, end=end)
        elif tokens > APPENDED_FIRST or looks_at_once(key.device):
            check_finite(key, value, self.name, end=self.get_seq_length())
        elif not is_compiling():
            self._leave_to_kernels(key, value)

    def _wait_before_packing(self) -> None:
        """Waits for what kernels have noted, so that nothing behind it is packed."""
        if is_compiling():
            return
        holder = self.holder()
        if holder is None:
            self.wait_for_notes()
            self._refuse_noted(new_tokens=True)
        else:
            holder.before_packing()

    def _leave_to_kernels(self, key: Tensor, value: Tensor) -> None:
        """Has kernels look at few new tokens on a GPU, or waits for it where none can."""
        holder, length = self.holder(), self.get_seq_length()
        # what others have packed in this pass, tokens that are refused later would not bring back
        if (holder is not None and holder.packs) or not self.watch.takes(key.device):
            check_finite(key, value, self.name, end=length)
        elif self.preconditioner is None:
            self.statistics.mark(length)

    def look(self, key: Tensor, value: Tensor) -> None:
        """Has a kernel look at tokens that are about to be stored, if nobody has."""
        self.watch.look(key, value, self._store.dropped + self._store.length)

    def wait_for_notes(self) -> None:
        """Stores a step's token that waits for its attention, and waits for kernels so far."""
        self.settle_step()
        self.watch.wait()

    def settle_step(self) -> None:
        """Stores a step's token that waits for its attention to look at it."""
        if self.watch.unseen:
            self.settle()

    def check_steps(self) -> None:
        """Waits for the device, and looks at what kernels have noted of new tokens.

        Raises:
            ValueError: A token is not finite; it was taken back with all behind it if it can be,
                see `crop`.
        """
        self.wait_for_notes()
        self._refuse_noted(new_tokens=False)

    def refuse_noted_alone(self) -> None:
        """Tells of what kernels have noted so far, if no cache does."""
        if not is_compiling() and self.holder() is None:
            self._refuse_noted(new_tokens=True)

    def _refuse_noted(self, new_tokens: bool) -> None:
        if self.watch.first is None:
            return
        self.wait_for_notes()
        place = self.watch.first
        back = self.get_seq_length() - place
        obstacle = self.crop_obstacle(-back)
        if obstacle is None:
            self.take_back(place)
        raise late_error(self.name, place, back, obstacle, new_tokens)

    def take_back(self, length: int) -> None:
        """Drops all tokens but the first `length`, and what their queries have shown."""
        removal = length - self.get_seq_length()
        if removal < 0:
            self.crop(removal)
            self.statistics.go_back(length)
