# SPDX-License-Identifier: Apache-2.0
"""The cache inside real model classes: generate() flows, kinds of layers, refusals, memory."""

import copy
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import DECODERS as DECODER_FACTORIES
from support.models import make_model, make_tokens
from support.oracle import make_oracle
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer, LinearAttentionLayer

from rq_hf import RotorQuantCache, RotorQuantConfig
from rq_hf.layers import RotorQuantLayer

SMALL: dict[str, Any] = {
    "residual_length": 32,
    "nbits": 4,
    "key_mean": "none",
    "balance": False,
    "value_mean": False,
}
DECODERS = ["llama", "qwen2", "mistral-sliding", "gemma3", "gpt2", "qwen3-next"]


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return make_model("llama")


def generate(model: PreTrainedModel, tokens: torch.Tensor, cache: Any, **options: Any) -> Any:
    options = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0} | options
    options.setdefault("attention_mask", torch.ones_like(tokens))
    torch.manual_seed(0)
    return model.generate(tokens, past_key_values=cache, **options)


def assert_generates_as_oracle(model: PreTrainedModel, length: int = 300, **options: Any) -> None:
    tokens = make_tokens(length, batch=2)
    cache = RotorQuantCache(config=model.config, **SMALL)
    oracle = make_oracle(cache)
    mine = generate(model, tokens, cache, **options)
    theirs = generate(model, tokens, oracle, **options)
    assert torch.equal(mine, theirs)
    assert all(x.store.packed_length > 0 for x in cache.packed_layers)


FLOWS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "long": {"max_new_tokens": 150},
}


@pytest.mark.parametrize("flow", FLOWS)
def test_generate_gives_the_oracles_tokens(llama: PreTrainedModel, flow: str) -> None:
    assert_generates_as_oracle(llama, **FLOWS[flow])


@pytest.mark.parametrize("family", DECODERS)
def test_families_generate_the_oracles_tokens(family: str) -> None:
    assert_generates_as_oracle(make_model(family))


@pytest.mark.parametrize("family", DECODERS)
def test_logits_are_the_models_own_while_nothing_is_packed(family: str) -> None:
    model = make_model(family)
    tokens = make_tokens(100)
    mine = generate(model, tokens, RotorQuantCache(config=model.config))
    assert torch.equal(mine, generate(model, tokens, DynamicCache(config=model.config)))


def test_a_left_padded_sequence_is_continued_as_it_is_alone(llama: PreTrainedModel) -> None:
    # padding of whole tiles, so that alone or padded the same tokens are packed
    alone = make_tokens(300)
    tokens = torch.cat((torch.zeros(1, 128, dtype=torch.long), alone), 1)
    tokens = torch.cat((tokens, make_tokens(428, seed=1)))
    mask = torch.ones_like(tokens)
    mask[0, :128] = 0
    settings = {**SMALL, "key_mean": "auto", "balance": True, "value_mean": True}
    for attention in ("sdpa", "eager"):
        llama.set_attn_implementation(attention)
        cache = RotorQuantCache(config=llama.config, **settings)
        padded = generate(llama, tokens, cache, attention_mask=mask)
        expected = generate(llama, alone, RotorQuantCache(config=llama.config, **settings))
        assert torch.equal(padded[:1, 128:], expected)
        assert cache.layers[0].padding.tolist() == [128, 0]
    llama.set_attn_implementation("sdpa")


def test_without_a_config_layers_appear_as_they_are_used(llama: PreTrainedModel) -> None:
    cache = RotorQuantCache(**SMALL)
    with_config = RotorQuantCache(config=llama.config, **SMALL)
    tokens = make_tokens(300)
    assert torch.equal(generate(llama, tokens, cache), generate(llama, tokens, with_config))
    assert [layer.layer_idx for layer in cache.layers] == [0, 1]


def test_layers_of_other_kinds_keep_the_hosts_classes() -> None:
    gemma = RotorQuantCache(config=make_model("gemma3").config)
    assert [type(x) for x in gemma.layers] == [DynamicSlidingWindowLayer, RotorQuantLayer]
    mistral = RotorQuantCache(config=make_model("mistral-sliding").config)
    assert [type(x) for x in mistral.layers] == [DynamicSlidingWindowLayer] * 2
    qwen3_next = RotorQuantCache(config=make_model("qwen3-next").config)
    assert [type(x) for x in qwen3_next.layers] == [LinearAttentionLayer, RotorQuantLayer]


