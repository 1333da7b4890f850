# SPDX-License-Identifier: Apache-2.0
"""The split-K baseline computes attention, and compiles for the GPU that it is compared on.

Triton reads TRITON_INTERPRET when it is imported, so each kind of test has a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]
# batch, KV heads, group, head_dim, tokens, dtype; splits without a token among them
CASES = [
    (1, 2, 4, 64, 256, "float16"),
    (2, 1, 7, 128, 200, "float32"),
    (1, 1, 4, 256, 130, "float32"),
    (2, 2, 1, 128, 193, "float16"),
]
CONFIGS = [(1, 64, 4, 3), (3, 32, 4, 3), (7, 64, 4, 3)]

INTERPRETED = """
from tests.test_split_k import check, CASES, CONFIGS
for case in CASES:
    for config in CONFIGS:
        check(*case, config=config, device="cpu")
"""
COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from eval import split_k, sum_kernel

def compile(kernel, types, constants, **options):
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constexprs=values)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)

types = {name: "*bf16" for name in ("q_ptr", "k_ptr", "v_ptr", "out_ptr")}
types |= {name: "*fp32" for name in ("sums_ptr", "maxima_ptr", "totals_ptr")}
types |= {"scale": "fp32", "tokens": "i32", "tokens_a_split": "i32"}
types |= {"splits": "i32", "group": "i32"}
for dim, tilings in split_k.TILINGS.items():
    block, warps, stages = tilings[0]
    constants = {"G": 7, "D": dim, "ROWS": 16, "BLOCK": block, "EVEN": True}
    kernel = split_k._attend_split_kernel
    binary = compile(kernel, types, constants, num_warps=warps, num_stages=stages)
    # what a multiprocessor of an H100 has
    assert binary.metadata.shared <= 227 * 1024
compile(split_k._combine_kernel, types, {"D": 128, "SPLITS": 64, "CHUNK": 128})
words = {"words_ptr": "*i32", "sums_ptr": "*i32"}
compile(sum_kernel._sum_kernel, words, {"STEPS": 8, "BLOCK": 2048})
"""


def check(
    batch: int,
    kv_heads: int,
    group: int,
    dim: int,
    tokens: int,
    dtype: str,
    *,
    config: tuple[int, int, int, int],
    device: str,
) -> None:
    """Compares with float64 attention of the same numbers."""
    from eval.split_k import Config, attend

    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    query = 3 * torch.randn(batch, kv_heads * group, 1, dim, device=device).to(kind)
    states = (batch, kv_heads, tokens, dim)
    keys, values = (torch.randn(states, device=device).to(kind) for _ in range(2))
    out = attend(query, keys, values, scale=dim**-0.5, config=Config(*config))
    exact = F.scaled_dot_product_attention(
        query.double(), keys.double(), values.double(), enable_gqa=True
    )
    error = float((out.double() - exact).norm() / exact.norm())
    # weights and output are rounded once each; in float32 the sums of products are what rounds
    roundings = 2 if kind != torch.float32 else dim
    assert error <= roundings * torch.finfo(kind).eps, (error, config)


def run(program: str, interpret: bool) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_INTERPRET": "1"} if interpret else {}
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    environment["PYTHONPATH"] = os.pathsep.join([paths, environment.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_attention_is_right() -> None:
    run(INTERPRETED, interpret=True)


@pytest.mark.slow
def test_kernels_compile_for_hopper() -> None:
    run(COMPILED, interpret=False)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_every_layout_is_right_on_a_gpu(dim: int) -> None:
    from eval.split_k import configs

    processors = torch.cuda.get_device_properties(0).multi_processor_count
    for tokens in (4096, 1000):
        for config in configs(4, tokens, dim, processors):
            check(2, 2, 7, dim, tokens, "bfloat16", config=config, device="cuda")


def test_layouts_fill_the_gpu() -> None:
    from eval.split_k import configs

    layouts = list(configs(8, 32768, 128, 132))
    assert len(set(layouts)) == len(layouts) > 5
    # one wave of two programs a multiprocessor
    assert layouts[0].splits == 33 and layouts[0].block == 64
    assert next(configs(256, 32768, 128, 132, quick=True)).splits == 1
    assert all(layout.splits <= 4 for layout in configs(1, 100, 128, 132))
