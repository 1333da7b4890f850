# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run on tiny shapes on the CPU, and their records are what they say."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support.models import make_model

from eval import (
    benchmark_attention,
    benchmark_generate,
    bf16_attention,
    cache_rows,
    goals,
    plot,
    tables,
    timing,
)
from eval.random_view import first_sequence, random_view, view_bytes
from eval.shapes import parse_shape
from rq_hf import RotorQuantCache
from rq_hf.ops import attend
from rq_hf.quant.tiles import TileCodec


def benchmark(script: ModuleType, out: Path, *options: str) -> dict[str, Any]:
    script.main(["--out", str(out), "--device", "cpu", *options])
    return json.loads(out.read_text())


def test_benchmark_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "MOST_BUFFERS", 2)
    out = tmp_path / "attention.json"
    options = ["--shapes", "tiny:1x300", "tiny:1x1k", "tiny:2x300", "--bits", "3", "4", "prod"]
    result = benchmark(benchmark_attention, out, *options)
    assert [row["attention"] for row in result["rows"][:6]] == [
        *bf16_attention.BASELINES,
        *("3", "4", "prod"),
    ]
    tokens = {"tiny:1x300": 300, "tiny:1x1k": 1024, "tiny:2x300": 600}
    for row in result["rows"]:
        if row["attention"] == "cuDNN SDPA":
            assert row["timing"] is None and "RuntimeError" in row["error"]
        if not row["packed"]:
            # keys and values of 2 KV heads of 64 numbers, 2 bytes each
            assert row["bytes"] == 2 * 2 * tokens[row["shape"]] * 64 * 2
        else:
            assert row["timing"]["us"] > 0 and row["relative_error"] < 2**-7
            assert row["ratio"] == row["best_bf16_us"] / row["timing"]["us"]
    plot.main([str(out)])
    assert out.with_suffix(".png").stat().st_size > 0
    table = tables.make_table(out)
    assert "| tiny, 1x1k | " in table and "of MSE's time" in table


def test_wrong_attention_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_attention, "attend", lambda query, view, scale: query * 0)
    monkeypatch.setattr(bf16_attention, "_sdpa", lambda dense, keys, values: dense.query * 0)
    out = tmp_path / "x.json"
    rows = benchmark(benchmark_attention, out, "--shapes", "tiny:1x300", "--bits", "2")["rows"]
    assert [row["timing"] for row in rows] == [None] * 4
    assert "the result is wrong" in rows[1]["error"] and "the result is wrong" in rows[3]["error"]
    assert "none ran | not run: ValueError: the result is wrong" in tables.make_table(out)


