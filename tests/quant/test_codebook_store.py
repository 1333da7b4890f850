# SPDX-License-Identifier: Apache-2.0
"""Codebooks on disk: exact round trips, damage, crashes, several processes, no writable folder."""

from __future__ import annotations

import json
import multiprocessing
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rq_hf.quant import codebook_store
from rq_hf.quant.codebook_store import (
    SHIPPED_FOLDER,
    CodebookCacheWarning,
    CodebookFileError,
    CodebookKey,
    cache_folder,
    clear,
    load_levels,
    read_levels,
    stored_files,
    write_levels,
)
from rq_hf.quant.lloyd_max import TOLERANCE, Floats, solve

# not among those shipped, so that the cache is asked for it
KEY = CodebookKey(3, "beta", 40)
SHIPPED = [
    *(CodebookKey(bits) for bits in range(1, 9)),
    *(CodebookKey(b, "beta", dim) for dim in (64, 80, 96, 128, 256) for b in range(1, 5)),
]


def levels_of(key: CodebookKey) -> Floats:
    return solve(key.density(), key.bits)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder, not made yet."""
    monkeypatch.setenv("RQ_HF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(codebook_store, "_reported", set())
    return tmp_path / "cache" / "codebooks"


@pytest.fixture
def no_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Floats:
        raise RuntimeError("solved again")

    monkeypatch.setattr(codebook_store, "solve", fail)


def test_cache_folder_follows_the_environment(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cache_folder() == folder
    monkeypatch.setenv("RQ_HF_CACHE", "")
    assert "rq_hf" in str(cache_folder()) and cache_folder().is_absolute()


@pytest.mark.parametrize("bits", range(1, 9))
def test_levels_survive_the_round_trip_to_the_last_bit(folder: Path, bits: int) -> None:
    key = CodebookKey(bits, "beta", 40)
    path = write_levels(folder, key, levels_of(key))
    assert path.name == f"v1-beta-d40-b{bits}.json"
    assert np.array_equal(read_levels(path, key), levels_of(key))


@pytest.mark.usefixtures("no_solver")
@pytest.mark.parametrize("key", SHIPPED, ids=lambda key: key.file_name)
def test_shipped_levels_need_neither_solver_nor_cache(folder: Path, key: CodebookKey) -> None:
    assert load_levels(key).shape == (2**key.bits,)
    assert not folder.exists()


def test_nothing_else_is_shipped() -> None:
    assert {file.key for file in stored_files(SHIPPED_FOLDER)} == set(SHIPPED)


@pytest.mark.parametrize("key", SHIPPED, ids=lambda key: key.file_name)
def test_shipped_levels_are_those_of_the_solver(key: CodebookKey) -> None:
    # erf and betainc differ in their last bits between platforms and versions of scipy; the
    # shipped levels and these are each within the solver's tolerance of the true ones
    tolerance = 2 * TOLERANCE * key.density().std
    np.testing.assert_allclose(load_levels(key), levels_of(key), rtol=0, atol=tolerance)


def test_first_load_solves_and_later_ones_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    first = load_levels(KEY)
    assert names(folder) == [KEY.file_name]
    assert np.array_equal(first, levels_of(KEY))
    request.getfixturevalue("no_solver")
    assert np.array_equal(load_levels(KEY), first)


def resigned(path: Path, **changes: object) -> bytes:
    """The document of a file with changes and a checksum that fits them."""
    content = json.loads(path.read_bytes())
    del content["sha256"]
    content |= changes
    return json.dumps({**content, "sha256": codebook_store._checksum(content)}).encode()


DAMAGES: dict[str, Callable[[Path], bytes]] = {
    "empty": lambda path: b"",
    "truncated": lambda path: path.read_bytes()[:200],
    "binary": lambda path: bytes(range(256)),
    "nested": lambda path: b"[" * 100_000,
    "changed level": lambda path: path.read_bytes().replace(b"p-4", b"p-5", 1),
    "wrong checksum": lambda path: path.read_bytes().replace(b'"sha256": "', b'"sha256": "0'),
    "no checksum": lambda path: json.dumps(
        {k: v for k, v in json.loads(path.read_bytes()).items() if k != "sha256"}
    ).encode(),
    "foreign object": lambda path: b'{"name": "something else"}',
    "foreign list": lambda path: b"[1, 2, 3]",
    "other version": lambda path: resigned(path, version=2),
    "other bits": lambda path: resigned(path, bits=4),
    "other dimension": lambda path: resigned(path, head_dim=48),
    "odd distribution": lambda path: resigned(path, distribution=["beta"]),
    "few levels": lambda path: resigned(path, levels=["-0x1p-1", "0x1p-1"]),
    "unsorted levels": lambda path: resigned(path, levels=[(0.1).hex(), (-0.1).hex()] * 4),
    "lopsided levels": lambda path: resigned(path, levels=[float(i).hex() for i in range(8)]),
    "infinite levels": lambda path: resigned(
        path, levels=["-inf", "-0x1p0", "-0x1p-1", "-0x1p-2", "0x1p-2", "0x1p-1", "0x1p0", "inf"]
    ),
    "numbers for levels": lambda path: resigned(path, levels=list(range(8))),
    "no levels": lambda path: resigned(path, levels=None),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_reported_and_repaired(folder: Path, damage: str) -> None:
    expected = load_levels(KEY)
    path = folder / KEY.file_name
    whole = path.read_bytes()
    damaged = DAMAGES[damage](path)
    assert damaged != whole
    path.write_bytes(damaged)
    with pytest.raises(CodebookFileError):
        read_levels(path, KEY)
    with pytest.warns(CodebookCacheWarning, match="computed afresh"):
        assert np.array_equal(load_levels(KEY), expected)
    assert path.read_bytes() == whole
    assert names(folder) == [KEY.file_name]


def test_a_damaged_shipped_file_is_replaced_by_the_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codebook_store, "SHIPPED_FOLDER", tmp_path)
    (tmp_path / KEY.file_name).write_text("{")
    with pytest.warns(CodebookCacheWarning):
        levels = load_levels(KEY)
    assert np.array_equal(levels, levels_of(KEY))
    assert np.array_equal(read_levels(folder / KEY.file_name, KEY), levels)


class Crash(BaseException):
    """Ends the writer where it stands, as a signal would."""


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_crash_while_writing_leaves_the_old_file_whole(
    folder: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    path = write_levels(folder, KEY, levels_of(KEY))
    old = path.read_bytes()

    def crash(*_: object) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(os, moment, crash)
        with pytest.raises(Crash):
            write_levels(folder, KEY, levels_of(KEY) / 2)
    assert path.read_bytes() == old
    assert names(folder) == [KEY.file_name]
    write_levels(folder, KEY, levels_of(KEY) / 2)
    assert np.array_equal(read_levels(path, KEY), levels_of(KEY) / 2)


def test_the_file_is_complete_on_disk_before_it_gets_its_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def seen_fsync(handle: int) -> None:
        events.append("fsync")
        fsync(handle)

    def seen_replace(source: str, target: Path) -> None:
        assert Path(source).parent == folder and not target.exists()
        assert np.array_equal(read_levels(Path(source), KEY), levels_of(KEY))
        events.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(os, "replace", seen_replace)
    write_levels(folder, KEY, levels_of(KEY))
    assert events == ["fsync", "replace"]


def refuse(*_: object, **__: object) -> None:
    raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize("obstacle", ["file in the way", "no new files", "no renaming"])
def test_without_a_writable_folder_it_warns_once_and_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, obstacle: str
) -> None:
    if obstacle == "file in the way":
        folder.parent.write_text("")
    elif obstacle == "no new files":
        monkeypatch.setattr(codebook_store.tempfile, "mkstemp", refuse)
    else:
        monkeypatch.setattr(os, "replace", refuse)
    with pytest.warns(CodebookCacheWarning, match="RQ_HF_CACHE") as caught:
        for bits in (2, 3, 3):
            key = CodebookKey(bits, "beta", 40)
            assert np.array_equal(load_levels(key), levels_of(key))
    assert len(caught) == 1
    assert not folder.exists() or names(folder) == []


def test_a_file_that_cannot_be_read_is_reported(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_levels(folder, KEY, levels_of(KEY))
    monkeypatch.setattr(Path, "read_bytes", refuse)
    monkeypatch.setattr(codebook_store, "SHIPPED_FOLDER", folder / "none")
    with pytest.warns(CodebookCacheWarning, match="Permission denied"):
        assert np.array_equal(load_levels(KEY), levels_of(KEY))


def load_together(root: str, barrier: Any, results: Any) -> None:
    os.environ["RQ_HF_CACHE"] = root
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        barrier.wait()
        results.put([level.hex() for level in load_levels(KEY).tolist()])


def fresh_processes() -> Any:
    """A multiprocessing context whose processes share nothing with this one.

    Where there is a fork server it imports the package once, which takes longer than the test.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rq_hf.quant.codebook_store"])
    return context


