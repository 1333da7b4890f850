# SPDX-License-Identifier: Apache-2.0
"""What attention reads in each model family: packed, and the same as from decoded tensors.

Every family runs a text in pieces: a prompt, a long chunk, a short one and single tokens. Tiles
are packed after the prompt and again while single tokens come. The twin is the same model with
the host's attention over the decoded numbers of the same store.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from support.models import DECODERS, ENCODER_DECODERS, make_model, make_tokens
from support.replay import make_replay, recorded, run_with_twin
from torch import Tensor
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from rq_hf import RotorQuantCache, RotorQuantConfig
from rq_hf.layers import RotorQuantLayer
from rq_hf.sliding import RotorQuantSlidingLayer

SETTINGS: dict[str, Any] = {
    "nbits": 3,
    "residual_length": 32,
    "sink_length": 4,
    # windows of 32 tokens fit the tail and stay exact
    "sliding": "packed",
}
# 128 tokens leave the tail after the prompt, and again at the 292nd token
PIECES = (245, 40, 3, *[1] * 8)
PADDING = 100
# of the logits' scale; float32 sums in another order
TOLERANCE = 2e-5


class Fused(NamedTuple):
    """What a family is expected to do.

    Attributes:
        packed: Layers that are packed; the others keep the host's classes.
        attention: Implementations that the family offers in all supported versions.
        readers: Layers that read each packed layer, its own included.
        shows_padding: Whether masks or weights tell padding from real tokens; otherwise it counts
            in the statistics, and nothing else changes.
    """

    packed: tuple[int, ...] = (0, 1)
    attention: tuple[str, ...] = ("sdpa", "eager")
    readers: int = 1
    shows_padding: bool = True


EAGER, SDPA, SECOND = ("eager",), ("sdpa",), (1,)

FUSED = {
    "llama": Fused(),
    "llama-mqa": Fused(),
    "llama-80": Fused(),
    "qwen2": Fused(),
    "qwen2-sliding": Fused(packed=(0,)),
    "qwen3": Fused(),
    "mistral": Fused(),
    "mistral-window": Fused(),
    "ministral": Fused(SECOND),
    "gemma": Fused(),
    "gemma2": Fused(SECOND, EAGER),
    "gemma2-window": Fused(attention=EAGER),
    "gemma3": Fused(SECOND),
    "gemma3-window": Fused(),
    "gemma3n": Fused(SECOND, readers=2),
    "gemma3n-window": Fused(readers=2),
    "gemma4": Fused(SECOND, readers=2),
    "vaultgemma": Fused(SECOND, EAGER),
    "gpt-oss": Fused(SECOND, EAGER),
    "gpt-oss-window": Fused(attention=EAGER),
    "llama4": Fused(SECOND),
    "llama4-window": Fused(),
    "phi": Fused(),
    "phi3": Fused(),
    "phimoe": Fused(),
    "gpt-neox": Fused(),
    "gpt2": Fused(),
    "gptj": Fused(attention=EAGER),
    "codegen": Fused(attention=EAGER),
    "gpt-bigcode": Fused(),
    "gpt-neo": Fused(attention=EAGER, shows_padding=False),
    "ctrl": Fused(),
    "opt": Fused(),
    "biogpt": Fused(),
    "bert-decoder": Fused(),
    "falcon-mqa": Fused(attention=SDPA),
    "falcon-gqa": Fused(attention=SDPA),
    "falcon-alibi": Fused(attention=SDPA),
    "mpt": Fused(attention=EAGER),
    "persimmon": Fused(),
    "stablelm": Fused(),
    "starcoder2": Fused(),
    "cohere": Fused(),
    "cohere2": Fused(SECOND),
    "olmo": Fused(),
    "olmo2": Fused(),
    "olmo3": Fused(SECOND),
    "olmoe": Fused(),
    "granite": Fused(),
    "granitemoe": Fused(),
    "granitemoehybrid": Fused(SECOND),
    "glm": Fused(),
    "glm4": Fused(),
    "glm4-moe": Fused(),
    "smollm3": Fused(),
    "nemotron": Fused(),
    "exaone4": Fused(SECOND),
    "ernie4-5": Fused(),
    "seed-oss": Fused(),
    "hunyuan": Fused(),
    "arcee": Fused(),
    "apertus": Fused(),
    "bitnet": Fused(),
    "nanochat": Fused(),
    "modernbert-decoder": Fused(SECOND),
    "mixtral": Fused(),
    "qwen2-moe": Fused(),
    "qwen3-moe": Fused(),
    "qwen3-next": Fused(SECOND),
    "qwen3-5": Fused(SECOND),
    "olmo-hybrid": Fused(SECOND),
    "minimax-m2": Fused(),
    "dots1": Fused(),
    "jamba": Fused(SECOND),
    "lfm2": Fused(SECOND),
    "bamba": Fused(SECOND),
    "nemotron-h": Fused(SECOND),
    "llava": Fused(),
    "gemma3-vision": Fused(SECOND),
}


class Decoded(NamedTuple):
    """A family whose attention needs decoded tensors, and why.

    Attributes:
        reason: What its attention does to keys and values.
        doors: Ways of attention counted after the prompt, by implementation.
    """

    reason: str
    doors: dict[str, set[str]]


SPLIT, FLASH = "decoded for split", "decoded for _scaled_dot_product_flash_attention_for_cpu"
DECODED = {
    "bloom": Decoded("multiplies heads flattened into the batch", {"eager": {"decoded for view"}}),
    "xglm": Decoded("multiplies heads flattened into the batch", {"eager": {"decoded for view"}}),
    "gpt-neox-japanese": Decoded(
        "multiplies queries with keys flattened into the batch", {"eager": {"decoded for view"}}
    ),
    "doge": Decoded(
        "computes a mask from the values, and attends as others do",
        {
            "sdpa": {"decoded for transpose", "sdpa"},
            "eager": {"decoded for transpose", "eager"},
        },
    ),
    "diffllama": Decoded(
        "splits the heads of the values in two halves",
        {"sdpa": {SPLIT, FLASH}, "eager": {SPLIT, "eager"}},
    ),
    "jetmoe": Decoded(
        "repeats all heads one after the other",
        {"sdpa": {"decoded for repeat"}, "eager": {"decoded for repeat"}},
    ),
}

EXACT = {
    "mistral-sliding": "all its layers have a window that fits the tail",
    "mimo-v2-flash": "values of another size than the keys",
    "deepseek-v2": "latents, which are compressed already",
    "deepseek-v3": "latents, which are compressed already",
    "falcon-h1": "attention and a state in one layer",
}

PARAMETERS = [(name, attention) for name in FUSED for attention in FUSED[name].attention]
DECODED_PARAMETERS = [(name, attention) for name in DECODED for attention in DECODED[name].doors]


@pytest.fixture(autouse=True)
def no_warnings_of_decoding() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def make(family: str, attention: str) -> PreTrainedModel:
    model = make_model(family)
    if model.config.get_text_config(decoder=True)._attn_implementation != attention:
        model.set_attn_implementation(attention)
    assert model.config.get_text_config(decoder=True)._attn_implementation == attention
    if model.config.is_encoder_decoder:
        # T5's decoder has a config of its own, which transformers 5.17 leaves as it was
        model.get_decoder().config._attn_implementation = attention
    return model


def padded_batch() -> tuple[Tensor, Tensor]:
    """Returns tokens `[2, all pieces]`, the first text left-padded, and their mask."""
    tokens = make_tokens(sum(PIECES), batch=2)
    mask = torch.ones_like(tokens)
    tokens[0, :PADDING] = mask[0, :PADDING] = 0
    return tokens, mask


@torch.no_grad()
def run(model: PreTrainedModel, cache: Cache, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Returns the logits of all pieces `[B, N, vocabulary]`."""
    logits, end = [], 0
    for length in PIECES:
        start, end = end, end + length
        seen = None if mask is None else mask[:, :end]
        output = model(tokens[:, start:end], attention_mask=seen, past_key_values=cache)
        logits.append(output.logits)
    return torch.cat(logits, 1)


