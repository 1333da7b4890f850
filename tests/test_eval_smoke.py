# SPDX-License-Identifier: Apache-2.0
"""The measuring scripts run on a tiny random model, and their numbers are what they say."""

from __future__ import annotations

import json
import math
from argparse import Namespace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import make_model, make_tokens
from transformers import (
    AutoTokenizer,
    DynamicCache,
)

from eval import fidelity, perplexity, plot, rotation_mse, scoring, tables
from eval.capture import capture
from eval.paired import PairedSums
from eval.precision import NarrowLinear, narrow_linear_layers
from eval.results_io import command_line, write_json
from eval.run import Run
from eval.settings import LADDER, bits_per_number, parse_settings, reason_to_skip
from eval.windows import Text, first_tokens, make_windows
from rq_hf import RotorQuantConfig

WINDOW, SKIP = 96, 16


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A file of random letters, each of them one token of `saved_model`."""
    generator = torch.Generator().manual_seed(1)
    letters = torch.randint(65, 91, (400,), generator=generator).tolist()
    path = tmp_path / "text.txt"
    path.write_text("".join(map(chr, letters)))
    return path


def run_perplexity(model: Path, text: Path, out: Path, *options: str) -> dict[str, Any]:
    lengths = ["--window", str(WINDOW), "--skip", str(SKIP), "--windows", "2"]
    common = ["--model", str(model), "--text", str(text), "--out", str(out), "--device", "cpu"]
    perplexity.main([*common, *lengths, *options])
    return json.loads(out.read_text())


def by_setting(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["setting"]: row for row in result["summary"]}


def test_perplexity_strict(saved_model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "strict.json"
    names = ["dynamic", "near-lossless:2", "near-lossless:4", "turboquant:2", "quantized:4"]
    result = run_perplexity(saved_model, text, out, "--settings", *names, "--plot")
    rows = by_setting(result)
    exact = rows["dynamic"]
    assert exact["kl"] == 0 and exact["delta_percent"] == 0
    assert exact["top1_agreement_percent"] == 100
    assert exact["tokens"] == 2 * (WINDOW - 1 - SKIP)
    assert 0 < rows["near-lossless:4"]["kl"] < rows["near-lossless:2"]["kl"]
    assert rows["near-lossless:4"]["kl"] < rows["turboquant:2"]["kl"]
    assert rows["near-lossless:4"]["bits_nominal"] == 4 + 16 / 64
    assert "generate" in result["skipped"]["quantized:4"]
    assert result["command"].startswith("python -m eval.perplexity --model model")
    assert str(tmp_path) not in out.read_text()
    assert f"| `dynamic` | 16.00 | {exact['tokens']} | " in tables.make_table(out)
    assert out.with_suffix(".png").stat().st_size > 0


def test_baseline_is_the_models_own_perplexity(
    saved_model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", 97 * 10)  # several pieces a window
    result = run_perplexity(saved_model, text, tmp_path / "x.json", "--settings", "dynamic")
    tokenizer = AutoTokenizer.from_pretrained(saved_model)
    ids = tokenizer(text.read_text(), return_tensors="pt").input_ids
    with torch.no_grad():
        windows = torch.stack([ids[0, :WINDOW], ids[0, WINDOW : 2 * WINDOW]])
        scores = make_model("llama")(windows).logits[:, SKIP:-1].double().log_softmax(-1)
    expected = -scores.gather(2, windows[:, SKIP + 1 :, None]).mean()
    # float32 log-probabilities of about log(97)
    eps = torch.finfo(torch.float32).eps
    reference = by_setting(result)["dynamic"]["reference_perplexity"]
    assert math.log(reference) == pytest.approx(float(expected), rel=16 * eps)


def test_perplexity_generate_reads_the_packed_prefix(
    saved_model: Path, text: Path, tmp_path: Path
) -> None:
    # a tile at 4 bits has 64 tokens, and sinks and tail are exact
    names = ["dynamic", "near-lossless:4,residual_length=0", "near-lossless:4,residual_length=90"]
    options = ["--mode", "generate", "--first", "80", "--chunk", "5"]
    result = run_perplexity(saved_model, text, tmp_path / "x.json", "--settings", *names, *options)
    exact, packed, unpacked = (by_setting(result)[name] for name in names)
    assert result["config"]["first_forwards"] == [[0, 80], [80, 85]]
    assert exact["tokens"] == 2 * (WINDOW - 1 - 80)
    assert exact["kl"] == 0 < packed["kl"]
    # nothing is old enough to be packed; attention alone computes in another order
    assert abs(unpacked["kl"]) < 1e-3 * packed["kl"]
    assert unpacked["bits_held"] is None


def test_statistics_can_be_frozen_early(saved_model: Path, text: Path, tmp_path: Path) -> None:
    names = ["dynamic", "near-lossless:3"]
    late = run_perplexity(saved_model, text, tmp_path / "late.json", "--settings", *names)
    options = ["--stats-tokens", "32", "--settings", *names]
    early = run_perplexity(saved_model, text, tmp_path / "early.json", *options)
    assert early["config"]["first_forwards"] == [[0, 32], [32, WINDOW]]
    kl = by_setting(early)["near-lossless:3"]["kl"]
    assert kl > 0 and kl != by_setting(late)["near-lossless:3"]["kl"]


def test_a_stopped_run_goes_on(
    saved_model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "x.json"
    forwards: list[str] = []
    real = perplexity.hidden_states

    def counted(model: Any, tokens: Any, cache: Any, spans: Any) -> Any:
        forwards.append(type(cache).__name__)
        if len(forwards) == 6:
            raise KeyboardInterrupt
        return real(model, tokens, cache, spans)

    monkeypatch.setattr(perplexity, "hidden_states", counted)
    options = ["--settings", "near-lossless:4", "turboquant:4"]
    with pytest.raises(KeyboardInterrupt):
        run_perplexity(saved_model, text, out, *options)
    before = json.loads(out.read_text())
    assert len(before["records"]) == 3
    after = run_perplexity(saved_model, text, out, *options)
    assert after["records"][:3] == before["records"]
    assert [row["windows"] for row in after["summary"]] == [2, 2]
    # the second window's reference once more, and the one setting that was missing
    assert forwards[6:] == ["DynamicCache", "RotorQuantCache"]
    with pytest.raises(ValueError, match=r"another config \(.*scored"):
        run_perplexity(saved_model, text, out, *options, "--skip", "20")


def test_settings_are_added_to_a_file(saved_model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.json"
    first = run_perplexity(saved_model, text, out, "--settings", "near-lossless:4")
    names = ["near-lossless:4", "rotorquant:4", "turboquant:4"]
    both = run_perplexity(saved_model, text, out, "--settings", *names)
    assert both["records"][:2] == first["records"] and len(both["records"]) == 6
    assert [row["setting"] for row in both["summary"]] == names
    assert [row["windows"] for row in both["summary"]] == [2, 2, 2]
    assert len({row["reference_perplexity"] for row in both["summary"]}) == 1
    # the command in the file makes all of it
    assert " ".join(names) in both["command"]


def test_results_of_a_renamed_setting_are_not_mixed(tmp_path: Path) -> None:
    (one,) = parse_settings(["near-lossless:3"], strict=True)
    (other,) = parse_settings(["near-lossless:3"], strict=False)
    run = Run(tmp_path / "x.json", {"commit": None, "environment": {}}, {})
    run.add_setting(one)
    with pytest.raises(ValueError, match="other options"):
        run.add_setting(other)


def test_fields_that_are_new_have_their_defaults_in_old_files(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    run = Run(path, {"commit": None, "environment": {}}, {})
    plain, packed = parse_settings(
        ["near-lossless:3", "near-lossless:3,sliding=packed"], strict=True
    )
    before = {name: value for name, value in plain.options.items() if name != "sliding"}
    run.content["settings"] = {plain.label: dict(before), packed.label: before}
    run.add_setting(plain)
    with pytest.raises(ValueError, match="other options"):
        run.add_setting(packed)


@pytest.mark.parametrize(
    "family", ["llama", "gemma2", "gpt2", "cohere", "granite", "qwen3-moe", "gemma3-vision"]
)
def test_logits_in_pieces_are_the_models(family: str) -> None:
    model = make_model(family)
    tokens = make_tokens(20)
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        hidden = scoring.hidden_states(model, tokens, cache, [(0, 7), (7, 20)])
        pieces = torch.cat([scoring.logits(model, hidden[:9]), scoring.logits(model, hidden[9:])])
        expected = model(tokens).logits[0]
    torch.testing.assert_close(pieces, expected)
    assert expected.std() > 0


def test_an_exact_cache_reads_long_spans_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = make_model("llama"), make_tokens(20)
    lengths: list[int] = []
    decoder = model.get_decoder()
    decoder.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))

    def read(cache: Any) -> torch.Tensor:
        with torch.no_grad():
            return scoring.hidden_states(model, tokens, cache, [(0, 11), (11, 20)])

    whole = read(DynamicCache(config=model.config))
    monkeypatch.setattr(scoring, "LONGEST_FORWARD", 4)
    pieces = read(DynamicCache(config=model.config))
    # what a packed cache makes of a forward depends on its length
    (packed,) = parse_settings(["near-lossless:3"], strict=True)
    read(packed.make(model.config))
    assert lengths == [11, 9, 4, 4, 3, 4, 4, 1, 11, 9]
    torch.testing.assert_close(pieces, whole)


@pytest.mark.parametrize("bytes_kept", [0, 1 << 30])
def test_comparison_by_its_formulae(bytes_kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "KEPT_BYTES", bytes_kept)
    monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", 97 * 4)
    model, targets = make_model("llama"), make_tokens(11)[0]
    generator = torch.Generator().manual_seed(2)
    one, two = (torch.randn(11, 64, generator=generator) for _ in range(2))
    with torch.no_grad():
        reference = scoring.Reference(model, one, targets)
        reference.compare(one)
        scores = reference.compare(two)
    weight = model.lm_head.weight.detach().double()
    p, q = ((x.double() @ weight.T).log_softmax(-1) for x in (one, two))
    index = torch.arange(11)
    # a float32 logit is a sum of 64 products; a divergence is a mean of differences of four
    rounding = torch.finfo(torch.float32).eps * 64 * float(two.norm(dim=1).max() * weight.norm())
    close = partial(torch.testing.assert_close, rtol=0, atol=4 * rounding)
    close(scores.reference_nll.double(), -p[index, targets])
    close(scores.nll.double(), -q[index, targets])
    close(scores.kl.double(), (p.exp() * (p - q)).sum(-1))
    assert torch.equal(scores.agrees, p.argmax(-1) == q.argmax(-1))


def test_sums_add_up_to_the_metrics() -> None:
    generator = torch.Generator().manual_seed(3)
    reference, nll, kl = torch.rand(3, 2, 40, generator=generator, dtype=torch.float64)
    agrees = torch.rand(2, 40, generator=generator) < 0.5
    parts = [
        PairedSums.of(scoring.Scores(reference[i], nll[i], kl[i], agrees[i])) for i in range(2)
    ]
    metrics = PairedSums.total(parts).metrics()
    difference = (nll - reference).flatten()
    ratio = float(difference.mean().exp())
    assert metrics["perplexity"] == pytest.approx(float(nll.mean().exp()))
    assert metrics["delta_percent"] == pytest.approx(100 * (ratio - 1))
    error = float(difference.std()) / 80**0.5
    assert metrics["delta_percent_error"] == pytest.approx(100 * ratio * error)
    assert metrics["kl_error"] == pytest.approx(float(kl.flatten().std()) / 80**0.5)
    assert metrics["top1_agreement_percent"] == pytest.approx(100 * float(agrees.double().mean()))
    assert metrics["kl_by_piece"][1] == pytest.approx(float(kl[:, 5:10].mean()))


def test_ladder_ends_at_the_default() -> None:
    settings = parse_settings(["ladder:3"], strict=False)
    assert [setting.label for setting in settings] == [f"{name}:3" for name in LADDER]
    last = settings[-1].options | {"key_mean": "auto"}
    assert RotorQuantConfig(**last) == RotorQuantConfig()
    changed = [
        {key for key, value in two.options.items() if one.options[key] != value}
        for one, two in pairwise(settings)
    ]
    assert all(len(keys) == 1 for keys in changed)


@pytest.mark.parametrize("name", ["near-lossless", "rotorquant", "turboquant"])
def test_methods_are_the_packages_presets(name: str) -> None:
    (setting,) = parse_settings([f"{name}:3"], strict=False)
    assert RotorQuantConfig(**setting.options) == RotorQuantConfig.from_preset(name)


def test_settings_take_fields() -> None:
    (setting,) = parse_settings(["rotorquant:3,value_bits=2,rotation=dense"], strict=True)
    wanted = {"key_bits": 3, "value_bits": 2, "rotation": "dense", "strict": True}
    assert setting.options | wanted == setting.options


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("best:3", "unknown setting 'best'; choose one of dynamic"),
        ("turboquant", "needs a number of bits"),
        ("turboquant:3,seed", "field=value"),
        ("turboquant:7", "nbits must be one of"),
    ],
)
def test_wrong_settings_are_refused(word: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_settings([word], strict=True)


def test_unavailable_settings_have_a_reason() -> None:
    config = make_model("gemma3").config
    (setting,) = parse_settings(["quantized:4"], strict=False)
    assert "strict" not in (reason_to_skip(setting, config, strict=False) or "strict")
    (packed,) = parse_settings(["near-lossless:3"], strict=False)
    assert reason_to_skip(packed, config, strict=False) is None
    (exact,) = parse_settings(["dynamic"], strict=False)
    assert bits_per_number(exact.make(config)) == (16, 16)


def test_windows_switch_texts(saved_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(saved_model)
    texts = [Text("a", "abcdefgh"), Text("b", "ABCDEFGHIJKL")]
    windows = make_windows(tokenizer, texts, count=2, length=6, switch_at=2)
    assert [tokenizer.decode(window[0]) for window in windows] == ["abABCD", "cdEFGH"]
    with pytest.raises(ValueError, match="enough for 4 windows"):
        make_windows(tokenizer, texts, count=5, length=6, switch_at=2)
    with pytest.raises(ValueError, match="--switch-at"):
        make_windows(tokenizer, texts, count=1, length=6)


def test_windows_begin_as_the_tokenizer_does(saved_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(saved_model)
    assert first_tokens(tokenizer, "auto") == []
    with pytest.raises(ValueError, match="no token for the beginning"):
        first_tokens(tokenizer, "always")
    tokenizer.bos_token = "!"
    assert first_tokens(tokenizer, "auto") == []
    text = Text("a", "abcdefgh")
    windows = make_windows(tokenizer, [text], count=2, length=4, bos="always")
    assert [tokenizer.decode(window[0]) for window in windows] == ["!abc", "!def"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "generate", "stats_tokens": 8}, "--first does the same"),
        ({"mode": "strict", "chunk": 8}, "belong to --mode generate"),
        ({"mode": "strict", "skip": 63}, "nothing to score"),
        ({"mode": "generate", "first": 64}, "nothing to score"),
    ],
)
def test_wrong_plans_are_refused(options: dict[str, Any], message: str) -> None:
    defaults = {"window": 64, "skip": 0, "first": None, "chunk": None, "stats_tokens": None}
    with pytest.raises(ValueError, match=message):
        perplexity.plan(Namespace(**{**defaults, **options}))


def test_narrow_layers_compute_in_their_own_type() -> None:
    model, tokens = make_model("llama"), make_tokens(12)
    with torch.no_grad():
        exact = model(tokens).logits
        narrow_linear_layers(model, torch.bfloat16)
        narrow = model(tokens).logits
    replaced = [module for module in model.modules() if isinstance(module, NarrowLinear)]
    assert len(replaced) == 2 * 7 and narrow.dtype == torch.float32
    assert type(model.lm_head) is torch.nn.Linear
    error = (narrow - exact).norm() / exact.norm()
    # some roundings of 2^-9 each, in a row of layers
    assert 0 < error < 2**-9 * 2 * 7


def test_capture_sees_what_the_cache_is_given() -> None:
    model, tokens = make_model("gemma3"), make_tokens(40)
    (layer,) = capture(model, tokens)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens, past_key_values=cache)
    assert layer.layer == 1
    assert torch.equal(layer.key, cache.layers[1].keys)
    assert torch.equal(layer.value, cache.layers[1].values)
    assert layer.query.shape == (1, 4, 40, 64)
    assert model.config._attn_implementation == "sdpa"


def test_logit_error_by_its_formula() -> None:
    (states, _) = capture(make_model("llama"), make_tokens(30))
    generator = torch.Generator().manual_seed(4)
    key = states.key + torch.randn(states.key.shape, generator=generator)
    errors = []
    for head in range(4):
        for row in range(30):
            q = states.query[0, head, row].double() * states.scaling
            d = (key - states.key)[0, head // 2, : row + 1].double() @ q
            errors.append(d - d.mean())
    expected = torch.cat(errors).square().mean().sqrt()
    assert fidelity.logit_error(states, key) == pytest.approx(float(expected), rel=1e-5)
    # the same for all keys of a head: softmax does not feel it
    assert fidelity.logit_error(states, states.key + 1) < 1e-5 * float(expected)


def test_fidelity(saved_model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "fidelity.json"
    settings = ["--settings", "near-lossless:4", "near-lossless:2", "quantized:4"]
    options = ["--model", str(saved_model), "--text", str(text), "--tokens", "80"]
    fidelity.main([*options, "--out", str(out), "--device", "cpu", *settings])
    rows = json.loads(out.read_text())["rows"]
    assert [row["setting"] for row in rows] == settings[1:3]
    for metric in fidelity.METRICS:
        fine, coarse = (row["median"][metric] for row in rows)
        # a decoder that returns zeros has an error of 1
        assert 0 < fine < coarse
        assert metric == "logit_error" or coarse < 1
    assert [layer["layer"] for layer in rows[0]["layers"]] == [0, 1]
    table = tables.make_table(out)
    assert f"| `near-lossless:4` | {rows[0]['mean']['key_error']:.4f} | " in table
    assert "of one window of 80 tokens" in table


def test_fidelity_keeps_what_it_has(
    saved_model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = fidelity.measure

    def stopped(states: Any, setting: Any, config: Any) -> dict[str, float]:
        if setting.label == "near-lossless:2":
            raise KeyboardInterrupt
        return real(states, setting, config)

    monkeypatch.setattr(fidelity, "measure", stopped)
    out = tmp_path / "fidelity.json"
    options = ["--model", str(saved_model), "--text", str(text), "--tokens", "80"]
    settings = ["--settings", "near-lossless:4", "near-lossless:2"]
    with pytest.raises(KeyboardInterrupt):
        fidelity.main([*options, "--out", str(out), "--device", "cpu", *settings])
    assert [row["setting"] for row in json.loads(out.read_text())["rows"]] == settings[1:2]


def test_rotation_mse(saved_model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "mse.json"
    options = ["--model", str(saved_model), "--text", str(text), "--tokens", "80", "--seeds", "2"]
    rotation_mse.main([*options, "--out", str(out), "--device", "cpu"])
    result = json.loads(out.read_text())
    assert len(result["rows"]) == 4 * 5 * 3 * 2
    dense = {
        row["bits"]: row["relative_mse"]
        for row in result["rows"]
        if (row["rotation"], row["scale"], row["input"]) == ("dense", "norm", "values")
    }
    for bits in rotation_mse.BITS:
        # what a dense rotation gives is a Gaussian source, from any vectors
        assert dense[bits] == pytest.approx(result["gaussian"][str(bits)], rel=0.2)


def test_plot_command(saved_model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.json"
    run_perplexity(saved_model, text, out, "--settings", "near-lossless:4")
    plot.main([str(out)])
    assert out.with_suffix(".png").stat().st_size > 0


def test_json_is_whole_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": float("nan"), "b": [1.5, (2, float("inf"))]})
    assert json.loads(path.read_text()) == {"a": None, "b": [1.5, [2, None]]}
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]
    assert json.loads(path.read_text())["b"][0] == 1.5


def test_command_names_no_place_of_this_machine(tmp_path: Path) -> None:
    shown = command_line("eval.x", ["--text", str(tmp_path / "a b.txt"), "--out", "eval/y.json"])
    assert shown == "python -m eval.x --text 'a b.txt' --out eval/y.json"
