# SPDX-License-Identifier: Apache-2.0
"""One static layer against the growing one: the same states in, so the same codes and numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.integrations.sdpa_attention import repeat_kv

from rq_hf import handle, layers
from rq_hf.config import RotorQuantConfig
from rq_hf.handle import Handle
from rq_hf.layers import RotorQuantLayer
from rq_hf.quant.rope import RopeTable
from rq_hf.static_handle import StaticHandle
from rq_hf.static_layer import RotorQuantStaticLayer
from rq_hf.static_ops import recipe_of

BATCH, HEADS, GROUP, HEAD_DIM = 2, 2, 3, 64
PADDING = 30
ROOM = 420
SETTINGS: dict[str, dict[str, Any]] = {
    "4 bits": {"nbits": 4, "residual_length": 16},
    "3 bits": {"nbits": 3, "residual_length": 5},
    "prod": {"key_codec": "prod", "nbits": 2, "residual_length": 0},
    "nothing exact": {"nbits": 4, "residual_length": 0, "sink_length": 0},
}


def make_states(tokens: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (BATCH, HEADS, tokens, HEAD_DIM)
    mean = torch.linspace(-2, 2, HEAD_DIM)
    return [torch.randn(shape, generator=generator) + mean for _ in range(2)]


def make_query(tokens: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1000)
    return torch.randn(BATCH, HEADS * GROUP, tokens, HEAD_DIM, generator=generator)


def make_mask(tokens: int, columns: int, seen: int, padding: int) -> Tensor:
    """Returns the causal mask `[B, 1, tokens, columns]` of the newest of `seen` tokens."""
    at = torch.arange(columns)
    rows = torch.arange(seen - tokens, seen)[:, None]
    first = torch.tensor([padding, 0])[:, None, None]
    return ((at <= rows) & (at >= first))[:, None]


class Pair:
    """A growing layer and a static one that see the same."""

    def __init__(self, padding: int = 0, **settings: Any) -> None:
        config = RotorQuantConfig(**settings)
        rope = RopeTable(10_000.0 ** -torch.arange(0, 1, 2 / HEAD_DIM))
        self.growing = RotorQuantLayer(config, rope=rope)
        self.static = RotorQuantStaticLayer(config, ROOM, rope=rope)
        self.padding = padding
        self.seen = 0

    def attend(self, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
        """Stores new tokens in both; returns what their attention gives."""
        states, query = make_states(tokens, seed), make_query(tokens, seed)
        self.seen += tokens
        results = []
        for layer in (self.static, self.growing):
            columns = layer.get_mask_sizes(tokens)[0]
            key, value = layer.update(*states)
            assert key.shape[2] == value.shape[2] == columns
            mask = make_mask(tokens, columns, self.seen, self.padding)
            key, value = repeat_kv(key, GROUP), repeat_kv(value, GROUP)
            assert isinstance(key, (Handle, StaticHandle))
            results.append(F.scaled_dot_product_attention(query, key, value, mask))
        return results[0], results[1]

    def assert_same_store(self) -> None:
        self.static.settle()
        mine, theirs = self.static.store, self.growing.store
        assert mine is not None and theirs is not None
        assert mine.length == theirs.length == self.seen
        count = min(mine.tiles.length, theirs.tiles.length)
        # a full tail is packed with the next token
        assert theirs.packed_length - mine.packed_length in (0, mine.tile_length)
        for a, b in zip(mine.tiles.view(), theirs.tiles.view(), strict=True):
            assert torch.equal(a[:, :, :count], b[:, :, :count])
        for a, b in zip((self.static.keys, self.static.values), self.decoded(), strict=True):
            assert a is not None
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)

    def decoded(self) -> tuple[Tensor, Tensor]:
        """Returns what the growing layer decodes, but for a tile that the static one has exact."""
        assert self.growing.store is not None and self.static.store is not None
        exact = self.static.view().dense()
        rows = slice(0, self.static.store.packed_length + self.static.store.sinks)
        result = [x.clone() for x in exact]
        for mine, theirs in zip(result, self.growing.view().dense(), strict=True):
            mine[:, :, rows] = theirs[:, :, rows]
        return result[0], result[1]


@pytest.mark.parametrize("padding", [0, PADDING])
@pytest.mark.parametrize("name", SETTINGS)
def test_steps_read_what_the_growing_layer_reads(name: str, padding: int) -> None:
    pair = Pair(padding, **SETTINGS[name])
    # each prompt fills a tile at least
    for seed in range(160):
        mine, theirs = pair.attend(150 if seed == 0 else 1, seed)
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    pair.assert_same_store()
    assert pair.growing.store is not None
    assert pair.growing.store.packed_length >= 256


@pytest.mark.parametrize("padding", [0, PADDING])
def test_several_tokens_read_what_the_growing_layer_reads(padding: int) -> None:
    pair = Pair(padding, **SETTINGS["4 bits"])
    # a tail that is full at 4 + 16 + 64 n tokens, before one token, few, many
    for seed, tokens in enumerate((150, 62, 1, 1, 5, 58, 3, 20, 40, 1, 1)):
        mine, theirs = pair.attend(tokens, seed)
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
        pair.assert_same_store()


def test_reordered_sequences_keep_their_codes() -> None:
    pair = Pair(PADDING, **SETTINGS["4 bits"])
    pair.attend(150, 0)
    for layer in (pair.static, pair.growing):
        layer.reorder_cache(torch.tensor([0, 0]))
    states, query = make_states(1, 1), make_query(1, 1)
    key, value = pair.static.update(*states)
    mask = make_mask(1, ROOM, 151, PADDING)[:1].expand(2, -1, -1, -1)
    query = query[:1, :HEADS].expand(2, -1, -1, -1)
    both = F.scaled_dot_product_attention(query, key, value, mask)
    # the new tokens differ
    assert not torch.equal(both[0], both[1])
    key, value = pair.growing.update(*states)
    theirs = F.scaled_dot_product_attention(query, key, value, mask[..., :151])
    torch.testing.assert_close(both, theirs, rtol=1e-5, atol=1e-5)
    tensors = pair.static.static.tensors_read
    assert torch.equal(tensors.records[0], tensors.records[1])
    assert tensors.padding.tolist() == [PADDING, PADDING]


def test_statistics_of_reordered_sequences_are_read_anew() -> None:
    key_mean = pytest.importorskip("rq_hf.ops.triton.means").key_mean
    pair = Pair(**SETTINGS["4 bits"])
    pair.attend(150, 0)
    layer = pair.static
    assert layer.preconditioner is not None
    # means and, last, the balance
    before = key_mean(layer.preconditioner)[:, :, 3]
    assert not torch.equal(before[0], before[1])
    layer.reorder_cache(torch.tensor([1, 1]))
    after = key_mean(layer.preconditioner)[:, :, 3]
    assert torch.equal(after, before[[1, 1]])


def test_layers_alike_read_the_tables_of_one() -> None:
    first, second = (Pair(**SETTINGS["4 bits"]) for _ in range(2))
    for pair in (first, second):
        pair.attend(150, 0)
    assert first.static.recipe == second.static.recipe
    for layer in (first.static, second.static):
        assert layer.preconditioner is not None and layer.preconditioner.rope is not None
        assert layer.preconditioner.rope is recipe_of(layer.recipe).rope


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers of single tokens are not looked at."""
    monkeypatch.setattr(layers, "looks_at_once", lambda device: False)


