# SPDX-License-Identifier: Apache-2.0
"""Whether a saved cache is one of a model, as far as the model's config tells."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicSlidingWindowLayer

from rq_hf.cache import RotorQuantCache
from rq_hf.cache_header import PACKED, Header, LayerRecord
from rq_hf.layers import RotorQuantLayer

_OTHER_MODEL = "this is another model's cache: load it with the config of the model that filled it"
# of these a config tells the sizes of keys
_SIZED = (PACKED, DynamicSlidingWindowLayer.__name__)


def check_model(header: Header, cache: RotorQuantCache, config: PreTrainedConfig) -> None:
    """Refuses a cache whose layers are not this model's.

    Args:
        header: What the file says of them.
        cache: An empty cache, made with the model's config.
        config: This config.

    Raises:
        ValueError: Number, kinds, windows or sizes of layers differ.
    """
    held, told = len(header.layers), len(cache.layers)
    if held != told:
        raise ValueError(f"the file holds {held} layers, the model has {told}; {_OTHER_MODEL}")
    for i, (record, layer) in enumerate(zip(header.layers, cache.layers, strict=True)):
        # a config of such a model does not tell the sizes of all its layers
        sized = cache.exact_because is None
        for name, mine, models in _facts(record, layer, _layer_config(config, i), sized):
            if mine != models:
                raise ValueError(
                    f"the {name} of layer {i} is {mine}, the model's is {models}; {_OTHER_MODEL}"
                )


def _facts(record: LayerRecord, layer: Any, config: Any, sized: bool) -> list[tuple[str, Any, Any]]:
    """Returns what a layer and the model have to agree in: name, the layer's, the model's."""
    kind = PACKED if isinstance(layer, RotorQuantLayer) else type(layer).__name__
    window = getattr(layer, "sliding_window", None)
    states = getattr(layer, "number_of_states", None)
    facts = [
        ("kind", record.kind, kind),
        ("window", record.sliding_window, window),
        ("number of states", None if record.linear is None else record.linear.states, states),
    ]
    if sized and record.batch and record.kind in _SIZED:
        sizes = {"num_key_value_heads": record.kv_heads, "head_dim": record.head_dim}
        for name, size in sizes.items():
            models = getattr(config, name, None)
            # where a config does not say, the first update does
            facts.append((name, size, models if isinstance(models, int) else size))
    return facts


def _layer_config(config: PreTrainedConfig, index: int) -> Any:
    """Returns the config of one decoder layer, where layers may differ."""
    decoder = config.get_text_config(decoder=True)
    try:
        return decoder.per_layer_config[index]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        # models older than that describe all layers by one config
        return decoder
