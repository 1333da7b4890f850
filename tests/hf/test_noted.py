# SPDX-License-Identifier: Apache-2.0
"""Steps that kernels look at: told late and taken back out of all layers, or a reset is asked for.

Without a GPU the tests take the CPU for one, whose kernels Triton interprets.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from support.host_layers import assert_same_host_layers
from support.models import make_model, make_tokens
from support.refusals import INF, NAN, assert_holds, contents
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache, cache_utils

from rq_hf import RotorQuantCache, RotorQuantConfig, watched_states
from rq_hf.layers import RotorQuantLayer
from rq_hf.watch import Watch

pytest.importorskip("triton")

# tiles in plain order: the interpreter runs them
HEAD_DIM, KV_HEADS, LAYERS = 16, 1, 3
SETTINGS: dict[str, Any] = {"nbits": 3, "residual_length": 8, "sink_length": 4, "impl": "triton"}
# tokens of the prompt, of which the first are packed
PROMPT = 160
# steps until the next tile is packed
LEFT = 4 + 2 * 128 + 8 - PROMPT
ROOM = 340


@pytest.fixture(autouse=True)
def as_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens are left to kernels."""
    monkeypatch.setattr(watched_states, "looks_at_once", lambda device: False)


class Late:
    """Lets the host see what kernels have noted only after a wait, or when `arrived` is set."""

    def __init__(self) -> None:
        self.arrived = False
        self.waits = 0


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Late:
    state = Late()
    seen: Callable[[Watch], int | None] = Watch.first.fget  # type: ignore[attr-defined]

    def wait(watch: Watch) -> None:
        state.arrived = True
        state.waits += 1

    monkeypatch.setattr(Watch, "wait", wait)
    first = property(lambda watch: seen(watch) if state.arrived else None)
    monkeypatch.setattr(Watch, "first", first)
    return state