def test_processes_that_build_at_once_agree(folder: Path) -> None:
    context = fresh_processes()
    barrier, results = context.Barrier(4), context.Queue()
    arguments = (str(folder.parent), barrier, results)
    processes = [context.Process(target=load_together, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert found == [[level.hex() for level in levels_of(KEY).tolist()]] * 4
    assert names(folder) == [KEY.file_name]
    assert np.array_equal(read_levels(folder / KEY.file_name, KEY), levels_of(KEY))


def test_listing_and_clearing_touch_our_files_only(folder: Path) -> None:
    assert stored_files(folder) == [] and clear(folder) == []
    good = write_levels(folder, KEY, levels_of(KEY))
    ours = ["v1-gaussian-b2.json", "v0-beta-d8-b1.json", "v1-gaussian-b2.json.ab_c1.tmp"]
    foreign = ["notes.json", "v1-gaussian-b2.json.bak", "v1-gaussian-b22.json"]
    for name in (*ours, *foreign):
        (folder / name).write_bytes(good.read_bytes())
    listed = {file.path.name: (file.key, file.problem) for file in stored_files(folder)}
    assert set(listed) == {good.name, "v1-gaussian-b2.json", "v0-beta-d8-b1.json"}
    assert listed[good.name] == (KEY, None)
    key, problem = listed["v1-gaussian-b2.json"]
    assert key is None and problem is not None and "it holds" in problem
    assert {path.name for path in clear(folder)} == {good.name, *ours}
    assert names(folder) == sorted(foreign)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "1 to 8"),
        ((3, "laplace"), "gaussian, beta"),
        ((3, "gaussian", 64), "leave head_dim out"),
        ((3, "beta"), "from 3 up"),
        ((3, "beta", 64.0), "from 3 up"),
        ((3, "beta", 2), "head_dim >= 3"),
    ],
)
def test_keys_are_checked(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CodebookKey(*arguments)  # type: ignore[arg-type]
