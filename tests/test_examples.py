# SPDX-License-Identifier: Apache-2.0
"""The example programs run on a tiny random model."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.models import VOCABULARY, make_model
from transformers import AutoTokenizer

from examples import (
    batch,
    compare_settings,
    compiled,
    demo,
    generate,
    lm_eval,
    long_document,
    multi_gpu,
)
from examples.loading import load_model

ROOT = Path(__file__).parents[1]


def test_generate(saved_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate.main(["--model", str(saved_model), "--prompt", "abc", "--max-new-tokens", "4"])
    out = capsys.readouterr().out
    assert out.startswith("abc")
    assert "bits a number" in out


@pytest.mark.parametrize("options", [[], ["--graph"]])
def test_compiled(
    saved_model: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    words = ["--model", str(saved_model), "--prompt", "abc", "--max-new-tokens", "4", *options]
    if options and not torch.cuda.is_available():
        with pytest.raises(ValueError, match="needs a model on a CUDA device"):
            compiled.main(words)
        return
    compiled.main(words)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:2]] == ["first run", "second run"]
    assert lines[2].startswith("abc")


def test_demo_packs_most_of_its_prompt(
    saved_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = saved_model / "prompt.txt"
    prompt.write_text(demo.PROMPT.read_text()[:1000])
    monkeypatch.setattr(demo, "PROMPT", prompt)
    demo.main(["--model", str(saved_model), "--nbits", "4", "--max-new-tokens", "8"])
    out = capsys.readouterr().out
    assert "Leading tokens that agree" in out
    # 64 coordinates share a 16-bit scale; spare room of the buffers comes on top
    (bits,) = [line for line in out.splitlines() if line.startswith("A packed number takes")]
    assert 4 + 16 / 64 <= float(bits.split()[4]) < 5


@pytest.mark.parametrize(
    ("first", "second", "count"), [([1, 2], [1, 2], 2), ([1, 2], [1, 3], 1), ([1], [2], 0)]
)
def test_agreeing(first: list[int], second: list[int], count: int) -> None:
    assert demo.agreeing(first, second) == count


def test_missing_gguf_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no file .*absent\.gguf"):
        load_model(str(tmp_path / "absent.gguf"))


def test_long_document_is_read_once(
    saved_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    document = tmp_path / "document.txt"
    document.write_text("The sea was calm. " * 20)
    caches = tmp_path / "caches"
    words = ["--model", str(saved_model), "--document", str(document), "--caches", str(caches)]
    words += ["--max-new-tokens", "4"]
    long_document.main([*words, "--ask", "Who?", "--ask", "Why?"])
    first = capsys.readouterr().out
    assert "Reading 387 tokens" in first and "Loaded" not in first
    assert "> Who?" in first and "> Why?" in first
    (path,) = caches.iterdir()
    # questions from the keyboard, until an empty line
    lines = iter(["Why?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    long_document.main(words)
    second = capsys.readouterr().out
    assert f"Loaded {path}" in second
    # the same answer from the file
    assert second.endswith(first.rpartition("> Why?\n")[2])
    document.write_text("The sea was rough. " * 20)
    long_document.main([*words, "--ask", "Who?"])
    assert "Reading" in capsys.readouterr().out and len(list(caches.iterdir())) == 2


def test_a_batch_gives_each_text_its_own_continuation(
    saved_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", str(saved_model), "--max-new-tokens", "4"]
    batch.main([*options, "abcdefgh", "xy"])
    both = capsys.readouterr().out.splitlines()
    batch.main([*options, "xy"])
    assert both[0].startswith("abcdefgh|")
    # nothing is packed yet, so padding alone could make a difference
    assert both[2] == capsys.readouterr().out.splitlines()[0]


def test_compare_settings(saved_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = saved_model / "short-prompt.txt"
    prompt.write_text(compare_settings.PROMPT.read_text()[:400])
    words = ["--model", str(saved_model), "--prompt-file", str(prompt), "--max-new-tokens", "4"]
    compare_settings.main(words)
    lines = capsys.readouterr().out.splitlines()
    for name in compare_settings.SETTINGS:
        (row,) = [line for line in lines if line.startswith(f"{name} ")]
        assert 0 <= int(row[28:].split()[0]) <= 4


def test_multi_gpu_in_one_process(saved_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    multi_gpu.main(["--model", str(saved_model), "--prompt", "ab" * 100, "--max-new-tokens", "4"])
    out = capsys.readouterr().out
    assert out.startswith("ab" * 100) and "2 layers on" in out and "2 KV heads" in out


def test_multi_gpu_by_torchrun(saved_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(saved_model, folder)
    # older transformers want a vocabulary that two processes share evenly
    make_model("llama", vocab_size=VOCABULARY + 1).save_pretrained(folder)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "examples.multi_gpu", "--model", str(folder)]
    command += ["--prompt", "ab" * 100, "--max-new-tokens", "4"]
    # on the CPU, whatever there is
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("ab" * 100) == 1 and "1 KV heads" in run.stdout


def test_lm_eval_says_what_is_missing(saved_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SystemExit, match="pip install lm-eval"):
        lm_eval.main(["--model", str(saved_model), "--tasks", "gsm8k"])


TASKS = {
    "likelihood": "output_type: multiple_choice\ndoc_to_choice: ['a', 'b']\ndoc_to_target: 0\n",
    "generation": "output_type: generate_until\ndoc_to_target: a\n"
    "generation_kwargs: {until: ['.'], max_gen_toks: 4}\n",
}


def test_lm_eval(saved_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"text": "abc " * 60}, {"text": "xyz " * 60}]))
    for name, lines in TASKS.items():
        source = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: '{rows}'}}}}\n"
        common = f"task: rq_{name}\ntest_split: test\ndoc_to_text: '{{{{text}}}}'\n"
        (tmp_path / f"{name}.yaml").write_text(common + source + lines)
    # the harness cannot do without an end
    folder = tmp_path / "model"
    shutil.copytree(saved_model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = "!"
    tokenizer.save_pretrained(folder)
    words = ["--model", str(folder), "--tasks", *(f"rq_{name}" for name in TASKS)]
    for options in ([], ["--exact"]):
        lm_eval.main([*words, "--include-path", str(tmp_path), *options])
        out = capsys.readouterr().out
        assert "rq_likelihood" in out and "rq_generation" in out
