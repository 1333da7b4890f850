# SPDX-License-Identifier: Apache-2.0
"""Handles: what attention code does to keys and values, and what happens to anything else."""

import operator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rq_hf import RotorQuantConfig, handle
from rq_hf.handle import Handle
from rq_hf.layers import RotorQuantLayer

BATCH, HEADS, DIM = 2, 2, 64


def make_states(tokens: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(BATCH, HEADS, tokens, DIM, generator=generator) for _ in range(2)]


@pytest.fixture
def layer() -> RotorQuantLayer:
    layer = RotorQuantLayer(RotorQuantConfig(residual_length=32))
    layer.update(*make_states(300))
    layer.settle()
    return layer


def next_handles(layer: RotorQuantLayer, tokens: int = 1) -> tuple[Any, Any, Tensor, Tensor]:
    key, value = layer.update(*make_states(tokens, seed=1))
    return key, value, layer.keys, layer.values


def repeat_kv(states: Tensor, repeats: int) -> Tensor:
    """What most models do for grouped queries."""
    batch, heads, tokens, dim = states.shape
    states = states[:, :, None, :, :].expand(batch, heads, repeats, tokens, dim)
    return states.reshape(batch, heads * repeats, tokens, dim)


def test_a_handle_looks_like_the_states_and_holds_none(layer: RotorQuantLayer) -> None:
    key, _, dense, _ = next_handles(layer)
    assert isinstance(key, Handle)
    assert (key.shape, key.dtype, key.device) == (dense.shape, dense.dtype, dense.device)
    assert key.size(2) == 301
    assert repr(key) == "Handle(key, shape=(2, 2, 301, 64))"
    with pytest.raises(RuntimeError):
        key.untyped_storage().data_ptr()


@pytest.mark.parametrize("tokens", [1, 5, 60])
@pytest.mark.parametrize("how", ["repeat_kv", "repeat_interleave", "enable_gqa"])
def test_sdpa_in_every_way_of_grouping(layer: RotorQuantLayer, how: str, tokens: int) -> None:
    key, value, dense_key, dense_value = next_handles(layer, tokens)
    # more than a few new tokens are read exactly by their own queries, packed only by later ones
    dense_key, dense_value = key.dense(), value.dense()
    query = torch.randn(BATCH, HEADS * 3, tokens, DIM, generator=torch.Generator().manual_seed(2))
    mask = torch.ones(tokens, 300 + tokens, dtype=torch.bool).tril(300)
    repeated = [x.repeat_interleave(3, 1) for x in (dense_key, dense_value)]
    wanted = F.scaled_dot_product_attention(query, *repeated, attn_mask=mask[None, None])
    options: dict[str, Any] = {"attn_mask": mask[None, None]}
    if how == "repeat_kv":
        key, value = repeat_kv(key, 3), repeat_kv(value, 3)
    elif how == "repeat_interleave":
        key, value = (torch.repeat_interleave(x, 3, dim=1) for x in (key, value))
    else:
        options["enable_gqa"] = True
    before = dict(layer.calls)
    out = F.scaled_dot_product_attention(query, key.contiguous(), value, **options)
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)
    assert layer.calls["sdpa"] == before.get("sdpa", 0) + 1
    assert not any(door.startswith("decoded") for door in layer.calls)


def test_eager_attention_by_two_products(layer: RotorQuantLayer) -> None:
    key, value, dense_key, dense_value = next_handles(layer)
    query = torch.randn(BATCH, HEADS * 2, 1, DIM)
    key, value = repeat_kv(key, 2), repeat_kv(value, 2)
    weights = torch.matmul(query, key.transpose(2, 3))
    wanted = query @ dense_key.repeat_interleave(2, 1).transpose(2, 3)
    torch.testing.assert_close(weights, wanted, rtol=1e-4, atol=1e-4)
    out = torch.matmul(wanted.softmax(-1), value)
    wanted = wanted.softmax(-1) @ dense_value.repeat_interleave(2, 1)
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)
    assert layer.calls["eager"] == 1


def test_another_dtype_is_a_handle_still(layer: RotorQuantLayer) -> None:
    key, _, dense, _ = next_handles(layer)
    for half in (key.to(torch.bfloat16), key.to(torch.bfloat16)[:, :, :, :]):
        assert isinstance(half, Handle)
        assert half.dtype == torch.bfloat16
        assert torch.equal(half.dense(), dense.bfloat16())
    assert isinstance(key.float(), Handle)


def test_an_unknown_operation_decodes_and_says_so_once(
    layer: RotorQuantLayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handle, "_warned", set())
    key, _, dense, _ = next_handles(layer)
    with pytest.warns(UserWarning, match=r"operation 'exp' is not known on packed keys") as seen:
        torch.testing.assert_close(key.exp(), dense.exp())
        torch.testing.assert_close(key.exp(), dense.exp())
    assert len(seen) == 1
    assert layer.calls["decoded for exp"] == 2
    assert key.source.dense("key") is key.source.dense("key")


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x[:, :1],
        lambda x: x[..., :32],
        lambda x: x[:, :, -5:],
        lambda x: x.transpose(1, 2),
        lambda x: x.reshape(BATCH * HEADS, -1, DIM),
        lambda x: torch.cat((x, x), 2),
        lambda x: x.permute(0, 2, 1, 3),
        lambda x: x.to("cpu", copy=True),
        lambda x: x[0],
    ],
)
@pytest.mark.filterwarnings("ignore:the operation")
def test_other_shapes_are_right_if_slower(layer: RotorQuantLayer, operation: Any) -> None:
    key, _, dense, _ = next_handles(layer)
    assert torch.equal(operation(key), operation(dense))


