# SPDX-License-Identifier: Apache-2.0
"""Asks about a long document that is read once: its cache is kept in a file, small as it is.

python -m examples.long_document --model Qwen/Qwen2.5-7B-Instruct --document book.txt \
    --caches caches --ask "Who finds the letter?" --ask "Where does it end?"

Without --ask, questions come from the keyboard. Every question is asked of the document alone.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TextStreamer

from examples.loading import load_model
from rq_hf import RotorQuantCache

# no document holds this
QUESTION = "\u27eaquestion\u27eb"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="hub id, folder or .gguf file")
    parser.add_argument("--document", type=Path, required=True, help="a text file")
    parser.add_argument("--caches", type=Path, required=True, help="folder for caches")
    parser.add_argument("--ask", action="append", help="a question; may be repeated")
    parser.add_argument("--nbits", type=int, default=3, help="bits a stored number: 2, 3, 4 or 8")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    args = parser.parse_args(argv)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model, tokenizer = load_model(args.model, dtype, device)
    before, after = frame(tokenizer, args.document.read_text(encoding="utf-8"))
    document = tokenizer(before, return_tensors="pt").input_ids.to(device)

    path = args.caches / f"{digest(args.model, args.nbits, document)}.safetensors"
    cache = open_cache(model, document, args.nbits, path)
    print(cache.memory())
    for question in args.ask or from_keyboard():
        print(f"\n> {question}" if args.ask else "")
        asked = after.replace(QUESTION, question)
        rest = tokenizer(asked, return_tensors="pt", add_special_tokens=False).input_ids
        tokens = torch.cat((document, rest.to(device)), 1)
        model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            # the document's own cache stays as it is
            past_key_values=copy.deepcopy(cache),
            max_new_tokens=args.max_new_tokens,
            do_sample=False,
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        )


def frame(tokenizer: PreTrainedTokenizerBase, document: str) -> tuple[str, str]:
    """Returns the prompt up to the question, and the rest of it, in which QUESTION stands."""
    content = f"{document.strip()}\n\nQuestion about this text: {QUESTION}"
    if tokenizer.chat_template is None:
        text = f"{content}\n\nAnswer:"
    else:
        messages = [{"role": "user", "content": content}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    before, _, after = str(text).partition(QUESTION)
    return before, QUESTION + after


def digest(model: str, nbits: int, document: Tensor) -> str:
    """Returns a name for the cache of these tokens with this model."""
    told = f"{model} {nbits} {document.tolist()}"
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def open_cache(model: Any, document: Tensor, nbits: int, path: Path) -> RotorQuantCache:
    """Returns the cache of a document: from its file, or read now and saved there."""
    start = time.perf_counter()
    if path.is_file():
        cache = RotorQuantCache.load(path, model.config, device=model.device)
        print(f"Loaded {path} in {time.perf_counter() - start:.1f} s")
        return cache
    print(f"Reading {document.shape[1]} tokens ...", flush=True)
    cache = RotorQuantCache(config=model.config, nbits=nbits)
    with torch.no_grad():
        # the decoder alone: nobody needs logits of a whole document
        model.get_decoder()(document, past_key_values=cache, use_cache=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    cache.save(path)
    print(f"Saved {path} after {time.perf_counter() - start:.1f} s")
    return cache


def from_keyboard() -> Iterator[str]:
    """Yields questions until an empty one."""
    while question := input("\n> ").strip():
        yield question


if __name__ == "__main__":
    main()
