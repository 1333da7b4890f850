# SPDX-License-Identifier: Apache-2.0
"""Hidden states of a window read through a cache, and how its predictions compare.

Logits of a window take a gigabyte and more (vocabularies reach 262,144 words), hidden states a few
megabytes. So the decoder runs once and the rest of the model, from hidden states to logits, on a
few positions at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

# logits in work at once
LOGITS_AT_ONCE = 1 << 25
# log-probabilities of the unquantised model kept for the next setting, bytes
KEPT_BYTES = 2 << 30
# tokens of one forward with an exact cache
LONGEST_FORWARD = 4096


class Scores(NamedTuple):
    """One number a scored position, `[n]`; logarithms are natural.

    Attributes:
        reference_nll: -log p(next token) of the unquantised model.
        nll: -log p(next token) with the setting.
        kl: KL(unquantised || setting) of the whole prediction.
        agrees: Whether both put the same token first, bool.
    """

    reference_nll: Tensor
    nll: Tensor
    kl: Tensor
    agrees: Tensor


def hidden_states(
    model: PreTrainedModel,
    tokens: Tensor,
    cache: Cache,
    spans: Sequence[tuple[int, int]] | None = None,
) -> Tensor:
    """Runs the decoder over tokens `[1, n]`, one forward a span, and returns `[n, hidden]`."""
    decoder = model.get_decoder()
    spans = [(0, tokens.shape[1])] if spans is None else spans
    # an exact cache gives the same in pieces; the host's float32 attention holds all scores at once
    pieces = _cut(spans) if isinstance(cache, DynamicCache) else spans
    parts = [
        decoder(tokens[:, start:stop], past_key_values=cache, use_cache=True).last_hidden_state
        for start, stop in pieces
    ]
    return torch.cat(parts, 1)[0]


def _cut(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    return [
        (at, min(at + LONGEST_FORWARD, stop))
        for start, stop in spans
        for at in range(start, stop, LONGEST_FORWARD)
    ]


def logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Returns the model's own logits `[n, vocabulary]` for hidden states `[n, hidden]`.

    The model's forward runs with a decoder that hands out `hidden`, so whatever the model does to
    its logits (a soft cap, a scale) is done here.
    """
    with _hands_out(model.get_decoder(), hidden[None]):
        tokens = torch.zeros(1, hidden.shape[0], dtype=torch.long, device=hidden.device)
        return model(tokens, use_cache=False).logits[0]


class _Output(BaseModelOutputWithPast):
    """A decoder's output; what else some families read of theirs is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@contextmanager
def _hands_out(decoder: torch.nn.Module, hidden: Tensor) -> Iterator[None]:
    decoder.forward = lambda *args, **kwargs: _Output(last_hidden_state=hidden)
    try:
        yield
    finally:
        # the method of the class shows again
        del decoder.forward


def _log_probabilities(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    return logits(model, hidden).float().log_softmax(-1)


class Reference:
    """Predictions of the unquantised model for some positions of a window.

    Args:
        model: The model.
        hidden: Hidden states of the scored positions `[n, hidden]`.
        targets: The tokens that follow them `[n]`.
    """

    def __init__(self, model: PreTrainedModel, hidden: Tensor, targets: Tensor) -> None:
        self.model = model
        self.hidden = hidden
        self.targets = targets
        self._kept: dict[int, Tensor] = {}
        self._kept_bytes = 0

    def _spans(self) -> Iterator[slice]:
        vocabulary = self.model.get_output_embeddings().weight.shape[0]
        step = max(1, LOGITS_AT_ONCE // vocabulary)
        return (slice(at, at + step) for at in range(0, len(self.targets), step))

    def _predict(self, rows: slice) -> Tensor:
        """Returns log-probabilities of some positions, kept while there is room."""
        if rows.start in self._kept:
            return self._kept[rows.start]
        result = _log_probabilities(self.model, self.hidden[rows])
        if self._kept_bytes + result.nbytes <= KEPT_BYTES:
            self._kept[rows.start] = result
            self._kept_bytes += result.nbytes
        return result

    def compare(self, hidden: Tensor) -> Scores:
        """Scores the predictions from other hidden states of the same positions."""
        parts = []
        for rows in self._spans():
            target = self.targets[rows, None]
            reference = self._predict(rows)
            mine = _log_probabilities(self.model, hidden[rows])
            parts.append(
                Scores(
                    reference_nll=-reference.gather(1, target)[:, 0],
                    nll=-mine.gather(1, target)[:, 0],
                    kl=(reference.exp() * (reference - mine)).sum(-1),
                    agrees=reference.argmax(-1) == mine.argmax(-1),
                )
            )
        return Scores(*(torch.cat(column) for column in zip(*parts, strict=True)))