def error(logits: Tensor, expected: Tensor, mask: Tensor | None = None) -> float:
    """Returns the largest difference relative to the largest logit, padding left out."""
    if mask is not None:
        logits, expected = logits[mask.bool()], expected[mask.bool()]
    return float((logits - expected).abs().max() / expected.abs().max())


def assert_reads_as_decoded(
    model: PreTrainedModel, tokens: Tensor, mask: Tensor | None = None
) -> RotorQuantCache:
    """Compares the model with its dense twin and returns the cache that it used."""
    cache = RotorQuantCache(config=model.config, **SETTINGS)
    logits, expected = run_with_twin(cache, lambda cache: run(model, cache, tokens, mask))
    assert error(logits, expected, mask) < TOLERANCE
    unquantised = run(model, DynamicCache(config=model.config), tokens, mask)
    after = PIECES[0]
    after_mask = None if mask is None else mask[:, after:]
    assert error(logits[:, after:], unquantised[:, after:], after_mask) > 1e-3
    return cache


def packed(cache: RotorQuantCache) -> tuple[int, ...]:
    return tuple(i for i, x in enumerate(cache.layers) if isinstance(x, RotorQuantLayer))


def assert_packed_and_fused(cache: RotorQuantCache, expected: Fused, attention: str) -> None:
    assert packed(cache) == expected.packed
    for layer in cache.packed_layers:
        dropped = 128 if isinstance(layer, RotorQuantSlidingLayer) else 0
        assert (layer.store.dropped, layer.store.packed_length) == (dropped, 256 - dropped)
        pieces = len(PIECES) - 1
        readers = expected.readers
        assert layer.calls == {"prompt": readers, attention: readers * pieces}


