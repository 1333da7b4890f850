# SPDX-License-Identifier: Apache-2.0
"""Checks of the cache on a device, in seconds and without a model from anywhere.

On a GPU most of the time goes to compiling kernels at their first use, one for each head_dim, bits
and dtype. So all checks share these, as far as they can.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from rq_hf.cache import RotorQuantCache
from rq_hf.cli.kernels import KV_HEADS, QUERY_HEADS, filled_layer, random_states, usual_dtype
from rq_hf.ops import attend

HEAD_DIM = 128
BITS = 4
# mean squared error of a Gaussian's optimal 4-bit levels; means and scales change it a little
SOURCE_ERROR = 0.0095
PROMPT, NEW = 300, 16
VOCABULARY = 128


@dataclass(frozen=True)
class Result:
    """One check.

    Attributes:
        name: What was checked.
        problem: What is wrong; None if nothing is.
        seconds: How long it took.
    """

    name: str
    problem: str | None
    seconds: float

    @property
    def good(self) -> bool:
        return self.problem is None

    def __str__(self) -> str:
        return f"{self.name:<48}{self.problem or 'good'} ({self.seconds:.1f} s)"


def run(device: torch.device) -> Iterator[Result]:
    """Yields the results one after the other."""
    for name, check in CHECKS.items():
        begin = time.perf_counter()
        try:
            with torch.no_grad():
                problem = check(device)
        except Exception as error:
            # whatever it is, the other checks tell more about it
            problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
        yield Result(name, problem, time.perf_counter() - begin)


def _check_codec(device: torch.device) -> str | None:
    dtype = usual_dtype(device)
    key, value = random_states(HEAD_DIM, device, dtype)
    layer = filled_layer(HEAD_DIM, device, dtype, nbits=BITS, sink_length=0)
    assert layer.store is not None
    packed = slice(0, layer.store.packed_length)
    errors = [
        _relative_error(mine[:, :, packed].float(), states[:, :, packed].float())
        for mine, states in zip(layer.view().dense(), (key, value), strict=True)
    ]
    if not all(SOURCE_ERROR / 2 < error < SOURCE_ERROR * 1.5 for error in errors):
        return f"squared errors of {errors}, expected about {SOURCE_ERROR}"
    return None


def _check_attention(device: torch.device) -> str | None:
    dtype = usual_dtype(device)
    view = filled_layer(HEAD_DIM, device, dtype, nbits=BITS).view()
    stream = torch.Generator().manual_seed(1)
    query = torch.randn(1, QUERY_HEADS, 1, HEAD_DIM, generator=stream).to(device, dtype)
    scale = HEAD_DIM**-0.5
    mine = attend(query, view, scale=scale)
    keys, values = (x.double().repeat_interleave(QUERY_HEADS // KV_HEADS, 1) for x in view.dense())
    weights = (query.double() @ keys.mT * scale).softmax(-1)
    error = _relative_error(mine.double(), weights @ values) ** 0.5
    # a handful of roundings in a row
    bound = 8 * torch.finfo(dtype).eps
    return (
        None if error < bound else f"differs by {error:.2g} from decoded tokens, over {bound:.2g}"
    )


def _check_exact_part(device: torch.device) -> str | None:
    # in half precision two tokens may be as likely as each other
    model, prompt = _model(device, torch.float32), _prompt(device)
    packed = RotorQuantCache(config=model.config, residual_length=PROMPT + NEW)
    exact = DynamicCache(config=model.config)
    mine, theirs = (_generate(model, prompt, cache) for cache in (packed, exact))
    return None if torch.equal(mine, theirs) else "generates other tokens than the exact cache"


def _check_saving(device: torch.device) -> str | None:
    model, prompt = _model(device, usual_dtype(device)), _prompt(device)
    cache = RotorQuantCache(config=model.config, nbits=BITS)
    tokens = _generate(model, prompt, cache)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cache.safetensors"
        cache.save(path)
        loaded = RotorQuantCache.load(path, model.config, device=device)
    if loaded.memory().packed_numbers == 0:
        return "nothing was packed"
    further = [_generate(model, tokens, one) for one in (cache, loaded)]
    return None if torch.equal(*further) else "a loaded cache goes on otherwise"


CHECKS: dict[str, Callable[[torch.device], str | None]] = {
    f"{BITS} bits lose what they should": _check_codec,
    "attention reads what was packed": _check_attention,
    "generate() with everything in the exact tail": _check_exact_part,
    "generate(), save, load, go on": _check_saving,
}


def _relative_error(mine: Tensor, states: Tensor) -> float:
    return float((mine - states).square().sum() / states.square().sum())


def _model(device: torch.device, dtype: torch.dtype) -> Any:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=QUERY_HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(config)
    return model.to(device, dtype).eval()


def _prompt(device: torch.device) -> Tensor:
    stream = torch.Generator().manual_seed(2)
    return torch.randint(VOCABULARY, (1, PROMPT), generator=stream).to(device)


def _generate(model: Any, tokens: Tensor, cache: object) -> Tensor:
    result: Tensor = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        past_key_values=cache,
        max_new_tokens=NEW,
        do_sample=False,
        pad_token_id=0,
    )
    return result