def test_latent_attention_stays_exact_with_a_warning() -> None:
    model = make_model("deepseek-v2")
    with pytest.warns(
        UserWarning, match="latents .* are compressed already: all layers stay exact"
    ):
        cache = RotorQuantCache(config=model.config)
    assert cache.packed_layers == []
    tokens = make_tokens(200)
    mine = generate(model, tokens, cache)
    assert torch.equal(mine, generate(model, tokens, DynamicCache(config=model.config)))


def test_values_of_another_size_than_keys_stay_exact_with_a_warning() -> None:
    model = make_model("mimo-v2-flash")
    with pytest.warns(UserWarning, match="keys have 64 numbers a head and values 32, .* exact"):
        cache = RotorQuantCache(config=model.config, sliding="packed")
    tokens = make_tokens(200)
    mine = generate(model, tokens, cache)
    assert torch.equal(mine, generate(model, tokens, DynamicCache(config=model.config)))
    assert cache.describe().splitlines() == [
        "layer 0: exact (DynamicLayer)",
        "layer 1: exact (DynamicSlidingWindowLayer, window 160)",
        "nothing is packed: keys have 64 numbers a head and values 32, which tiles do not take",
    ]


def test_encoder_decoder_takes_a_pair_and_refuses_one() -> None:
    model = make_model("bart")
    with pytest.raises(ValueError, match="EncoderDecoderCache"):
        RotorQuantCache(config=model.config)
    tokens = make_tokens(20)
    with pytest.raises(ValueError, match=r"updated twice before layer 1.*EncoderDecoderCache"):
        generate(model, tokens, RotorQuantCache())
    pair = EncoderDecoderCache(RotorQuantCache(), DynamicCache())
    plain = EncoderDecoderCache(DynamicCache(), DynamicCache())
    assert torch.equal(generate(model, tokens, pair), generate(model, tokens, plain))


def test_another_model_is_refused_and_the_cache_is_as_it_was(llama: PreTrainedModel) -> None:
    cache = RotorQuantCache(config=llama.config, **SMALL)
    generate(llama, make_tokens(300), cache)
    keys = [layer.keys for layer in cache.layers]
    state = make_tokens(1).float()[:, :, None, None].expand(1, 4, 1, 64)
    with pytest.raises(ValueError, match=r"layer 0: the cache holds .*1, 2, 64.*got .1, 4, 64."):
        cache.update(state, state, 0)
    assert all(torch.equal(x.keys, k) for x, k in zip(cache.layers, keys, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 3, 50, 200])
@pytest.mark.parametrize(
    ("family", "settings"), [("llama", {}), ("llama", {"layer_bits": {0: 16}})]
)
def test_a_deeper_model_is_refused_and_the_cache_is_as_it_was(
    family: str, settings: dict[str, Any], tokens: int
) -> None:
    model, deeper = make_model(family), make_model(family, num_hidden_layers=3)
    cache = RotorQuantCache(config=model.config, **SMALL, **settings)
    for length in (0, 300):
        if length:
            model(make_tokens(length), past_key_values=cache)
        before = copy.deepcopy(cache)
        refused = "layer 2: the cache was made for a model with 2 layers; make a new one"
        with pytest.raises(ValueError, match=refused):
            deeper(make_tokens(tokens), past_key_values=cache)
        assert [layer.get_seq_length() for layer in cache.layers] == [length, length]
        logits = [model(make_tokens(5), past_key_values=one).logits for one in (cache, before)]
        assert torch.equal(*logits)
        cache.reset()


@torch.no_grad()
def test_a_shallower_model_is_told_of_at_the_next_pass(llama: PreTrainedModel) -> None:
    shallower = make_model("llama", num_hidden_layers=1)
    cache = RotorQuantCache(config=llama.config, **SMALL)
    llama(make_tokens(300), past_key_values=cache)
    before = copy.deepcopy(cache)
    for model in (llama, shallower):
        shallower(make_tokens(3), past_key_values=cache)
        with pytest.raises(
            ValueError, match=r"layer 1 .* the first 300: .* with fewer layers .* taken back"
        ):
            model(make_tokens(2), past_key_values=cache)
    logits = [llama(make_tokens(5), past_key_values=one).logits for one in (cache, before)]
    assert torch.equal(*logits)


