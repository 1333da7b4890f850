# SPDX-License-Identifier: Apache-2.0
"""rq-hf eval: the measuring scripts of a checkout."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Annotated

import typer

evaluate = typer.Typer(
    no_args_is_help=True, help="Run a measuring script; needs a checkout of the project."
)
# what follows belongs to the script, its --help too
_PASSED_ON = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "help_option_names": [],
}
BENCHMARKS = ("attention", "encode", "generate")


@evaluate.command(context_settings=_PASSED_ON)
def perplexity(ctx: typer.Context) -> None:
    """Perplexity and divergence from the exact cache."""
    _run("perplexity", ctx.args)


@evaluate.command(context_settings=_PASSED_ON)
def needle(ctx: typer.Context) -> None:
    """Facts found again in a long context."""
    _run("needle", ctx.args)


@evaluate.command(context_settings={**_PASSED_ON, "allow_interspersed_args": False})
def benchmark(
    ctx: typer.Context,
    what: Annotated[str, typer.Argument(help="attention, encode or generate", metavar="WHAT")],
) -> None:
    """Speed: of attention, of packing, or of steps inside generate()."""
    if what not in BENCHMARKS:
        raise ValueError(f"eval benchmark takes one of {', '.join(BENCHMARKS)}, got {what!r}")
    _run(f"benchmark_{what}", ctx.args)


def _run(script: str, arguments: list[str]) -> None:
    root = str(find_checkout())
    sys.path.insert(0, root)
    try:
        # not a part of the package: there only in a checkout
        module = importlib.import_module(f"eval.{script}")
        sys.argv = [f"rq-hf eval {script}", *arguments]
        module.main(arguments)
    finally:
        sys.path.remove(root)


def find_checkout() -> Path:
    """Returns the folder with `eval/`: the working directory, or where the package lies.

    Raises:
        ValueError: It is in neither.
    """
    places = [Path.cwd(), Path(__file__).parents[2]]
    for place in places:
        if (place / "eval" / "perplexity.py").is_file() and (place / "rq_hf").is_dir():
            return place
    raise ValueError(
        "eval needs a checkout of the project, as its scripts are not installed; "
        f"run it from the checkout's root (looked in {places[0]})"
    )
