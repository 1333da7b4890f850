# SPDX-License-Identifier: Apache-2.0
"""rq-hf codebooks build | list | clear."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rq_hf.cli.text import numbers, table

# everything that loads scipy or torch is imported inside the commands, to keep --help quick
if TYPE_CHECKING:
    from rq_hf.quant.codebook_store import CodebookKey


codebooks = typer.Typer(no_args_is_help=True, help="Lloyd-Max codebooks on disk.")


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
    from tqdm import tqdm

    from rq_hf.quant.codebook_store import cache_folder, write_levels
    from rq_hf.quant.lloyd_max import distortion, solve

    folder = to or cache_folder()
    rows = []
    # no bar where nobody watches
    for key in tqdm(_keys(bits, distribution, head_dim), unit="codebook", disable=None):
        levels = solve(key.density(), key.bits)
        path = write_levels(folder, key, levels)
        rows.append([*_describe(key), f"{distortion(key.density(), levels):.4g}", path.name])
    typer.echo(table(["distribution", "head_dim", "bits", "distortion", "file"], rows))
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
    typer.echo(table(["distribution", "head_dim", "bits", "origin", "file", "state"], rows))
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

    dims: Sequence[int | None] = [None] if head_dim is None else numbers("--head-dim", head_dim)
    if distribution == "beta" and head_dim is None:
        raise ValueError("--distribution beta needs --head-dim, such as --head-dim 64,128")
    if distribution == "gaussian" and head_dim is not None:
        raise ValueError("--head-dim is for --distribution beta: Gaussian levels fit every one")
    widths = numbers("--bits", bits)
    # the key itself refuses other distributions
    return [CodebookKey(width, distribution, dim) for dim in dims for width in widths]  # type: ignore[arg-type]


def _describe(key: CodebookKey) -> list[str]:
    return [key.distribution, str(key.head_dim or "any"), str(key.bits)]
