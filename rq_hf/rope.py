# SPDX-License-Identifier: Apache-2.0
"""What RoPE a model applies to its keys, read from its configuration.

Nothing here needs to be right for the cache to be: keys are turned back only where their own
energy says that it helps (`rq_hf.quant.measurement`). So what cannot be read is left out.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from rq_hf.quant.rope import RopeTable

# what models call the function that turns the pairs of a vector by a quarter
_QUARTER_TURNS = ("rotate_half", "rotate_every_two")


def rope_tables(config: PreTrainedConfig) -> list[RopeTable | None]:
    """Returns the RoPE of every decoder layer, one object for layers that share it.

    Frequencies that a model changes with the length of the text ("dynamic", "longrope") are those
    for texts within its original length.

    Args:
        config: Configuration of a model; of one made of several, the text decoder's is used.

    Returns:
        One entry a layer: None where the model has no RoPE there, or none that is read here (one
        unknown to `transformers.modeling_rope_utils`, or on a part of the key as in multi-head
        latent attention). `interleaved` is None where the model's code does not say. Empty if even
        the number of layers is unknown.
    """
    text = config.get_text_config(decoder=True)
    layers = getattr(text, "num_hidden_layers", None)
    if not isinstance(layers, int):
        return []
    if getattr(text, "alibi", False) or getattr(text, "qk_rope_head_dim", None):
        return [None] * layers
    interleaved = _interleaved(text)
    built: dict[str | None, RopeTable | None] = {}
    tables = []
    for layer in range(layers):
        layer_type = _layer_type(text, layer)
        if layer_type not in built:
            built[layer_type] = _table(text, layer_type, interleaved)
        tables.append(built[layer_type] if _turns(text, layer) else None)
    return tables


def _layer_type(config: PreTrainedConfig, layer: int) -> str | None:
    """Returns the key of the layer's own parameters; None if all layers share one set."""
    parameters = getattr(config, "rope_parameters", None) or {}
    types = getattr(config, "layer_types", None) or ()
    if layer < len(types) and set(parameters) & set(types):
        return types[layer]
    return None


def _turns(config: PreTrainedConfig, layer: int) -> bool:
    """Whether the layer has RoPE where a model lists that (1 in a list that is called "no")."""
    listed = getattr(config, "no_rope_layers", None) or ()
    return layer >= len(listed) or bool(listed[layer])


def _table(
    config: PreTrainedConfig, layer_type: str | None, interleaved: bool | None
) -> RopeTable | None:
    try:
        inv_freq = _inv_freq(config, layer_type)
    except Exception:
        # a configuration of unknown make may lack anything; without a table all still works
        return None
    return None if inv_freq is None else RopeTable(inv_freq.float().cpu(), interleaved)


def _inv_freq(config: PreTrainedConfig, layer_type: str | None) -> Tensor | None:
    """Returns radians a position for each pair, as the model's own code computes them."""
    parameters = getattr(config, "rope_parameters", None)
    if parameters and layer_type is not None:
        parameters = parameters.get(layer_type)
        config = _of_layer_type(config, layer_type)
    if not parameters:
        # GPT-J and CodeGen are older than rope_parameters
        width = getattr(config, "rotary_dim", None)
        return _default_inv_freq(10_000.0, width) if width else None
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind == "default":
        width = int(_head_dim(config) * (parameters.get("partial_rotary_factor") or 1.0))
        return _default_inv_freq(parameters["rope_theta"], width)
    if kind not in ROPE_INIT_FUNCTIONS:
        return None
    return ROPE_INIT_FUNCTIONS[kind](config, layer_type=layer_type)[0]


def _of_layer_type(config: Any, layer_type: str) -> Any:
    """Returns what holds for one kind of layer where kinds differ in more than their RoPE."""
    try:
        return config.per_layer_config[layer_type]
    except (AttributeError, KeyError, TypeError, ValueError):
        return config


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _default_inv_freq(base: float, width: int) -> Tensor:
    # in float32 and in the host's order of operations, for the very numbers that keys saw
    return 1.0 / (base ** (torch.arange(0, width, 2, dtype=torch.float) / width))


def _interleaved(config: PreTrainedConfig) -> bool | None:
    """Asks the model's own quarter turn how it pairs coordinates; None if it has no such thing."""
    module = _modeling_module(config)
    for name in _QUARTER_TURNS:
        turn = getattr(module, name, None)
        if turn is not None:
            return _pairs_neighbours(turn)
    return None


def _modeling_module(config: PreTrainedConfig) -> ModuleType | None:
    name = type(config).__module__.replace("configuration_", "modeling_")
    if name in sys.modules or not name.startswith("transformers.models."):
        return sys.modules.get(name)
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _pairs_neighbours(turn: Callable[[Tensor], Tensor]) -> bool | None:
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).expand(1, 1, 1, 4)
    try:
        turned = turn(x).flatten().tolist()
    except Exception:
        # code of unknown make
        return None
    known = {(-2.0, 1.0, -4.0, 3.0): True, (-3.0, -4.0, 1.0, 2.0): False}
    return known.get(tuple(turned))