def assign(states: Tensor) -> None:
    states[..., :32] = 0


def set_data(states: Tensor) -> None:
    states.data = torch.zeros(1)


WRITING = {
    "setitem": assign,
    "data": set_data,
    "mul_": lambda x: x.mul_(2),
    "add_": lambda x: operator.iadd(x, 1),
    "copy_": lambda x: x.copy_(torch.ones(x.shape)),
    "zero_": torch.nn.init.zeros_,
    "masked_fill_": lambda x: x.masked_fill_(torch.ones(x.shape, dtype=torch.bool), 0.0),
    "relu_": lambda x: F.relu(x, inplace=True),
    "add": lambda x: torch.add(torch.ones(x.shape), 1, out=x),
    "_foreach_mul_": lambda x: torch._foreach_mul_([torch.ones(1), x], 2),
    "transpose_": lambda x: x.transpose_(1, 2),
    "resize_": lambda x: x.resize_(1),
}


@pytest.mark.parametrize("operation", WRITING)
@pytest.mark.parametrize("which", ["key", "value", "transposed", "repeated", "prompt"])
def test_writing_is_refused_and_changes_nothing(operation: str, which: str) -> None:
    layer = RotorQuantLayer(RotorQuantConfig(residual_length=32))
    key, value = layer.update(*make_states(300))
    if which != "prompt":
        layer.settle()
        key, value = layer.update(*make_states(1, seed=1))
    seen = {"transposed": key.transpose(2, 3), "repeated": repeat_kv(key, 3), "value": value}
    role = "values" if which == "value" else "keys"
    calls = dict(layer.calls)
    with pytest.raises(RuntimeError, match=rf"'{operation}' would write to packed {role}") as error:
        WRITING[operation](seen.get(which, key))
    assert f"{role}.clone()" in str(error.value)
    assert layer.calls == calls
    twin = RotorQuantLayer(RotorQuantConfig(residual_length=32))
    states = [twin.update(*make_states(300))]
    if which != "prompt":
        twin.settle()
        states.append(twin.update(*make_states(1, seed=1)))
    assert all(
        torch.equal(mine.dense(), theirs.dense())
        for mine, theirs in zip((key, value), states[-1], strict=True)
    )
    query = torch.randn(BATCH, HEADS, 1, DIM, generator=torch.Generator().manual_seed(2))
    mine = F.scaled_dot_product_attention(query, key, value)
    assert torch.equal(mine, F.scaled_dot_product_attention(query, *states[-1]))
    assert torch.equal(layer.keys, twin.keys)


@pytest.mark.filterwarnings("ignore:the operation")
def test_a_copy_can_be_written_to_and_a_handle_copied_from(layer: RotorQuantLayer) -> None:
    _, value, _, dense = next_handles(layer)
    copied = value.clone()
    copied[..., :32] = 0
    assert not copied[..., :32].any()
    for fill in (lambda x: x.copy_(value), lambda x: x.__setitem__(..., value)):
        other = torch.zeros(value.shape)
        fill(other)
        assert torch.equal(other, dense)
    assert torch.equal(torch.add(value, 1, out=torch.empty(value.shape)), dense + 1)


@pytest.mark.filterwarnings("ignore:the operation")
def test_what_packed_attention_cannot_do_is_left_to_the_host(layer: RotorQuantLayer) -> None:
    key, value, dense_key, dense_value = next_handles(layer, 5)
    query = torch.randn(BATCH, HEADS, 5, DIM, requires_grad=True)
    out = F.scaled_dot_product_attention(query, key, value)
    wanted = F.scaled_dot_product_attention(query, dense_key, dense_value)
    torch.testing.assert_close(out, wanted)
    (gradient,) = torch.autograd.grad(out.sum(), query)
    (expected,) = torch.autograd.grad(wanted.sum(), query)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.filterwarnings("ignore:the operation")
def test_keys_in_the_place_of_values_are_keys(layer: RotorQuantLayer) -> None:
    key, _, dense_key, _ = next_handles(layer)
    query = torch.randn(BATCH, HEADS, 1, DIM, generator=torch.Generator().manual_seed(2))
    out = F.scaled_dot_product_attention(query, key, key)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(query, dense_key, dense_key))


def test_dense_path_and_unfit_attention_get_tensors() -> None:
    dense = RotorQuantLayer(RotorQuantConfig(path="dense"))
    unfit = RotorQuantLayer(RotorQuantConfig(), gives_handles=lambda: False)
    for layer in (dense, unfit):
        layer.update(*make_states(400))
        key, value = layer.update(*make_states(1, seed=1))
        assert type(key) is type(value) is Tensor
        assert layer.store.packed_length > 0
        assert layer.calls == {"dense": 2}
