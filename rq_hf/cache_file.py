# SPDX-License-Identifier: Apache-2.0
"""A file of named tensors and one text, whole or not there at all: safetensors, checked.

metadata  kind, format   what the file is, and in which version of its layout
          writer         version of the package that wrote it
          header         the text
          sha256         of these, and of names, dtypes, shapes and bytes of all tensors
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rq_hf import __version__

# 2: statistics kept for the next prompt
FORMAT = 2
KIND = "rq_hf cache"
SAVE_AGAIN = "take another copy of the file, or save the cache again"

Tensors = dict[str, Tensor]


def write(path: Path, header: str, tensors: Tensors) -> None:
    """Writes a file beside `path` that takes its place once it is complete and on disk.

    Args:
        path: Where to; whatever is there stays until then. A killed process leaves a hidden
            temporary file in the folder.
        header: The text.
        tensors: Contiguous tensors on the CPU, none in the memory of another.

    Raises:
        OSError: The file cannot be written.
    """
    path = Path(os.path.realpath(path))
    metadata = {"kind": KIND, "format": str(FORMAT), "writer": __version__, "header": header}
    metadata["sha256"] = _checksum(metadata, tensors)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        # the library makes files that only their owner may read, unless there is one already
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(tensors, temporary, metadata)
        temporary.chmod(mode)
        _sync(temporary)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, SafetensorError):
            raise OSError(f"{path} could not be written: {error}") from error
        raise
    # a folder and the names in it are written for themselves
    if os.name == "posix":
        _sync(path.parent)


def read(path: Path) -> tuple[str, Tensors]:
    """Returns header and tensors of a file that is whole and of a format that is known.

    Raises:
        ValueError: It is not; the message says in what.
        OSError: The file cannot be read.
    """
    with path.open("rb") as raw:
        start = raw.read(9)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            _check_format(path, metadata)
            # copied: a tensor of the open file is part of one storage as large as the file
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        # such a file starts with eight bytes of length and a JSON object
        foreign = len(start) == 9 and not start.endswith(b"{")
        wrong = "is not a safetensors file" if foreign else "is cut short or damaged"
        raise ValueError(f"{path} {wrong} ({error}); {SAVE_AGAIN}") from error
    if _checksum(metadata, tensors) != metadata.get("sha256"):
        raise ValueError(
            f"{path} is damaged: its content does not match its checksum; {SAVE_AGAIN}"
        )
    return metadata["header"], tensors


def _checksum(metadata: dict[str, str], tensors: Tensors) -> str:
    facts = {name: text for name, text in metadata.items() if name != "sha256"}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_format(path: Path, metadata: dict[str, str]) -> None:
    if metadata.get("kind") != KIND:
        raise ValueError(
            f"{path} is a safetensors file but not a saved cache (model weights?); give the path "
            "that the cache was saved to"
        )
    number = metadata.get("format", "")
    if not number.isdecimal() or int(number) < 1:
        raise ValueError(f"{path} is damaged: its format number is {number!r}; {SAVE_AGAIN}")
    if int(number) > FORMAT:
        raise ValueError(
            f"{path} has format {number}, written by rq_hf {metadata.get('writer')}; this is rq_hf "
            f"{__version__}, which reads formats up to {FORMAT}: install a newer version"
        )


def _sync(path: Path) -> None:
    # Windows syncs only what is open for writing, POSIX opens folders only for reading
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
