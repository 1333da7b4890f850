# SPDX-License-Identifier: Apache-2.0
"""The command line: rq-hf generate | chat | doctor | eval | codebooks.

Modules named like a command hold its options and load nothing large, to keep --help quick; what
they call is imported when they run.
"""

from __future__ import annotations

from typing import Annotated

import typer

from rq_hf.cli.chat import chat
from rq_hf.cli.codebooks import codebooks
from rq_hf.cli.doctor import doctor
from rq_hf.cli.errors import OneLineErrors
from rq_hf.cli.evaluate import evaluate
from rq_hf.cli.generate import generate

main = typer.Typer(
    name="rq-hf",
    cls=OneLineErrors,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@main.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """RotorQuant: a packed 2-4 bit key-value cache for Hugging Face Transformers."""


main.command()(generate)
main.command()(chat)
main.command()(doctor)
main.add_typer(evaluate, name="eval")
main.add_typer(codebooks, name="codebooks")
