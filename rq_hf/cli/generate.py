# SPDX-License-Identifier: Apache-2.0
"""rq-hf generate"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from rq_hf.cli import options
from rq_hf.cli.text import settings


def generate(
    model: options.Model,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="The text.")] = None,
    file: Annotated[
        str | None, typer.Option("--file", "-f", help="A file with the text; - for stdin.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the text into the model's chat template.")
    ] = False,
    max_new_tokens: options.Tokens = 128,
    temperature: options.Temperature = 0.0,
    nbits: options.Nbits = None,
    preset: options.Preset = None,
    setting: options.Settings = None,
    exact: options.Exact = False,
    device: options.Device = None,
    dtype: options.Dtype = None,
) -> None:
    """Continue a text, token by token on stdout; speed and memory follow on stderr."""
    text = _read(prompt, file)
    # transformers takes seconds to load
    from rq_hf.cli.session import CacheChoice, Session

    choice = CacheChoice(nbits, preset, settings(setting or []), exact)
    session = Session.load(model, choice, device=device, dtype=dtype)
    tokens = session.as_chat([{"role": "user", "content": text}]) if chat else session.encode(text)
    session.generate(tokens, max_new_tokens=max_new_tokens, temperature=temperature)
    typer.echo(session.status(), err=True)


def _read(prompt: str | None, file: str | None) -> str:
    if (prompt is None) == (file is None):
        raise ValueError("give the text either with --prompt or with --file")
    if prompt is None:
        prompt = sys.stdin.read() if file == "-" else Path(str(file)).read_text(encoding="utf-8")
    if not prompt:
        raise ValueError("the text is empty")
    return prompt
