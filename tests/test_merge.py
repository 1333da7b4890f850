# SPDX-License-Identifier: Apache-2.0
"""Work split over processes gives, merged, what one process gives."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from eval import merge, needle, perplexity
from eval.shards import WHOLE, Shard, parse_shard

TEXT = "The sea was calm. Nobody spoke! Was it late? The lamp burned on. "


def test_every_item_is_in_one_part() -> None:
    parts = [Shard(i, 3) for i in (1, 2, 3)]
    for item in range(10):
        assert sum(part.takes(item) for part in parts) == 1
    assert all(WHOLE.takes(item) for item in range(3))


@pytest.mark.parametrize("word", ["", "2", "0/2", "3/2", "a/b", "1/-2"])
def test_other_words_are_no_parts(word: str) -> None:
    assert parse_shard("2/4") == (2, 4)
    with pytest.raises(argparse.ArgumentTypeError, match="as 2/4"):
        parse_shard(word)


def run(script: Any, model: Path, out: Path, *options: str) -> dict[str, Any]:
    text = out.parent / "text.txt"
    text.write_text(TEXT * 6)
    common = ["--model", str(model), "--text", str(text), "--out", str(out), "--device", "cpu"]
    script.main([*common, *options])
    return json.loads(out.read_text())


PERPLEXITY = ["--window", "96", "--skip", "16", "--windows", "3", "--settings"]
NEEDLE = ["--contexts", "500", "--depths", "3", "--seeds", "1", "--settings"]
SCRIPTS = [(perplexity, PERPLEXITY), (needle, NEEDLE)]


@pytest.mark.parametrize(("script", "options"), SCRIPTS, ids=["perplexity", "needle"])
def test_merged_parts_are_the_whole(
    script: Any, options: list[str], saved_model: Path, tmp_path: Path
) -> None:
    options = [*options, "dynamic", "near-lossless:3"]
    whole = run(script, saved_model, tmp_path / "whole.json", *options)
    paths = [tmp_path / f"{i}.json" for i in (1, 2)]
    for i, path in enumerate(paths):
        run(script, saved_model, path, *options, "--shard", f"{i + 1}/2")
    out = tmp_path / "merged.json"
    merge.main([*map(str, paths), "--out", str(out)])
    merged = json.loads(out.read_text())
    assert merged["command"] == whole["command"].replace("whole.json", "merged.json")
    assert len(merged["records"]) == len(whole["records"]) == 6
    for mine, theirs in zip(merged["summary"], whole["summary"], strict=True):
        times = {name for name in mine if name.startswith("seconds")}
        assert len(times) == 1
        for name in mine.keys() - times - {"cells"}:
            # sums are added in another order
            assert mine[name] == pytest.approx(theirs[name])
        assert mine.get("cells") == theirs.get("cells")
    # parts once more change nothing, and the command goes on from the whole
    merge.main([str(out), str(paths[0]), "--out", str(out)])
    assert len(json.loads(out.read_text())["records"]) == 6
    again = run(script, saved_model, out, *options)
    assert again["records"] == merged["records"]


def test_other_measurements_are_refused(saved_model: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    content = run(perplexity, saved_model, one, *PERPLEXITY, "dynamic", "--shard", "1/2")
    run(perplexity, saved_model, two, *PERPLEXITY, "near-lossless:3", "--shard", "2/2")
    with pytest.raises(ValueError, match=r"two\.json was made by another command"):
        merge.merge([one, two], tmp_path / "merged.json")
    content["environment"]["torch"] = "0"
    two.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"another environment \(torch\)"):
        merge.merge([one, two], tmp_path / "merged.json")
    two.write_text(json.dumps({**content, "command": "python -m eval.fidelity"}))
    with pytest.raises(ValueError, match=r"eval\.fidelity have no parts"):
        merge.merge([two], tmp_path / "merged.json")
    assert not (tmp_path / "merged.json").exists()
