# SPDX-License-Identifier: Apache-2.0
"""Lloyd-Max levels on disk: shipped with the package, else solved once and cached for the user.

One JSON file a quantizer. Its levels are hexadecimal floats, so that they survive the round trip
to the last bit, and a SHA-256 checksum over the canonical form of all else tells damage from
content. Files appear by renaming a finished temporary file: readers never see half a file, and
processes that write the same one at once merely replace equal content.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import platformdirs

from rq_hf.quant.lloyd_max import Density, Floats, Gaussian, UnitSphere, solve

Distribution = Literal["gaussian", "beta"]

FORMAT_VERSION = 1
SHIPPED_FOLDER = Path(__file__).parent / "data"

# also of other versions and of temporary files, which clear() removes
_OUR_NAMES = re.compile(r"v\d+-(gaussian|beta-d\d+)-b\d\.json(\.\w+\.tmp)?")


class CodebookCacheWarning(UserWarning):
    """A codebook file was damaged, or could not be written; the codebook itself is right."""


class CodebookFileError(ValueError):
    """A file does not hold the codebook that its name promises."""


@dataclass(frozen=True)
class CodebookKey:
    """Which Lloyd-Max quantizer: what its file name says.

    Attributes:
        bits: 1 to 8.
        distribution: "gaussian" for N(0, 1), or "beta" for a coordinate of a unit vector.
        head_dim: Dimension of that vector, at least 3; None for "gaussian".

    Raises:
        ValueError: For anything else.
    """

    bits: int
    distribution: Distribution = "gaussian"
    head_dim: int | None = None

    def __post_init__(self) -> None:
        if not _is_int(self.bits) or not 1 <= self.bits <= 8:
            raise ValueError(f"bits must be an integer from 1 to 8, got {self.bits!r}")
        if self.distribution not in get_args(Distribution):
            raise ValueError(
                f"distribution must be one of {', '.join(get_args(Distribution))}, "
                f"got {self.distribution!r}"
            )
        if self.distribution == "gaussian" and self.head_dim is not None:
            raise ValueError(
                "the Gaussian levels are stored once for every head_dim, leave head_dim out; "
                f"got {self.head_dim!r}"
            )
        if self.distribution == "beta" and not _is_int(self.head_dim):
            raise ValueError(
                f"the Beta levels need head_dim as an integer from 3 up, got {self.head_dim!r}"
            )
        self.density()

    @property
    def file_name(self) -> str:
        dim = "" if self.head_dim is None else f"-d{self.head_dim}"
        return f"v{FORMAT_VERSION}-{self.distribution}{dim}-b{self.bits}.json"

    def density(self) -> Density:
        """The density that the levels are optimal for."""
        return Gaussian() if self.head_dim is None else UnitSphere(self.head_dim)


@dataclass(frozen=True)
class StoredFile:
    """A file of ours found on disk; exactly one of key and problem is None."""

    path: Path
    key: CodebookKey | None
    problem: str | None


def cache_folder() -> Path:
    """Folder of the user's own codebooks: below $RQ_HF_CACHE, else the platform's cache folder."""
    root = os.environ.get("RQ_HF_CACHE") or platformdirs.user_cache_dir("rq_hf")
    return Path(root) / "codebooks"


def load_levels(key: CodebookKey) -> Floats:
    """Levels [2**bits] float64, ascending: the shipped ones, else the cached ones, else solved.

    Never fails for the sake of the cache: a damaged file is reported by a CodebookCacheWarning and
    rewritten, and a folder that cannot be written is reported once.
    """
    for folder in (SHIPPED_FOLDER, cache_folder()):
        levels = _read_or_warn(folder / key.file_name, key)
        if levels is not None:
            return levels
    levels = solve(key.density(), key.bits)
    try:
        write_levels(cache_folder(), key, levels)
    except OSError as error:
        _warn_unwritable(cache_folder(), error)
    return levels


def read_levels(path: Path, key: CodebookKey) -> Floats:
    """Levels [2**bits] float64 of one file.

    Raises:
        CodebookFileError: If it is damaged, or holds something else than key.
        OSError: If it cannot be read; FileNotFoundError if there is none.
    """
    found, levels = _parse(path.read_bytes())
    if found != key:
        raise CodebookFileError(f"it holds {found}, not {key}")
    return levels


def write_levels(folder: Path, key: CodebookKey, levels: Floats) -> Path:
    """Writes one file, atomically; returns its path.

    Raises:
        OSError: If the folder cannot be made or written; an older file is then still whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / key.file_name
    # the same folder, since a rename is atomic only within a file system
    handle, temporary = tempfile.mkstemp(prefix=f"{path.name}.", suffix=".tmp", dir=folder)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(_document(key, levels))
            file.flush()
            os.fsync(file.fileno())
        # mkstemp lets only its owner read, but a cache may be shared
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    return path


