# SPDX-License-Identifier: Apache-2.0
"""Query statistics and the padding that masks or weights show."""

import pytest
import torch

from rq_hf import statistics as statistics_module
from rq_hf.statistics import QueryStatistics, _leading, padding_of_mask, padding_of_weights


def causal_mask(padding: list[int], tokens: int = 9, window: int = 9) -> torch.Tensor:
    """Boolean `[B, 1, t, t]`: causal within a window, left padding hidden."""
    mask = torch.ones(tokens, tokens, dtype=torch.bool)
    mask = mask.tril() & mask.triu(1 - window)
    columns = torch.arange(tokens) >= torch.tensor(padding)[:, None]
    return mask & columns[:, None, None]


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("window", [9, 2])
@pytest.mark.parametrize("padding", [[3, 0], [8, 2], [1, 1]])
def test_padding_is_what_no_query_sees(padding: list[int], window: int, additive: bool) -> None:
    mask = causal_mask(padding, window=window)
    if additive:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    assert padding_of_mask(mask, 0).tolist() == padding


def test_no_padding_is_none() -> None:
    assert padding_of_mask(None, 0) is None
    assert padding_of_mask(causal_mask([0, 0]), 0) is None
    assert padding_of_mask(causal_mask([0, 0], window=2), 0) is None
    # biases are not hidden columns
    assert padding_of_mask(-1e4 * torch.ones(1, 1, 5, 5), 0) is None


@pytest.mark.parametrize("additive", [False, True])
def test_a_token_that_others_see_is_no_padding(additive: bool) -> None:
    mask = causal_mask([4, 0, 2])
    # a later query sees the second token, of the last sequence another the first one
    mask[0, :, 7, 1], mask[2, :, 1, 0] = True, True
    if additive:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    assert padding_of_mask(mask, 0).tolist() == [1, 0, 0]
    # nor one that one head alone sees
    heads = causal_mask([4, 0, 2]).repeat(1, 2, 1, 1)
    heads[0, 1, 8, 2] = True
    assert padding_of_mask(heads, 0).tolist() == [2, 0, 2]


def test_a_mask_is_looked_at_once_unless_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[torch.Tensor] = []
    monkeypatch.setattr(
        statistics_module,
        "_leading",
        lambda hidden, do=_leading: looked.append(hidden) or do(hidden),
    )
    mask = causal_mask([3, 0])
    for _ in range(2):
        assert padding_of_mask(mask, 0).tolist() == [3, 0]
    # the diagonal, and columns in question
    assert len(looked) == 2
    # an equal one may change later
    assert padding_of_mask(mask.clone(), 0).tolist() == [3, 0]
    mask[0, :, :, 3] = False
    assert padding_of_mask(mask, 0).tolist() == [4, 0]
    assert padding_of_mask(mask[:, :, 3:], 3).tolist() == [1, 0]
    with torch.inference_mode():
        mask = causal_mask([2, 0])
        assert padding_of_mask(mask, 0).tolist() == [2, 0]
        mask[0, :, :, 2] = False
        assert padding_of_mask(mask, 0).tolist() == [3, 0]


def test_padding_adds_up_over_chunks() -> None:
    statistics = QueryStatistics()
    whole = causal_mask([7, 2])
    for start, stop in ((0, 4), (4, 6), (6, 9)):
        chunk = whole[:, :, start:stop, :stop]
        statistics.extend_padding(padding_of_mask(chunk, start), start)
    assert statistics.padding.tolist() == [7, 2]


@pytest.mark.parametrize("window", [9, 2])
def test_weights_show_the_same_padding(window: int) -> None:
    mask = causal_mask([4, 0], window=window)
    scores = torch.randn(2, 3, 9, 9).masked_fill(~mask, torch.finfo(torch.float32).min)
    assert padding_of_weights(scores.softmax(-1)).tolist() == [4, 0]
    assert padding_of_weights(scores[1:].softmax(-1)) is None
    assert padding_of_weights(torch.ones(2, 3, 1, 1)) is None


def test_power_is_the_mean_square_over_valid_queries_and_the_group() -> None:
    statistics = QueryStatistics()
    assert statistics.power is None
    first, second = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 1, 8)
    valid = torch.ones(2, 5, dtype=torch.bool)
    valid[0, :3] = False
    statistics.observe(first.masked_fill(~valid[:, None, :, None], 1e4), 2, valid)
    statistics.observe(second, 2, None)
    for row, start in ((0, 3), (1, 0)):
        queries = torch.cat((first[row, :, start:], second[row]), 1)
        wanted = queries.double().square().unflatten(0, (2, 2)).mean((1, 2)).float()
        torch.testing.assert_close(statistics.power[row], wanted)


def test_map_reaches_every_tensor() -> None:
    statistics = QueryStatistics()
    statistics.map(lambda t: t[[1]])
    statistics.observe(torch.randn(2, 4, 5, 8), 2, None)
    statistics.padding = torch.tensor([3, 0])
    power = statistics.power
    statistics.map(lambda t: t[[1, 1, 0]])
    assert torch.equal(statistics.power, power[[1, 1, 0]])
    assert statistics.padding.tolist() == [0, 0, 3]
