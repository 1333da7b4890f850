# SPDX-License-Identifier: Apache-2.0
"""rq-hf doctor"""

from __future__ import annotations

from typing import Annotated

import typer

from rq_hf.cli import options
from rq_hf.cli.text import table


def doctor(
    device: options.Device = None,
    quick: Annotated[bool, typer.Option("--quick", help="Leave out the self-test.")] = False,
) -> None:
    """Show versions, device and kernels, and test the cache on it; exit code 1 if that fails."""
    # torch and transformers take seconds to load
    from rq_hf.cli import environment, kernels, self_test

    where = environment.find_device(device)
    versions = environment.versions()
    typer.echo(table(["package", "version", "state"], [v.row() for v in versions]))
    typer.echo(f"\ndevice: {environment.describe_device(where)}")
    typer.echo("\n".join(["", *kernels.report(where)]))
    failures = [v.name for v in versions if not v.good]
    if not quick:
        typer.echo("\nself-test")
        if where.type == "cuda":
            typer.echo("  kernels are compiled at their first use, which takes seconds for each")
        for result in self_test.run(where):
            typer.echo(f"  {result}")
            failures += [] if result.good else [result.name]
    if failures:
        typer.echo(f"rq-hf: error: not as it should be: {', '.join(failures)}", err=True)
        raise typer.Exit(1)
