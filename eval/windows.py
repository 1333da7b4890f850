# SPDX-License-Identifier: Apache-2.0
"""Texts, and the windows of tokens cut from them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

# name: (repository on the hub, configuration, split)
DATASETS = {"wikitext": ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")}


@dataclass(frozen=True)
class Text:
    """A text to measure on.

    Attributes:
        name: Of the file or data set.
        content: The text.
    """

    name: str
    content: str

    def describe(self) -> dict[str, str]:
        """Returns what identifies the text in a result file."""
        digest = hashlib.sha256(self.content.encode()).hexdigest()
        return {"name": self.name, "sha256": digest}


def read_text(path: Path) -> Text:
    """Returns the text in a file, or that of a folder's `*.txt`, one behind the other by name.

    Raises:
        ValueError: There is no such file or folder, or the folder holds no such file.
    """
    if path.is_dir():
        files = sorted(file for file in path.glob("*.txt") if file.is_file())
        if not files:
            raise ValueError(f"no *.txt in the folder {path}; give a text file or a folder of such")
        # a name even for "."
        return Text(path.resolve().name, "".join(map(_read, files)))
    if not path.is_file():
        raise ValueError(
            f"no file or folder {path}; give a text file, a folder with *.txt, or a data set with "
            "--dataset"
        )
    return Text(path.name, _read(path))


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def download_text(name: str) -> Text:
    """Returns the text of a data set, its rows joined as is usual for perplexities.

    Raises:
        ValueError: The name is not in `DATASETS`.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}; choose one of {', '.join(DATASETS)}")
    import datasets

    repository, configuration, split = DATASETS[name]
    rows = datasets.load_dataset(repository, configuration, split=split)
    return Text(f"{repository}/{configuration}/{split}", "\n\n".join(rows["text"]))


def first_tokens(tokenizer: PreTrainedTokenizerBase, bos: str) -> list[int]:
    """Returns the tokens that every window starts with.

    Args:
        tokenizer: The model's.
        bos: "auto" (what the tokenizer itself puts before a text), "always" or "never".

    Raises:
        ValueError: "always" without such a token.
    """
    token = tokenizer.bos_token_id
    if bos == "always" and token is None:
        raise ValueError("--bos always: this tokenizer has no token for the beginning of a text")
    added = token is not None and tokenizer("a").input_ids[:1] == [token]
    return [token] if bos == "always" or (bos == "auto" and added) else []


def make_windows(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Text],
    *,
    count: int,
    length: int,
    bos: str = "auto",
    switch_at: int | None = None,
) -> list[Tensor]:
    """Returns `count` windows of tokens `[1, length]`.

    They are consecutive pieces of the text, none overlapping another. With `switch_at` each
    starts in the first text and goes on in the second from that position.

    Raises:
        ValueError: The number of texts does not fit `switch_at`, that is not inside of the window,
            or the text is too short.
    """
    start = first_tokens(tokenizer, bos)
    shares = _shares(texts, length, len(start), switch_at)
    parts = []
    for text, share in zip(texts, shares, strict=True):
        ids = tokenizer(text.content, add_special_tokens=False, verbose=False).input_ids
        if len(ids) < count * share:
            raise ValueError(
                f"{text.name} has {len(ids)} tokens, enough for {len(ids) // share} windows; "
                f"{count} of {length} tokens need {count * share}"
            )
        parts.append([ids[i * share : (i + 1) * share] for i in range(count)])
    return [torch.tensor([sum(pieces, start)]) for pieces in zip(*parts, strict=True)]


def _shares(texts: Sequence[Text], length: int, special: int, switch_at: int | None) -> list[int]:
    """Returns how many tokens of a window each text gives."""
    if switch_at is None:
        if len(texts) != 1:
            raise ValueError(f"{len(texts)} texts: say with --switch-at where windows turn")
        return [length - special]
    if len(texts) != 2:
        raise ValueError(f"--switch-at needs two texts, got {len(texts)}")
    if not special < switch_at < length:
        raise ValueError(
            f"--switch-at must be between {special + 1} and {length - 1}, got {switch_at}"
        )
    return [switch_at - special, length - switch_at]
