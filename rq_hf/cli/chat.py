# SPDX-License-Identifier: Apache-2.0
"""rq-hf chat"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from rq_hf.cli import options
from rq_hf.cli.text import settings

# chat.Session is made when the command runs
if TYPE_CHECKING:
    from rq_hf.cli.session import Session

COMMANDS = "/reset forgets the conversation, /memory shows the cache, /quit ends"


def chat(
    model: options.Model,
    system: Annotated[str | None, typer.Option(help="Instructions before the first turn.")] = None,
    max_new_tokens: options.Tokens = 512,
    temperature: options.Temperature = 0.0,
    nbits: options.Nbits = None,
    preset: options.Preset = None,
    setting: options.Settings = None,
    exact: options.Exact = False,
    device: options.Device = None,
    dtype: options.Dtype = None,
) -> None:
    """Talk to a model; one cache is kept over all turns."""
    # transformers takes seconds to load
    from rq_hf.cli.session import CacheChoice, Session

    choice = CacheChoice(nbits, preset, settings(setting or []), exact)
    session = Session.load(model, choice, device=device, dtype=dtype)
    start = [] if system is None else [{"role": "system", "content": system}]
    # says at once that there is no template
    session.as_chat([*start, {"role": "user", "content": "?"}])
    typer.echo(COMMANDS, err=True)
    messages = list(start)
    while (line := _ask()) is not None:
        if _is_command(line):
            messages = _obey(line, session, start, messages)
            continue
        messages.append({"role": "user", "content": line})
        reply = session.generate(
            session.as_chat(messages), max_new_tokens=max_new_tokens, temperature=temperature
        )
        messages.append({"role": "assistant", "content": reply})
        typer.echo(session.status(), err=True)


def _ask() -> str | None:
    """Returns the next line that says something; None at the end."""
    while True:
        try:
            line = input("\n> ").strip()
        except EOFError:
            return None
        if line == "/quit":
            return None
        if line:
            return line


def _is_command(line: str) -> bool:
    """Tells a command, or what was meant for one, from text such as "/usr/bin is what?"."""
    return line.startswith("/") and line[1:].isalpha()


def _obey(
    line: str, session: Session, start: list[dict[str, str]], messages: list[dict[str, str]]
) -> list[dict[str, str]]:
    """Does what a line says and returns the messages that stay."""
    if line != "/reset":
        typer.echo(session.describe() if line == "/memory" else COMMANDS, err=True)
        return messages
    session.reset()
    return list(start)
