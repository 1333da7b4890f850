# SPDX-License-Identifier: Apache-2.0
"""One layer: what is read after any sequence of calls equals the oracle's numbers."""

import copy

import pytest
import torch
from support.oracle import OracleLayer
from torch import Tensor

from rq_hf import RotorQuantConfig
from rq_hf.layers import RotorQuantLayer

# small lengths, so that tiles fill within few tokens; statistics have tests of their own
PLAIN = {"key_mean": "none", "balance": False, "value_mean": False, "path": "dense"}
SMALL = {"residual_length": 32, "sink_length": 4, **PLAIN}
SETTINGS = {
    "3-bit": RotorQuantConfig(**SMALL),
    "2-bit": RotorQuantConfig(nbits=2, **SMALL),
    "4-bit": RotorQuantConfig(nbits=4, **SMALL),
    "k4v2-rotor-norm": RotorQuantConfig(
        key_bits=4, value_bits=2, rotation="rotor", scale="norm", **SMALL
    ),
    "prod": RotorQuantConfig(key_codec="prod", **SMALL),
    "no-sinks": RotorQuantConfig(sink_length=0, residual_length=0, **PLAIN),
    "strict": RotorQuantConfig(strict=True, **PLAIN),
}


def make_states(tokens: int, seed: int, *, batch: int = 2, head_dim: int = 64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, 2, tokens, head_dim)
    return [torch.randn(shape, generator=generator) for _ in range(2)]


def both(config: RotorQuantConfig) -> tuple[RotorQuantLayer, OracleLayer]:
    return RotorQuantLayer(config), OracleLayer(config)


