# SPDX-License-Identifier: Apache-2.0
"""Caches are compared on the same prompts, and the sign test is the binomial one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eval import needle_paired
from eval.needle_table import needle_rows


def record(setting: str, seed: int, score: float, kind: str = "single") -> dict[str, Any]:
    case = {"kind": kind, "context": 4096, "depth": 0.5, "seed": seed}
    return {**case, "setting": setting, "score": score, "logprob": score - 2}


RECORDS = [
    *(record("dynamic", seed, 0.5) for seed in range(4)),
    *(record("packed", seed, score) for seed, score in enumerate((0.0, 0.25, 0.5, 1.0))),
    record("packed", 9, 0.0),  # a prompt that the exact cache has not read
    record("packed", 0, 0.0, "pairs"),
]


def test_only_prompts_that_both_have_read_count() -> None:
    some = needle_paired.pairs(RECORDS, "packed")
    one = needle_paired.compare(some)
    assert one == (4, 2, 1, pytest.approx(-0.0625), pytest.approx(-0.0625))
    assert needle_paired.by_cell(some, lambda r: r["kind"]) == {"single": one}
    with pytest.raises(ValueError, match="no prompt was read with both"):
        needle_paired.compare([])


def test_the_sign_test_is_binomial() -> None:
    assert needle_paired.sign_test(0, 0) == 1
    assert needle_paired.sign_test(3, 3) == 1
    assert needle_paired.sign_test(0, 8) == needle_paired.sign_test(8, 0) == 2 / 2**8
    assert needle_paired.sign_test(1, 5) == 2 * (1 + 6) / 2**6


def test_table_and_script_say_how_many_differ(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "needle.json"
    path.write_text(json.dumps({"records": RECORDS}))
    needle_paired.main([str(path)])
    assert "4 prompts,   2 fewer,   1 more, p 1 " in capsys.readouterr().out
    cell = {"kind": "single", "context": 4096, "depth": 0.5, "prompts": 4, "score": 0.5}
    cells = [{**cell, "logprob": -1.5}]
    summary = [
        {"setting": name, "prompts": 4, "bits_nominal": 3, "cells": cells}
        for name in ("dynamic", "packed")
    ]
    header, exact, packed = needle_rows({"summary": summary, "records": RECORDS})
    assert header[-2:] == ["prompts", "fewer, more"]
    assert exact[-2:] == ["4", "-"] and packed[-2:] == ["4", "2, 1 (p 1)"]
