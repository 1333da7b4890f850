# SPDX-License-Identifier: Apache-2.0
"""When and of what a cache measures its statistics, in a model whose keys have a bias."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.flows import make_cache
from support.models import make_model, make_tokens
from support.oracle import OracleLayer
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from rq_hf import RotorQuantCache, RotorQuantConfig, packed_states
from rq_hf.layers import RotorQuantLayer
from rq_hf.quant.preconditioning import Preconditioner
from rq_hf.quant.seeding import generator

# 4 sinks, 128 exact tokens at least: the first tile of 128 is packed at the 260th token
FIRST_PACKED, TOKENS = 260, 300
FIELDS = ("pre_mean", "post_mean", "balance", "value_mean")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """Biases before RoPE, as Qwen2 is trained to have; `make_model` leaves them at zero."""
    model = make_model("qwen2")
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            bias = layer.self_attn.k_proj.bias
            bias.copy_(torch.randn(bias.shape, generator=generator(0, "bias", index)))
    return model


@torch.no_grad()
def read(model: PreTrainedModel, tokens: Tensor, cache: DynamicCache | RotorQuantCache) -> Tensor:
    """Logits `[n, vocabulary]` of tokens `[1, n]` that come one by one, the first one too."""
    return torch.cat(
        [model(token, past_key_values=cache).logits[0] for token in tokens.split(1, 1)]
    )


def frozen(cache: RotorQuantCache) -> list[Preconditioner]:
    statistics = [layer.preconditioner for layer in cache.packed_layers]
    assert all(x is not None for x in statistics)
    return statistics


def test_a_prompt_of_one_token(model: PreTrainedModel) -> None:
    """It is measured and continued as a prompt of all tokens up to the first packing."""
    tokens = make_tokens(TOKENS)
    first, rest = tokens[:, :FIRST_PACKED], tokens[:, FIRST_PACKED:]
    cache, whole = (RotorQuantCache(config=model.config) for _ in range(2))
    begun = read(model, first[:, :-1], cache)
    assert all(layer.preconditioner is None for layer in cache.packed_layers)
    begun = torch.cat((begun, read(model, first[:, -1:], cache)))
    with torch.no_grad():
        model(first, past_key_values=whole)
    for mine, theirs in zip(frozen(cache), frozen(whole), strict=True):
        for name in FIELDS:
            # a single token's query comes after its tile was packed, so the last of 260 is missing:
            # it moves the balance, a fourth root of powers, by less than two percent
            tolerance = 0.02 if name == "balance" else 1e-5
            torch.testing.assert_close(
                getattr(mine, name), getattr(theirs, name), rtol=tolerance, atol=tolerance
            )
        assert mine.pre_mean.any(-1).all() and mine.balance.std() > 0.01
    assert [float(x.statistics.count) for x in cache.packed_layers] == [2 * (FIRST_PACKED - 1)] * 2
    assert cache.describe().count("key mean pre-RoPE, balance from queries") == 2
    exact = read(model, tokens, DynamicCache(config=model.config))
    torch.testing.assert_close(begun, exact[:FIRST_PACKED], rtol=1e-4, atol=1e-4)
    # from here on packed tokens are read; a random model makes much of their small errors
    error, usual = ((read(model, rest, x) - exact[FIRST_PACKED:]).norm() for x in (cache, whole))
    assert 0 < error < 1.2 * usual


def test_what_read_dense_tensors_is_balanced_by_keys_alone(model: PreTrainedModel) -> None:
    cache = RotorQuantCache(config=model.config, path="dense")
    with torch.no_grad():
        model(make_tokens(TOKENS), past_key_values=cache)
    assert cache.describe().count("key mean pre-RoPE, balance from keys alone") == 2
    assert all(x.balance.std() > 0.01 for x in frozen(cache))


def test_unknown_rope_falls_back_and_says_so(model: PreTrainedModel) -> None:
    # without a config nothing is known of the position embedding
    cache = RotorQuantCache()
    with torch.no_grad():
        model(make_tokens(TOKENS), past_key_values=cache)
    assert cache.describe().count("key mean post-RoPE, balance from queries") == 2
    assert not any(x.pre_mean.any() for x in frozen(cache))
    off = RotorQuantCache(config=model.config, key_mean="none", balance=False)
    with torch.no_grad():
        model(make_tokens(TOKENS), past_key_values=off)
    assert off.describe().count("key mean none, balance off") == 2


@torch.no_grad()
def run(
    model: PreTrainedModel, cache: DynamicCache | RotorQuantCache, tokens: Tensor, padding: Any = ()
) -> Tensor:
    """Logits of `tokens` behind what the cache holds, with left padding in each sequence."""
    mask = torch.ones(len(tokens), cache.get_seq_length() + tokens.shape[1], dtype=torch.long)
    for row, count in enumerate(padding):
        mask[row, :count] = 0
    return model(tokens, past_key_values=cache, attention_mask=mask).logits


def continued(model: PreTrainedModel, cache: RotorQuantCache, batch: int = 1) -> Tensor:
    """Logits of a prompt, and of what reads it packed."""
    prompt, rest = make_tokens(280, batch=batch, seed=1), make_tokens(140, batch=batch, seed=2)
    logits = [run(model, cache, part) for part in (prompt, *rest[:, :5].split(1, 1), rest[:, 5:])]
    logits.append(run(model, cache, make_tokens(1, batch=batch)))
    return torch.cat(logits, 1)


def set_by_hand(
    cache: RotorQuantCache, statistics: list[Preconditioner], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lets each layer find the statistics given where it would measure."""
    for layer, given in zip(cache.packed_layers, statistics, strict=True):
        monkeypatch.setattr(layer, "_measure", lambda *args, given=given: given)


