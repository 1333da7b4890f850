# SPDX-License-Identifier: Apache-2.0
"""Texts are files or folders, and a wrong one is refused before a model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from eval import fidelity, needle, options, perplexity, rotation_mse, sensitivity
from eval.windows import read_text


def test_a_folder_is_its_texts_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "essays"
    (folder / "c.txt").mkdir(parents=True)
    for name, content in {"b.txt": "two\n", "a.txt": "one ", "notes.md": "no"}.items():
        (folder / name).write_text(content, encoding="utf-8")
    (folder / "c.txt" / "d.txt").write_text("deeper")
    text = read_text(folder)
    assert (text.name, text.content) == ("essays", "one two\n")
    # as if it were one file
    joined = tmp_path / "joined.txt"
    joined.write_text("one two\n")
    assert read_text(joined).describe()["sha256"] == text.describe()["sha256"]


def test_the_folder_one_is_in_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("one")
    monkeypatch.chdir(tmp_path)
    assert read_text(Path()).name == tmp_path.name


def test_a_folder_without_texts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("no")
    with pytest.raises(ValueError, match=r"no \*\.txt in the folder") as error:
        read_text(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "script", [fidelity, needle, perplexity, rotation_mse, sensitivity], ids=lambda s: s.__name__
)
def test_a_wrong_path_is_refused_before_the_model_is_loaded(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any) -> None:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr(options, "load_model", load)
    common = ["--model", "m", "--text", str(tmp_path / "absent"), "--out", str(tmp_path / "o.json")]
    settings = [] if script is rotation_mse else ["--settings", "near-lossless:3"]
    with pytest.raises(ValueError, match="no file or folder"):
        script.main([*common, *settings])