EXACT_FIRST: list[tuple[str, dict[str, Any]]] = [("gemma3", {}), ("llama", {"layer_bits": {0: 16}})]


@pytest.mark.parametrize(("family", "settings"), EXACT_FIRST)
@pytest.mark.parametrize("length", [20, 300])
def test_an_exact_layer_in_front_refuses_what_packed_ones_do(
    family: str, settings: dict[str, Any], length: int
) -> None:
    model = make_model(family)
    cache, fresh = (RotorQuantCache(model.config, **SMALL, **settings) for _ in range(2))
    states = torch.randn(2, 2, 40, 64, generator=torch.Generator().manual_seed(0))
    refused = {
        r"layer 0: .* keys of .*\(1, 2, 64\), got \(2, 2, 64\)": states,
        r"layer 0: .* keys of .*\(1, 2, 64\), got \(1, 1, 64\)": states[:1, :1],
        r"layer 0: .* keys of .*\(1, 2, 64\), got \(1, 2, 32\)": states[:1, :, :, :32],
        r"layer 0: the cache holds torch.float32, got torch.bfloat16": states[:1].bfloat16(),
        r"layer 0: the cache is on cpu, got states on meta": states[:1].to("meta"),
    }
    with torch.no_grad():
        for each in (cache, fresh):
            model(make_tokens(length), past_key_values=each)
        for message, wrong in refused.items():
            with pytest.raises(ValueError, match=message):
                cache.update(wrong, wrong, 0)
            assert [layer.get_seq_length() for layer in cache.layers] == [length] * 2
        logits = [model(make_tokens(40), past_key_values=x).logits for x in (cache, fresh)]
    assert torch.equal(*logits)


def test_exact_layers_alone_take_what_the_hosts_do() -> None:
    model = make_model("llama")
    cache = RotorQuantCache(model.config, layer_bits={0: 16, 1: 16})
    states = torch.randn(1, 2, 40, 64)
    cache.update(states, states, 0)
    # as autocast leaves them, and in another dtype
    cache.update(states, states.bfloat16(), 0)
    keys, _ = cache.update(states.bfloat16(), states.bfloat16(), 0)
    assert keys.dtype == torch.float32 and keys.shape[2] == 120


@pytest.mark.parametrize("sliding_first", [True, False])
def test_a_crop_is_refused_before_any_layer_is_cropped(sliding_first: bool) -> None:
    kinds = ["sliding_attention", "full_attention"]
    model = DECODER_FACTORIES["gemma3"](layer_types=kinds if sliding_first else kinds[::-1]).eval()
    cache = RotorQuantCache(model.config, **SMALL)
    # with nothing stored there is nothing to crop
    cache.crop(-1)
    with torch.no_grad():
        model(make_tokens(100), past_key_values=cache)
        message = r"layer [01]: of 100 tokens it holds the newest 31, .* activate_past_recording"
        with pytest.raises(ValueError, match=message):
            cache.crop(-5)
        assert [layer.get_seq_length() for layer in cache.layers] == [100] * 2
        cache.activate_past_recording()
        model(make_tokens(10), past_key_values=cache)
    cache.crop(-4)
    assert [layer.get_seq_length() for layer in cache.layers] == [106] * 2
    # what was recorded is gone with the first crop
    with pytest.raises(ValueError, match=r"layer [01]: of 106 tokens it holds the newest 31"):
        cache.crop(-1)
    assert [layer.get_seq_length() for layer in cache.layers] == [106] * 2


def test_linear_attention_is_not_cropped() -> None:
    model = make_model("qwen3-next")
    cache = RotorQuantCache(model.config, **SMALL)
    cache.activate_past_recording()
    with torch.no_grad():
        model(make_tokens(100), past_key_values=cache)
    with pytest.raises(ValueError, match="layer 0: linear attention keeps no states of earlier"):
        cache.crop(-5)
    assert cache.layers[1].get_seq_length() == 100


