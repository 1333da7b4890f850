# SPDX-License-Identifier: Apache-2.0
"""Commands whose output nobody reads to its end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from rq_hf.cli.errors import OneLineErrors

ROOT = Path(__file__).parents[2]
PRINTS = """
import typer
from rq_hf.cli.errors import OneLineErrors
main = typer.Typer(cls=OneLineErrors)
@main.callback()
def options(debug: bool = False): pass
@main.command()
def show():
    print("x")
main()
"""
COMMANDS = {
    "echo": ["-m", "rq_hf.cli", "codebooks", "list"],
    "debug": ["-m", "rq_hf.cli", "--debug", "codebooks", "list"],
    # what Python itself would write as it ends
    "print": ["-c", PRINTS, "show"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_closed_pipe_ends_a_command_quietly(name: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, *COMMANDS[name]],
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_other_errors_of_the_system_are_reported() -> None:
    main = typer.Typer(cls=OneLineErrors)

    @main.callback()
    def options(debug: bool = False) -> None:
        pass

    @main.command()
    def show() -> None:
        raise FileNotFoundError(2, "No such file")

    result = CliRunner().invoke(main, ["show"])
    assert result.exit_code == 1
    assert result.stderr == "rq-hf: error: [Errno 2] No such file\n"
