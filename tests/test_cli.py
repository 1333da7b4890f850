# SPDX-License-Identifier: Apache-2.0
"""The command line: what it writes, shows and removes, and how it reports mistakes."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from rq_hf.cli import main, self_test
from rq_hf.cli.evaluate import BENCHMARKS
from rq_hf.cli.session import CacheChoice, Session, join_equal_layers
from rq_hf.quant.codebook_store import SHIPPED_FOLDER, CodebookKey, read_levels, stored_files
from rq_hf.quant.lloyd_max import solve

ROOT = Path(__file__).parents[1]


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
    commands = ["generate", "chat", "doctor", "eval", "codebooks", "--debug"]
    expected = ["build", "list", "clear"] if arguments else commands
    assert all(word in result.output for word in expected)


@pytest.mark.parametrize("words", [[], ["generate"], ["eval", "--help"]], ids=" ".join)
def test_help_loads_nothing_large(words: list[str]) -> None:
    code = (
        f"import sys; sys.argv = {['rq-hf', *words, '--help']}\n"
        "from rq_hf.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'scipy', 'transformers'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.fixture
def chat_model(saved_model: Path, tmp_path: Path) -> Path:
    """The tiny model with a chat template."""
    folder = tmp_path / "chat"
    shutil.copytree(saved_model, folder)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return folder


def test_generate_prints_text_and_then_what_it_took(saved_model: Path) -> None:
    common = ["generate", str(saved_model), "-p", "ab" * 200, "-n", "6", "--device", "cpu"]
    packed = run(*common, "--nbits", "4", "--set", "rotation=dense")
    exact = run(*common, "--exact")
    assert packed.exit_code == exact.exit_code == 0
    assert len(packed.stdout.strip()) >= 1 and "ab" * 200 not in packed.stdout
    status = packed.stderr.splitlines()[-1]
    assert "6 tokens" in status and "a second" in status and "context 405 tokens" in status
    assert "in bfloat16 0." in status and "in bfloat16" not in exact.stderr


def test_generate_reads_files_and_templates(chat_model: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("abc")
    options = ["--device", "cpu", "-n", "2"]
    assert run("generate", str(chat_model), "-f", str(tmp_path / "text"), *options).exit_code == 0
    piped = ["generate", str(chat_model), "-f", "-", "--chat", *options]
    result = CliRunner().invoke(main, piped, input="abc")
    # <user>abc<assistant> and the first of two tokens
    assert "context 21 tokens" in result.stderr


def test_chat_keeps_one_cache(chat_model: Path) -> None:
    command = ["chat", str(chat_model), "--device", "cpu", "-n", "5", "--system", "be"]
    result = CliRunner().invoke(
        main, command, input="hello\n\nand\n/memory\n/reset\nhello\n/quit\n"
    )
    assert result.exit_code == 0, result.output
    statuses = [line for line in result.stderr.splitlines() if line.startswith("[")]
    first, second, again = (_numbers(status) for status in statuses)
    assert first == again
    # read now: the new turn and the reply's last token, as long as the reply reads the same
    assert second[0] > first[0] and 0 < second[1] < second[0] - 5
    assert "layers 0 to " in result.stderr and "held in all" in result.stderr


def _numbers(status: str) -> tuple[int, int]:
    """Tokens in the context, and those of them that were read for the last reply."""
    found = re.search(r"context (\d+) tokens, (\d+) of them", status)
    assert found is not None
    return int(found[1]), int(found[2])


def test_chat_takes_no_mistyped_command_for_a_turn(chat_model: Path) -> None:
    command = ["chat", str(chat_model), "--device", "cpu", "-n", "2"]
    result = CliRunner().invoke(main, command, input="/memroy\n/usr/bin\n/quit\n")
    assert result.exit_code == 0, result.output
    # at the start, and for the first line; the second is a turn
    assert result.stderr.count("/quit ends") == 2
    assert sum(line.startswith("[") for line in result.stderr.splitlines()) == 1


def test_layers_that_say_the_same_are_one_line() -> None:
    lines = ["layer 0: a: b", "layer 1: c", "layer 2: c", "layer 3: c", "layer 4: a: b", "x: y"]
    assert join_equal_layers("\n".join(lines)).splitlines() == [
        "layer 0: a: b",
        "layers 1 to 3: c",
        "layer 4: a: b",
        "x: y",
    ]


@pytest.mark.parametrize("setting", ["nbits=5", "x=1"])
def test_settings_are_refused_before_a_model_is_loaded(
    setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules[Session.__module__]
    monkeypatch.setattr(module, "load_model", lambda *args: pytest.fail("loads the model"))
    result = run("generate", "some/model", "-p", "a", "--device", "cpu", "--set", setting)
    assert result.exit_code == 1 and result.stderr.startswith("rq-hf: error: ")


def test_a_gguf_file_names_the_extra_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.gguf").write_bytes(b"")
    monkeypatch.setattr(sys.modules[Session.__module__], "find_spec", lambda name: None)
    result = run("generate", str(tmp_path / "model.gguf"), "-p", "a", "--device", "cpu")
    assert result.exit_code == 1 and 'pip install ".[gguf]"' in result.stderr
    assert result.stderr.count("\n") == 1


def test_chat_reads_again_what_a_template_changes(chat_model: Path) -> None:
    session = Session.load(str(chat_model), CacheChoice(), device="cpu", dtype=None)
    fresh = Session(session.model, session.tokenizer, CacheChoice())
    turns = [session.encode("ab" * 200), session.encode("ab" * 150 + "c" * 100)]
    session.generate(turns[0], max_new_tokens=3, temperature=0)
    texts = [s.generate(turns[1], max_new_tokens=3, temperature=0) for s in (session, fresh)]
    assert session.held == fresh.held and texts[0] == texts[1]


MISTAKES = [
    (["generate", "MODEL"], "either with --prompt or with --file"),
    (["generate", "MODEL", "-p", ""], "the text is empty"),
    (["generate", "MODEL", "-p", "a", "--nbits", "5"], "nbits must be one of"),
    (["generate", "MODEL", "-p", "a", "--set", "dense"], "--set takes field=value"),
    (["generate", "MODEL", "-p", "a", "--set", "x=1"], "unknown settings: x"),
    (["generate", "MODEL", "-p", "a", "--exact", "--nbits", "2"], "leave out --nbits"),
    (["generate", "MODEL", "-p", "a", "--dtype", "int8"], "--dtype must be one of"),
    (["generate", "absent.gguf", "-p", "a"], "no file absent.gguf"),
    (["chat", "MODEL"], "no chat template"),
    (["eval", "benchmark", "nothing"], "attention, encode, generate"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES, ids=[" ".join(w) for w, _ in MISTAKES])
def test_mistakes_of_other_commands(saved_model: Path, words: list[str], message: str) -> None:
    options = ["--device", "cpu"] if words[0] != "eval" else []
    words = [str(saved_model) if word == "MODEL" else word for word in words]
    result = run(*words, *options)
    assert result.exit_code == 1 and message in result.stderr
    assert result.stderr.splitlines()[-1].startswith("rq-hf: error: ")


def test_doctor() -> None:
    result = run("doctor", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "attention of a decode step" in result.stdout and "packing" in result.stdout
    assert result.stdout.count("good (") == len(self_test.CHECKS)
    assert "self-test" not in run("doctor", "--device", "cpu", "--quick").stdout


def test_doctor_fails_with_a_cache_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_test, "attend", lambda query, *args, **kwargs: query)
    result = run("doctor", "--device", "cpu")
    assert result.exit_code == 1
    assert "differs by" in result.stdout
    assert result.stderr == ("rq-hf: error: not as it should be: attention reads what was packed\n")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_doctor_says_that_there_is_no_gpu() -> None:
    result = run("doctor", "--device", "cuda")
    assert result.exit_code == 1 and "torch sees no GPU" in result.stderr


SCRIPTS = [["perplexity"], ["needle"], *(["benchmark", name] for name in BENCHMARKS)]


@pytest.mark.parametrize("script", SCRIPTS, ids=" ".join)
def test_eval_passes_options_on(script: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    result = run("eval", *script, "--help")
    assert result.exit_code == 0
    name = "_".join(script)
    assert f"usage: rq-hf eval {name}" in result.output + capsys.readouterr().out
    assert run("eval", *script, "--unknown").exit_code == 2


def test_eval_needs_a_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(
        sys.modules["rq_hf.cli.evaluate"],
        "__file__",
        str(tmp_path / "rq_hf" / "cli" / "evaluate.py"),
    )
    monkeypatch.chdir(tmp_path)
    result = run("eval", "needle", "--help")
    assert result.exit_code == 1 and "needs a checkout" in result.stderr
    assert result.stderr.count("\n") == 1