def assert_same(layer: RotorQuantLayer, oracle: OracleLayer) -> None:
    assert layer.get_seq_length() == oracle.get_seq_length()
    for mine, theirs in zip((layer.keys, layer.values), oracle.read(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.fixture(params=SETTINGS)
def config(request: pytest.FixtureRequest) -> RotorQuantConfig:
    return SETTINGS[request.param]


@pytest.mark.parametrize("chunks", [(1, 2, 3), (500,), (3, 300, 1, 1, 200), (170, 1, 1)])
def test_updates_of_any_length_read_as_the_oracle(
    config: RotorQuantConfig, chunks: tuple[int, ...]
) -> None:
    layer, oracle = both(config)
    for seed, tokens in enumerate(chunks):
        states = make_states(tokens, seed)
        for mine, theirs in zip(layer.update(*states), oracle.update(*states), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
        assert_same(layer, oracle)


def test_token_by_token_and_at_once_give_the_same_codes() -> None:
    keys, values = make_states(400, seed=0)
    at_once, single = (RotorQuantLayer(SETTINGS["3-bit"]) for _ in range(2))
    at_once.update(keys, values)
    for i in range(400):
        single.update(keys[:, :, i : i + 1], values[:, :, i : i + 1])
    assert single.store.packed_length == at_once.store.packed_length == 256
    for mine, theirs in zip(single.store.tiles.view(), at_once.store.tiles.view(), strict=True):
        assert torch.equal(mine, theirs)


def test_the_packed_part_is_far_from_the_exact_one() -> None:
    # guards the tests above: were nothing quantised, they would all pass
    layer = RotorQuantLayer(SETTINGS["3-bit"])
    keys, values = make_states(400, seed=0)
    layer.update(keys, values)
    packed = slice(4, 4 + layer.store.packed_length)
    error = (layer.keys - keys)[:, :, packed].square().mean()
    assert 0.01 < error < 0.05
    assert torch.equal(layer.keys[:, :, packed.stop :], keys[:, :, packed.stop :])
    assert torch.equal(layer.values[:, :, :4], values[:, :, :4])


@pytest.mark.parametrize("removed", [1, 40, 150, 261, 300, 398, 400, 1000])
def test_cropped_then_continued_reads_as_the_oracle(removed: int) -> None:
    layer, oracle = both(SETTINGS["3-bit"])
    states = make_states(400, seed=0)
    layer.update(*states)
    oracle.update(*states)
    before = [t.clone() for t in layer.store.tiles.view()]
    layer.crop(-removed)
    oracle.crop(-min(removed, 400))
    if removed < 400:
        assert_same(layer, oracle)
        kept = layer.store.tiles.length
        for old, new in zip(before, layer.store.tiles.view(), strict=True):
            assert torch.equal(old[:, :, :kept], new)
    else:
        assert layer.get_seq_length() == 0
        oracle.reset()
    for seed, tokens in ((1, 1), (2, 190), (3, 1)):
        more = make_states(tokens, seed)
        layer.update(*more)
        oracle.update(*more)
        assert_same(layer, oracle)


def test_sequences_can_be_reordered_selected_and_repeated() -> None:
    layer, oracle = both(SETTINGS["3-bit"])
    states = make_states(400, seed=0, batch=3)
    layer.update(*states)
    oracle.update(*states)
    for change in (
        lambda x: x.reorder_cache(torch.tensor([2, 0, 0])),
        lambda x: x.batch_repeat_interleave(2),
        lambda x: x.batch_select_indices(torch.tensor([5, 1])),
        lambda x: x.batch_select_indices(torch.tensor([True, False])),
    ):
        change(layer)
        change(oracle)
        assert_same(layer, oracle)
    more = make_states(200, seed=1, batch=1)
    layer.update(*more)
    oracle.update(*more)
    assert_same(layer, oracle)


def test_a_copy_lives_its_own_life() -> None:
    layer = RotorQuantLayer(SETTINGS["3-bit"])
    layer.update(*make_states(400, seed=0))
    keys = layer.keys
    other = copy.deepcopy(layer)
    other.update(*make_states(300, seed=1))
    assert torch.equal(layer.keys, keys)
    assert torch.equal(other.keys[:, :, : 4 + 256], keys[:, :, : 4 + 256])


def test_reset_forgets_and_allows_another_batch_and_dtype() -> None:
    layer = RotorQuantLayer(SETTINGS["3-bit"])
    layer.update(*make_states(400, seed=0))
    layer.reset()
    assert layer.get_seq_length() == 0
    assert layer.keys is None
    layer.update(*(x.bfloat16() for x in make_states(10, seed=1, batch=5)))
    assert layer.keys.shape == (5, 2, 10, 64)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_head_dims_and_dtypes(head_dim: int, dtype: torch.dtype) -> None:
    layer = RotorQuantLayer(SETTINGS["4-bit"])
    keys, values = (x.to(dtype) for x in make_states(300, seed=0, head_dim=head_dim))
    layer.update(keys, values)
    assert layer.keys.dtype == dtype
    for mine, exact in ((layer.keys, keys), (layer.values, values)):
        relative = (mine - exact).float().norm() / exact.float().norm()
        # four bits leave a relative error of sqrt(0.0095); decoding to zero would leave 1
        assert 0.03 < relative < 0.11


def test_states_in_inference_mode_then_outside() -> None:
    layer, oracle = both(SETTINGS["3-bit"])
    with torch.inference_mode():
        states = make_states(300, seed=0)
        layer.update(*states)
    oracle.update(*(x.clone() for x in states))
    more = make_states(1, seed=1)
    layer.update(*more)
    oracle.update(*more)
    assert_same(layer, oracle)


def test_prefill_with_gradients_returns_them_and_stores_none() -> None:
    layer = RotorQuantLayer(SETTINGS["3-bit"])
    keys, values = (x.requires_grad_() for x in make_states(300, seed=0))
    returned, _ = layer.update(keys, values)
    assert returned.requires_grad
    assert not any(t.requires_grad for t in layer.store.tensors())


def test_mask_sizes_count_stored_and_new_tokens() -> None:
    layer = RotorQuantLayer(SETTINGS["3-bit"])
    assert layer.get_mask_sizes(7) == (7, 0)
    layer.update(*make_states(300, seed=0))
    assert layer.get_mask_sizes(1) == (301, 0)
    assert layer.get_max_length() == -1


def refused_states() -> dict[str, tuple[list[Tensor], str]]:
    keys, values = make_states(3, seed=9)
    nan = keys.clone()
    nan[1, 1, 2, 3] = float("nan")
    infinite = values.clone()
    infinite[0, 0, 0, 0] = float("inf")
    return {
        "nan": ([nan, values], "1 of 768 new key numbers are NaN"),
        "inf": ([keys, infinite], "1 of 768 new value numbers are NaN or infinite"),
        "head_dim": (make_states(3, 9, head_dim=128), "holds .* got .2, 2, 128."),
        "tiny head_dim": (make_states(3, 9, head_dim=8), "head_dim must be 16 to 512, got 8"),
        "batch": (make_states(3, 9, batch=1), "holds .* got .1, 2, 64."),
        "dtype": ([keys.bfloat16(), values.bfloat16()], "holds torch.float32, got torch.bfloat16"),
        "float64": (
            [keys.double(), values.double()],
            "keys and values must be float32, bfloat16 or float16",
        ),
        "integer": (
            [keys.long(), values.long()],
            "keys and values must be float32, bfloat16 or float16",
        ),
        "integer values": ([keys, values.long()], "got torch.float32 and torch.int64"),
        "rank": ([keys[0], values[0]], "must be .batch, kv_heads, tokens, head_dim."),
        "shapes": ([keys, values[:, :, :2]], "must have one shape"),
    }


@pytest.mark.parametrize("name", refused_states())
def test_refused_states_leave_the_layer_as_it_was(name: str) -> None:
    states, message = refused_states()[name]
    layer = RotorQuantLayer(SETTINGS["3-bit"], layer_idx=5)
    layer.update(*make_states(300, seed=0))
    keys, values = layer.keys, layer.values
    with pytest.raises(ValueError, match=f"layer 5: .*{message}"):
        layer.update(*states)
    assert torch.equal(layer.keys, keys)
    assert torch.equal(layer.values, values)
    layer.update(*make_states(3, seed=9))


def test_values_are_looked_at_as_they_are_kept() -> None:
    layer = RotorQuantLayer(SETTINGS["3-bit"], layer_idx=5)
    keys, values = make_states(3, seed=9)
    values[0, 0, 0, 0] = 1e6
    with pytest.raises(ValueError, match="1 of 768 new value numbers are NaN or infinite"):
        layer.update(keys.half(), values)
    assert layer.get_seq_length() == 0


def test_packing_that_fails_leaves_the_layer_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = RotorQuantLayer(SETTINGS["3-bit"])
    # one token short of a tile that leaves
    layer.update(*make_states(4 + 32 + 127, seed=0))
    keys = layer.keys

    def fail(*args: Tensor) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(layer.codec, "encode", fail)
        for _ in range(2):
            with pytest.raises(MemoryError):
                layer.update(*make_states(1, seed=1))
            assert torch.equal(layer.keys, keys)
    layer.update(*make_states(1, seed=1))
    assert layer.store.packed_length == 128


def test_positive_crop_is_refused() -> None:
    layer = RotorQuantLayer(SETTINGS["3-bit"])
    layer.update(*make_states(300, seed=0))
    with pytest.raises(ValueError, match="minus the number of tokens"):
        layer.crop(10)
    assert layer.get_seq_length() == 300


def test_offload_and_prefetch_keep_the_numbers() -> None:
    layer = RotorQuantLayer(SETTINGS["3-bit"])
    layer.update(*make_states(300, seed=0))
    keys = layer.keys
    layer.offload()
    # read on the device of the states, and away again
    assert torch.equal(layer.keys, keys)
    layer.prefetch()
    assert torch.equal(layer.keys, keys)