@pytest.mark.parametrize("which", [0, 1])
def test_prompts_that_are_not_finite_are_refused(which: int, device: torch.device) -> None:
    layer = RotorQuantStaticLayer(RotorQuantConfig(path="dense", **SETTINGS["4 bits"]), ROOM)
    states = [x.to(device) for x in make_states(150, 0)]
    states[which][1, 1, 20, 3] = torch.nan
    with pytest.raises(ValueError, match=r"layer 0: 1 of .* new (key|value) numbers are NaN"):
        layer.update(*states)
    assert layer.get_seq_length() == 0 and layer.store is None


@pytest.mark.parametrize("which", [0, 1])
def test_steps_that_are_not_finite_stop_the_next_part(
    which: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_on_a_gpu(monkeypatch)
    layer = RotorQuantStaticLayer(RotorQuantConfig(path="dense", **SETTINGS["4 bits"]), ROOM)

    def states(tokens: int, seed: int) -> list[Tensor]:
        return [x.to(device) for x in make_states(tokens, seed)]

    layer.update(*states(150, 0))
    layer.check_steps()
    bad = states(1, 1)
    bad[which][1, 1, 0, 3] = torch.nan
    # steps wait for nothing
    for new in (bad, states(1, 2)):
        layer.update(*new)
    before = [tensor.clone() for tensor in layer.static.tensors_read]
    for call in (lambda: layer.update(*states(70, 3)), layer.settle, layer.check_steps):
        with pytest.raises(ValueError, match=r"layer 0: decode steps .* NaN .* reset\(\)"):
            call()
    for mine, old in zip(layer.static.tensors_read, before, strict=True):
        torch.testing.assert_close(mine, old, rtol=0, atol=0, equal_nan=True)
    assert int(layer.get_seq_length()) == 152
    layer.reset()
    for seed, tokens in enumerate((150, 1, 70)):
        key, _ = layer.update(*states(tokens, seed))
    assert key.shape[2] == 221 and bool(key.isfinite().all())


def test_steps_count_when_they_are_done() -> None:
    layer = RotorQuantStaticLayer(RotorQuantConfig(path="dense", **SETTINGS["4 bits"]), 151)
    layer.update(*make_states(150, 0))
    layer.update(*make_states(1, 1))
    for _ in range(2):
        with pytest.raises(ValueError, match="holds max_cache_len = 151 tokens"):
            layer.update(*make_states(1, 2))
    assert layer.calls["step"] == 1 and int(layer.get_seq_length()) == 151


def test_a_prompt_that_waits_is_not_stored_by_a_compiled_step() -> None:
    layer = RotorQuantStaticLayer(RotorQuantConfig(**SETTINGS["4 bits"]), ROOM)
    layer.update(*make_states(150, 0))
    assert layer.is_waiting
    query = make_query(1, 1)[:, :HEADS]

    def step(*states: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, *layer.update(*states))

    torch._dynamo.reset()
    with pytest.raises(Exception, match="layer 0: the prompt waits for its attention still"):
        torch.compile(step, fullgraph=True, backend="eager")(*make_states(1, 1))
    assert layer.is_waiting and layer.get_seq_length() == 150
    layer.settle()
    step(*make_states(1, 1))
    assert int(layer.get_seq_length()) == 151


@pytest.mark.parametrize("compiles", [False, True])
def test_masks_of_steps_have_a_column_for_each_token(compiles: bool) -> None:
    key, value, tokens = static_handles(0, **SETTINGS["4 bits"])
    query = make_query(1, 3)[:, :HEADS]

    def attention(mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, mask)

    torch._dynamo.reset()
    run = torch.compile(attention, fullgraph=True, backend="eager") if compiles else attention
    wide = make_mask(1, ROOM, tokens, 0)
    assert run(wide).shape == query.shape
    # enough for the tokens that there are, not for those that a step may add
    for columns in (tokens, ROOM - 1, 1):
        # a size may be a symbol
        with pytest.raises(Exception, match=rf"has \w+ columns, .* of the {ROOM} tokens"):
            run(wide[..., :columns])


@pytest.mark.parametrize("tokens", [1, 3, 20, 150])
def test_statistics_may_be_kept(tokens: int) -> None:
    config = RotorQuantConfig(**SETTINGS["4 bits"])
    rope = RopeTable(10_000.0 ** -torch.arange(0, 1, 2 / HEAD_DIM))
    layer = RotorQuantStaticLayer(config, ROOM, rope=rope)
    layer.update(*make_states(150, 0))
    layer.settle()
    tensors = layer.static.tensors_read
    kept = [x.clone() for x in tensors.statistics]
    assert bool(kept[-1].any())
    for keep in (True, True, False):
        layer.reset(keep_statistics=keep)
        layer.update(*make_states(tokens, 1))
        layer.settle()
        assert layer.static.tensors_read is tensors
        same = all(torch.equal(*pair) for pair in zip(tensors.statistics, kept, strict=True))
        assert same == keep
        assert int(layer.get_seq_length()) == tokens


@pytest.mark.parametrize(("tokens", "measured"), [(1, False), (10, False), (35, False), (36, True)])
def test_prompts_too_short_to_measure_leave_no_statistics(tokens: int, measured: bool) -> None:
    layer = RotorQuantStaticLayer(RotorQuantConfig(**SETTINGS["4 bits"]), ROOM)
    layer.update(*make_states(tokens, 0))
    layer.settle()
    layer.reset(keep_statistics=True)
    assert (layer.kept is not None) == measured
    other = RotorQuantStaticLayer(RotorQuantConfig(**SETTINGS["4 bits"]), ROOM)
    for x in (layer, other):
        x.update(*make_states(150, 1))
        x.settle()
    pairs = zip(*(x.static.tensors_read.statistics for x in (layer, other)), strict=True)
    assert all(torch.equal(*pair) for pair in pairs) != measured


def static_handles(padding: int, **settings: Any) -> tuple[StaticHandle, StaticHandle, int]:
    """Returns the handles of a step, and how many tokens there are."""
    pair = Pair(padding, **settings)
    for seed, tokens in enumerate((150, 1, 1)):
        pair.attend(tokens, seed)
    key, value = pair.static.update(*make_states(1, 9))
    assert isinstance(key, StaticHandle) and isinstance(value, StaticHandle)
    expected = pair.static.keys
    assert expected is not None
    torch.testing.assert_close(key.dense()[:, :, :153], expected, rtol=1e-6, atol=1e-6)
    return key, value, 153


@pytest.mark.parametrize("padding", [0, PADDING])
@pytest.mark.parametrize("name", SETTINGS)
def test_rows_that_are_not_there_decode_to_zero(name: str, padding: int) -> None:
    key, value, tokens = static_handles(padding, **SETTINGS[name])
    for states in (key.dense(), value.dense()):
        assert states.shape == (BATCH, HEADS, ROOM, HEAD_DIM)
        assert not states[:, :, tokens:].any()
        assert bool(states[:, :, :tokens].abs().amax(-1).gt(0).all())


OPERATIONS: dict[str, Any] = {
    "slice": lambda k, v, q: k[:, :, 3:5],
    "index all": lambda k, v, q: k[:, :, :],
    "sum": lambda k, v, q: v.sum(2),
    "new dimension": lambda k, v, q: k[:, :, None],
    "expand": lambda k, v, q: k[:, :, None, :, :].expand(BATCH, HEADS, 3, ROOM, HEAD_DIM),
    "repeat": lambda k, v, q: k.repeat_interleave(3, 1).float(),
    "to": lambda k, v, q: torch.repeat_interleave(v, 3, dim=1).to(torch.float64),
    "transpose": lambda k, v, q: k.transpose(-1, -2).contiguous(),
    "permute": lambda k, v, q: k.permute(0, 2, 1, 3),
    "product": lambda k, v, q: q[:, :HEADS] @ k.transpose(2, 3) @ v,
    "double": lambda k, v, q: torch.cat((k, k), 2),
    "detach": lambda k, v, q: k.detach().reshape(BATCH, -1),
}


@pytest.mark.filterwarnings("ignore:the operation")
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_give_what_they_give_on_decoded_states(name: str) -> None:
    key, value, _ = static_handles(PADDING, **SETTINGS["4 bits"])
    query, operation = make_query(1, 3), OPERATIONS[name]
    mine = operation(key, value, query)
    mine = mine.dense() if isinstance(mine, StaticHandle) else mine
    theirs = operation(key.dense(), value.dense(), query)
    assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
    assert torch.equal(mine, theirs)


def test_unknown_operations_are_counted_and_warned_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handle, "_warned", set())
    layer = RotorQuantStaticLayer(RotorQuantConfig(**SETTINGS["4 bits"]), ROOM)
    layer.update(*make_states(150, 0))
    key, _ = layer.update(*make_states(1, 1))
    with pytest.warns(UserWarning, match=r"operation 'exp' is not known on packed keys") as seen:
        assert torch.equal(key.exp(), key.transpose(2, 3).exp().transpose(2, 3))
    assert len(seen) == 1 and layer.calls["decoded for exp"] == 2
    # products are known, if not on packed states
    torch.matmul(make_query(1, 3)[:, :HEADS], key.transpose(2, 3))
    assert layer.calls["decoded for matmul"] == 1