def test_settings_are_checked_at_the_door(llama: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="nbits must be one of 2, 3, 4, 8, got 7"):
        RotorQuantCache(config=llama.config, nbits=7)
    with pytest.raises(ValueError, match="unknown settings: bits; accepted are nbits"):
        RotorQuantCache(config=llama.config, bits=3)
    with pytest.raises(ValueError, match="either quantization or single settings"):
        RotorQuantCache(quantization=RotorQuantConfig(), nbits=3)


@pytest.mark.parametrize("nbits", [2, 3, 4])
def test_held_bytes_are_what_the_bits_say(llama: PreTrainedModel, nbits: int) -> None:
    cache = RotorQuantCache(config=llama.config, nbits=nbits)
    states = torch.randn(1, 2, 8192, 64)
    for layer in range(2):
        cache.update(states, states, layer)
    memory = cache.memory()
    codes_and_scales = nbits + 16 / 64
    assert memory.nominal_bits == codes_and_scales
    assert memory.bits_per_number == pytest.approx(codes_and_scales, rel=1e-6)
    numbers = 2 * 2 * 2 * 64
    packed = (8192 - 4 - 128) // 128 * 128 if nbits < 4 else (8192 - 4 - 128) // 64 * 64
    assert memory.packed_numbers == packed * numbers
    # a tile's worth of spare room
    tile = 128 if nbits < 4 else 64
    assert memory.exact_bytes == (8192 - packed + tile) * numbers * 4
    assert memory.dense_bytes == 8192 * numbers * 4 == 2 * memory.dense_bf16_bytes
    parts = (memory.packed_bytes, memory.exact_bytes, memory.statistics_bytes)
    assert memory.held_bytes == sum(parts) + memory.constant_bytes
    assert memory.statistics_bytes == 2 * 4 * 2 * 64 * 4
    assert f"{codes_and_scales:.3f} nominal" in str(memory)


def test_spare_room_is_counted(llama: PreTrainedModel) -> None:
    cache = RotorQuantCache(config=llama.config, **SMALL)
    generate(llama, make_tokens(300), cache, max_new_tokens=200)
    tiles = [layer.store.tiles for layer in cache.packed_layers]
    held = sum(t.numel() * t.itemsize for x in tiles for t in x.tensors)
    assert cache.memory().packed_bytes == held


def test_describe_says_what_each_layer_holds() -> None:
    model = make_model("gemma3")
    cache = RotorQuantCache(config=model.config)
    assert "layer 1: packed, nothing stored yet" in cache.describe()
    generate(model, make_tokens(400), cache)
    first, second = cache.describe().splitlines()
    assert first == "layer 0: exact (DynamicSlidingWindowLayer, window 32)"
    assert second.startswith("layer 1: 4 exact sinks | 256 tokens packed in 2 tiles of 128")


def test_describe_tells_kept_statistics() -> None:
    model = make_model("llama")
    cache = RotorQuantCache(model.config, path="dense")
    with torch.no_grad():
        model(make_tokens(300), past_key_values=cache)
    # no query was seen
    assert cache.describe().count("balance from keys alone") == 2
    cache.reset(keep_statistics=True)
    kept = r"key mean [\w-]+, balance on, both kept from an earlier prompt"
    for i, line in enumerate(cache.describe().splitlines()):
        assert re.fullmatch(f"layer {i}: packed, nothing stored yet; {kept}", line)
    for length in (50, 300):
        with torch.no_grad():
            model(make_tokens(length), past_key_values=cache)
        assert len(re.findall(rf"{kept}\)", cache.describe())) == 2


def test_offload_keyword_is_the_hosts(llama: PreTrainedModel) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert RotorQuantCache(config=llama.config, offloading=False).offloading is False


def test_single_layers_can_be_finer_or_exact(llama: PreTrainedModel) -> None:
    tokens = make_tokens(300)
    exact = RotorQuantCache(config=llama.config, layer_bits={0: 16, 1: 16})
    assert cache_types(exact) == ["DynamicLayer", "DynamicLayer"]
    dynamic = DynamicCache(config=llama.config)
    assert torch.equal(generate(llama, tokens, exact), generate(llama, tokens, dynamic))
    fine = RotorQuantCache(config=llama.config, residual_length=0, layer_bits={0: 16, 1: 8})
    generate(llama, tokens, fine)
    assert cache_types(fine) == ["DynamicLayer", "RotorQuantLayer"]
    error = (fine.layers[1].keys - dynamic.layers[1].keys)[:, :, :260].norm()
    # eight bits leave a relative error of about sqrt(4e-5)
    assert 1e-3 < error / dynamic.layers[1].keys[:, :, :260].norm() < 1e-2


