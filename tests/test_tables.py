# SPDX-License-Identifier: Apache-2.0
"""Tables from several files at once, and what a row without measurements becomes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eval import tables
from eval.statistics_table import NEUTRAL, SETTINGS


def result(model: str, tokens: int, kl: dict[str, float]) -> dict[str, Any]:
    return {
        "command": f"python -m eval.perplexity --model {model} --stats-tokens {tokens}",
        "environment": {"torch": "2", "transformers": "5", "device": "a GPU"},
        "config": {"model": {"name": model}, "first_forwards": [[0, tokens], [tokens, 64]]},
        "summary": [
            {"setting": name, "windows": 1, "kl": value, "kl_error": 0.001}
            for name, value in kl.items()
        ],
    }


def test_files_of_one_comparison_make_one_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    plain, unbalanced = SETTINGS
    files = {
        "m-16": result("m", 16, {plain: 0.1, unbalanced: 0.2, NEUTRAL: 0.9}),
        "m-8": {**result("m", 8, {plain: 0.3, unbalanced: 0.4}), "note": "By hand"},
        "n-16": result("n", 16, {plain: 0.5}),
    }
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    text = "<!-- table: *-*.json -->\nold\n<!-- end of table -->"
    lines = tables.fill(text).splitlines()
    assert lines[1] == (
        f"| tokens | m, `{plain}` | m, `{unbalanced}` | n, `{plain}` | n, `{unbalanced}` |"
    )
    assert lines[3:6] == [
        "| 8 | 0.3000 ± 0.0010 | 0.4000 ± 0.0010 | - | - |",
        "| 16 | 0.1000 ± 0.0010 | 0.2000 ± 0.0010 | 0.5000 ± 0.0010 | - |",
        "| none | 0.9000 ± 0.0010 | - | - | - |",
    ]
    assert "--stats-tokens 8`, and so on; a GPU" in lines[7] and lines[7].endswith(". By hand")


def test_settings_without_windows_have_no_row(tmp_path: Path) -> None:
    measured = {
        "setting": "a:3",
        "windows": 1,
        "tokens": 1000,
        "bits_nominal": 3.25,
        "reference_perplexity": 10.0,
        "perplexity": 10.1,
        "delta_percent": 1.0,
        "delta_percent_error": 0.1,
        "kl": 0.1,
        "top1_agreement_percent": 90.0,
    }
    content = result("m", 64, {})
    content["summary"] = [measured, {"setting": "b:3", "windows": 0}]
    path = tmp_path / "x.json"
    path.write_text(json.dumps(content))
    table = tables.make_table(path)
    assert "`a:3`" in table and "`b:3`" not in table