def must_not_measure(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("measured")


@pytest.mark.parametrize("family", ["llama", "gemma3-window"])
def test_kept_statistics_pack_the_next_prompt(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(family)
    cache, by_hand, fresh = (make_cache(model) for _ in range(3))
    run(model, cache, make_tokens(300))
    statistics = frozen(cache)
    cache.reset(keep_statistics=True)
    assert cache.get_seq_length() == 0
    assert all(layer.preconditioner is None for layer in cache.packed_layers)
    set_by_hand(by_hand, statistics, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(packed_states, "measure", must_not_measure)
        mine = continued(model, cache)
    assert torch.equal(mine, continued(model, by_hand))
    assert all(a is b for a, b in zip(frozen(cache), statistics, strict=True))
    # such a prompt's own statistics are others
    assert not torch.equal(mine, continued(model, fresh))


@pytest.mark.parametrize("first", [1, 40, 300])
def test_kept_statistics_are_the_oracles(first: int) -> None:
    """Of a prompt of any length, down to one token."""
    states = torch.randn(2, 2, 2, 800, 64, generator=generator(0, "states")) + 1.5
    config = RotorQuantConfig(residual_length=32)
    layer, oracle = RotorQuantLayer(config), OracleLayer(config)
    layer.update(*states[:, :, :, :400])
    layer.settle()
    oracle.preconditioner = layer.preconditioner
    layer.reset(keep_statistics=True)
    parts = states[:, :, :, 400:].split([first, *[1] * (310 - first), 90], 3)
    for part in parts:
        layer.update(*part)
    layer.settle()
    oracle.update(*states[:, :, :, 400:])
    assert layer.store.packed_length == oracle.packed == 256
    assert layer.preconditioner is oracle.preconditioner
    for mine, theirs in zip((layer.keys, layer.values), oracle.read(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    # without the mean the same oracle reads other numbers
    oracle.preconditioner = None
    assert (oracle.read()[0] - layer.keys).abs().max() > 0.1


def test_reset_forgets_statistics_unless_told_otherwise(model: PreTrainedModel) -> None:
    cache, fresh = make_cache(model), make_cache(model)
    run(model, cache, make_tokens(300))
    cache.reset(keep_statistics=True)
    cache.reset()
    assert torch.equal(continued(model, cache), continued(model, fresh))
    cache.reset()
    assert continued(model, cache, batch=2).shape[0] == 2


def test_statistics_that_are_open_are_not_kept(model: PreTrainedModel) -> None:
    cache, fresh = make_cache(model), make_cache(model)
    run(model, cache, make_tokens(100))
    cache.reset(keep_statistics=True)
    assert torch.equal(continued(model, cache, batch=2), continued(model, fresh, batch=2))


def test_statistics_are_kept_over_many_prompts(model: PreTrainedModel) -> None:
    cache = make_cache(model)
    run(model, cache, make_tokens(300))
    statistics = frozen(cache)
    # none at all, one that packs nothing, and one that does
    for count in (0, 50, 300):
        if count:
            run(model, cache, make_tokens(count, seed=count))
        cache.reset(keep_statistics=True)
    run(model, cache, make_tokens(300, seed=1))
    # back to before the first token, as by a reset that keeps them
    cache.crop(-300)
    assert cache.get_seq_length() == 0
    run(model, cache, make_tokens(300, seed=2))
    assert all(a is b for a, b in zip(frozen(cache), statistics, strict=True))


def test_padding_is_that_of_the_new_prompt(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, by_hand = make_cache(model), make_cache(model)
    run(model, cache, make_tokens(300, batch=2), padding=(100, 0))
    set_by_hand(by_hand, frozen(cache), monkeypatch)
    cache.reset(keep_statistics=True)
    for each in (cache, by_hand):
        run(model, each, make_tokens(300, batch=2, seed=1), padding=(0, 60))
        assert [layer.padding.tolist() for layer in each.packed_layers] == [[0, 60]] * 2
    more = make_tokens(5, batch=2)
    answers = [run(model, each, more, padding=(0, 60)) for each in (cache, by_hand)]
    assert torch.equal(*answers)
    cache.reset(keep_statistics=True)
    run(model, cache, make_tokens(300, batch=2, seed=2))
    assert [layer.padding for layer in cache.packed_layers] == [None, None]


def test_queries_seen_before_do_not_count(model: PreTrainedModel) -> None:
    cache = make_cache(model)
    run(model, cache, make_tokens(300))
    cache.reset(keep_statistics=True)
    run(model, cache, make_tokens(300))
    assert all(layer.statistics.power is None for layer in cache.packed_layers)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.repeat(1, 2, 1, 1, 1), r"= \(1, 2, 64\) on cpu, got \(2, 2, 64\) on cpu"),
        (lambda x: x[:, :, :1], r"= \(1, 2, 64\) on cpu, got \(1, 1, 64\) on cpu"),
        (lambda x: x[..., :32], r"= \(1, 2, 64\) on cpu, got \(1, 2, 32\) on cpu"),
        (lambda x: x.to("meta"), r"= \(1, 2, 64\) on cpu, got \(1, 2, 64\) on meta"),
    ],
    ids=["batch", "heads", "head_dim", "device"],
)
def test_another_kind_of_prompt_is_refused(
    change: Callable[[Tensor], Tensor], message: str
) -> None:
    states = torch.randn(2, 1, 2, 300, 64, generator=torch.Generator().manual_seed(0))
    layer = RotorQuantLayer(RotorQuantConfig(path="dense"), layer_idx=3)
    layer.update(*states)
    layer.reset(keep_statistics=True)
    kept = layer.kept
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"layer 3: .* {message}; call reset\(\)"):
            layer.update(*change(states))
        assert layer.kept is kept and layer.get_seq_length() == 0
    layer.reset()
    other = change(states)
    if other.device.type == "cpu":
        layer.update(*other)
        assert layer.preconditioner.balance.shape == tuple(other.shape[i] for i in (1, 2, 4))


def test_kept_statistics_follow_the_batch(model: PreTrainedModel) -> None:
    cache, other = make_cache(model), make_cache(model)
    for each in (cache, other):
        run(model, each, make_tokens(300, batch=2))
    cache.reset(keep_statistics=True)
    for each in (cache, other):
        each.reorder_cache(torch.tensor([1, 0]))
        each.batch_repeat_interleave(2)
    other.reset(keep_statistics=True)
    assert torch.equal(continued(model, cache, batch=4), continued(model, other, batch=4))
    assert frozen(cache)[0].balance.shape[0] == 4


@pytest.mark.parametrize("family", ["llama", "gemma3-window"])
@pytest.mark.parametrize("count", [0, 30, 300])
@pytest.mark.parametrize("with_config", [True, False], ids=["config", "alone"])
def test_kept_statistics_are_copied_and_saved(
    family: str, count: int, with_config: bool, tmp_path: Path
) -> None:
    model = make_model(family)
    cache = make_cache(model)
    run(model, cache, make_tokens(300))
    cache.reset(keep_statistics=True)
    held = cache.memory()
    # four of float32 `[1, 2, 64]` in each of two layers, and a table of RoPE
    assert held.statistics_bytes == held.held_bytes >= 2 * 4 * 2 * 64 * 4
    if count:
        run(model, cache, make_tokens(count, seed=4))
    cache.save(tmp_path / "cache")
    loaded = RotorQuantCache.load(tmp_path / "cache", model.config if with_config else None)
    copied = copy.deepcopy(cache)
    answers = [continued(model, each) for each in (cache, loaded, copied)]
    assert torch.equal(answers[0], answers[1]) and torch.equal(answers[0], answers[2])
    # what a loaded cache keeps, it keeps on
    for each in (cache, loaded):
        each.reset(keep_statistics=True)
    assert torch.equal(continued(model, cache), continued(model, loaded))


def test_statistics_for_another_model_are_refused_when_loaded(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    cache = make_cache(model)
    run(model, cache, make_tokens(300))
    cache.reset(keep_statistics=True)
    cache.save(tmp_path / "cache")
    with pytest.raises(ValueError, match="another model's cache"):
        RotorQuantCache.load(tmp_path / "cache", make_model("llama-mqa").config)


@pytest.mark.gpu
def test_kept_statistics_on_a_gpu(tmp_path: Path) -> None:
    states = torch.randn(2, 2, 2, 800, 64, device="cuda", dtype=torch.bfloat16)
    cache = RotorQuantCache(path="dense")
    cache.update(*states[:, :, :, :400], 0)
    cache.reset(keep_statistics=True)
    with pytest.raises(ValueError, match=r"on cuda:0, got \(2, 2, 64\) on cpu; call reset"):
        cache.update(*states[:, :, :, 400:].cpu(), 0)
    moved = copy.deepcopy(cache).to("cpu")
    moved.update(*states[:, :, :, 400:].cpu(), 0)
    kept = cache.packed_layers[0].kept
    cache.update(*states[:, :, :, 400:], 0)
    assert cache.packed_layers[0].preconditioner is kept
    assert moved.packed_layers[0].store.packed_length == 256
