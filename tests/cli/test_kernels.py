# SPDX-License-Identifier: Apache-2.0
"""What the doctor says of kernels, which it must find out without compiling one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import rq_hf.packed_states
from rq_hf.cli import environment, kernels, main, self_test

CPU = torch.device("cpu")
# of both orders of tiles, and with a sketch
SETTINGS = [(64, 8, "mse"), (64, 3, "prod"), (128, 4, "mse")]


@pytest.fixture
def packing(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Notes how every tile is packed from now on."""
    calls: list[dict[str, Any]] = []
    encode: Callable = rq_hf.packed_states.encode

    def noting(codec: Any, preconditioner: Any, keys: torch.Tensor, *rest: Any, impl: str) -> Any:
        layout = codec.layout
        kind = (codec.head_dim, layout.key_bits, layout.value_bits, keys.dtype)
        calls.append({"impl": impl, "kind": kind})
        return encode(codec, preconditioner, keys, *rest, impl=impl)

    monkeypatch.setattr(rq_hf.packed_states, "encode", noting)
    return calls


def test_the_report_asks_for_plain_torch(packing: list[dict[str, Any]]) -> None:
    assert kernels.report(CPU)
    assert len(packing) == len(kernels.HEAD_DIMS) * len(kernels.SETTINGS)
    assert {call["impl"] for call in packing} == {"reference"}


@pytest.mark.gpu
def test_the_report_launches_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime import JITFunction

    device = torch.device("cuda")
    launched: list[str] = []
    run = JITFunction.run

    def noting(kernel: Any, *args: Any, **options: Any) -> Any:
        launched.append(kernel.__name__)
        return run(kernel, *args, **options)

    monkeypatch.setattr(JITFunction, "run", noting)
    assert kernels.report(device) == [
        "attention of a decode step: kernels",
        "packing: kernels",
    ]
    assert not launched
    # it would have been noted
    kernels.filled_layer(64, device, torch.bfloat16, nbits=4)
    assert launched


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("device", [CPU, pytest.param("cuda", marks=pytest.mark.gpu)], ids=str)
def test_layers_that_kernels_have_filled_say_the_same(
    setting: tuple[int, int, str], device: torch.device | str
) -> None:
    pytest.importorskip("triton")
    device, (head_dim, bits, codec) = torch.device(device), setting
    dtype = kernels.usual_dtype(device)
    layer = kernels.filled_layer(
        head_dim, device, dtype, nbits=bits, key_codec=codec, impl="triton"
    )
    assert layer.store is not None and layer.store.packed_length > 0
    attention, packing = kernels.obstacles(*setting, device)
    assert kernels.obstacles_of(layer) == (attention, packing)
    # the interpreter has no tensor cores
    assert packing is None and (attention is None) == (device.type == "cuda" or bits == 8)


def test_all_checks_share_their_kernels(packing: list[dict[str, Any]]) -> None:
    assert all(result.good for result in self_test.run(CPU))
    kind = (self_test.HEAD_DIM, self_test.BITS, self_test.BITS, kernels.usual_dtype(CPU))
    assert len(packing) > 2 and {call["kind"] for call in packing} == {kind}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_takes_long_is_told_before(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    here = torch.device(device)
    monkeypatch.setattr(environment, "find_device", lambda name: here)
    monkeypatch.setattr(environment, "describe_device", str)
    monkeypatch.setattr(kernels, "report", lambda device: [])
    monkeypatch.setattr(self_test, "run", lambda device: [self_test.Result("check", None, 0.0)])
    lines = CliRunner().invoke(main, ["doctor"]).stdout.splitlines()
    at = lines.index("self-test")
    assert lines[-1].startswith("  check")
    assert ("compiled" in lines[at + 1]) == (device == "cuda")
