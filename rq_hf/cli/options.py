# SPDX-License-Identifier: Apache-2.0
"""Options that commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="Hub id, folder or .gguf file.", metavar="MODEL")]
Nbits = Annotated[
    int | None, typer.Option(help="Bits a stored number: 2, 3, 4 or 8; 3 if left out.")
]
Preset = Annotated[
    str | None, typer.Option(help="near-lossless (the default), rotorquant or turboquant.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="Another setting, such as value_bits=2; may be repeated."),
]
Exact = Annotated[
    bool, typer.Option("--exact", help="Use transformers' exact cache, to compare with.")
]
Device = Annotated[
    str | None, typer.Option(help="Such as cpu, cuda or cuda:1; a GPU where there is one.")
]
Dtype = Annotated[
    str | None,
    typer.Option(help="float32, bfloat16 or float16; bfloat16 on a GPU, float32 on a CPU."),
]
Tokens = Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="The most to generate.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="Of sampling; 0 takes the likeliest.")]
