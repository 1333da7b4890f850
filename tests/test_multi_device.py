# SPDX-License-Identifier: Apache-2.0
"""One model over several devices: the script runs, here on CPU devices and Gloo processes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

ROOT = Path(__file__).parent.parent


def run_script(out: Path, *options: str, check: bool = True) -> dict[str, Any]:
    command = [sys.executable, "-m", "eval.multi_gpu", "--device", "cpu", "--out", str(out)]
    # the host would spread the heads over GPUs where it sees some
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([*command, *options], cwd=ROOT, env=environment, check=check, timeout=300)
    return json.loads(out.read_text())


def test_layers_and_heads_spread_over_devices_give_the_same_tokens(tmp_path: Path) -> None:
    options = ["--prompt-tokens", "300", "--new-tokens", "8"]
    result = run_script(tmp_path / "out.json", *options)
    results = result["results"]
    assert result["config"]["model"] == "a random Llama" and result["config"]["text"] is None
    assert all(result["equal"] for result in results.values())
    assert all("packed in 1 tiles" in line for r in results.values() for line in r["layers"])
    spread = results["tensor parallel"]["held"]
    assert [next(iter(held)) for held in spread.values()] == ["cpu, 4 KV heads"] * 2


def test_a_model_and_text_of_ones_own(saved_model: Path, tmp_path: Path) -> None:
    """Tied weights, biases and one KV head a process, as in small models of Qwen."""
    folder, text = tmp_path / "qwen", tmp_path / "text.txt"
    AutoTokenizer.from_pretrained(saved_model).save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        # the tokenizer's 97, and one more for two processes to share
        vocab_size=98,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        # it would stop there
        eos_token_id=list(range(98)),
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    text.write_text("The sea was calm. " * 50)
    options = ["--model", str(folder), "--text", str(text), "--dtype", "bfloat16"]
    # exits with an error where the tokens differ, which a tie in bfloat16 may do
    result = run_script(
        tmp_path / "out.json", *options, "--prompt-tokens", "300", "--new-tokens", "4", check=False
    )
    assert result["config"]["model"] == "qwen" and result["config"]["text"]["name"] == "text.txt"
    parallel = result["results"]["tensor parallel"]
    assert [next(iter(held)) for held in parallel["held"].values()] == ["cpu, 1 KV heads"] * 2
    for kind in ("tokens", "exact_tokens"):
        assert [len(tokens) for tokens in parallel[kind]] == [4, 4]
        for parting in parallel[f"{kind}_partings"]:
            # bfloat16 sums of two processes are not those of one, and not far from them
            assert 0 < max(parting["difference_before"], parting["difference_there"] or 0) < 0.1
