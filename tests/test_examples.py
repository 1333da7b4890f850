# SPDX-License-Identifier: Apache-2.0
"""The example programs run on a tiny random model."""

from pathlib import Path

import pytest

from examples import demo, generate
from examples.loading import load_model


def test_generate(saved_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate.main(["--model", str(saved_model), "--prompt", "abc", "--max-new-tokens", "4"])
    out = capsys.readouterr().out
    assert out.startswith("abc")
    assert "bits a number" in out


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
