# SPDX-License-Identifier: Apache-2.0
"""Random facts to hide in a text, and what is asked about them."""

from __future__ import annotations

import random
from dataclasses import dataclass

PLACES = (
    *("Accra", "Bergen", "Cusco", "Dakar", "Essen", "Faro", "Graz", "Havana", "Izmir", "Jaipur"),
    *("Kyoto", "Lagos", "Malmö", "Nantes", "Osaka", "Porto", "Quito", "Riga", "Sofia", "Tunis"),
    *("Utrecht", "Vilnius", "Warsaw", "Xi'an", "Yerevan", "Zagreb"),
)
COLOURS = ("amber", "blue", "coral", "green", "ivory", "lilac", "ochre", "red", "silver", "teal")
THINGS = ("anchor", "bell", "clock", "door", "engine", "lantern", "piano", "safe", "tower", "well")
DIGITS = 7
KEY_DIGITS = 8


@dataclass(frozen=True)
class Fact:
    """A fact, and how it is asked for.

    Attributes:
        statement: Stands in the context.
        question: Comes behind the context.
        lead: Begins the reply, so that chat models and base models go on alike.
        answer: What must follow, with the space in front.
    """

    statement: str
    question: str
    lead: str
    answer: str


def random_facts(stream: random.Random, count: int) -> list[Fact]:
    """Returns facts about different subjects, each with a number nobody can guess.

    Raises:
        ValueError: There are not so many subjects.
    """
    subjects = [f"{c} {thing} of {p}" for p in PLACES for c in COLOURS for thing in THINGS]
    if count > len(subjects):
        raise ValueError(f"there are facts about {len(subjects)} things, not {count}")
    return [_fact(subject, _number(stream, DIGITS)) for subject in stream.sample(subjects, count)]


def _fact(subject: str, number: str) -> Fact:
    return Fact(
        statement=f" The secret number of the {subject} is {number}.",
        question=f"What is the secret number of the {subject}, as the text above gives it?",
        lead=f"The secret number of the {subject} is",
        answer=f" {number}",
    )


def random_pair(stream: random.Random) -> Fact:
    """Returns a key and its value, as one line of a list of such."""
    key, number = _number(stream, KEY_DIGITS), _number(stream, DIGITS)
    return Fact(
        statement=f"The value of key {key} is {number}.\n",
        question=f"What is the value of key {key} in the list above?",
        lead=f"The value of key {key} is",
        answer=f" {number}",
    )


def _number(stream: random.Random, digits: int) -> str:
    return str(stream.randrange(10 ** (digits - 1), 10**digits))