@pytest.mark.filterwarnings("ignore:the operation")
def test_attention_with_gradient_or_dropout_is_the_hosts_own() -> None:
    key, value, tokens = static_handles(0, **SETTINGS["4 bits"])
    mask = make_mask(1, ROOM, tokens, 0)
    query = make_query(1, 3)[:, :HEADS].requires_grad_()
    mine = F.scaled_dot_product_attention(query, key, value, mask)
    theirs = F.scaled_dot_product_attention(query, key.dense(), value.dense(), mask)
    assert mine.requires_grad
    assert torch.equal(mine, theirs)
    packed = F.scaled_dot_product_attention(query.detach(), key, value, mask)
    torch.testing.assert_close(packed, theirs.detach(), rtol=1e-5, atol=1e-5)


def test_handles_flatten_and_come_back() -> None:
    key, _, _ = static_handles(0, **SETTINGS["4 bits"])
    names, options = key.transpose(2, 3).__tensor_flatten__()
    again = StaticHandle.__tensor_unflatten__(
        {name: getattr(key, name) for name in names}, options, None, None
    )
    assert again.form == "bhdn" and again.shape == (BATCH, HEADS, HEAD_DIM, ROOM)
    assert "key" in repr(again)
    assert torch.equal(again.dense(), key.dense().transpose(2, 3))


def test_operators_keep_the_rules_of_operators() -> None:
    key, _, tokens = static_handles(PADDING, **SETTINGS["4 bits"])
    tensors = key.tensors()
    mask = make_mask(1, ROOM, tokens, PADDING)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    sinks = torch.zeros(HEADS * GROUP)
    arguments: tuple[Any, ...] = (make_query(1, 0), tensors, mask, sinks, 0.1, 5.0)
    numbers = (key.sink_length, key.recipe)
    operators = torch.ops.rq_hf
    torch.library.opcheck(operators.attend_static.default, (*arguments, *numbers), test_utils=tests)
    torch.library.opcheck(
        operators.decode_static.default, (tensors, ROOM, *numbers), test_utils=tests
    )
    counted = (torch.zeros((), dtype=torch.int32), torch.tensor(tokens), torch.tensor(128))
    clones = [tensor.clone() for tensor in tensors]
    buffers = (*clones[:5], *counted, 4, 16, ROOM)
    torch.library.opcheck(
        operators.append_.default,
        (*make_states(1, 0), *buffers, *clones[6:], key.recipe),
        test_utils=tests,
    )
