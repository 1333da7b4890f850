# SPDX-License-Identifier: Apache-2.0
"""The first token that is not finite is noted, by kernel and by plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rq_hf.ops.look import LAST, note_not_finite, number_of, place_in

NAN, INF = float("nan"), float("inf")
FIRST = 1000
IMPLS = ["reference", "triton"]

# which of keys and values, batch, head, token, dimension, number
Spot = tuple[int, int, int, int, int, float]
SPOTS: dict[str, tuple[list[Spot], int | None]] = {
    "all finite": ([], None),
    "key alone": ([(0, 0, 0, 4, 0, NAN)], 4),
    "value alone": ([(1, 1, 2, 0, 47, INF)], 0),
    "the last number": ([(1, 1, 2, -1, 47, -INF)], -1),
    "the first of several": (
        [(0, 0, 0, 10, 1, NAN), (1, 1, 1, 3, 9, INF), (0, 1, 2, 7, 2, NAN)],
        3,
    ),
    "the first of a head": ([(0, 1, 0, 6, 1, NAN), (0, 1, 0, 5, 40, NAN)], 5),
}


@pytest.fixture(params=IMPLS)
def impl(request: pytest.FixtureRequest) -> str:
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


def make_states(tokens: int, dim: int = 48, dtype: torch.dtype = torch.float32) -> Tensor:
    """Keys and values `[2, 2, 3, tokens, dim]`, laid out as projections give them."""
    generator = torch.Generator().manual_seed(tokens)
    states = torch.randn(2, 2, tokens, 3, dim, generator=generator).to(dtype)
    # the largest finite numbers are nothing to note
    states[:, :, -1] = torch.finfo(dtype).max
    return states.transpose(2, 3)


def note(states: Tensor, impl: str, before: int | None = None, first: int = FIRST) -> int | None:
    number = torch.tensor([number_of(before)], dtype=torch.int32, device=states.device)
    note_not_finite(states[0], states[1], first, number, impl=impl)
    return place_in(int(number))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", SPOTS)
def test_notes_the_first_token_of_all_heads(
    case: str, dtype: torch.dtype, impl: str, device: torch.device
) -> None:
    states = make_states(17, dtype=dtype).to(device)
    spots, expected = SPOTS[case]
    for *place, number in spots:
        states[tuple(place)] = number
    wanted = None if expected is None else FIRST + expected % 17
    assert note(states, impl) == wanted


@pytest.mark.parametrize("tokens", [1, 8, 9, 32])
@pytest.mark.parametrize("dim", [16, 80])
def test_every_place_is_looked_at(tokens: int, dim: int, impl: str, device: torch.device) -> None:
    for token in {0, tokens // 2, tokens - 1}:
        states = make_states(tokens, dim).to(device)
        states[token % 2, 1, 1, token, dim - 1] = NAN
        assert note(states, impl) == FIRST + token
        # numbers of a token need not lie side by side
        apart = states.transpose(3, 4).contiguous().transpose(3, 4)
        assert note(apart, impl) == FIRST + token


def test_the_earliest_token_ever_noted_stays(impl: str, device: torch.device) -> None:
    states = make_states(5).to(device)
    assert note(states, impl, before=7) == 7
    states[0, 0, 0, 2, 0] = NAN
    assert note(states, impl, before=7) == 7
    assert note(states, impl, before=FIRST + 4) == FIRST + 2
    assert note(states, impl, first=0) == 2


def test_numbers_stand_for_places() -> None:
    assert number_of(None) == 0 and place_in(0) is None
    for place in (0, 1, 10**6, LAST - 1):
        assert place_in(number_of(place)) == place
        assert 0 < number_of(place) < 2**31
    assert number_of(3) > number_of(4)


def test_a_kernel_that_cannot_run_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="needs tensors on an NVIDIA GPU, got cpu"):
        note(make_states(1), "triton")
    assert note(make_states(1), "auto") is None


@pytest.mark.gpu
def test_a_gpu_writes_to_memory_of_the_host() -> None:
    states = make_states(20).cuda()
    number = torch.zeros(1, dtype=torch.int32, pin_memory=True)
    note_not_finite(states[0], states[1], FIRST, number)
    torch.cuda.synchronize()
    assert int(number) == 0
    # many programs, one memory
    wide = states.repeat(1, 64, 1, 1, 1)
    for batch in range(128):
        wide[batch % 2, batch, batch % 3, 19 - batch % 17, 5] = NAN
    for _ in range(3):
        note_not_finite(wide[0], wide[1], FIRST, number)
    torch.cuda.synchronize()
    assert place_in(int(number)) == FIRST + 3
