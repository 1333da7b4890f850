# SPDX-License-Identifier: Apache-2.0
"""When and of what a cache measures its statistics, in a model whose keys have a bias."""

import pytest
import torch
from support.models import make_model, make_tokens
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from rq_hf import RotorQuantCache
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
