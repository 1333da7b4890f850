# SPDX-License-Identifier: Apache-2.0
"""Saved and loaded: the same bits, the same continuation; or a refusal that says why."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support.models import SMALL, make_model, make_tokens
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from rq_hf import RotorQuantCache, cache_file, serialization
from rq_hf.layers import RotorQuantLayer
from rq_hf.memory import reachable_tensors
from rq_hf.quant.codebooks import Codebook
from rq_hf.serialization import load_cache, save_cache

ROOT = Path(__file__).parents[2]


def model_of_width(head_dim: int) -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL, head_dim=head_dim)).eval()


def run(model: PreTrainedModel, cache: Any, tokens: torch.Tensor, padding: int = 0) -> Any:
    """Logits of `tokens` behind what the cache holds, with left padding in the first sequence."""
    mask = torch.ones(len(tokens), cache.get_seq_length() + tokens.shape[1], dtype=torch.long)
    mask[0, :padding] = 0
    with torch.no_grad():
        return model(tokens, past_key_values=cache, attention_mask=mask).logits


def contents(cache: RotorQuantCache) -> dict[str, Any]:
    """Everything that a cache holds, cut to what is in use."""
    found: dict[str, Any] = {}
    for i, layer in enumerate(cache.layers):
        if not isinstance(layer, RotorQuantLayer):
            found |= {f"{i}.{name}": x for name, x in vars(layer).items()}
            continue
        found[f"{i}.rope"] = layer.rope and (layer.rope.inv_freq, layer.rope.interleaved)
        if layer.store is None:
            continue
        found[f"{i}.exact"] = layer.store.exact.view()
        found[f"{i}.tiles"] = layer.store.tiles.view()
        found[f"{i}.lengths"] = (layer.store.sinks, layer.store.packed_length, layer.store.tail)
        found[f"{i}.padding"] = layer.padding
        found[f"{i}.statistics"] = list(vars(layer.statistics).values())
        if (means := layer.preconditioner) is not None:
            found[f"{i}.means"] = [
                means.pre_mean,
                means.post_mean,
                means.balance,
                means.value_mean,
                means.rope and (means.rope.inv_freq, means.rope.interleaved),
            ]
    return found


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same(a: RotorQuantCache, b: RotorQuantCache) -> None:
    mine, theirs = contents(a), contents(b)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not same(mine[name], theirs[name])] == []


def assert_continue_alike(
    model: PreTrainedModel, a: RotorQuantCache, b: RotorQuantCache, padding: int = 0
) -> None:
    """Both get the same tokens in steps of many sizes, and are cropped and reordered between."""
    batch = next(x.keys.shape[0] for x in a.layers if x.keys is not None)
    croppable = all(isinstance(x, RotorQuantLayer) for x in a.layers)
    for seed, count in enumerate((1, 1, 40, 150, 1)):
        tokens = make_tokens(count, batch=batch, seed=seed)
        logits = run(model, a, tokens, padding)
        assert torch.equal(logits, run(model, b, tokens, padding))
        # a cache that forgot everything would answer otherwise
        if count == 1:
            assert not torch.equal(logits, run(model, DynamicCache(config=model.config), tokens))
        if croppable:
            a.crop(-3)
            b.crop(-3)
    order = torch.arange(batch).flip(0)
    if padding == 0:
        a.reorder_cache(order)
        b.reorder_cache(order)
        tokens = make_tokens(2, batch=batch)
        assert torch.equal(run(model, a, tokens), run(model, b, tokens))
    assert_same(a, b)


# name: family or head_dim, dtype, settings, batch, prompt, left padding, tokens cropped
CASES: dict[str, tuple[Any, torch.dtype, dict[str, Any], int, int, int, int]] = {
    "3-bit": ("llama", torch.float32, {}, 2, 400, 0, 0),
    "bfloat16": ("llama", torch.bfloat16, {"nbits": 2}, 1, 400, 0, 0),
    "float16": ("llama", torch.float16, {"nbits": 4}, 1, 400, 0, 0),
    "k4v2 dense": ("llama", torch.float32, {"value_bits": 2, "rotation": "dense"}, 1, 400, 0, 0),
    "prod": ("llama", torch.float32, {"key_codec": "prod"}, 2, 400, 0, 0),
    "padded": ("llama", torch.float32, {}, 2, 400, 100, 0),
    "open tile": ("llama", torch.float32, {"residual_length": 0}, 2, 400, 0, 60),
    "open statistics": ("llama", torch.float32, {}, 2, 90, 0, 0),
    "open, padded": ("llama", torch.float32, {}, 2, 90, 20, 0),
    "strict": ("llama", torch.float32, {"strict": True}, 2, 200, 0, 0),
    "plain order": (80, torch.float32, {}, 2, 400, 0, 0),
    "two kinds": ("gemma3", torch.float32, {}, 2, 400, 0, 0),
    "two kinds, short": ("gemma3", torch.float32, {}, 1, 20, 0, 0),
    "nothing packed": ("mistral-sliding", torch.bfloat16, {}, 2, 100, 0, 0),
    "bits by layer": ("llama", torch.float32, {"layer_bits": {0: 8}}, 1, 400, 0, 0),
    "an exact layer": ("llama", torch.float32, {"layer_bits": {0: 16, 1: 4}}, 1, 400, 0, 0),
    "no RoPE": ("gpt2", torch.float32, {}, 2, 400, 0, 0),
    "eight": ("llama", torch.bfloat16, {}, 8, 300, 0, 0),
}


@pytest.mark.parametrize("family", ["gemma3n-window", "gemma4", "mimo-v2-flash"])
@pytest.mark.parametrize("with_config", [True, False], ids=["config", "alone"])
@pytest.mark.filterwarnings("ignore:keys have")
def test_models_with_unusual_layers(family: str, with_config: bool, tmp_path: Path) -> None:
    """Some layers read the states of others, or values have another size than keys."""
    model = make_model(family)
    cache = RotorQuantCache(config=model.config, residual_length=32, sliding="packed")
    run(model, cache, make_tokens(300))
    save_cache(cache, tmp_path / "cache")
    loaded = load_cache(tmp_path / "cache", model.config if with_config else None)
    for seed, count in enumerate((1, 40, 1)):
        tokens = make_tokens(count, seed=seed)
        assert torch.equal(run(model, cache, tokens), run(model, loaded, tokens))
    assert loaded.get_seq_length() == 342


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("with_config", [True, False], ids=["config", "alone"])
def test_loaded_continues_to_the_bit(name: str, with_config: bool, tmp_path: Path) -> None:
    family, dtype, settings, batch, prompt, padding, cropped = CASES[name]
    model = make_model(family) if isinstance(family, str) else model_of_width(family)
    model = model.to(dtype)
    cache = RotorQuantCache(config=model.config, **{"residual_length": 32, **settings})
    run(model, cache, make_tokens(prompt, batch=batch), padding)
    if cropped:
        cache.crop(-cropped)
    save_cache(cache, tmp_path / "cache")
    loaded = load_cache(tmp_path / "cache", model.config if with_config else None)
    assert loaded.quantization == cache.quantization
    assert_same(cache, loaded)
    assert_continue_alike(model, cache, loaded, padding)
    if cropped:
        assert any(x.store.open_tokens for x in load_cache(tmp_path / "cache").packed_layers)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_generate_goes_on_with_the_same_tokens(attention: str, tmp_path: Path) -> None:
    model = make_model("llama")
    model.set_attn_implementation(attention)
    cache = RotorQuantCache(config=model.config, residual_length=32)
    options = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0}
    text = model.generate(make_tokens(300), past_key_values=cache, **options)
    save_cache(cache, tmp_path / "cache")
    loaded = load_cache(tmp_path / "cache", model.config)
    text = torch.cat((text, make_tokens(50, seed=1)), 1)
    expected = model.generate(text, past_key_values=cache, **options)
    assert torch.equal(model.generate(text, past_key_values=loaded, **options), expected)
    assert f"{attention} 30x" in loaded.describe()


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3-next"])
def test_layers_are_loaded_and_moved_to_devices_of_their_own(family: str, tmp_path: Path) -> None:
    model = make_model(family)
    cache = RotorQuantCache(config=model.config, residual_length=32)
    run(model, cache, make_tokens(300))
    save_cache(cache, tmp_path / "cache")
    layers = len(cache.layers)
    # one that holds no numbers, as far away as a second GPU
    places = {i: "meta" if i % 2 else "cpu" for i in range(layers)}
    loaded = RotorQuantCache.load(tmp_path / "cache", model.config, device=places)
    moved = RotorQuantCache.load(tmp_path / "cache", model.config).to(places)
    for i, place in places.items():
        for one in (loaded, moved):
            layer = one.layers[i]
            if isinstance(layer, RotorQuantLayer):
                assert {x.device.type for x in layer.store.tensors()} == {place}
            elif one is loaded or isinstance(layer, DynamicLayer):
                assert {x.device.type for x in reachable_tensors(layer)} == {place}
    del places[layers - 1]
    refused = rf"no device is given for layers \[{layers - 1}\]; give one for each of {layers}"
    with pytest.raises(ValueError, match=refused):
        RotorQuantCache.load(tmp_path / "cache", model.config, device=places)
    with pytest.raises(ValueError, match=refused):
        cache.to(places)
    assert {x.device.type for x in cache.packed_layers[0].store.tensors()} == {"cpu"}


def test_a_prompt_whose_queries_are_not_seen_is_stored_first(tmp_path: Path) -> None:
    cache = RotorQuantCache(residual_length=32)
    states = torch.randn(1, 2, 300, 64, generator=torch.Generator().manual_seed(0))
    cache.update(states, states, 0)
    save_cache(cache, tmp_path / "cache")
    loaded = load_cache(tmp_path / "cache")
    assert loaded.layers[0].store.packed_length == 256
    assert_same(cache, loaded)


def test_layers_still_appear_in_a_cache_made_without_config(tmp_path: Path) -> None:
    states = torch.randn(1, 2, 10, 64)
    grows, fixed = RotorQuantCache(), RotorQuantCache(config=make_model("llama").config)
    for cache in (grows, fixed):
        cache.update(states, states, 0)
        save_cache(cache, tmp_path / "cache")
        loaded = load_cache(tmp_path / "cache")
        assert len(loaded.layers) == len(cache.layers)
        if cache is grows:
            loaded.update(states, states, 5)
            assert len(loaded.layers) == 6
        else:
            with pytest.raises(ValueError, match="made for a model with 2 layers"):
                loaded.update(states, states, 2)


def test_an_empty_cache_is_loaded_empty(tmp_path: Path) -> None:
    model = make_model("gemma3")
    cache = RotorQuantCache(config=model.config)
    save_cache(cache, tmp_path / "cache")
    loaded = load_cache(tmp_path / "cache", model.config)
    assert loaded.get_seq_length() == 0
    tokens = make_tokens(300)
    assert torch.equal(run(model, cache, tokens), run(model, loaded, tokens))
    assert_same(cache, loaded)


def test_a_window_that_records_its_past_can_be_cropped_after_loading(tmp_path: Path) -> None:
    model = make_model("gemma3")
    cache = RotorQuantCache(config=model.config, residual_length=32)
    cache.activate_past_recording()
    run(model, cache, make_tokens(200))
    cache.crop(0)
    run(model, cache, make_tokens(6, seed=1))
    save_cache(cache, tmp_path / "cache")
    loaded = load_cache(tmp_path / "cache", model.config)
    for each in (cache, loaded):
        each.crop(-4)
    assert_same(cache, loaded)
    tokens = make_tokens(3, seed=2)
    assert torch.equal(run(model, cache, tokens), run(model, loaded, tokens))


def test_loaded_in_inference_mode_grows_outside_of_it(tmp_path: Path) -> None:
    cache = filled(300)
    save_cache(cache, tmp_path / "cache")
    with torch.inference_mode():
        loaded = load_cache(tmp_path / "cache")
    states = torch.ones(1, 2, 200, 64)
    for each in (cache, loaded):
        each.crop(-1)
        each.update(states, states, 0)
    assert_same(cache, loaded)


def test_the_file_holds_what_is_in_use_and_is_as_readable_as_others(tmp_path: Path) -> None:
    cache = filled(2000)
    cache.crop(-900)
    memory = cache.memory()
    save_cache(cache, tmp_path / "cache")
    size = (tmp_path / "cache").stat().st_size
    assert size < 0.75 * (memory.packed_bytes + memory.exact_bytes)
    loaded = load_cache(tmp_path / "cache").memory()
    # tiles and exact rows, statistics, a probe of 2 x 8 x 64 numbers, and the header
    assert size < loaded.held_bytes - loaded.constant_bytes + 4096 + 4000
    (tmp_path / "other").touch()
    assert (tmp_path / "cache").stat().st_mode == (tmp_path / "other").stat().st_mode
    assert sorted(x.name for x in tmp_path.iterdir()) == ["cache", "other"]


def test_layers_share_one_position_embedding(tmp_path: Path) -> None:
    cache = RotorQuantCache(config=make_model("llama").config)
    save_cache(cache, tmp_path / "cache")
    first, second = load_cache(tmp_path / "cache").layers
    assert first.rope is second.rope is not None


@pytest.mark.gpu
def test_to_and_from_a_gpu(tmp_path: Path) -> None:
    model = make_model("gemma3").to("cuda")
    cache = RotorQuantCache(config=model.config, residual_length=32)
    tokens = make_tokens(300).to("cuda")
    with torch.no_grad():
        model(tokens, past_key_values=cache)
        save_cache(cache, tmp_path / "cache")
        loaded = load_cache(tmp_path / "cache", model.config, device="cuda")
        assert_same(cache, loaded)
        step = tokens[:, :1]
        mine = model(step, past_key_values=cache).logits
        assert torch.equal(mine, model(step, past_key_values=loaded).logits)
    assert load_cache(tmp_path / "cache").layers[1].keys.device.type == "cpu"


def filled(tokens: int, seed: int = 0, **settings: Any) -> RotorQuantCache:
    cache = RotorQuantCache(**{"residual_length": 32, **settings})
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(2, 1, 2, tokens, 64, generator=generator)
    cache.update(*states, 0)
    cache.update(*states[:, :, :, :1], 0)
    return cache


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_cache(filled(300), tmp_path / "cache")
    return tmp_path / "cache"


def test_every_flipped_bit_is_refused(saved: Path) -> None:
    content = saved.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    places = [*range(0, header, 23), *range(header, len(content), 4999), len(content) - 1]
    for n, place in enumerate(places):
        damaged = bytearray(content)
        damaged[place] ^= 1 << n % 8
        saved.write_bytes(damaged)
        with pytest.raises(ValueError, match=str(saved)):
            load_cache(saved)
    saved.write_bytes(content)
    load_cache(saved)


def test_a_flipped_bit_of_a_code_is_called_damage(saved: Path) -> None:
    content = bytearray(saved.read_bytes())
    content[-1000] ^= 1
    saved.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged: its content does not match its checksum"):
        load_cache(saved)


@pytest.mark.parametrize("kept", [0, 5, 8, 9, 500, 0.5, -1])
def test_truncated_files_are_refused(saved: Path, kept: float) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[: int(kept * len(content)) if kept == 0.5 else int(kept)])
    with pytest.raises(ValueError, match=r"is (cut short or damaged|not a safetensors file)"):
        load_cache(saved)


def rewritten(path: Path, **metadata: str) -> None:
    """Changes entries of the metadata, and the checksum to what they then ask for."""
    with safe_open(path, framework="pt") as file:
        old = file.metadata() | metadata
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    old["sha256"] = cache_file._checksum(old, tensors)
    save_file(tensors, path, old)


def test_files_of_other_makes_are_refused(saved: Path) -> None:
    saved.write_bytes(b"GIF89a" + bytes(range(256)))
    with pytest.raises(ValueError, match="is not a safetensors file"):
        load_cache(saved)
    save_file({"lm_head.weight": torch.ones(4)}, saved)
    with pytest.raises(ValueError, match="a safetensors file but not a saved cache"):
        load_cache(saved)
    save_file({"lm_head.weight": torch.ones(4)}, saved, {"format": "pt"})
    with pytest.raises(ValueError, match="a safetensors file but not a saved cache"):
        load_cache(saved)
    with pytest.raises(FileNotFoundError):
        load_cache(saved.with_name("absent"))


def test_the_first_format_is_read(saved: Path) -> None:
    # it had no kept statistics, and was else the same
    expected = load_cache(saved)
    with safe_open(saved, framework="pt") as file:
        assert file.metadata()["format"] == "2"
        assert not any("kept_" in name for name in file.keys())  # noqa: SIM118
    rewritten(saved, format="1")
    loaded = load_cache(saved)
    assert loaded.packed_layers[0].store.packed_length == 256
    assert_same(loaded, expected)


def test_newer_formats_are_refused(saved: Path) -> None:
    rewritten(saved, format="3", writer="9.1")
    with pytest.raises(ValueError, match=r"format 3, written by rq_hf 9\.1.* install a newer"):
        load_cache(saved)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"packed_length": 256', '"packed_length": 400', "layers.0.records is .* header says"),
        ('"tail": 41', '"tail": 40', "layers.0.keys is .* the header says"),
        ('"seed": 0', '"seed": 1', "packed with other rotations or codebooks"),
        ('"nbits": 3', '"nbits": 9', "not a header of this format: nbits must be one of"),
        ('"nbits": 3', '"bits": 3', "not a header of this format"),
        ('"kind": "packed"', '"kind": "Else"', "layer 0 is of an unknown kind, 'Else'"),
        ('"keys", ', "", "there are tensors that the header does not list"),
    ],
)
def test_headers_that_make_no_sense_are_refused(
    saved: Path, old: str, new: str, message: str
) -> None:
    with safe_open(saved, framework="pt") as file:
        header = file.metadata()["header"]
    assert old in header
    rewritten(saved, header=header.replace(old, new))
    with pytest.raises(ValueError, match=message):
        load_cache(saved)


def test_codes_for_other_codebooks_are_refused(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Codebook.lookup
    monkeypatch.setattr(Codebook, "lookup", lambda self, codes: plain(self, codes) * 1.01)
    with pytest.raises(ValueError, match="packed with other rotations or codebooks"):
        load_cache(saved)


def config_of(family: str, **changes: Any) -> Any:
    config = make_model(family).config
    for name, value in changes.items():
        setattr(config, name, value)
    return config


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"num_hidden_layers": 3}, "the file holds 2 layers, the model has 3"),
        ("mistral-sliding", {}, "kind of layer 0 is packed, .*DynamicSlidingWindowLayer"),
        ("llama", {"head_dim": 128}, "head_dim of layer 0 is 64, the model's is 128"),
        ("llama", {"num_key_value_heads": 1}, "num_key_value_heads of layer 0 is 2, .* is 1"),
    ],
)
def test_caches_of_other_models_are_refused(
    family: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = make_model("llama")
    cache = RotorQuantCache(config=model.config)
    run(model, cache, make_tokens(10))
    save_cache(cache, tmp_path / "cache")
    load_cache(tmp_path / "cache", model.config)
    with pytest.raises(ValueError, match=f"{message}.*; this is another model's cache"):
        load_cache(tmp_path / "cache", config_of(family, **changes))


def test_another_window_is_refused(tmp_path: Path) -> None:
    save_cache(RotorQuantCache(config=make_model("gemma3").config), tmp_path / "cache")
    with pytest.raises(ValueError, match="window of layer 0 is 32, the model's is 64"):
        load_cache(tmp_path / "cache", config_of("gemma3", sliding_window=64))


def test_latent_attention_is_saved_as_it_is(tmp_path: Path) -> None:
    model = make_model("deepseek-v2")
    with pytest.warns(UserWarning, match="latent attention"):
        cache = RotorQuantCache(config=model.config)
    run(model, cache, make_tokens(100))
    save_cache(cache, tmp_path / "cache")
    with pytest.warns(UserWarning, match="latent attention"):
        loaded = load_cache(tmp_path / "cache", model.config)
    assert isinstance(loaded.layers[0], DynamicLayer)
    tokens = make_tokens(2, seed=1)
    assert torch.equal(run(model, cache, tokens), run(model, loaded, tokens))


class Bomb:
    """A pickle that leaves a trace when it is loaded."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