def make_states(seed: int = 0) -> Tensor:
    """Keys, values and queries of all layers, `[layers, 4, 1, heads, tokens, D]`, heads paired."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(LAYERS, 4, 1, KV_HEADS, ROOM, HEAD_DIM, generator=generator)


def make_cache(**settings: Any) -> RotorQuantCache:
    model = make_model("llama", head_dim=HEAD_DIM, num_hidden_layers=LAYERS)
    return RotorQuantCache(config=model.config, **(SETTINGS | settings))


def run(
    cache: Cache, states: Tensor, first: int, last: int, layers: range = range(LAYERS)
) -> list[Tensor]:
    """One pass: new states of each layer are stored, and attended to."""
    results = []
    for i in layers:
        key, value, *queries = states[i][:, :, :, first:last]
        key, value = cache.update(key, value, i)
        query = torch.cat(queries, 1)
        options = {"is_causal": first == 0} if last - first > 1 else {}
        results.append(
            F.scaled_dot_product_attention(query, key, value, enable_gqa=True, **options)
        )
    return results


def spoil(
    states: Tensor, token: int, layer: int = 1, which: int = 0, number: float = NAN
) -> Tensor:
    spoilt = states.clone()
    spoilt[layer, which, 0, 0, token, 7] = number
    return spoilt


def held(cache: RotorQuantCache) -> list[list[Any]]:
    """Everything that a cache holds, and what it knows of queries."""
    found = []
    for layer in cache.packed_layers:
        seen = layer.statistics
        known = [x.clone() for x in (seen.total, seen.count) if x is not None]
        found.append([*contents(layer), *known])
    return found


def assert_same(mine: list[list[Any]], theirs: list[list[Any]]) -> None:
    for one, other in zip(mine, theirs, strict=True):
        assert len(one) == len(other) and all(map(torch.equal, one, other))


def assert_goes_on(cache: RotorQuantCache, fresh: RotorQuantCache, states: Tensor, at: int) -> None:
    """Generation goes on as if nothing had been, over the packing of tiles."""
    for first, last in ((at, at + 1), (at + 1, at + 140)):
        for mine, theirs in zip(
            run(cache, states, first, last), run(fresh, states, first, last), strict=True
        ):
            assert torch.equal(mine, theirs) and bool(mine.isfinite().all())
    assert_same(held(cache), held(fresh))
    assert min(layer.store.packed_length for layer in cache.packed_layers) >= 128


@pytest.mark.parametrize(
    ("layer", "which", "number", "path", "prompt", "tokens"),
    [
        (0, 0, NAN, "auto", PROMPT, 1),
        (1, 1, INF, "auto", PROMPT, 5),
        (2, 0, -INF, "dense", PROMPT, 1),
        # open statistics
        (1, 1, NAN, "auto", 20, 1),
        (2, 0, NAN, "auto", 20, 5),
        (0, 1, INF, "dense", 20, 1),
    ],
)
def test_a_bad_step_is_told_by_the_next_pass_and_taken_back(
    layer: int, which: int, number: float, path: str, prompt: int, tokens: int
) -> None:
    cache, fresh = make_cache(path=path), make_cache(path=path)
    states = make_states()
    for each in (cache, fresh):
        run(each, states, 0, prompt)
        run(each, states, prompt, prompt + 1)
    before = held(cache)
    bad = prompt + tokens
    spoilt = spoil(states, bad, layer, which, number)
    # queries of the bad token are of no use either
    spoilt[:, 2:, :, :, bad] = NAN
    run(cache, spoilt, prompt + 1, prompt + 1 + tokens)
    assert cache.get_seq_length() == prompt + 1 + tokens
    message = f"layer {layer}: keys or values of token {bad} are NaN .* as it was before: it was"
    with pytest.raises(ValueError, match=message + r" taken back\. The new tokens were not stored"):
        run(cache, states, prompt + 1 + tokens, prompt + 2 + tokens)
    assert {x.get_seq_length() for x in cache.packed_layers} == {bad}
    if tokens == 1:
        assert_same(held(cache), before)
        assert_goes_on(cache, fresh, states, bad)
    else:
        cache.crop(-(tokens - 1))
        assert_same(held(cache), before)


@pytest.mark.parametrize("prompt", [PROMPT, 20])
def test_what_is_known_late_takes_all_steps_since_back(late: Late, prompt: int) -> None:
    cache, fresh = make_cache(), make_cache()
    states = make_states()
    for each in (cache, fresh):
        run(each, states, 0, prompt)
    before = held(cache)
    spoilt = spoil(spoil(states, prompt, 1), prompt, 2)
    run(cache, spoilt, prompt, prompt + 1)
    waits = late.waits
    for i in (1, 2):
        run(cache, spoil(states, prompt + i, 0), prompt + i, prompt + i + 1)
    assert late.waits == waits
    late.arrived = True
    message = f"layer 1: .* token {prompt} are .*: the last 3 tokens were taken back"
    with pytest.raises(ValueError, match=message):
        run(cache, states, prompt + 3, prompt + 4)
    assert_same(held(cache), before)
    assert_goes_on(cache, fresh, states, prompt)


# all layers pack together; the second one packs tiles of half the size
@pytest.mark.parametrize(
    ("settings", "spoilt_layer"),
    [({}, 2), ({"layer_bits": {1: 4}}, 0), ({"layer_bits": {1: 4}}, 2)],
    ids=["alike", "mixed, before", "mixed, behind"],
)
def test_nothing_is_packed_behind_a_bad_token(
    late: Late, settings: dict[str, Any], spoilt_layer: int
) -> None:
    cache, fresh = make_cache(**settings), make_cache(**settings)
    states = make_states()
    # with this token a tile is full
    last = PROMPT + (LEFT if not settings else LEFT - 64) - 1
    for each in (cache, fresh):
        run(each, states, 0, PROMPT)
        run(each, states, PROMPT, last - 2)
    before = held(cache)
    late.arrived = False
    run(cache, spoil(states, last - 2, spoilt_layer), last - 2, last - 1)
    run(cache, states, last - 1, last)
    packed = [layer.store.packed_length for layer in cache.packed_layers]
    with pytest.raises(ValueError, match=f"layer {spoilt_layer}: .* token {last - 2} are .* taken"):
        run(cache, states, last, last + 1)
    assert_same(held(cache), before)
    assert [layer.store.packed_length for layer in cache.packed_layers] == packed
    for each in (cache, fresh):
        run(each, states, last - 2, last + 1)
    assert_same(held(cache), held(fresh))
    assert [layer.store.packed_length for layer in cache.packed_layers] != packed


def test_behind_a_layer_that_packs_tokens_are_looked_at_at_once(late: Late) -> None:
    cache = make_cache(layer_bits={0: 4, 1: 4})
    states = make_states()
    run(cache, states, 0, PROMPT)
    last = PROMPT + LEFT - 64 - 1
    run(cache, states, PROMPT, last)
    before = held(cache)
    # the last layer has nothing to pack in this pass
    with pytest.raises(ValueError, match=r"layer 2: 1 of 16 new key numbers .* were not stored"):
        run(cache, spoil(states, last, 2), last, last + 1)
    assert_same(held(cache), before)
    run(cache, states, last, last + 1)
    packed = [layer.store.packed_length for layer in cache.packed_layers]
    assert packed[0] == packed[1] > packed[2]


def test_good_steps_wait_for_nothing(late: Late) -> None:
    cache = make_cache()
    states = make_states()
    run(cache, states, 0, PROMPT)
    for first in range(PROMPT, PROMPT + 3):
        run(cache, states, first, first + 1)
    run(cache, states, PROMPT + 3, PROMPT + 6)
    assert late.waits == 0
    assert all(layer.watch.device is not None for layer in cache.packed_layers)


def test_a_crop_forgets_what_it_drops(late: Late) -> None:
    cache, fresh = make_cache(), make_cache()
    states = make_states()
    for each in (cache, fresh):
        run(each, states, 0, PROMPT)
    spoilt = spoil(states, PROMPT)
    run(cache, spoilt, PROMPT, PROMPT + 1), run(cache, states, PROMPT + 1, PROMPT + 2)
    assert not late.arrived
    cache.crop(-2)
    assert_goes_on(cache, fresh, states, PROMPT)
    # a token that stays is told of still
    at = cache.get_seq_length()
    late.arrived = False
    run(cache, spoil(states, at), at, at + 1), run(cache, states, at + 1, at + 2)
    cache.crop(-1)
    with pytest.raises(ValueError, match=f"token {at} are"):
        cache.check_steps()
    assert cache.get_seq_length() == at


def test_a_crop_forgets_queries_of_a_bad_token() -> None:
    cache = make_cache()
    states = make_states()
    run(cache, states, 0, 20)
    before = held(cache)[1]
    spoilt = spoil(states, 20)
    spoilt[1, 2:, :, :, 20] = NAN
    run(cache, spoilt, 20, 21)
    assert not bool(cache.packed_layers[1].statistics.total.isfinite().all())
    cache.crop(-1)
    assert_same([held(cache)[1]], [before])


@pytest.mark.parametrize("keep_statistics", [False, True])
def test_a_reset_forgets_everything(keep_statistics: bool) -> None:
    cache = make_cache()
    states = make_states()
    run(cache, states, 0, PROMPT)
    run(cache, spoil(states, PROMPT), PROMPT, PROMPT + 1)
    cache.reset(keep_statistics)
    run(cache, states, 0, PROMPT)
    cache.check_steps()
    assert cache.get_seq_length() == PROMPT


def test_a_copy_tells_for_itself() -> None:
    cache = make_cache()
    states = make_states()
    run(cache, states, 0, PROMPT)
    before = held(cache)
    run(cache, spoil(states, PROMPT), PROMPT, PROMPT + 1)
    other = copy.deepcopy(cache)
    for each in (cache, other):
        with pytest.raises(ValueError, match=f"layer 1: .* token {PROMPT} are"):
            run(each, states, PROMPT + 1, PROMPT + 2)
        assert_same(held(each), before)
    run(other, spoil(states, PROMPT), PROMPT, PROMPT + 1)
    run(cache, states, PROMPT, PROMPT + 1)
    cache.check_steps()


def test_check_steps_tells_of_the_newest_token_and_of_one_that_waits() -> None:
    cache = make_cache()
    states = make_states()
    run(cache, states, 0, PROMPT)
    cache.check_steps()
    before = held(cache)
    message = r"layer 2: .* taken back\. Look at the model's inputs"
    run(cache, spoil(states, PROMPT, 2, 1), PROMPT, PROMPT + 1)
    with pytest.raises(ValueError, match=message):
        cache.check_steps()
    assert_same(held(cache), before)
    for i in range(LAYERS):
        # its attention never comes
        cache.update(*spoil(states, PROMPT, 2, 1)[i, :2, :, :, PROMPT : PROMPT + 1], i)
    assert cache.packed_layers[2]._pending is not None
    with pytest.raises(ValueError, match=message):
        cache.check_steps()
    assert_same(held(cache), before)


def test_a_prompt_waits_on_through_check_steps() -> None:
    cache = make_cache()
    cache.update(*make_states()[0, :2, :, :, :PROMPT], 0)
    cache.check_steps()
    assert cache.packed_layers[0]._pending is not None


def test_a_bad_cache_is_not_saved(late: Late, tmp_path: Path) -> None:
    cache = make_cache()
    states, path = make_states(), tmp_path / "cache.safetensors"
    run(cache, states, 0, PROMPT)
    cache.save(path)
    old, before = path.read_bytes(), [contents(layer) for layer in cache.packed_layers]
    late.arrived = False
    run(cache, spoil(states, PROMPT), PROMPT, PROMPT + 1)
    with pytest.raises(ValueError, match=f"token {PROMPT} are"):
        cache.save(path)
    assert path.read_bytes() == old
    # the token was taken back
    cache.save(path)
    loaded = RotorQuantCache.load(path)
    assert_same([contents(x) for x in loaded.packed_layers], before)


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("tokens", [1, 5])
def test_a_full_window_of_the_host_goes_back(recorded: bool, tokens: int) -> None:
    """By all tokens of the pass: what the window held in its midst is not known."""
    model = make_model("gemma3", head_dim=HEAD_DIM)
    cache, fresh = (RotorQuantCache(config=model.config, **SETTINGS) for _ in range(2))
    states = make_states()
    layers = range(2)
    for each in (cache, fresh):
        if recorded:
            each.activate_past_recording()
        run(each, states, 0, PROMPT, layers)
    bad = PROMPT + tokens - 1
    run(cache, spoil(states, bad), PROMPT, bad + 1, layers)
    taken = "it was" if tokens == 1 else f"the last {tokens} tokens were"
    with pytest.raises(ValueError, match=f"layer 1: .* token {bad} are .*: {taken} taken back"):
        run(cache, states, bad + 1, bad + 2, layers)
    assert_same_host_layers(cache, fresh)
    assert_same(held(cache), held(fresh))
    for mine, theirs in zip(
        run(cache, states, PROMPT, PROMPT + 1, layers),
        run(fresh, states, PROMPT, PROMPT + 1, layers),
        strict=True,
    ):
        assert torch.equal(mine, theirs)
    cache.check_steps()


CHANGES: dict[str, Callable[[RotorQuantCache], Any]] = {
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([0])),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([0])),
    "repeat": lambda cache: cache.batch_repeat_interleave(2),
    "to": lambda cache: cache.to("cpu"),
    "crop": lambda cache: cache.crop(-1),
}


@pytest.mark.parametrize("how", CHANGES)
def test_what_could_not_go_back_later_is_told_before_a_change(late: Late, how: str) -> None:
    """And nothing else is changed."""
    model = make_model("gemma3", head_dim=HEAD_DIM)
    cache, fresh = (RotorQuantCache(config=model.config, **SETTINGS) for _ in range(2))
    states, layers = make_states(), range(2)
    for each in (cache, fresh):
        each.activate_past_recording()
        run(each, states, 0, PROMPT, layers)
    run(cache, spoil(states, PROMPT), PROMPT, PROMPT + 5, layers)
    late.arrived = False
    with pytest.raises(ValueError, match=f"token {PROMPT} are .* the last 5 tokens were taken"):
        CHANGES[how](cache)
    assert_same_host_layers(cache, fresh)
    assert_same(held(cache), held(fresh))
    CHANGES[how](cache)
    # a bad token that a crop drops is not worth a word
    if how == "crop":
        run(cache, states, PROMPT - 1, PROMPT, layers)
        run(cache, spoil(states, PROMPT + 2), PROMPT, PROMPT + 3, layers)
        cache.crop(-1)
        cache.check_steps()
        assert cache.get_seq_length() == PROMPT + 2


@pytest.mark.parametrize("tokens", [1, 3])
def test_packed_windows_wait_before_they_drop_tokens(late: Late, tokens: int) -> None:
    """What is dropped behind a bad token could not come back with it."""
    model = make_model("gemma3-window", head_dim=HEAD_DIM)
    settings = SETTINGS | {"sliding": "packed"}
    cache, fresh = (RotorQuantCache(config=model.config, **settings) for _ in range(2))
    states, layers = make_states(), range(2)
    # once there are so many tokens, a window of 160 drops the first 128
    bad = 159 + 128 - 1 - tokens
    for each in (cache, fresh):
        run(each, states, 0, PROMPT, layers)
        run(each, states, PROMPT, bad, layers)
    late.arrived = False
    run(cache, spoil(states, bad, 0), bad, bad + 1, layers)
    assert not late.arrived and cache.layers[0].store.dropped == 0
    with pytest.raises(ValueError, match=f"layer 0: .* token {bad} are .*was taken back"):
        run(cache, states, bad + 1, bad + 1 + tokens, layers)
    assert_same(held(cache), held(fresh))
    for each in (cache, fresh):
        run(each, states, bad, bad + 1, layers)
        run(each, states, bad + 1, bad + 1 + tokens, layers)
        run(each, states, bad + 1 + tokens, bad + 2 + tokens, layers)
    assert_same(held(cache), held(fresh))
    assert cache.layers[0].store.dropped == 128


def test_an_exact_layer_gives_the_tokens_back() -> None:
    cache, fresh = (make_cache(layer_bits={0: 16}) for _ in range(2))
    states = make_states()
    for each in (cache, fresh):
        run(each, states, 0, PROMPT)
    run(cache, spoil(states, PROMPT), PROMPT, PROMPT + 1)
    with pytest.raises(ValueError, match="it was taken back"):
        run(cache, states, PROMPT + 1, PROMPT + 2)
    assert torch.equal(cache.layers[0].keys, fresh.layers[0].keys)
    assert_goes_on(cache, fresh, states, PROMPT)


def test_layers_that_some_passes_leave_out() -> None:
    # layers of a model that skips the first one, and then the last one
    cache = make_cache()
    states = make_states()
    for part in (range(1, 3), range(1, 3), range(0, 2)):
        at = cache.layers[1].get_seq_length()
        run(cache, states, at, at + 20, part)
        if at == 20:
            break
    run(cache, spoil(states, 40, 2), 40, 41, range(1, 3))
    with pytest.raises(ValueError, match=r"layer 2: .* token 40 are .* taken back"):
        run(cache, states, 41, 42, range(1, 3))
    assert [layer.get_seq_length() for layer in cache.layers] == [0, 40, 40]


@pytest.mark.parametrize(
    ("family", "revertible"),
    [("lfm2", False), ("lfm2", True), ("qwen3-next", True), ("qwen3-next", False)],
)
@pytest.mark.parametrize("tokens", [1, 3])
def test_linear_attention_and_convolutions(
    late: Late, family: str, revertible: bool, tokens: int
) -> None:
    """Told by the next pass before any layer changes, and taken back if it is known what was.

    Else nobody waits.
    """
    model = make_model(family, head_dim=HEAD_DIM)
    settings = SETTINGS | {"revertible": revertible}
    cache, fresh = (RotorQuantCache(config=model.config, **settings) for _ in range(2))
    ids = make_tokens(64)

    @torch.no_grad()
    def forward(each: RotorQuantCache, first: int, last: int) -> Tensor:
        return model(ids[:, first:last], past_key_values=each).logits

    for each in (cache, fresh):
        forward(each, 0, 40), forward(each, 40, 41)
    weight = model.model.layers[1].self_attn.v_proj.weight
    whole = weight.detach().clone()
    with torch.no_grad():
        weight[0, 0] = NAN
    forward(cache, 41, 41 + tokens)
    late.arrived = False
    with torch.no_grad():
        weight.copy_(whole)
    goes_back = revertible or family == "lfm2"
    late.arrived = not goes_back
    end = "taken back" if goes_back else r"stored still.* layer 0: .*reset\(\) the cache"
    with pytest.raises(ValueError, match=f"layer 1: .* token 41 are .*{end}"):
        forward(cache, 41 + tokens, 42 + tokens)
    if goes_back:
        assert_same_host_layers(cache, fresh)
        assert_same(held(cache), held(fresh))
    else:
        assert cache.get_seq_length(1) == 41 + tokens
        cache.reset()
        fresh.reset()
        forward(cache, 0, 41), forward(fresh, 0, 41)
    assert torch.equal(forward(cache, 41, 64), forward(fresh, 41, 64))


@pytest.mark.parametrize("check", [True, False])
def test_recorded_windows_go_back_once(late: Late, check: bool) -> None:
    """Told where a layer is about to pack, with windows ahead that hold the new tokens already."""
    if not check and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("several tokens behind one that was recorded fail here with any cache")
    model = make_model("gemma3", head_dim=HEAD_DIM)
    cache, fresh = (RotorQuantCache(config=model.config, **SETTINGS) for _ in range(2))
    tokens = make_tokens(ROOM)

    @torch.no_grad()
    def forward(each: RotorQuantCache, first: int, last: int) -> Tensor:
        return model(tokens[:, first:last], past_key_values=each).logits

    for each in (cache, fresh):
        forward(each, 0, PROMPT + LEFT - 2)
        each.activate_past_recording()
    at = PROMPT + LEFT - 2
    packed = next(i for i, x in enumerate(cache.layers) if isinstance(x, RotorQuantLayer))
    weight = model.model.layers[packed].self_attn.v_proj.weight
    whole = weight.detach().clone()
    with torch.no_grad():
        weight[0, 0] = NAN
    forward(cache, at, at + 1)
    with torch.no_grad():
        weight.copy_(whole)
    with pytest.raises(ValueError, match=f"token {at} are .*was taken back"):
        cache.check_steps() if check else forward(cache, at + 1, at + 4)
    assert {x.get_seq_length() for x in cache.layers} == {at}
    torch.testing.assert_close(forward(cache, at, at + 1), forward(fresh, at, at + 1))


def test_layers_that_store_nothing_are_left_alone() -> None:
    """As newer hosts have them for blocks without attention; they count no tokens."""
    if not hasattr(cache_utils, "DummyLayer"):
        pytest.skip("this version of transformers has no such layers")
    cache, states = make_cache(), make_states()
    cache.layers.append(cache_utils.DummyLayer())
    run(cache, states, 0, 20)
    wanted = held(cache)
    run(cache, spoil(states, 20), 20, 21)
    with pytest.raises(ValueError, match=r"token 20 are .*it was taken back"):
        cache.check_steps()
    assert_same(held(cache), wanted)


def test_a_crop_forgets_queries_of_layers_that_were_not_noted() -> None:
    cache, states = make_cache(), make_states()
    run(cache, states, 0, 20)
    wanted = held(cache)
    spoilt = spoil(states, 20, layer=2)
    spoilt[1, 2:, :, :, 20, 3] = float("inf")
    run(cache, spoilt, 20, 21)
    cache.crop(-1)
    assert_same(held(cache), wanted)


def feed(layer: RotorQuantLayer, states: Tensor, first: int, last: int) -> None:
    layer.update(*states[1, :2, :, :, first:last])


@pytest.mark.parametrize("delayed", [False, True])
def test_a_layer_alone_packs_nothing_bad(late: Late, delayed: bool) -> None:
    layer = RotorQuantLayer(RotorQuantConfig(**SETTINGS), layer_idx=4)
    states = make_states()
    last = PROMPT + LEFT - 1
    feed(layer, states, 0, PROMPT), feed(layer, states, PROMPT, last - 1)
    before = contents(layer)
    late.arrived = not delayed
    feed(layer, spoil(states, last - 1), last - 1, last)
    # the token waits for its attention
    layer.settle()
    with pytest.raises(ValueError, match=f"layer 4: .* token {last - 1} are .* taken back"):
        feed(layer, states, last, last + 1)
    assert_holds(layer, before)
    feed(layer, states, last - 1, last), feed(layer, states, last, last + 1)
    assert layer.store.packed_length == 256


def test_a_layer_alone_looks_when_asked() -> None:
    layer = RotorQuantLayer(RotorQuantConfig(**SETTINGS), layer_idx=4)
    states = make_states()
    feed(layer, states, 0, PROMPT)
    layer.check_steps()
    feed(layer, spoil(states, PROMPT), PROMPT, PROMPT + 1)
    with pytest.raises(ValueError, match=r"layer 4: .* taken back\. Look"):
        layer.check_steps()
    assert layer.get_seq_length() == PROMPT


@pytest.mark.parametrize("how", ["to", "reorder"])
def test_a_note_goes_with_the_tokens(how: str) -> None:
    cache = make_cache()
    states = make_states()
    run(cache, states, 0, PROMPT)
    run(cache, spoil(states, PROMPT), PROMPT, PROMPT + 1)
    cache.to("cpu") if how == "to" else cache.reorder_cache(torch.tensor([0]))
    with pytest.raises(ValueError, match=f"token {PROMPT} are"):
        run(cache, states, PROMPT + 1, PROMPT + 2)
    assert cache.get_seq_length() == PROMPT


def test_a_refused_pass_leaves_no_note_of_its_own() -> None:
    cache, fresh = make_cache(), make_cache()
    states = make_states()
    for each in (cache, fresh):
        run(each, states, 0, PROMPT)
    before = held(cache)
    run(cache, spoil(states, PROMPT, 0), PROMPT, PROMPT + 1, range(1))
    with pytest.raises(ValueError, match="head_dim"):
        cache.update(*torch.zeros(2, 1, KV_HEADS, 1, 32), 1)
    assert_same(held(cache), before)
    assert_goes_on(cache, fresh, states, PROMPT)


@pytest.mark.parametrize("tokens", [1, 3])
def test_where_kernels_do_not_run_steps_are_looked_at_at_once(tokens: int) -> None:
    cache = make_cache(impl="reference")
    states = make_states()
    run(cache, states, 0, PROMPT)
    before = held(cache)
    with pytest.raises(ValueError, match=r"layer 1: 1 of .* new key .* were not stored"):
        run(cache, spoil(states, PROMPT), PROMPT, PROMPT + tokens)
    assert_same(held(cache), before)


def test_the_cpu_looks_at_once_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    cache = make_cache()
    states = make_states()
    run(cache, states, 0, PROMPT)
    with pytest.raises(ValueError, match=r"layer 1: 1 of .* new key .* were not stored"):
        run(cache, spoil(states, PROMPT), PROMPT, PROMPT + 1)
    assert all(layer.watch.device is None for layer in cache.packed_layers)


@pytest.mark.gpu
@pytest.mark.parametrize("prompt", [20, 300])
@pytest.mark.parametrize("offloading", [False, True])
def test_decoding_on_a_gpu(prompt: int, offloading: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    model = make_model("llama").cuda()
    tokens = torch.randint(3, 90, (2, prompt + 200), device="cuda")
    caches = [
        RotorQuantCache(config=model.config, residual_length=32, offloading=offloading)
        for _ in range(2)
    ]

    @torch.no_grad()
    def forward(cache: RotorQuantCache, first: int, last: int) -> Tensor:
        return model(tokens[:, first:last], past_key_values=cache).logits

    def spoil_key(module: torch.nn.Module, args: Any, key: Tensor) -> Tensor:
        key = key.clone()
        key[1, -1, 5] = NAN
        return key

    for cache in caches:
        forward(cache, 0, prompt)
    cache, fresh = caches
    for i in range(prompt, prompt + 10):
        assert torch.equal(forward(cache, i, i + 1), forward(fresh, i, i + 1))
    bad = prompt + 10
    before = [contents(layer) for layer in cache.packed_layers]
    for width in (1, 4):
        hook = model.model.layers[1].self_attn.k_proj.register_forward_hook(spoil_key)
        forward(cache, bad, bad + width)
        hook.remove()
        torch.cuda.synchronize()
        with pytest.raises(ValueError, match=f"layer 1: .* token {bad + width - 1} are .* taken"):
            forward(cache, bad + width, bad + width + 1)
        cache.crop(bad - cache.get_seq_length())
        for layer, expected in zip(cache.packed_layers, before, strict=True):
            assert_holds(layer, expected)
    # without a wait it is told at the latest when a tile is packed
    hook = model.model.layers[0].self_attn.k_proj.register_forward_hook(spoil_key)
    forward(cache, bad, bad + 1)
    hook.remove()
    with pytest.raises(ValueError, match=rf"layer [01]: .* token {bad} are .* taken"):
        for i in range(bad + 1, bad + 160):
            forward(cache, i, i + 1)
    for layer, expected in zip(cache.packed_layers, before, strict=True):
        assert_holds(layer, expected)
    for i in range(bad, bad + 150):
        assert torch.equal(forward(cache, i, i + 1), forward(fresh, i, i + 1))
    for mine, theirs in zip(cache.packed_layers, fresh.packed_layers, strict=True):
        assert_holds(mine, contents(theirs))
    cache.check_steps()


@pytest.mark.gpu
@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize(
    "family", ["gemma3", "gpt-oss", "gemma3-window", "lfm2", "qwen3-next", "jamba"]
)
def test_windows_and_linear_attention_on_a_gpu(
    family: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    model = make_model(family).cuda()
    tokens = torch.randint(3, 90, (2, 460), device="cuda")
    settings = {"residual_length": 32, "revertible": True, "sliding": "packed"}
    cache, fresh = (RotorQuantCache(config=model.config, **settings) for _ in range(2))
    packed = max(layer.layer_idx for layer in cache.packed_layers)

    @torch.no_grad()
    def forward(each: RotorQuantCache, first: int, last: int) -> Tensor:
        return model(tokens[:, first:last], past_key_values=each).logits

    def spoil_value(module: torch.nn.Module, args: Any, value: Tensor) -> Tensor:
        value = value.clone()
        value[1, -1, 5] = NAN
        return value

    for each in (cache, fresh):
        forward(each, 0, 300), forward(each, 300, 301)
    bad = 301
    for _ in range(3):
        hook = model.model.layers[packed].self_attn.v_proj.register_forward_hook(spoil_value)
        forward(cache, bad, bad + width)
        hook.remove()
        with pytest.raises(ValueError, match=rf"token {bad + width - 1} are .* taken back"):
            forward(cache, bad + width, bad + width + 1)
        if cache.get_seq_length(packed) > bad:
            cache.crop(bad - cache.get_seq_length(packed))
        assert_same_host_layers(cache, fresh)
        for mine, theirs in zip(cache.packed_layers, fresh.packed_layers, strict=True):
            assert_holds(mine, contents(theirs))
        for i in range(bad, bad + 40):
            assert torch.equal(forward(cache, i, i + 1), forward(fresh, i, i + 1))
        bad += 40
    cache.check_steps()
