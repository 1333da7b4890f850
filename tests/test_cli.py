# SPDX-License-Identifier: Apache-2.0
"""The command line: what it writes, shows and removes, and how it reports mistakes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from rq_hf.cli import main
from rq_hf.quant.codebook_store import SHIPPED_FOLDER, CodebookKey, read_levels, stored_files
from rq_hf.quant.lloyd_max import solve


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder, not made yet."""
    monkeypatch.setenv("RQ_HF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "codebooks"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def test_build_writes_every_combination(folder: Path) -> None:
    result = run(
        "codebooks", "build", "--distribution", "beta", "--head-dim", "40,48", "--bits=1-3,5"
    )
    assert result.exit_code == 0, result.output
    keys = {CodebookKey(b, "beta", dim) for dim in (40, 48) for b in (1, 2, 3, 5)}
    assert {file.key for file in stored_files(folder)} == keys
    for key in keys:
        levels = read_levels(folder / key.file_name, key)
        assert np.array_equal(levels, solve(key.density(), key.bits))
        assert key.file_name in result.output
    assert f"8 written to {folder}" in result.output


def test_build_shows_the_distortion(folder: Path) -> None:
    lines = run("codebooks", "build", "--bits", "2").output.splitlines()
    assert lines[0].split() == ["distribution", "head_dim", "bits", "distortion", "file"]
    assert lines[1].split() == ["gaussian", "any", "2", "0.1175", "v1-gaussian-b2.json"]


def test_the_documented_commands_write_what_is_shipped(tmp_path: Path) -> None:
    text = (SHIPPED_FOLDER / "README.md").read_text()
    commands = [line.split()[1:] for line in text.splitlines() if line.startswith("    rq-hf ")]
    for command in commands:
        command[command.index("--to") + 1] = str(tmp_path / "data")
        assert run(*command).exit_code == 0
    # content is compared where the store is tested: last bits depend on the platform
    built, shipped = stored_files(tmp_path / "data"), stored_files(SHIPPED_FOLDER)
    assert len(built) == 28
    assert [file.key for file in built] == [file.key for file in shipped]
    assert not (tmp_path / "cache").exists()


def test_list_shows_shipped_cached_and_damaged(folder: Path) -> None:
    run("codebooks", "build", "--distribution", "beta", "--head-dim", "40", "--bits", "2-3")
    (folder / "v1-beta-d40-b2.json").write_text("{}")
    result = run("codebooks", "list")
    assert result.exit_code == 0
    rows = [line.split(maxsplit=5) for line in result.output.splitlines()]
    assert ["beta", "40", "3", "cache", "v1-beta-d40-b3.json", "good"] in rows
    assert ["gaussian", "any", "8", "shipped", "v1-gaussian-b8.json", "good"] in rows
    (damaged,) = [row for row in rows if "v1-beta-d40-b2.json" in row]
    assert damaged == [
        "?",
        "?",
        "?",
        "cache",
        "v1-beta-d40-b2.json",
        "it is not a codebook of rq_hf",
    ]
    assert f"cache: {folder}" in result.output


def test_clear_empties_the_cache_only(folder: Path) -> None:
    run("codebooks", "build", "--bits", "1-2")
    (folder / "notes.txt").write_text("mine")
    assert f"2 removed from {folder}" in run("codebooks", "clear").output
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    assert len(stored_files(SHIPPED_FOLDER)) == 28
    assert "0 removed" in run("codebooks", "clear").output


BAD = [
    (["--bits", "9"], "from 1 to 8, got 9"),
    (["--bits", "two"], "--bits takes numbers"),
    (["--bits", "3-"], "--bits takes numbers"),
    (["--bits", "-3"], "--bits takes numbers"),
    (["--bits", "4-3"], "counts upwards"),
    (["--distribution", "beta"], "needs --head-dim"),
    (["--distribution", "beta", "--head-dim", "2"], "head_dim >= 3"),
    (["--head-dim", "64"], "is for --distribution beta"),
    (["--distribution", "laplace"], "gaussian, beta"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[" ".join(o) for o, _ in BAD])
def test_mistakes_are_reported_in_one_line(folder: Path, options: list[str], message: str) -> None:
    result = run("codebooks", "build", *options)
    assert result.exit_code == 1
    assert result.stderr.startswith("rq-hf: error: ") and message in result.stderr
    assert result.stderr.count("\n") == 1 and result.stdout == ""
    assert not folder.exists()


def test_a_folder_that_cannot_be_made_is_reported_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = run("codebooks", "build", "--bits", "1", "--to", str(tmp_path / "file" / "data"))
    assert result.exit_code == 1
    assert result.stderr.startswith("rq-hf: error: ") and result.stderr.count("\n") == 1


def test_debug_shows_the_exception() -> None:
    result = run("--debug", "codebooks", "build", "--bits", "9")
    assert isinstance(result.exception, ValueError)


@pytest.mark.parametrize("arguments", [[], ["codebooks"]], ids=["main", "codebooks"])
def test_help_names_the_commands(arguments: list[str]) -> None:
    result = run(*arguments, "--help")
    assert result.exit_code == 0
    expected = ["build", "list", "clear"] if arguments else ["codebooks", "--debug"]
    assert all(word in result.output for word in expected)


def test_the_module_itself_loads_neither_scipy_nor_torch() -> None:
    path = Path(sys.modules["rq_hf.cli"].__file__ or "")
    # by its path, as importing the package is another matter
    code = (
        "import runpy, sys; sys.argv = ['rq-hf', '--help']\n"
        f"try: runpy.run_path({str(path)!r}, run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'scipy', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
