# SPDX-License-Identifier: Apache-2.0
"""The attention kernels against the float64 reference on the same packed words.

On a GPU all of them; without one, those that Triton's interpreter can run: tiles in plain order.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor

from rq_hf import RotorQuantConfig
from rq_hf.layers import RotorQuantLayer
from rq_hf.ops import LayerView, attend
from rq_hf.quant.rope import RopeTable

pytest.importorskip("triton")

TOLERANCE = 2e-4
KV_HEADS = 2


def make_view(
    tokens: int,
    head_dim: int,
    device: torch.device,
    *,
    batch: int = 2,
    padding: list[int] | None = None,
    dtype: torch.dtype = torch.float32,
    interleaved: bool = False,
    rotary: float = 1.0,
    **settings: Any,
) -> LayerView:
    """A view of a layer whose keys have a mean before and after RoPE, and uneven channels."""
    generator = torch.Generator().manual_seed(tokens + head_dim)
    shape = (batch, KV_HEADS, tokens, head_dim)
    key, value = (torch.randn(shape, generator=generator) for _ in range(2))
    key = key * torch.linspace(0.2, 2, head_dim) + torch.randn(head_dim, generator=generator)
    pairs = int(head_dim * rotary) // 2
    rope = RopeTable(10000.0 ** -torch.linspace(0, 1, pairs), interleaved=interleaved)
    layer = RotorQuantLayer(RotorQuantConfig(**{"residual_length": 40, **settings}), rope=rope)
    layer.update(rope.rotate(key, 0).to(device, dtype), (value + 1).to(device, dtype))
    if padding is not None:
        layer.statistics.padding = torch.tensor(padding, device=device)
    layer.settle()
    return layer.view()


def make_query(view: LayerView, group: int, queries: int) -> Tensor:
    batch, _, _, head_dim = view.sinks.keys.shape
    generator = torch.Generator().manual_seed(group * queries)
    query = torch.randn(batch, KV_HEADS * group, queries, head_dim, generator=generator)
    return query.to(view.records.device, view.sinks.keys.dtype)


def check(view: LayerView, query: Tensor, *, tolerance: float = TOLERANCE, **options: Any) -> None:
    wanted = attend(query.double(), view, scale=0.1, impl="reference", **options)
    actual = attend(query, view, scale=0.1, impl="triton", **options)
    assert actual.dtype == query.dtype and actual.isfinite().all()
    assert wanted.norm() > 0.1 * wanted.numel() ** 0.5
    assert (actual - wanted).norm() <= tolerance * wanted.norm()
    again = attend(query, view, scale=0.1, impl="triton", **options)
    assert torch.equal(actual, again)


gpu_alone = pytest.mark.gpu
HEAD_DIMS = [80, *(pytest.param(d, marks=gpu_alone) for d in (64, 128, 256))]


def place(head_dim: int) -> torch.device:
    """Plain order runs on the GPU where there is one, fragment order there alone."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize(
    ("key_bits", "value_bits"), [(2, 2), (3, 3), (4, 4), (2, 4), (4, 3), (3, 2), (2, 3)]
)
def test_bits(head_dim: int, key_bits: int, value_bits: int) -> None:
    view = make_view(500, head_dim, place(head_dim), key_bits=key_bits, value_bits=value_bits)
    check(view, make_query(view, 4, 1))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("key_bits", [2, 3, 4])
@pytest.mark.parametrize("estimator", ["mmse", "unbiased"])
def test_signs_of_a_sketch(head_dim: int, key_bits: int, estimator: str) -> None:
    settings = {"key_codec": "prod", "key_bits": key_bits, "estimator": estimator}
    view = make_view(400, head_dim, place(head_dim), **settings)
    check(view, make_query(view, 4, 1))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize(
    ("group", "queries"), [(1, 1), (2, 3), (7, 1), (8, 1), (16, 1), (3, 7), (2, 32)]
)
def test_groups_and_queries(head_dim: int, group: int, queries: int) -> None:
    view = make_view(300, head_dim, place(head_dim))
    check(view, make_query(view, group, queries), causal=True)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize(("group", "queries"), [(3, 3), (8, 1), (1, 1)])