@pytest.mark.parametrize(("family", "attention"), PARAMETERS)
def test_attention_reads_packed_tiles(family: str, attention: str) -> None:
    cache = assert_reads_as_decoded(make(family, attention), make_tokens(sum(PIECES)))
    assert_packed_and_fused(cache, FUSED[family], attention)


@pytest.mark.parametrize(("family", "attention"), PARAMETERS)
def test_left_padded_batches(family: str, attention: str) -> None:
    cache = assert_reads_as_decoded(make(family, attention), *padded_batch())
    assert_packed_and_fused(cache, FUSED[family], attention)
    found = [PADDING, 0] if FUSED[family].shows_padding else None
    for layer in cache.packed_layers:
        assert (None if layer.padding is None else layer.padding.tolist()) == found


@pytest.mark.parametrize("family", FUSED)
def test_bfloat16(family: str) -> None:
    model = make(family, FUSED[family].attention[0]).to(torch.bfloat16)
    cache = RotorQuantCache(config=model.config, **SETTINGS)
    assert torch.isfinite(run(model, cache, make_tokens(sum(PIECES)))).all()
    assert_packed_and_fused(cache, FUSED[family], FUSED[family].attention[0])


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize(("family", "attention"), DECODED_PARAMETERS)
def test_what_is_not_known_is_decoded_and_right(family: str, attention: str, padding: bool) -> None:
    inputs = padded_batch() if padding else (make_tokens(sum(PIECES)),)
    cache = assert_reads_as_decoded(make(family, attention), *inputs)
    for layer in cache.packed_layers:
        assert set(layer.calls) - {"prompt"} == DECODED[family].doors[attention]


@pytest.mark.parametrize("family", EXACT)
def test_layers_of_other_kinds_stay_exact(family: str) -> None:
    model = make_model(family)
    tokens, mask = padded_batch()
    cache = RotorQuantCache(config=model.config, **SETTINGS)
    assert packed(cache) == ()
    exact = run(model, DynamicCache(config=model.config), tokens, mask)
    assert torch.equal(run(model, cache, tokens, mask), exact)


