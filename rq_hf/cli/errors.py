# SPDX-License-Identifier: Apache-2.0
"""How commands report what went wrong."""

from __future__ import annotations

import errno
import sys
from typing import Any

import typer
from typer.core import TyperGroup

# what a user can act on: wrong values, missing files and packages, and memory that is not there
_EXPECTED = (ValueError, ArithmeticError, OSError, ImportError, RuntimeError)


class OneLineErrors(TyperGroup):
    """Reports what a user can act on in one line, with exit code 1, unless --debug is given.

    Where nobody reads on (`rq-hf ... | head`) there is nothing to report: typer ends the command
    with exit code 1, and sees to what is still to be written.
    """

    def invoke(self, ctx: Any) -> Any:
        try:
            result = super().invoke(ctx)
            # Python would do so as it ends, where nobody catches what comes of it
            sys.stdout.flush()
            return result
        except typer.Exit:
            # click's own is a RuntimeError
            raise
        except _EXPECTED as error:
            if ctx.params.get("debug") or _is_closed_pipe(error):
                raise
            text = " ".join(str(error).split()) or type(error).__name__
            typer.echo(f"rq-hf: error: {text}", err=True)
            raise typer.Exit(1) from error


def _is_closed_pipe(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno == errno.EPIPE