def cache_types(cache: RotorQuantCache) -> list[str]:
    return [type(layer).__name__ for layer in cache.layers]


def test_nominal_bits_are_those_of_all_layers(llama: PreTrainedModel) -> None:
    cache = RotorQuantCache(config=llama.config, layer_bits={0: 8})
    generate(llama, make_tokens(300), cache)
    memory = cache.memory()
    # 16 bits of scale for 64 numbers
    assert memory.nominal_bits == (8 + 3) / 2 + 16 / 64
    assert memory.bits_per_number == pytest.approx(memory.nominal_bits, rel=1 / 32)


def test_bits_for_layers_that_are_not_there_are_refused(llama: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=r"layer_bits names layers \[2\], the model caches 2"):
        RotorQuantCache(config=llama.config, layer_bits={1: 8, 2: 4})


def test_a_refused_first_state_adds_no_layer() -> None:
    cache = RotorQuantCache()
    states = torch.full((1, 2, 5, 64), float("nan"))
    with pytest.raises(ValueError, match="layer 3: 640 of 640 new key numbers are NaN"):
        cache.update(states, states, 3)
    assert cache.layers == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing_that_is_stored(dtype: torch.dtype) -> None:
    states = torch.randn(2, 1, 2, 400, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    plain, cast = RotorQuantLayer(RotorQuantConfig()), RotorQuantLayer(RotorQuantConfig())
    plain.update(*states)
    plain.settle()
    with torch.autocast("cpu", torch.bfloat16):
        cast.update(*states)
        cast.settle()
    assert cast.store.packed_length > 0
    assert torch.equal(cast.keys, plain.keys)
    assert torch.equal(cast.values, plain.values)


def test_presets_are_named_at_the_door(llama: PreTrainedModel) -> None:
    cache = RotorQuantCache(config=llama.config, preset="turboquant", nbits=4)
    assert cache.quantization == RotorQuantConfig.from_preset("turboquant", nbits=4)
    with pytest.raises(ValueError, match="got both: preset"):
        RotorQuantCache(quantization=RotorQuantConfig(), preset="turboquant")


def test_a_saved_prompt_is_continued_as_if_never_saved(
    llama: PreTrainedModel, tmp_path: Path
) -> None:
    prompt = make_tokens(300)
    cache = RotorQuantCache(config=llama.config)
    with torch.no_grad():
        llama(prompt, past_key_values=cache)
    cache.save(tmp_path / "prompt.safetensors")
    turn = torch.cat((prompt, make_tokens(20, seed=1)), 1)
    expected = generate(llama, turn, cache)
    loaded = RotorQuantCache.load(tmp_path / "prompt.safetensors", llama.config)
    assert torch.equal(generate(llama, turn, loaded), expected)


def test_a_cache_moves_with_all_it_holds() -> None:
    model = make_model("gemma3")
    cache = RotorQuantCache(config=model.config, residual_length=32)
    generate(model, make_tokens(300), cache)
    assert cache.to("cpu") is cache
    moved = copy.deepcopy(cache).to("meta")
    tensors = [*moved.layers[1].store.tensors(), moved.layers[1].preconditioner.balance]
    assert all(t.device.type == "meta" for t in [*tensors, moved.layers[0].keys])
    with pytest.raises(ValueError, match="layer 1: the cache is on meta, got states on cpu"):
        moved.update(torch.zeros(1, 2, 1, 64), torch.zeros(1, 2, 1, 64), 1)


def test_bits_of_a_sliding_layer_are_refused() -> None:
    config = make_model("gemma3").config
    with pytest.raises(ValueError, match=r"layers \[0\], which are not of full attention"):
        RotorQuantCache(config=config, layer_bits={0: 4})
    assert RotorQuantCache(config=config, layer_bits={0: 16, 1: 4}).packed_layers


def test_autocast_states_are_taken(llama: PreTrainedModel) -> None:
    tokens = make_tokens(300)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = generate(llama, tokens, RotorQuantCache(config=llama.config, residual_length=32))
    assert out.shape == (1, 340)
