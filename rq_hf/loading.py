# SPDX-License-Identifier: Apache-2.0
"""A model and its tokenizer from the hub, a folder or a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)


def load_model(
    name: str, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Returns model and tokenizer, the model on `device` and in evaluation mode.

    Args:
        name: Hub id, folder with a model saved by transformers, or path of a `.gguf` file, whose
            weights are unpacked to `dtype` while loading.
        dtype: Type of the weights, and so of the keys and values.
        device: Where the model goes.

    Raises:
        ValueError: `name` ends in `.gguf` and there is no such file.
    """
    source: str | Path = name
    tokenizer_options: dict[str, Any] = {}
    model_options: dict[str, Any] = {}
    if name.endswith(".gguf"):
        path = Path(name).expanduser()
        if not path.is_file():
            raise ValueError(f"no file {path}; give a hub id, a folder or an existing .gguf file")
        source, tokenizer_options = path.parent, {"gguf_file": path.name}
        # without this, some types of weights stay packed and slow down every step
        model_options = {**tokenizer_options, "quantization_config": GgufConfig(dequantize=True)}
    tokenizer = AutoTokenizer.from_pretrained(source, **tokenizer_options)
    # the host's types hide what a module can do
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **model_options)
    return model.to(device).eval(), tokenizer
