# SPDX-License-Identifier: Apache-2.0
"""Text in and out of commands: tables, lists of numbers, settings, sizes."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Sequence
from typing import Any

MIB = 1 << 20


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns columns in plain text, each as wide as its widest entry."""
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(entry.ljust(width) for entry, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def numbers(option: str, text: str) -> list[int]:
    """Returns the numbers of a list such as "1-4,8", in its order.

    Raises:
        ValueError: It is no such list.
    """
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"{option} takes numbers and ranges such as 1-4,8, got {text!r}")
        found.extend(range(int(first), int(last or first) + 1))
    if not found:
        raise ValueError(f"{option} {text!r} is empty: a range counts upwards")
    return found


def settings(words: Sequence[str]) -> dict[str, Any]:
    """Returns what assignments such as "value_bits=2" and "rotation=dense" say.

    Raises:
        ValueError: A word is no assignment.
    """
    return dict(map(_assignment, words))


def _assignment(word: str) -> tuple[str, Any]:
    name, mark, value = word.partition("=")
    if not mark or not name.isidentifier():
        raise ValueError(f"--set takes field=value, such as value_bits=2, got {word!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        # a name, such as that of a rotation
        return name, value


def mib(count: int) -> str:
    """Returns a number of bytes in MiB."""
    return f"{count / MIB:.1f} MiB"