def test_nothing_in_a_file_is_executed(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = saved.with_name("trace")
    for dump in (torch.save, lambda x, path: path.write_bytes(pickle.dumps(x))):
        other = saved.with_name("other")
        dump(Bomb(trace), other)
        with pytest.raises(ValueError, match="is not a safetensors file"):
            load_cache(other)
    assert not trace.exists()

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("unpickled")

    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(pickle, "loads", refuse)
    monkeypatch.setattr(pickle, "Unpickler", refuse)
    load_cache(saved)


@pytest.mark.parametrize("step", ["save_file", "_sync", "os.replace"])
def test_a_failure_leaves_the_old_file(
    saved: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = saved.read_bytes()

    def fail(*args: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(f"rq_hf.cache_file.{step}", fail)
    with pytest.raises(OSError, match="no space left"):
        save_cache(filled(900, seed=1), saved)
    assert saved.read_bytes() == content
    assert list(saved.parent.iterdir()) == [saved]


def test_a_full_disk_is_reported_and_leaves_the_old_file(saved: Path) -> None:
    resource = pytest.importorskip("resource")
    content = saved.read_bytes()
    larger = filled(3000, seed=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(content) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match="could not be written"):
            save_cache(larger, saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert saved.read_bytes() == content
    assert [x for x in saved.parent.iterdir() if x.suffix == ".tmp"] == []


def test_a_link_stays_a_link(saved: Path) -> None:
    link = saved.with_name("link")
    link.symlink_to(saved)
    save_cache(filled(400, seed=1), link)
    assert link.is_symlink()
    assert_same(load_cache(saved), filled(400, seed=1))


KILLED = """
import os, signal, sys, torch
from rq_hf import RotorQuantCache, cache_file, serialization

folder = sys.argv[1]
cache = RotorQuantCache(residual_length=32)
states = torch.ones(1, 2, 900, 64)
cache.update(states, states, 0)
save, replace = cache_file.save_file, os.replace
die = lambda *args: os.kill(os.getpid(), signal.SIGKILL)

def half(tensors, name, metadata):
    save(tensors, name, metadata)
    os.truncate(name, os.path.getsize(name) // 2)
    die()

def loop(path):
    while True:
        serialization.save_cache(cache, path)

for stage in "half", "whole", "any":
    path = f"{folder}/{stage}/cache"
    before = os.stat(path).st_ino
    pid = os.fork()
    if pid == 0:
        cache_file.save_file = half if stage == "half" else save
        os.replace = die if stage == "whole" else replace
        loop(path)
    while stage == "any" and os.stat(path).st_ino == before:
        pass
    if stage == "any":
        os.kill(pid, signal.SIGKILL)
    print(stage, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX processes")
def test_a_killed_process_leaves_a_whole_file(tmp_path: Path) -> None:
    contents = {}
    for stage in ("half", "whole", "any"):
        (tmp_path / stage).mkdir()
        save_cache(filled(300), tmp_path / stage / "cache")
        contents[stage] = (tmp_path / stage / "cache").read_bytes()
    run = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.stdout.split() == ["half", "-9", "whole", "-9", "any", "-9"]
    for stage in ("half", "whole"):
        assert (tmp_path / stage / "cache").read_bytes() == contents[stage]
        assert len([x for x in (tmp_path / stage).iterdir() if x.suffix == ".tmp"]) == 1
    with pytest.raises(ValueError, match="is cut short"):
        load_cache(next((tmp_path / "half").glob(".*.tmp")))
    # killed in the middle of the second save or a later one, after the first
    assert load_cache(tmp_path / "any/cache").get_seq_length() == 900


def test_a_copy_of_a_loaded_cache_lives_its_own_life(saved: Path) -> None:
    loaded = load_cache(saved)
    other = copy.deepcopy(loaded)
    states = torch.ones(1, 2, 200, 64)
    other.update(states, states, 0)
    assert_same(loaded, serialization.load_cache(saved))
