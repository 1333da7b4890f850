# SPDX-License-Identifier: Apache-2.0
"""What kernels note of new tokens: read without a wait, forgotten, copied and moved with them."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from torch import Tensor

from rq_hf.statistics import QueryStatistics
from rq_hf.watch import Watch

pytest.importorskip("triton")

NAN = float("nan")


def make_tokens(device: torch.device, bad: int | None) -> tuple[Tensor, Tensor]:
    key, value = torch.zeros(2, 1, 2, 8, 16, device=device)
    if bad is not None:
        value[0, 1, bad, 3] = NAN
    return key, value


def make_watch(device: torch.device, bad: int | None = 5) -> Watch:
    """A watch that was shown tokens 100 to 107."""
    watch = Watch("triton")
    assert watch.takes(device)
    watch.look(*make_tokens(device, bad), 100)
    watch.wait()
    return watch


def test_tells_what_a_kernel_has_noted(device: torch.device) -> None:
    assert make_watch(device).first == 105
    assert make_watch(device, None).first is None


def test_tokens_are_looked_at_once(device: torch.device) -> None:
    watch = Watch("triton")
    tokens = make_tokens(device, 2)
    watch.look(*tokens, 0)
    assert watch.first is None and watch.by_attention() is None and watch.device is None
    assert watch.takes(device) and watch.unseen
    number = watch.by_attention()
    assert number is not None and number.is_pinned() == (device.type == "cuda")
    watch.look(*tokens, 0)
    watch.wait()
    assert watch.first == 2 and not watch.unseen and watch.by_attention() is None
    watch.forget(0)
    watch.look(*tokens, 0)
    watch.wait()
    assert watch.first is None


def test_forgets_tokens_that_are_gone(device: torch.device) -> None:
    watch = make_watch(device)
    assert not watch.forget(106) and watch.first == 105
    assert watch.forget(105) and watch.first is None
    assert not watch.forget(0)
    watch = make_watch(device)
    watch.clear()
    assert watch.first is None and watch.device is None


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_have_a_number_of_their_own(how: str, device: torch.device) -> None:
    watch = make_watch(device)
    copies = {"deepcopy": copy.deepcopy, "pickle": lambda x: pickle.loads(pickle.dumps(x))}
    other = copies[how](watch)
    assert (other.first, other.impl, other.device) == (105, "triton", watch.device)
    watch.forget(0)
    assert other.first == 105
    assert watch.takes(device) and other.takes(device)
    mine, theirs = watch.by_attention(), other.by_attention()
    assert mine is not None and theirs is not None and mine.is_pinned() == theirs.is_pinned()
    assert mine.data_ptr() != theirs.data_ptr()
    assert copies[how](Watch("auto")).device is None


def test_goes_with_tokens_to_another_device(device: torch.device) -> None:
    watch = make_watch(device)
    watch.to(torch.device("cpu"))
    assert watch.first == 105 and watch.device == torch.device("cpu")
    unused = Watch("auto")
    unused.to(device)
    assert unused.device is None


@pytest.mark.parametrize("impl", ["reference", "auto"])
def test_takes_no_tokens_where_no_kernel_runs(impl: str) -> None:
    watch = Watch(impl)
    assert not watch.takes(torch.device("cpu")) and not watch.unseen


def test_queries_of_tokens_that_are_gone_are_forgotten() -> None:
    statistics = QueryStatistics()
    known: list[Tensor] = []
    for length in range(30):
        statistics.mark(length)
        statistics.observe(torch.full((1, 2, 1, 4), length + 1.0), 1, None)
        assert statistics.power is not None
        known.append(statistics.power)
    statistics.go_back(25)
    statistics.go_back(25)
    assert torch.equal(statistics.power, known[24])
    # a step is marked again in place of the one before
    statistics.mark(25)
    statistics.observe(torch.full((1, 2, 1, 4), NAN), 1, None)
    statistics.go_back(25)
    assert torch.equal(statistics.power, known[24])
    # nothing is marked any more, but nothing is wrong either
    statistics.go_back(3)
    assert statistics.power is not None and torch.equal(statistics.power, known[13])
    statistics.observe(torch.full((1, 2, 1, 4), NAN), 1, None)
    statistics.go_back(3)
    assert statistics.power is None


@pytest.mark.gpu
def test_memory_of_the_host_is_kept_while_a_kernel_may_write() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    tokens = make_tokens(device, 1)
    make_watch(device, 1)
    gc.collect()
    torch.cuda.synchronize()
    for _ in range(20):
        watch = Watch("triton")
        assert watch.takes(device)
        # the kernel runs when this is over
        torch.cuda._sleep(20_000_000)
        watch.look(*tokens, 0)
        del watch
        others = [torch.zeros(1, dtype=torch.int32, pin_memory=True) for _ in range(8)]
        torch.cuda.synchronize()
        assert not any(int(number) for number in others)
