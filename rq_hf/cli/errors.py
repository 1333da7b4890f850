# SPDX-License-Identifier: Apache-2.0
"""How commands report what went wrong."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

# what a user can act on: wrong values, missing files and packages, and memory that is not there
_EXPECTED = (ValueError, ArithmeticError, OSError, ImportError, RuntimeError)


class OneLineErrors(TyperGroup):
    """Reports what a user can act on in one line, with exit code 1, unless --debug is given."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except typer.Exit:
            # click's own is a RuntimeError
            raise
        except _EXPECTED as error:
            if ctx.params.get("debug"):
                raise
            text = " ".join(str(error).split()) or type(error).__name__
            typer.echo(f"rq-hf: error: {text}", err=True)
            raise typer.Exit(1) from error
