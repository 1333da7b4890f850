# SPDX-License-Identifier: Apache-2.0
"""NaN and infinity: found before they are packed, told with a way out, and nothing is changed.

Compiled steps on a GPU leave few new tokens to be looked at when some are packed; the tests take
all devices for one in such steps. What kernels look at is in `test_noted`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from support.refusals import (
    INF,
    NAN,
    assert_holds,
    contents,
    let_few_tokens_wait,
    make_layer,
    make_states,
)
from torch import Tensor
from torch.nn import functional as F

from rq_hf import RotorQuantConfig
from rq_hf.layers import RotorQuantLayer
from rq_hf.quant.rope import RopeTable

WINDOW = 160


@pytest.fixture(autouse=True)
def waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    let_few_tokens_wait(monkeypatch)


def feed(layer: RotorQuantLayer, states: Tensor, first: int = 0) -> None:
    """Stores a prompt of `first` tokens and then the others one by one."""
    for part in states.split([first] + [1] * (states.shape[3] - first), 3):
        if part.shape[3]:
            layer.update(*part)


# tokens of the prompt, how many there are when the next tile is packed, tokens that are not finite
STEPS = [
    (300, 4 + 256 + 160, [400]),
    (300, 4 + 256 + 160, [400, 401, 415]),
    # the first tile, whose statistics and sinks are still open
    (1, 4 + 160, [2]),
    (1, 4 + 160, [3, 4, 5, 60, 61, 163]),
]


@pytest.mark.parametrize(("which", "number"), [(0, NAN), (1, -INF)])
@pytest.mark.parametrize(("prompt", "end", "bad"), STEPS)
def test_steps_are_looked_at_before_they_are_packed(
    prompt: int, end: int, bad: list[int], which: int, number: float, device: torch.device
) -> None:
    layer, expected = make_layer(), make_layer()
    states = make_states(end).to(device)
    spoilt = states.clone()
    spoilt[which, 1, 1, bad, 3] = number
    feed(layer, spoilt[:, :, :, : end - 1], prompt)
    before = contents(layer)
    stored = [index for index in bad if index < end - 1]
    back = end - 1 - stored[0]
    named = ", ".join(map(str, stored[:4])) + (" and 1 more" if len(stored) > 4 else "")
    message = f"layer 5: keys or values of tokens? {named} are .* crop\\(-{back}\\), or reset"
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            layer.update(*spoilt[:, :, :, end - 1 :])
        assert_holds(layer, before)
    layer.crop(-back)
    feed(layer, states[:, :, :, stored[0] :])
    feed(expected, states, prompt)
    assert expected.store.packed_length in (128, 384)
    assert_holds(layer, contents(expected))


def test_the_token_that_fills_the_tail_is_looked_at_too(device: torch.device) -> None:
    layer = make_layer()
    states = make_states(420).to(device)
    feed(layer, states[:, :, :, :419], 300)
    before = contents(layer)
    spoilt = states[:, :, :, 419:].clone()
    spoilt[0, 1, 0, 0, :2] = INF
    with pytest.raises(ValueError, match=r"2 of 256 new key numbers .* in token 419, and were not"):
        layer.update(*spoilt)
    assert_holds(layer, before)
    layer.update(*states[:, :, :, 419:])
    assert layer.store.packed_length == 384


def test_a_long_part_finds_what_steps_before_it_left(device: torch.device) -> None:
    layer = make_layer()
    states = make_states(310).to(device)
    states[1, 0, 0, 305, 0] = NAN
    feed(layer, states, 300)
    before = contents(layer)
    with pytest.raises(ValueError, match=r"values of token 305 are .* crop\(-5\)"):
        layer.update(*make_states(200, 1).to(device))
    assert_holds(layer, before)
    layer.crop(-5)
    layer.update(*make_states(200, 1).to(device))
    assert layer.get_seq_length() == 505 and bool(layer.values.isfinite().all())


def test_sinks_that_a_crop_opened_are_looked_at_again(device: torch.device) -> None:
    layer = make_layer()
    states = make_states(300).to(device)
    feed(layer, states, 300)
    layer.crop(-298)
    spoilt = states[:, :, :, 2:164].clone()
    spoilt[0, 0, 0, 1] = NAN
    with pytest.raises(ValueError, match=r"values of token 3 are .* crop\(-160\)"):
        feed(layer, spoilt)
    assert layer.get_seq_length() == 163


@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize(("which", "number"), [(0, NAN), (1, INF)])
@pytest.mark.parametrize("tokens", [2, 33, 300])
def test_a_prompt_is_looked_at_first(
    tokens: int, which: int, number: float, window: int | None, device: torch.device
) -> None:
    layer = make_layer(window)
    spoilt = make_states(tokens).to(device)
    spoilt[which, 1, 1, 1, 3] = number
    name = ("key", "value")[which]
    message = f"layer 5: 1 of {2 * 2 * tokens * 64} new {name} numbers are .* in token 1, and"
    with pytest.raises(ValueError, match=message):
        layer.update(*spoilt)
    assert layer.get_seq_length() == 0
    # nothing was made for the prompt that was refused
    layer.update(*make_states(300)[:, :1].bfloat16().to(device))
    assert layer.keys.shape[0] == 1


@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("tokens", [33, 200])
def test_a_long_part_is_looked_at_first(
    tokens: int, window: int | None, device: torch.device
) -> None:
    layer = make_layer(window)
    layer.update(*make_states(300).to(device))
    before = contents(layer)
    spoilt = make_states(tokens, 1).to(device)
    spoilt[1, 0, 0, 7] = NAN
    with pytest.raises(ValueError, match=r"64 of .* new value numbers are .* in token 307, and"):
        layer.update(*spoilt)
    assert_holds(layer, before)


def test_a_window_finds_steps_before_they_are_packed(device: torch.device) -> None:
    layer, expected = make_layer(200), make_layer(200)
    states = make_states(416).to(device)
    spoilt = states.clone()
    spoilt[0, :, :, 410] = NAN
    with pytest.raises(ValueError, match=r"values of token 410 are .* crop\(-5\), or reset"):
        feed(layer, spoilt, 300)
    layer.crop(-5)
    feed(layer, states[:, :, :, 410:])
    feed(expected, states, 300)
    assert_holds(layer, contents(expected))
    assert layer.store.dropped == 128


def test_where_a_window_has_moved_on_reset_is_left(device: torch.device) -> None:
    layer, expected = make_layer(WINDOW), make_layer(WINDOW)
    states = make_states(416).to(device)
    spoilt = states.clone()
    spoilt[0, :, :, 410] = NAN
    with pytest.raises(ValueError, match=r"values of token 410 are .* crop\(-5\), or reset"):
        feed(layer, spoilt, 300)
    with pytest.raises(ValueError, match=r"or reset\(\) the cache"):
        layer.crop(-5)
    layer.reset()
    for each in (layer, expected):
        feed(each, states, 300)
    assert_holds(layer, contents(expected))


def test_what_was_moved_unseen_is_found_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_layer()
    states = make_states(420)
    states[0, 0, 0, 350] = NAN
    feed(layer, states[:, :, :, :380], 300)
    monkeypatch.undo()
    layer.to("cpu")
    with pytest.raises(ValueError, match=r"token 350 are .* crop\(-69\)"):
        feed(layer, states[:, :, :, 380:])


def test_the_cpu_looks_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    layer = make_layer()
    layer.update(*make_states(300))
    spoilt = make_states(1, 1)
    spoilt[0, 1, 0] = NAN
    with pytest.raises(ValueError, match=r"64 of 256 new key numbers are .* in token 300, and"):
        layer.update(*spoilt)


@contextmanager
def counted_waits() -> Iterator[list[str]]:
    """Yields a list of what waited for the GPU, complete behind the block."""
    waits: list[str] = []
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield waits
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits += [str(x.message) for x in caught if "synchronizing" in str(x.message)]


@pytest.mark.gpu
def test_how_often_a_gpu_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    rope = RopeTable(100.0 ** -torch.linspace(0, 1, 32), interleaved=False)
    states = make_states(1000).cuda().bfloat16()
    query = torch.randn(2, 4, 700, 64, device="cuda", dtype=torch.bfloat16)

    def update(layer: RotorQuantLayer, first: int, last: int) -> None:
        key, value = layer.update(*states[:, :, :, first:last])
        if first == 0:
            F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    def feed_all(layer: RotorQuantLayer) -> list[int]:
        counts = []
        # 700 tokens leave 184 exact ones: 72 more fill a tile
        for first, last in ((0, 700), (700, 701), (701, 771), (771, 772), (772, 773)):
            with counted_waits() as waits:
                update(layer, first, last)
            counts.append(len(waits))
        assert layer.store.packed_length == 640
        return counts

    # the first one makes tables
    feed_all(RotorQuantLayer(RotorQuantConfig(), rope=rope))
    # the prompt is looked at, and asked once more whether it has a mean before RoPE; kernels that
    # look at steps are waited for before a tile is packed
    assert feed_all(RotorQuantLayer(RotorQuantConfig(), rope=rope)) == [2, 0, 1, 2, 0]
