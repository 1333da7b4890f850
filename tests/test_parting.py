# SPDX-License-Identifier: Apache-2.0
"""Where two runs part, and what is told of it."""

from __future__ import annotations

import pytest
import torch

from eval.parting import Decoded, Parting, find_parting

# margins 2, 1, 0.25, 4
FIRST = torch.tensor([[3.0, 1.0, 0.0], [0.0, 2.0, 1.0], [1.0, 0.0, 1.25], [0.0, 0.0, 4.0]])


def parting_of(first: torch.Tensor, second: torch.Tensor) -> Parting:
    """Compares runs that took the best of these logits."""
    return find_parting(*(Decoded(logits.argmax(-1), logits) for logits in (first, second)))


def test_equal_runs_do_not_part() -> None:
    parting = parting_of(FIRST, FIRST.clone())
    assert parting.agreeing == 4
    assert parting.margin is None and parting.difference_there is None
    assert parting.difference_before == parting.smaller_margins == 0


def test_a_tie_decided_otherwise_is_told_from_a_fault() -> None:
    second = FIRST.clone()
    second[0, 2] += 0.125
    second[2, 0] += 0.5
    # behind the parting nothing counts
    second[3] = 100.0
    parting = parting_of(FIRST, second)
    assert parting.agreeing == 2
    assert parting.margin == 0.25
    assert parting.difference_before == 0.125
    assert parting.difference_there == 0.5
    assert str(parting).endswith("then the best two are 0.25 apart, logits within 0.5")
    assert parting.smaller_margins == 0


def test_steps_that_could_have_gone_otherwise_are_counted() -> None:
    second = FIRST.clone()
    second[1, 0] -= 0.5
    parting = parting_of(FIRST, second)
    assert (parting.agreeing, parting.difference_before) == (4, 0.5)
    # margins 1 and 0.25 are within twice 0.5
    assert parting.smaller_margins == 2


def test_runs_may_part_at_once() -> None:
    parting = parting_of(FIRST, -FIRST)
    assert (parting.agreeing, parting.margin, parting.difference_before) == (0, 2, 0)
    assert parting.difference_there == 6


def test_of_equal_logits_any_may_be_taken() -> None:
    logits = torch.tensor([[1.0, 1.0], [2.0, 2.0]])
    runs = [Decoded(torch.tensor(tokens), logits) for tokens in ([0, 0], [0, 1])]
    parting = find_parting(*runs)
    assert (parting.agreeing, parting.margin, parting.difference_there) == (1, 0, 0)


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="must match"):
        parting_of(FIRST, FIRST[:2])
