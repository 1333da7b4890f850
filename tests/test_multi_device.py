# SPDX-License-Identifier: Apache-2.0
"""One model over several devices: the script runs, here on CPU devices and Gloo processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_layers_and_heads_spread_over_devices_give_the_same_tokens(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "eval.multi_gpu", "--device", "cpu", "--out", str(out)]
    command += ["--prompt-tokens", "300", "--new-tokens", "8"]
    # the host would spread the heads over GPUs where it sees some
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=300)
    results = json.loads(out.read_text())["results"]
    assert all(result["equal"] for result in results.values())
    assert all("packed in 1 tiles" in line for r in results.values() for line in r["layers"])
    spread = results["tensor parallel"]["held"]
    assert [next(iter(held)) for held in spread.values()] == ["cpu, 4 KV heads"] * 2
