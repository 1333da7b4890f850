# SPDX-License-Identifier: Apache-2.0
"""Attaching the cache to a model, and detaching it without a trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from rq_hf.cache import RotorQuantCache

_HOOK = "_prepare_cache_for_generation"


@contextmanager
def use_rotorquant(model: PreTrainedModel, **settings: Any) -> Iterator[PreTrainedModel]:
    """Gives every `generate()` of a model that names no cache a fresh `RotorQuantCache`.

    For pipelines and other code that offers no place for a cache. Only this object is touched,
    and it is as it was afterwards.

    Args:
        model: A decoder model.
        **settings: Arguments of `RotorQuantCache`, `config` excepted.

    Yields:
        The model.

    Raises:
        ValueError: A setting is out of range, the model is an encoder-decoder, or is in use here
            already.

    Example:
        >>> with use_rotorquant(model, nbits=3):
        ...     pipeline("text-generation", model=model, tokenizer=tokenizer)(texts)
    """
    RotorQuantCache(config=model.config, **settings)
    if _HOOK in vars(model):
        raise ValueError("the model's cache preparation is replaced already; leave that first")
    prepare = getattr(model, _HOOK)

    def prepare_with_cache(
        generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        named = model_kwargs.get("past_key_values") is not None
        named = named or generation_config.cache_implementation is not None
        if not named and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = RotorQuantCache(config=model.config, **settings)
        return prepare(generation_config, model_kwargs, *args, **kwargs)

    setattr(model, _HOOK, prepare_with_cache)
    try:
        yield model
    finally:
        delattr(model, _HOOK)