def test_every_decoder_is_expected_to_do_something() -> None:
    assert sorted([*FUSED, *DECODED, *EXACT]) == sorted(DECODERS)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_what_is_out_of_a_window_is_not_taken_for_padding(attention: str) -> None:
    model = make("mistral-sliding", attention)
    # without a config all layers count as full attention
    cache = RotorQuantCache(**SETTINGS)
    tokens = make_tokens(sum(PIECES))
    logits, expected = run_with_twin(cache, lambda cache: run(model, cache, tokens))
    assert error(logits, expected) < TOLERANCE
    assert [layer.padding for layer in cache.packed_layers] == [None, None]


def test_what_gets_no_weight_for_a_while_is_not_taken_for_padding() -> None:
    layer = RotorQuantLayer(RotorQuantConfig(**SETTINGS))
    direction = 40 * torch.eye(64)[:2]
    keys = torch.cat((direction[:1].expand(20, -1), direction[1:].expand(225, -1)))[None, None]
    values = keys.clone()
    # an eager prompt, in which the newer tokens weigh the first twenty with exp(-200)
    key, value = layer.update(keys, values)
    scores = torch.matmul(keys, key.transpose(2, 3)) / 8
    scores += torch.full_like(scores, torch.finfo(scores.dtype).min).triu(1)
    torch.matmul(scores.softmax(-1), value)
    key, value = layer.update(keys[:, :, -1:], values[:, :, -1:])
    weights = (torch.matmul(keys[:, :, :1], key.transpose(2, 3)) / 8).softmax(-1)
    answer = torch.matmul(weights, value)
    torch.testing.assert_close(answer, values[:, :, :1], rtol=0.1, atol=1.0)


@torch.no_grad()
def run_decoder(
    model: PreTrainedModel, pair: EncoderDecoderCache, cross: Cache | None = None
) -> Tensor:
    """Returns the decoder's logits of all pieces `[2, N, vocabulary]`.

    Args:
        model: An encoder-decoder model.
        pair: Empty caches of self- and cross-attention.
        cross: Takes the place of the keys and values of cross-attention after the prompt.
    """
    states = model.get_encoder()(make_tokens(200, batch=2, seed=1)).last_hidden_state
    encoded = BaseModelOutput(last_hidden_state=states)
    swapped = cross.layers if cross else []
    logits = []
    for tokens in make_tokens(sum(PIECES), batch=2).split(PIECES, 1):
        output = model(encoder_outputs=encoded, decoder_input_ids=tokens, past_key_values=pair)
        logits.append(output.logits)
        for mine, theirs in zip(pair.cross_attention_cache.layers, swapped, strict=False):
            mine.keys, mine.values = theirs.keys, theirs.values
    return torch.cat(logits, 1)


@pytest.mark.parametrize("cross_packed", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_encoder_decoder_pairs(family: str, attention: str, cross_packed: bool) -> None:
    model = make(family, attention)
    mine = RotorQuantCache(**SETTINGS)
    cross = RotorQuantCache(**SETTINGS) if cross_packed else None
    with recorded() as recording:
        logits = run_decoder(model, EncoderDecoderCache(mine, cross or DynamicCache()))
    pieces = len(PIECES) - 1
    cross_calls = [
        (layer.calls["keys decoded"], layer.calls["values decoded"]) == (pieces, pieces)
        for layer in (cross.packed_layers if cross else [])
    ]
    twins = [make_replay(cache, recording) if cache else DynamicCache() for cache in (mine, cross)]
    expected = run_decoder(model, EncoderDecoderCache(*twins), cross)
    assert not recording.states
    assert error(logits, expected) < TOLERANCE
    unquantised = run_decoder(model, EncoderDecoderCache(DynamicCache(), DynamicCache()))
    after = PIECES[0]
    assert error(logits[:, after:], unquantised[:, after:]) > 1e-3
    assert_packed_and_fused(mine, Fused(), attention)
    if cross:
        assert all(cross_calls)
        assert [layer.store.packed_length for layer in cross.packed_layers] == [128, 128]