def stored_files(folder: Path) -> list[StoredFile]:
    """Every codebook file in a folder, checked, sorted by name; a missing folder holds none."""
    return [_inspect(path) for path in _ours(folder) if path.suffix == ".json"]


def clear(folder: Path) -> list[Path]:
    """Removes the codebook files of a folder, of any version, and no others; returns their paths.

    Also removes temporary files that a killed process left behind.
    """
    paths = _ours(folder)
    for path in paths:
        path.unlink(missing_ok=True)
    return paths


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _ours(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _OUR_NAMES.fullmatch(path.name))


def _inspect(path: Path) -> StoredFile:
    try:
        key, _ = _parse(path.read_bytes())
        if key.file_name != path.name:
            raise CodebookFileError(f"it holds {key}")
    except (OSError, CodebookFileError) as error:
        return StoredFile(path, None, str(error))
    return StoredFile(path, key, None)


def _read_or_warn(path: Path, key: CodebookKey) -> Floats | None:
    try:
        return read_levels(path, key)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, CodebookFileError) as error:
        message = f"ignoring the codebook file {path}: {error}; the codebook is computed afresh"
        warnings.warn(message, CodebookCacheWarning, stacklevel=3)
        return None


_reported: set[Path] = set()


def _warn_unwritable(folder: Path, error: OSError) -> None:
    if folder in _reported:
        return
    _reported.add(folder)
    message = (
        f"cannot keep codebooks in {folder} ({error}); each process will compute its own. "
        "Set RQ_HF_CACHE to a folder that can be written."
    )
    warnings.warn(message, CodebookCacheWarning, stacklevel=3)


def _document(key: CodebookKey, levels: Floats) -> bytes:
    content = {
        "format": "rq_hf codebook",
        "version": FORMAT_VERSION,
        "distribution": key.distribution,
        "head_dim": key.head_dim,
        "bits": key.bits,
        "levels": [float(level).hex() for level in levels],
    }
    signed = {**content, "sha256": _checksum(content)}
    return (json.dumps(signed, indent=1) + "\n").encode("ascii")


def _checksum(content: dict[str, object]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def _parse(data: bytes) -> tuple[CodebookKey, Floats]:
    """Key and levels of a document, or a CodebookFileError that says what is wrong with it."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CodebookFileError(f"it is not JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != "rq_hf codebook":
        raise CodebookFileError("it is not a codebook of rq_hf")
    if content.get("version") != FORMAT_VERSION:
        raise CodebookFileError(f"it has format version {content.get('version')!r}")
    if content.pop("sha256", None) != _checksum(content):
        raise CodebookFileError("its checksum does not match its content")
    try:
        key = CodebookKey(content["bits"], content["distribution"], content["head_dim"])
        levels = np.array([float.fromhex(text) for text in content["levels"]])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CodebookFileError(f"its content is unusable: {error!r}") from error
    _check_levels(key, levels)
    return key, levels


def _check_levels(key: CodebookKey, levels: Floats) -> None:
    if levels.shape != (2**key.bits,):
        raise CodebookFileError(f"it has {levels.size} levels where {2**key.bits} belong")
    ascending = bool(np.all(np.diff(levels) > 0))
    if not (np.all(np.isfinite(levels)) and ascending and np.array_equal(levels, -levels[::-1])):
        raise CodebookFileError("its levels are not finite, ascending and symmetric")