@pytest.mark.parametrize("multiprocessors", [1, 10**6])
def test_small_and_large_gpus(
    monkeypatch: pytest.MonkeyPatch, head_dim: int, group: int, queries: int, multiprocessors: int
) -> None:
    """One merges all rows of a unit in a program and keeps wide words in registers, one neither."""
    from rq_hf.ops.triton import attend_launch, replay, workspace

    monkeypatch.setattr(workspace, "processors", lambda device: multiprocessors)
    monkeypatch.setattr(attend_launch, "processors", lambda device: multiprocessors)
    # a signature says nothing of the GPU, which a process does not change
    monkeypatch.setattr(replay, "_replays", OrderedDict())
    view = make_view(420, head_dim, place(head_dim), padding=[170, 0])
    query = make_query(view, group, queries)
    mask = torch.ones(2, 1, queries, view.length, dtype=torch.bool, device=query.device)
    mask[1, :, 0] = False
    sinks = torch.linspace(-2, 5, group * KV_HEADS, device=query.device)
    check(view, query, mask=mask, sinks=sinks)
    hidden = attend(query, view, scale=0.1, mask=mask, impl="triton")[1, :, 0]
    assert hidden.abs().max() == 0


@pytest.mark.parametrize("head_dim", [96, 112, 160, 192])
@pytest.mark.parametrize("queries", [1, 3])
def test_head_dims_in_plain_order(head_dim: int, queries: int) -> None:
    view = make_view(300, head_dim, place(head_dim), padding=[30, 0])
    check(view, make_query(view, 4, queries), causal=True)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 43, 44, 45, 171, 172, 173, 1111])
def test_lengths(head_dim: int, tokens: int) -> None:
    view = make_view(tokens, head_dim, place(head_dim))
    check(view, make_query(view, 4, 1))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("kind", ["none", "bool", "float", "one-head", "softcap", "sinks"])
def test_masks_padding_softcap_and_sinks(head_dim: int, kind: str) -> None:
    view = make_view(420, head_dim, place(head_dim), padding=[170, 0])
    query = make_query(view, 4, 3)
    generator = torch.Generator().manual_seed(1)
    shape = (2, 1 if kind == "one-head" else 8, 3, view.length + 5)
    noise = torch.randn(shape, generator=generator).to(query.device)
    options: dict[str, Any] = {"causal": kind in ("none", "softcap")}
    if kind in ("bool", "one-head"):
        options["mask"] = noise > 0
    if kind == "float":
        options["mask"] = noise.masked_fill(noise > 1, -torch.inf)
    if kind == "softcap":
        options["softcap"] = 2.0
    if kind == "sinks":
        options["sinks"] = torch.linspace(-2, 5, 8, device=query.device)
    check(view, query, **options)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_a_row_with_everything_hidden_gives_zero(head_dim: int) -> None:
    view = make_view(300, head_dim, place(head_dim))
    query = make_query(view, 4, 2)
    mask = torch.ones(2, 1, 2, view.length, dtype=torch.bool, device=query.device)
    mask[1, :, 0] = False
    out = attend(query, view, scale=0.1, mask=mask, impl="triton")
    assert out[1, :, 0].abs().max() == 0
    assert out[1, :, 1].abs().max() > 0.01


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("key_mean", ["none", "post_rope", "pre_rope"])
@pytest.mark.parametrize(("interleaved", "rotary"), [(True, 1.0), (False, 0.5)])
def test_means(head_dim: int, key_mean: str, interleaved: bool, rotary: float) -> None:
    turns: dict[str, Any] = {"interleaved": interleaved, "rotary": rotary}
    view = make_view(400, head_dim, place(head_dim), key_mean=key_mean, **turns)
    check(view, make_query(view, 4, 1))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("rotation", ["rotor", "butterfly", "dense", "none"])
def test_rotations(head_dim: int, rotation: str) -> None:
    view = make_view(300, head_dim, place(head_dim), rotation=rotation)
    check(view, make_query(view, 4, 1))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_query_reads_packed_tokens_up_to_its_own(head_dim: int) -> None:
    view = make_view(310, head_dim, place(head_dim), strict=True)
    assert view.packed_length == 306
    check(view, make_query(view, 4, 20), causal=True)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_by_the_rounding_of_the_result(
    head_dim: int, dtype: torch.dtype
) -> None:
    view = make_view(400, head_dim, place(head_dim), dtype=dtype)
    # results lie anywhere between two numbers of the type
    check(view, make_query(view, 4, 1), tolerance=torch.finfo(dtype).eps)


def test_a_sketch_of_another_size_is_refused() -> None:
    view = make_view(300, 64, place(64), key_codec="prod", sketch_size=128)
    query = make_query(view, 4, 1)
    with pytest.raises(ValueError, match=r"impl='triton' cannot run: (a sketch|tiles in fragment)"):
        attend(query, view, scale=0.1, impl="triton")
    assert attend(query, view, scale=0.1).isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 64])
def test_long_contexts(batch: int) -> None:
    view = make_view(3000, 128, torch.device("cuda"), batch=batch)
    check(view, make_query(view, 4, 1))
