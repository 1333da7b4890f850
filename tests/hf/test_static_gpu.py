# SPDX-License-Identifier: Apache-2.0
"""Caches of a fixed size on a GPU: kernels that count on the device, in one CUDA graph a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.models import make_model
from support.static import PADDING, forget_compiled, generate, make_prompt, packed, static
from transformers import PreTrainedModel

pytestmark = pytest.mark.gpu

# a tile is packed in the third step
FEW = {"max_new_tokens": 24}
# tiles in the order of tensor-core operands, and in plain order
HEAD_DIMS = [64, 80]


def make_gpu_model(head_dim: int) -> PreTrainedModel:
    return make_model("llama", head_dim=head_dim).to("cuda")


def on_gpu(prompt: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor.cuda() for name, tensor in prompt.items()}


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("padding", [0, PADDING])
def test_kernels_generate_what_the_reference_does(head_dim: int, padding: int) -> None:
    model, prompt = make_gpu_model(head_dim), on_gpu(make_prompt(padding))
    runs = [
        generate(model, prompt, static(model, impl=impl), disable_compile=True, **FEW)
        for impl in ("reference", "triton")
    ]
    expected, actual = (torch.stack(run.logits) for run in runs)
    # until a code lies next to a boundary, rounding of sums alone
    assert (actual - expected).abs().max() <= 1e-2 * expected.abs().max()
    assert torch.equal(runs[0].sequences, runs[1].sequences)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "rotorquant"])
def test_generate_compiles_steps_by_itself(attention: str) -> None:
    from torch._dynamo.utils import counters

    model, prompt = make_gpu_model(64), on_gpu(make_prompt(PADDING))
    model.set_attn_implementation(attention)
    expected = generate(model, prompt, static(model), disable_compile=True, **FEW)
    forget_compiled(model)
    counters.clear()
    cache = static(model)
    for _ in range(3):
        cache.reset()
        actual = generate(model, prompt, cache, **FEW)
        assert torch.equal(actual.sequences, expected.sequences)
        assert packed(cache) == {128}
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert counters["inductor"]["cudagraph_skips"] == 0
