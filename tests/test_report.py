# SPDX-License-Identifier: Apache-2.0
"""The report: a page from result files, and how many tokens fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eval import plot, report, report_plots, report_tables
from eval.report_memory import BITS, GB, MODELS, RESERVE, cache_bytes, largest_context

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {"torch": "2", "transformers": "5", "device": "a GPU"}


def perplexity_result(settings: dict[str, float]) -> dict[str, Any]:
    rows = [
        {
            "setting": name,
            "windows": 1,
            "tokens": 1000,
            "bits_nominal": 3.25 if ":3" in name else 4.25,
            "reference_perplexity": 10.0,
            "perplexity": 10.0,
            "delta_percent": 1.0,
            "delta_percent_error": 0.1,
            "kl": kl,
            "top1_agreement_percent": 90.0,
        }
        for name, kl in settings.items()
    ]
    return {
        "command": "python -m eval.perplexity --model m",
        "environment": ENVIRONMENT,
        "config": {
            "model": {"name": "m"},
            "texts": [{"name": "t"}],
            "mode": "strict",
            "window": 1024,
            "first_forwards": [[0, 128], [128, 1024]],
            "scored": [128, 1023],
        },
        "summary": rows,
    }


def needle_result() -> dict[str, Any]:
    cells = [
        {
            "kind": "single",
            "context": 1024,
            "depth": depth,
            "prompts": prompts,
            "score": depth,
            "logprob": -depth,
        }
        for depth, prompts in ((0.0, 2), (0.5, 1), (1.0, 1))
    ]
    row = {"setting": "dynamic", "prompts": 3, "bits_nominal": 16, "score": 0.5, "logprob": -0.5}
    return {
        "command": "python -m eval.needle --model m",
        "environment": ENVIRONMENT,
        "config": {"model": {"name": "m"}},
        "summary": [{**row, "logprob_change": None, "cells": cells}],
    }


def steps_result() -> dict[str, Any]:
    row = {"row": "a", "case": "1x4k", "error": None, "step_ms": 5.0, "prefill_s": 1.0}
    row |= {"goal_ms": 4.0, "cache_bytes": 1, "prefill_peak_bytes": None, "decode_peak_bytes": None}
    failed = {**row, "row": "b", "error": "no memory"}
    return {
        "command": "python -m eval.benchmark_generate --out o",
        "environment": ENVIRONMENT,
        "labels": {"a": "one", "b": "other"},
        "rows": [row, failed],
    }


def test_the_page_names_every_file(tmp_path: Path) -> None:
    folder, out = tmp_path / "results", tmp_path / "out"
    folder.mkdir()
    files = {
        "quality": perplexity_result({"a:3": 0.1, "a:4": 0.01, "b:3": 0.2, "b:4": 0.02}),
        "needles": needle_result(),
        "steps": steps_result(),
        "foreign": {"command": "python -m eval.other"},
    }
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    report.main(["--results", str(folder), "--out", str(out)])
    page = (out / report.PAGE).read_text()
    headings = [line[3:] for line in page.splitlines() if line.startswith("## ")]
    assert headings == [
        "Quality",
        "Needle in a haystack",
        "A decode step in generate()",
        "Memory",
        "Files without a section",
    ]
    # (2 * 0 + 0.5 + 1) / 4, since a run may stop within a grid
    assert "| single | `dynamic` | 16.00 | 37.5% | -0.38 |" in page
    assert all(name in page for name in files) and "- `foreign.json`" in page
    for picture in ("quality", "needles", "steps", "memory"):
        assert f"({picture}.png)" in page and (out / f"{picture}.png").stat().st_size > 0


def test_the_plots_command_draws_steps(tmp_path: Path) -> None:
    path = tmp_path / "steps.json"
    path.write_text(json.dumps(steps_result()))
    plot.main([str(path)])
    assert path.with_suffix(".png").stat().st_size > 0


def test_the_projects_own_results_make_a_page(tmp_path: Path) -> None:
    results = report.read_results(ROOT / "eval" / "results")
    page = report.make_page(results, tmp_path)
    assert page.startswith("# Results\n") and "## Files without a section" not in page
    assert all(f"`{path.name}`" in page for path in results)


def frozen_result(tokens: int, kl: float) -> dict[str, Any]:
    result = perplexity_result({"a:3": kl})
    result["config"]["first_forwards"] = [[0, tokens], [tokens, 1024]]
    result["summary"][0] |= {"kl_by_piece": [kl] * 8, "kl_error": 0.1}
    return result


def test_files_that_differ_in_statistics_alone_make_one_table(tmp_path: Path) -> None:
    early, late, other = frozen_result(128, 0.3), frozen_result(256, 0.2), frozen_result(512, 0.1)
    # another part of the windows is scored
    other["config"]["scored"] = [512, 1023]
    results = {}
    for i, result in enumerate((early, late, other)):
        path = tmp_path / f"{i}.json"
        path.write_text(json.dumps(result))
        results[path] = result
    (files,) = report_tables.frozen_sets(results)
    assert list(files.values()) == [early, late]
    page = report.make_page(results, tmp_path)
    section = page.partition("## Statistics frozen early")[2].partition("## Memory")[0]
    assert "| m | 128 / 256 | 1.50x |" in section and "`0.json`, `1.json`" in section
    assert "### 2" in page and "### 0" not in page


def test_packing_has_time_and_rate() -> None:
    row = {"setting": "3", "rotation": "hadamard", "scale": "search", "bytes": 200_000_000}
    rows = [
        {**row, "operation": "encode", "timing": {"us": 400.0}},
        {**row, "operation": "decode", "timing": {"us": 100.0}},
    ]
    (line,) = report_tables.encode_rows({"rows": rows})[1:]
    assert line == ["3 bits", "hadamard", "search", "400 µs, 500 GB/s", "100 µs, 2,000 GB/s"]


def test_devices_are_held_against_one() -> None:
    parted = {"agreeing": 13, "margin": 0.25, "difference_before": 0.5}
    whole = {"agreeing": 200, "margin": None, "difference_before": 0.0}
    run = {"tokens_partings": [parted, whole], "exact_tokens_partings": [whole, whole]}
    run["held"] = {"rank 0": {"cuda:0": 1 << 20}, "rank 1": {"cuda:1": 3 << 20}}
    packed, exact = report_tables.devices_rows({"results": {"two": run}})[1:]
    assert packed == ["two", "packed", "13, 200", "0.25, -", "0.5, 0", "cuda:0: 1.0; cuda:1: 3.0"]
    assert exact == ["two", "exact", "200, 200", "-, -", "0, 0", "-"]


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no result files"):
        report.read_results(tmp_path)


def test_lines_are_methods_and_panels_are_comparable() -> None:
    settings = {"a:3": 0.1, "a:4": 0.01, "a:3,seed=1": 0.1, "dynamic": 0.0, "step0-dense:3": 1.0}
    other = perplexity_result({"b:3": 0.2, "b:4": 0.02})
    (lines,) = report_plots.collect([perplexity_result(settings), other]).values()
    assert sorted(lines) == ["a", "b"] and [p.kl for p in lines["a"]] == [0.1, 0.01]
    other["config"]["window"] = 4096
    assert len(report_plots.collect([perplexity_result(settings), other])) == 2


def test_a_line_has_one_point_for_a_number_of_bits() -> None:
    settings = {"a:3": 0.1, "a:4": 0.01, "b:3": 0.2, "b:4": 0.02}
    measured, again, fewer = (perplexity_result(settings) for _ in range(3))
    again["summary"][0]["kl"] = 0.11
    for row in fewer["summary"]:
        row["tokens"] = 500
    later = perplexity_result(settings)
    later["config"]["scored"] = [256, 1023]
    panels = report_plots.collect([measured, again, fewer, later])
    assert sorted((panel.start, panel.tokens) for panel in panels) == [
        (128, 500),
        (128, 1000),
        (256, 1000),
    ]
    for lines in panels.values():
        assert [point.kl for point in lines["a"]] == [0.1, 0.01]


@pytest.mark.parametrize("name", MODELS)
def test_the_largest_context_just_fits(name: str) -> None:
    model = MODELS[name]
    for bits in BITS:
        count = largest_context(model, 80 * GB, bits)
        room = 80 * GB - 2 * model.parameters - RESERVE
        assert cache_bytes(model, count, bits) <= room < cache_bytes(model, count + 1, bits)
    assert largest_context(model, 2 * model.parameters, 3) == 0


def test_a_cache_takes_its_bits() -> None:
    model, tokens = MODELS["Llama-3.1-8B"], 1 << 20
    exact = cache_bytes(model, tokens, 16)
    assert exact == 2 * 32 * 8 * 128 * 2 * tokens
    for bits in (2, 3, 4):
        # scales add 16 bits to 128 numbers; tails are nothing against a million tokens
        expected = exact * (bits + 16 / 128) / 16
        assert cache_bytes(model, tokens, bits) == pytest.approx(expected, rel=0.01)
