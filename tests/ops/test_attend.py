# SPDX-License-Identifier: Apache-2.0
"""Attention from packed tiles against float64 attention over the decoded tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rq_hf import RotorQuantConfig
from rq_hf.layers import RotorQuantLayer
from rq_hf.ops import LayerView, attend
from rq_hf.ops.reference import mix, scores
from rq_hf.quant.rope import RopeTable

BATCH, KV_HEADS = 2, 2


def make_view(tokens: int, *, head_dim: int = 64, padding: int = 0, **settings: Any) -> LayerView:
    """A view of a layer whose keys have a mean before and after RoPE, and uneven channels."""
    generator = torch.Generator().manual_seed(tokens)
    shape = (BATCH, KV_HEADS, tokens, head_dim)
    key, value = (torch.randn(shape, generator=generator) for _ in range(2))
    key = key * torch.linspace(0.2, 3, head_dim) + 2
    rope = RopeTable(1000.0 ** -torch.linspace(0, 1, head_dim // 2))
    config = RotorQuantConfig(**{"residual_length": 32, **settings})
    layer = RotorQuantLayer(config, rope=rope)
    layer.update(rope.rotate(key, 0), value + 1)
    if padding:
        layer.statistics.padding = torch.tensor([padding, 0])
    layer.settle()
    return layer.view()


def make_query(view: LayerView, group: int, queries: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    head_dim = view.codec.head_dim
    return torch.randn(BATCH, KV_HEADS * group, queries, head_dim, generator=generator)


def expected(
    query: Tensor,
    view: LayerView,
    *,
    visible: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float,
) -> Tensor:
    """Softmax attention written out, float64; a row with nothing visible gives 0."""
    key, value = (x.double() for x in view.dense())
    group = query.shape[1] // KV_HEADS
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    logits = query.double() @ key.transpose(2, 3) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    weights = logits.exp() if bias is None else (logits + bias).exp()
    if visible is not None:
        weights = weights * visible
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + sinks.double().exp()[None, :, None, None]
    return torch.where(total > 0, weights / total, 0.0) @ value


def check(actual: Tensor, wanted: Tensor) -> None:
    # float32 sums of a few hundred terms of order 1
    torch.testing.assert_close(actual.double(), wanted, rtol=1e-4, atol=2e-5)
    assert wanted.abs().max() > 0.1


SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "4-bit": {"nbits": 4},
    "k2v4": {"key_bits": 2, "value_bits": 4},
    "prod": {"key_codec": "prod"},
    "prod-gaussian": {"key_codec": "prod", "sketch": "gaussian", "estimator": "unbiased"},
    "dense-beta": {"rotation": "dense", "codebook": "beta", "scale": "norm"},
    "post-rope": {"key_mean": "post_rope"},
    "no-mean": {"key_mean": "none", "value_mean": False, "balance": False},
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize(("group", "queries"), [(1, 1), (4, 1), (7, 5)])
def test_every_setting_group_and_number_of_queries(name: str, group: int, queries: int) -> None:
    view = make_view(420, **SETTINGS[name])
    assert view.packed_length > 0
    query = make_query(view, group, queries)
    check(attend(query, view, scale=0.1), expected(query, view, scale=0.1))


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_head_dims(head_dim: int) -> None:
    view = make_view(300, head_dim=head_dim)
    query = make_query(view, 2, 1)
    check(attend(query, view, scale=0.05), expected(query, view, scale=0.05))


@pytest.mark.parametrize("tokens", [2, 4, 5, 163, 164, 165, 700])
def test_lengths_around_sinks_and_tiles(tokens: int) -> None:
    view = make_view(tokens)
    assert view.length == tokens
    query = make_query(view, 2, 2)
    check(attend(query, view, scale=0.1), expected(query, view, scale=0.1))


def test_causal_queries_are_the_newest_tokens() -> None:
    view = make_view(420)
    query = make_query(view, 2, 9)
    visible = torch.ones(9, 420).tril(411)
    wanted = expected(query, view, scale=0.1, visible=visible)
    check(attend(query, view, scale=0.1, causal=True), wanted)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 5), (2, 4, 5), (1, 4, 1)])
@pytest.mark.parametrize("kind", ["bool", "float", "longer"])
def test_masks_of_any_broadcastable_shape(shape: tuple[int, ...], kind: str) -> None:
    view = make_view(420)
    query = make_query(view, 2, 5)
    generator = torch.Generator().manual_seed(1)
    visible = torch.rand(*shape, 420, generator=generator) < 0.5
    wanted = expected(query, view, scale=0.1, visible=visible)
    mask = visible
    if kind == "float":
        bias = torch.randn(*shape, 420, generator=generator)
        mask = bias.masked_fill(~visible, torch.finfo(torch.float32).min)
        wanted = expected(query, view, scale=0.1, visible=visible, bias=bias)
    if kind == "longer":
        mask = torch.cat((visible, torch.ones(*shape, 30, dtype=torch.bool)), -1)
    check(attend(query, view, scale=0.1, mask=mask), wanted)


def test_a_row_with_everything_hidden_gives_zero() -> None:
    view = make_view(420)
    query = make_query(view, 2, 3)
    mask = torch.ones(2, 1, 3, 420, dtype=torch.bool)
    mask[1, :, 2] = False
    out = attend(query, view, scale=0.1, mask=mask)
    assert (out[1, :, 2] == 0).all()
    assert (out[1, :, 1] != 0).all()


def test_softcap_and_attention_sinks() -> None:
    view = make_view(420)
    query = 3 * make_query(view, 2, 2)
    logits = torch.tensor([0.5, 4.0, -1.0, 6.0])
    options: dict[str, Any] = {"scale": 0.2, "softcap": 3.0, "sinks": logits}
    check(attend(query, view, **options), expected(query, view, **options))
    plain = attend(query, view, scale=0.2)
    assert (attend(query, view, **options) - plain).abs().max() > 0.1


@pytest.mark.parametrize("padding", [1, 3, 90, 200])
def test_left_padding_moves_the_sinks(padding: int) -> None:
    view = make_view(420, padding=padding)
    assert view.sinks.index.tolist()[0] == list(range(padding, padding + 4))
    query = make_query(view, 2, 3)
    visible = torch.ones(2, 1, 1, 420, dtype=torch.bool)
    visible[0, ..., :padding] = False
    out = attend(query, view, scale=0.1, mask=visible)
    check(out, expected(query, view, scale=0.1, visible=visible))


@pytest.mark.parametrize("padding", [0, 3, 90])
def test_scores_and_mix_are_the_two_halves(padding: int) -> None:
    view = make_view(420, padding=padding)
    query = make_query(view, 2, 3)
    key, value = (x.repeat_interleave(2, 1) for x in view.dense())
    wanted = query @ key.transpose(2, 3)
    actual = scores(query, view)
    # below the padding scores are arbitrary
    torch.testing.assert_close(actual[..., padding:], wanted[..., padding:], rtol=1e-4, atol=1e-3)
    weights = torch.rand(2, 4, 3, 420, generator=torch.Generator().manual_seed(2))
    weights[0, ..., :padding] = 0
    torch.testing.assert_close(mix(weights, view), weights @ value, rtol=1e-4, atol=1e-3)


def test_a_small_working_memory_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    view = make_view(1500)
    query = make_query(view, 2, 3)
    at_once = attend(query, view, scale=0.1)
    monkeypatch.setattr("rq_hf.ops.reference._NUMBERS_AT_ONCE", 1)
    torch.testing.assert_close(attend(query, view, scale=0.1), at_once, rtol=1e-5, atol=1e-6)


def test_autocast_changes_nothing() -> None:
    view = make_view(420)
    query = make_query(view, 2, 3)
    wanted = attend(query, view, scale=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attend(query, view, scale=0.1), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_result_has_the_querys_dtype(dtype: torch.dtype) -> None:
    view = make_view(300)
    query = make_query(view, 2, 1).to(dtype)
    out = attend(query, view, scale=0.1)
    assert out.dtype == dtype
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    wanted = expected(query, view, scale=0.1)
    assert (out.double() - wanted).abs().max() <= 4 * eps * wanted.abs().max() + 2e-5


@pytest.mark.parametrize(
    ("query", "options", "message"),
    [
        (torch.zeros(2, 4, 1, 128), {}, "query must be .2, heads, queries, 64."),
        (torch.zeros(3, 4, 1, 64), {}, "query must be .2, heads, queries, 64."),
        (torch.zeros(2, 3, 1, 64), {}, "multiple of 2 KV heads, got 3"),
        (torch.zeros(2, 4, 1, 64), {"mask": torch.ones(2, 1, 1, 9)}, "at least 300"),
        (torch.zeros(2, 4, 1, 64), {"mask": torch.ones(3, 1, 1, 300)}, "mask must be"),
        (torch.zeros(2, 4, 1, 64), {"sinks": torch.ones(3)}, "sinks must hold one logit"),
    ],
)
def test_wrong_shapes_are_refused(query: Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attend(query, make_view(300), scale=0.1, **options)
