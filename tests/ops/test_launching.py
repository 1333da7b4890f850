# SPDX-License-Identifier: Apache-2.0
"""How the attention kernels are launched, seen from a driver that takes note and does nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.compile import outside_interpreter

pytest.importorskip("triton")

# head_dim and settings: tiles in fragment order, twice; in plain order; with signs
CASES: list[tuple[int, dict[str, Any]]] = [
    (128, {}),
    (256, {"nbits": 4}),
    (80, {}),
    (64, {"key_codec": "prod"}),
]


def is_wrong(name: str, argument: Any) -> bool:
    """Whether an argument is not of the kind that its place has: addresses are upper case."""
    if isinstance(argument, torch.Tensor):
        return True
    return name in ("QUERY", "RECORDS", "PARTIAL", "OUT") and not argument > 1 << 16


def relaunched() -> list[tuple[str, list[str]]]:
    """Attends three times in each case, and returns what the second and third launches show."""
    from ops.test_attend_kernels import make_query, make_view
    from support.driver import fake_driver

    from rq_hf.ops.triton.attend import attend

    with fake_driver() as notes:
        for head_dim, settings in CASES:
            view = make_view(700, head_dim, torch.device("cpu"), batch=1, **settings)
            for _ in range(3):
                attend(make_query(view, 4, 1), view, scale=0.1)
    return [
        (note.kernel, [name for name, x in note.arguments.items() if is_wrong(name, x)])
        for note in notes
        if not note.first
    ]


def test_later_launches_pass_the_same_arguments_by_address() -> None:
    notes = outside_interpreter("ops.test_launching:relaunched")
    packed = ["attend_plain" if head_dim == 80 else "attend_tiles" for head_dim, _ in CASES]
    launched = [kernel for kernel, _ in notes]
    for kernel in set(packed):
        # memory may come to lie at an address of another alignment: that is a first run again
        assert launched.count(kernel) >= packed.count(kernel)
    assert launched.count("prepare") >= len(CASES) and launched.count("combine") >= len(CASES)
    assert not [name for _, wrong in notes for name in wrong]