@pytest.mark.parametrize("bits", [3, 4])
def test_random_views_are_what_a_cache_holds(bits: int) -> None:
    shape = parse_shape("tiny:2x701")
    view = random_view(
        shape,
        TileCodec(64, key_bits=bits, value_bits=bits),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    cache = RotorQuantCache(nbits=bits)
    states = torch.randn(2, 2, 701, 64)
    key, _ = cache.update(states, states, 0)
    stored = key.source.stored().view
    assert view.length == stored.length == 701
    assert view.packed_length == stored.packed_length > 0
    assert view.records.shape == stored.records.shape
    assert view.scales.shape == stored.scales.shape
    assert torch.equal(view.recent[0].index, stored.recent[0].index)
    used = [stored.records, stored.scales, stored.sinks.keys, stored.sinks.values]
    used += [stored.recent[0].keys, stored.recent[0].values]
    # means of keys before and behind RoPE and of values, and the balance: 4 float32 a coordinate
    assert view_bytes(view) == sum(t.nbytes for t in used) + 4 * 4 * 2 * 2 * 64
    one = first_sequence(view)
    query = torch.randn(2, 4, 1, 64)
    alone, both = (attend(q, v, scale=0.1) for q, v in ((query[:1], one), (query, view)))
    torch.testing.assert_close(alone, both[:1])


def test_benchmark_generate(tmp_path: Path) -> None:
    out = tmp_path / "generate.json"
    names = ["dynamic", "static", "static-compiled", "rotorquant-3", "rotorquant-3-registered"]
    names += ["rotorquant-static-3", "rotorquant-static-3-compiled", "rotorquant-static-3-graph"]
    options = ["--model", "tiny", "--cases", "1x300", "--steps", "6", "--rows", *names]
    result = benchmark(benchmark_generate, out, *options)
    rows = {row["row"]: row for row in result["rows"]}
    for name in ("static-compiled", "rotorquant-static-3-compiled"):
        assert "does not compile steps on cpu" in rows.pop(name)["error"]
    assert "needs a model on a CUDA device" in rows.pop("rotorquant-static-3-graph")["error"]
    for row in rows.values():
        assert row["error"] is None and row["steps_timed"] == 2
        assert 0 < row["step_ms"] <= row["step_slowest_ms"]
        assert row["prefill_s"] > 0 and row["prefill_peak_bytes"] is None
    # 297 tokens of the prompt and 6 generated ones; the last is never stored
    assert rows["dynamic"]["cache_bytes"] == 2 * 2 * 2 * 64 * (297 + 6)
    assert "| DynamicCache as shipped | " in tables.make_table(out)


def test_failing_caches_leave_the_others_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(config: Any, tokens: int) -> Any:
        raise ImportError("no | such package\nat all")

    monkeypatch.setitem(cache_rows.ROWS, "quanto-4", cache_rows.CacheRow("broken", fail))
    options = ["--model", "tiny", "--cases", "1x40", "--steps", "5"]
    out = tmp_path / "x.json"
    result = benchmark(benchmark_generate, out, *options, "--rows", "quanto-4", "dynamic")
    assert [row["error"] for row in result["rows"]] == ["ImportError: no | such package", None]
    assert "| broken | not run: ImportError: no / such package |" in tables.make_table(out)


def test_slow_steps_end_in_time(tmp_path: Path) -> None:
    options = ["--model", "tiny", "--cases", "1x40", "--rows", "dynamic", "--seconds", "0"]
    (row,) = benchmark(benchmark_generate, tmp_path / "x.json", *options)["rows"]
    assert row["error"].startswith("TimeoutError")


def test_every_cache_is_in_the_registry_by_its_kind() -> None:
    model = make_model("llama")
    kinds = {
        name: type(row.make(model.config, 40)).__name__
        for name, row in cache_rows.ROWS.items()
        if name != "quanto-4"
    }
    assert kinds["static"] == kinds["static-compiled"] == "StaticCache"
    assert kinds["dynamic-without-cudnn"] == "DynamicCache"
    assert kinds["rotorquant-2"] == "RotorQuantCache"
    static = {name for name, kind in kinds.items() if kind == "RotorQuantStaticCache"}
    compiled = {name for name in static if cache_rows.ROWS[name].compiled}
    assert static - compiled == {"rotorquant-static-3", "rotorquant-static-3-graph"}
    assert compiled == {f"rotorquant-static-{bits}-compiled" for bits in (2, 3, 4)}
    before = torch.backends.cuda.cudnn_sdp_enabled()
    row = cache_rows.ROWS["dynamic-without-cudnn"]
    with row.around(model, row.make(model.config, 40)):
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


def test_goals_are_of_shapes_that_are_measured() -> None:
    assert set(goals.ATTENTION) <= set(benchmark_attention.SHAPES)
    assert {name for row in goals.ATTENTION.values() for name in row} <= set(
        benchmark_attention.SETTINGS
    )
    for cases in goals.STEP.values():
        assert set(cases) == set(benchmark_generate.CASES)
    assert {row.goal for row in cache_rows.ROWS.values()} - {None} <= set(goals.STEP)


def test_cases_are_named_as_they_are_written() -> None:
    for word in (*benchmark_attention.SHAPES, "tiny:3x500"):
        assert str(parse_shape(word)) == word
    for word, message in (
        ("llama-3-8b:8", "BATCHxTOKENS"),
        ("llama-3-8b:0x4k", "BATCHxTOKENS"),
        ("gpt-5:1x4k", "unknown model"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_shape(word)


def test_time_is_that_of_one_call() -> None:
    made: list[int] = []
    calls = [lambda i=i: (made.append(i), time.sleep(0.002)) for i in range(3)]
    time_taken = timing.measure(calls, torch.device("cpu"), replays=4)
    assert (time_taken.replays, time_taken.calls, time_taken.method) == (4, 3, "wall clock")
    # a warm-up of each, one more, and then the replays in turn
    assert made == [0, 1, 2, 0, *[0, 1, 2] * 4]
    assert 2000 <= time_taken.p20_us <= time_taken.us <= time_taken.p80_us
    assert [timing.buffers_for(n) for n in (10**9, 150 * 10**6, 10**6)] == [1, 2, 40]
