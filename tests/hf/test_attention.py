# SPDX-License-Identifier: Apache-2.0
"""The registered implementation, against handles under the model's own and foreign caches."""

from typing import Any

import pytest
import torch
from support.models import make_model, make_tokens
from transformers import DynamicCache, PreTrainedModel, StaticCache

from rq_hf import RotorQuantCache

SETTINGS: dict[str, Any] = {"residual_length": 32, "nbits": 4}


def run(model: PreTrainedModel, cache: Any, padding: int = 0) -> torch.Tensor:
    """Logits of a prompt, of single tokens and of a longer continuation, `[B, n, vocabulary]`."""
    tokens = make_tokens(300, batch=2)
    mask = torch.ones_like(tokens)
    mask[0, :padding] = 0
    outputs = []
    start = 0
    for stop in (220, 221, 222, 270, 271, 300):
        positions = (mask[:, :stop].cumsum(1) - 1).clamp_min(0)[:, start:]
        with torch.no_grad():
            output = model(
                tokens[:, start:stop],
                attention_mask=mask[:, :stop],
                position_ids=positions,
                past_key_values=cache,
            )
        outputs.append(output.logits[:, -1])
        start = stop
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("padding", [0, 40])
@pytest.mark.parametrize(
    ("family", "own", "changes"),
    [
        ("llama", "sdpa", {}),
        ("gemma3", "sdpa", {}),
        ("qwen3-next", "sdpa", {}),
        # scores that tanh bends, and logits without a value
        ("gemma2", "eager", {"attn_logit_softcapping": 5.0}),
        ("gpt-oss", "eager", {}),
    ],
)
def test_equals_the_models_own_attention(
    family: str, own: str, changes: dict[str, Any], padding: int
) -> None:
    model = make_model(family, **changes)
    model.set_attn_implementation(own)
    expected = run(model, RotorQuantCache(config=model.config, **SETTINGS), padding)
    model.set_attn_implementation("rotorquant")
    cache = RotorQuantCache(config=model.config, **SETTINGS)
    torch.testing.assert_close(run(model, cache, padding), expected, rtol=1e-4, atol=1e-4)
    packed = cache.packed_layers[0]
    assert packed.calls["rotorquant"] == 5
    assert packed.store.packed_length > 0


@pytest.mark.parametrize("make_cache", [DynamicCache, StaticCache])
@pytest.mark.parametrize("padding", [0, 40])
def test_foreign_caches_are_served_by_the_host(make_cache: Any, padding: int) -> None:
    model = make_model("llama")
    options = {"max_cache_len": 320} if make_cache is StaticCache else {}
    expected = run(model, make_cache(config=model.config, **options), padding)
    model.set_attn_implementation("rotorquant")
    mine = run(model, make_cache(config=model.config, **options), padding)
    torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)


def test_without_padding_no_mask_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    model.set_attn_implementation("rotorquant")
    seen = []
    original = torch.Tensor.tril

    def note(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr("rq_hf.attention.sdpa_mask", note)
    run(model, RotorQuantCache(config=model.config, **SETTINGS))
    assert seen == []


def test_strict_reads_decoded_tokens_from_the_first_query_on() -> None:
    model = make_model("llama")
    expected = run(model, RotorQuantCache(config=model.config, strict=True))
    exact = run(model, DynamicCache(config=model.config))
    model.set_attn_implementation("rotorquant")
    mine = run(model, RotorQuantCache(config=model.config, strict=True))
    torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)
    assert (mine - exact).abs().max() > 0.01
