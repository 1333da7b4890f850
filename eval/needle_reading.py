# SPDX-License-Identifier: Apache-2.0
"""One prompt of the needle test read through one cache: context, question, answer."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from statistics import fmean
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, QuantizedCache
from transformers.cache_utils import Cache

from eval.needle_prompts import Prompt, Question
from eval.scoring import hidden_states, logits
from eval.settings import Setting, bits_per_number
from rq_hf import RotorQuantCache


class Answer(NamedTuple):
    """How an answer was met.

    Attributes:
        exact: Whether greedy decoding gives it.
        logprob: Its log-probability.
        chosen: The first choices, token by token, given the right tokens before.
    """

    exact: bool
    logprob: float
    chosen: list[int]


def answer(model: PreTrainedModel, cache: Cache, question: Question) -> Answer:
    """Reads a question and its answer behind what the cache holds."""
    wanted = question.answer.to(model.device)
    hidden = hidden_states(model, question.tokens.to(model.device), cache)[-1:]
    if len(wanted) > 1:
        # as long as the answer is short, kernels read the packed tokens for it as in generation
        hidden = torch.cat((hidden, hidden_states(model, wanted[None, :-1], cache)))
    scores = logits(model, hidden).float().log_softmax(-1)
    chosen = scores.argmax(-1)
    logprob = scores.gather(1, wanted[:, None]).sum()
    return Answer(bool((chosen == wanted).all()), float(logprob), chosen.tolist())


def read_prompt(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, setting: Setting
) -> dict[str, Any]:
    """Returns a record: scores of one prompt with one cache, and what the cache held."""
    begin = time.perf_counter()

    def read_context() -> Cache:
        cache = setting.make(model.config)
        tokens = prompt.context.to(model.device)
        model.get_decoder()(tokens, past_key_values=cache, use_cache=True)
        return cache

    cache = read_context()
    nominal, held = bits_per_number(cache)
    packed = packed_tokens(cache)
    answers = []
    for i, question in enumerate(prompt.questions):
        # every question meets the context alone
        last = i == len(prompt.questions) - 1
        answers.append(answer(model, cache if last else _copy(cache, read_context), question))
    return {
        "setting": setting.label,
        "score": fmean(one.exact for one in answers),
        "logprob": fmean(one.logprob for one in answers),
        "answers": [
            {
                "wanted": tokenizer.decode(question.answer),
                "chosen": tokenizer.decode(one.chosen),
                "logprob": one.logprob,
            }
            for question, one in zip(prompt.questions, answers, strict=True)
        ],
        "context_tokens": prompt.context.shape[1],
        "packed_tokens": packed,
        "bits_nominal": nominal,
        "bits_held": held,
        "seconds": time.perf_counter() - begin,
    }


def _copy(cache: Cache, make_again: Callable[[], Cache]) -> Cache:
    # some back ends' tensors refuse to be copied
    return make_again() if isinstance(cache, QuantizedCache) else copy.deepcopy(cache)


def packed_tokens(cache: Cache) -> int:
    """Returns how many tokens of the context the question reads packed, in the least layer."""
    if not isinstance(cache, RotorQuantCache):
        return 0
    stores = [layer.store for layer in cache.packed_layers]
    return min((store.packed_length for store in stores if store is not None), default=0)
