# SPDX-License-Identifier: Apache-2.0
"""The command line: rq-hf codebooks build | list | clear."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

# everything that loads scipy or torch is imported inside the commands, to keep --help quick
if TYPE_CHECKING:
    from rq_hf.quant.codebook_store import CodebookKey


class _OneLineErrors(TyperGroup):
    """Reports what a user can act on in one line, with exit code 1, unless --debug is given."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (ValueError, ArithmeticError, OSError) as error:
            if ctx.params.get("debug"):
                raise
            typer.echo(f"rq-hf: error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(1) from error


main = typer.Typer(
    name="rq-hf",
    cls=_OneLineErrors,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
codebooks = typer.Typer(no_args_is_help=True, help="Lloyd-Max codebooks on disk.")
main.add_typer(codebooks, name="codebooks")


@main.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """RotorQuant: a packed 2-4 bit key-value cache for Hugging Face Transformers."""


@codebooks.command()
def build(
    bits: Annotated[str, typer.Option(help="Widths, such as 3 or 1-4,8.")] = "1-8",
    distribution: Annotated[str, typer.Option(help="gaussian or beta.")] = "gaussian",
    head_dim: Annotated[
        str | None, typer.Option(help="For beta: head dimensions, such as 64,128.")
    ] = None,
    to: Annotated[
        Path | None, typer.Option(help="Folder to write; by default the user's cache.")
    ] = None,
) -> None:
    """Solve codebooks and write them to disk, over any that are there."""
    from rq_hf.quant.codebook_store import cache_folder, write_levels
    from rq_hf.quant.lloyd_max import distortion, solve

    folder = to or cache_folder()
    rows = []
    for key in _keys(bits, distribution, head_dim):
        levels = solve(key.density(), key.bits)
        path = write_levels(folder, key, levels)
        rows.append([*_describe(key), f"{distortion(key.density(), levels):.4g}", path.name])
    typer.echo(_table(["distribution", "head_dim", "bits", "distortion", "file"], rows))
    typer.echo(f"{len(rows)} written to {folder}")


@codebooks.command("list")
def list_codebooks() -> None:
    """Show the codebooks that are shipped and those in the user's cache."""
    from rq_hf.quant.codebook_store import SHIPPED_FOLDER, cache_folder, stored_files

    rows = []
    for origin, folder in (("shipped", SHIPPED_FOLDER), ("cache", cache_folder())):
        for file in stored_files(folder):
            fields = ["?", "?", "?"] if file.key is None else _describe(file.key)
            rows.append([*fields, origin, file.path.name, file.problem or "good"])
    typer.echo(_table(["distribution", "head_dim", "bits", "origin", "file", "state"], rows))
    typer.echo(f"cache: {cache_folder()}")


@codebooks.command("clear")
def clear_codebooks() -> None:
    """Remove the codebooks in the user's cache; they are computed again when needed."""
    from rq_hf.quant.codebook_store import cache_folder, clear

    removed = clear(cache_folder())
    typer.echo(f"{len(removed)} removed from {cache_folder()}")


def _keys(bits: str, distribution: str, head_dim: str | None) -> list[CodebookKey]:
    """Every requested combination, checked before the first is solved."""
    from rq_hf.quant.codebook_store import CodebookKey

    dims: Sequence[int | None] = [None] if head_dim is None else _numbers("--head-dim", head_dim)
    if distribution == "beta" and head_dim is None:
        raise ValueError("--distribution beta needs --head-dim, such as --head-dim 64,128")
    if distribution == "gaussian" and head_dim is not None:
        raise ValueError("--head-dim is for --distribution beta: Gaussian levels fit every one")
    widths = _numbers("--bits", bits)
    # the key itself refuses other distributions
    return [CodebookKey(width, distribution, dim) for dim in dims for width in widths]  # type: ignore[arg-type]


def _numbers(option: str, text: str) -> list[int]:
    """The numbers of a list such as "1-4,8", in its order."""
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"{option} takes numbers and ranges such as 1-4,8, got {text!r}")
        numbers.extend(range(int(first), int(last or first) + 1))
    if not numbers:
        raise ValueError(f"{option} {text!r} is empty: a range counts upwards")
    return numbers


def _describe(key: CodebookKey) -> list[str]:
    return [key.distribution, str(key.head_dim or "any"), str(key.bits)]


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns in plain text, each as wide as its widest entry."""
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(entry.ljust(width) for entry, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


if __name__ == "__main__":
    main()
