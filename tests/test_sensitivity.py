# SPDX-License-Identifier: Apache-2.0
"""Noise on outputs of attention is of the energy asked for, and divergence follows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import make_model, make_tokens

from eval import sensitivity, tables
from eval.paired import PIECES


def test_noise_has_the_energy_asked_for() -> None:
    model, tokens = make_model("llama"), make_tokens(256)
    attentions = [layer.self_attn for layer in model.get_decoder().layers]
    seen: dict[str, list[torch.Tensor]] = {}

    def keep(name: str) -> Any:
        return lambda module, args: seen.setdefault(name, []).append(args[0].clone())

    noise = sensitivity.Noise(model)
    before = attentions[1].o_proj.register_forward_pre_hook(keep("exact"))
    with torch.no_grad(), noise.on([1], 0.09):
        after = attentions[1].o_proj.register_forward_pre_hook(keep("noisy"))
        model(tokens)
        model(tokens)
        after.remove()
    with torch.no_grad():
        model(tokens)
    before.remove()
    assert torch.equal(seen["exact"][0], seen["exact"][2])
    shape = (-1, attentions[1].head_dim)
    added = [a - b for a, b in zip(seen["noisy"], seen["exact"], strict=False)]
    for one in added:
        ratio = one.reshape(shape).square().sum(1) / seen["exact"][0].reshape(shape).square().sum(1)
        # mean of 256 * 4 squares of norms of head_dim normal numbers each, 5 deviations
        deviation = (2 / one.numel()) ** 0.5
        assert float(ratio.mean()) == pytest.approx(0.09, rel=5 * deviation)
    assert not torch.equal(*added)


def test_the_script(saved_model: Path, tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "sensitivity.json"
    text.write_text("The sea was calm. Nobody spoke! Was it late? " * 8)
    options = ["--model", str(saved_model), "--text", str(text), "--device", "cpu"]
    lengths = ["--window", "96", "--windows", "2", "--skip", "16"]
    wanted = ["--noise", "0.04", "0.0001", "--alone", "1", "--settings", "near-lossless:3"]
    sensitivity.main([*options, *lengths, *wanted, "--out", str(out)])
    result = json.loads(out.read_text())
    much, little, alone = (row["kl_by_piece"] for row in result["noise"])
    assert [row["layers"] for row in result["noise"]] == [[0, 1], [0, 1], [1]]
    assert result["noise"][0]["tokens"] == 2 * (96 - 16 - 1)
    assert len(much) == PIECES and min(little) > 0
    # KL goes as the energy of small noise
    assert sum(much) > 100 * sum(little)
    assert 0 < sum(alone) < sum(much)
    for row in result["errors"]:
        for name in ("key_error", "value_error", "output_error"):
            # a decoder that returns zeros has an error of 1
            assert len(row[name]) == PIECES and 0 < sum(row[name]) / PIECES < 0.2
    table = tables.make_table(out)
    assert "| KL, noise of 0.04 in layers 0, 1 | " in table
    assert "| error of keys, `near-lossless:3`, layer 1 | " in table
    assert f" | {much[-1] / much[0]:.2f} |" in table
