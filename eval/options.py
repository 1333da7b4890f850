# SPDX-License-Identifier: Apache-2.0
"""Options that the measuring scripts share: which model, which text."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eval.precision import narrow_linear_layers
from eval.windows import DATASETS, Text, download_text, make_windows, read_text
from examples.loading import load_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds --model, --dtype, --linear-dtype and --device."""
    parser.add_argument("--model", required=True, help="hub id, folder or .gguf file")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of weights and states")
    parser.add_argument(
        "--linear-dtype",
        choices=DTYPES,
        help="type that the decoder's linear layers compute in (bfloat16 is faster on some CPUs)",
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=torch.device, default=torch.device(device))


def add_text_options(parser: argparse.ArgumentParser) -> None:
    """Adds --text, --dataset and --bos."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--text",
        type=Path,
        action="append",
        help="a text file, or a folder: its *.txt one behind the other, by name",
    )
    source.add_argument("--dataset", choices=DATASETS, help="a text from the hub")
    parser.add_argument(
        "--bos",
        choices=("auto", "always", "never"),
        default="auto",
        help="begin with the token for the beginning of a text; auto: as the tokenizer does",
    )


def load_options_model(
    args: argparse.Namespace,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Returns the model and tokenizer that the options name."""
    model, tokenizer = load_model(args.model, DTYPES[args.dtype], args.device)
    if args.linear_dtype is not None:
        narrow_linear_layers(model, DTYPES[args.linear_dtype])
    return model, tokenizer


def read_texts(args: argparse.Namespace) -> list[Text]:
    """Returns the texts that the options name."""
    if args.dataset is not None:
        return [download_text(args.dataset)]
    return [read_text(path) for path in args.text]


def describe_model(args: argparse.Namespace, model: PreTrainedModel) -> dict[str, Any]:
    """Returns what identifies the model and its arithmetic in a result file."""
    config = model.config.get_text_config(decoder=True)
    name = str(args.model)
    return {
        "name": Path(name).name if Path(name).exists() else name,
        "class": type(model).__name__,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "dtype": args.dtype,
        "linear_dtype": args.linear_dtype or args.dtype,
    }


def add_first_window_options(parser: argparse.ArgumentParser) -> None:
    """Adds what `load_first_window` reads: model, text, and --tokens."""
    add_model_options(parser)
    add_text_options(parser)
    parser.add_argument("--tokens", type=int, default=1024, help="from the start of the text")


def load_first_window(
    args: argparse.Namespace,
) -> tuple[PreTrainedModel, torch.Tensor, dict[str, Any]]:
    """Returns the model, the text's first tokens `[1, n]` on its device, and both described."""
    # texts first: a wrong path shows at once, a model takes its time
    texts = read_texts(args)
    model, tokenizer = load_options_model(args)
    (tokens,) = make_windows(tokenizer, texts, count=1, length=args.tokens, bos=args.bos)
    described = {
        "model": describe_model(args, model),
        "texts": [text.describe() for text in texts],
        "tokens": args.tokens,
    }
    return model, tokens.to(args.device), described
