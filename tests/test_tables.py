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


def frozen(model: str, tokens: int, kl: list[float]) -> dict[str, Any]:
    content = result(model, tokens, {SETTINGS[0]: sum(kl) / len(kl)})
    content["summary"][0]["kl_by_piece"] = kl
    return content


def test_statistics_frozen_early_stand_beside_the_latest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    files = {
        "m-frozen-1024": frozen("m", 1024, [0.3, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.3]),
        "m-frozen-512": frozen("m", 512, [0.6, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.45]),
        "n-frozen-1024": frozen("n", 1024, [0.2] * 8),
    }
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    lines = tables.fill("<!-- table: *-frozen-*.json -->\n<!-- end of table -->").splitlines()
    same = " 0.1000 |" * 6
    assert lines[3:7] == [
        f"| m | 512 | 0.6000 |{same} 0.4500 | 0.2062 ± 0.0010 |",
        f"| m | 1,024 | 0.3000 |{same} 0.3000 | 0.1500 ± 0.0010 |",
        f"| m | 512 / 1,024 | 2.00x |{' 1.00x |' * 6} 1.50x | 1.38x |",
        f"| n | 1,024 |{' 0.2000 |' * 8} 0.2000 ± 0.0010 |",
    ]
    assert "--stats-tokens 512`, and so on" in lines[8]


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


def step(row: str, case: str, ms: float, goal: float | None = None) -> dict[str, Any]:
    sizes = {"cache_bytes": 3 << 30, "prefill_peak_bytes": None, "decode_peak_bytes": 5 << 20}
    return {
        **{"row": row, "case": case, "error": None, "step_ms": ms, "prefill_s": 0.25},
        **{"goal_ms": goal, **sizes},
    }


def test_steps_stand_beside_goals_and_the_fastest_bf16_cache_of_their_case(tmp_path: Path) -> None:
    content = {
        **result("m", 8, {}),
        "command": "python -m eval.benchmark_generate --out o",
        "labels": {"dynamic": "D", "static-compiled": "S", "quanto-4": "Q", "rotorquant-3": "R"},
        "rows": [
            step("dynamic", "1x4k", 8.0),
            step("static-compiled", "1x4k", 4.0),
            step("quanto-4", "1x4k", 1.0),
            {**step("rotorquant-3", "1x4k", 5.0, 2.5), "queued_ms": 1.75},
            step("dynamic", "8x4k", 30.0),
            {**step("static-compiled", "8x4k", 0.0), "error": "no | memory"},
            step("rotorquant-3", "8x4k", 10.0),
        ],
    }
    path = tmp_path / "x.json"
    path.write_text(json.dumps(content))
    table = tables.make_table(path).splitlines()
    assert table[2:9] == [
        "| 1x4k | D | 8.00 | - | - | - | 0.250 | 3,072 | - | 5 |",
        "| 1x4k | S | 4.00 | - | - | - | 0.250 | 3,072 | - | 5 |",
        "| 1x4k | Q | 1.00 | - | - | 4.00x | 0.250 | 3,072 | - | 5 |",
        "| 1x4k | R | 5.00 | 1.75 | 2.5 | 0.80x | 0.250 | 3,072 | - | 5 |",
        "| 8x4k | D | 30.00 | - | - | - | 0.250 | 3,072 | - | 5 |",
        "| 8x4k | S | not run: no / memory | - | - | - | - | - | - | - |",
        "| 8x4k | R | 10.00 | - | - | 3.00x | 0.250 | 3,072 | - | 5 |",
    ]
    assert {line.count("|") for line in table[:9]} == {11}


def kernel(name: str, us: float, **fields: Any) -> dict[str, Any]:
    packed = name in ("3", "prod")
    timing = {"us": us, "method": "cuda graph"}
    row = {"shape": "tiny:1x1k", "attention": name, "packed": packed, "timing": timing}
    row |= {"read_rate_percent": 50.0, "ratio": None, "byte_ceiling": None, "goal": None}
    return {**row, "error": None, **fields}


def test_attention_stands_beside_its_goals(tmp_path: Path) -> None:
    content = {
        **result("m", 8, {}),
        "command": "python -m eval.benchmark_attention --out o",
        "read_rate_gb_per_s": 3000.0,
        "rows": [
            kernel("slow", 90.0),
            kernel("fast", 60.0),
            kernel("broken", 0.0, timing=None, error="x"),
            kernel("3", 30.0, ratio=2.0, byte_ceiling=5.0, goal=3.0),
            kernel("prod", 36.0, ratio=5 / 3, byte_ceiling=4.9),
        ],
    }
    path = tmp_path / "x.json"
    path.write_text(json.dumps(content))
    table = tables.make_table(path)
    assert table.splitlines()[2] == (
        "| tiny, 1x1k | 60.0 µs, 50% (fast) | 30.0 µs, 50%; 2.00x of 5.0x (goal 3.0x) "
        "| 36.0 µs, 50%; 1.67x of 4.9x; 1.20 of MSE's time (goal 1.10) |"
    )
    assert "(3000 GB/s)" in table
