# SPDX-License-Identifier: Apache-2.0
"""Prompts of the needle test: a context of so many tokens with facts in it, and the questions.

single    one fact in a text, at the depth
several   facts about different things at equal distances, the first at the depth, those that
          would lie behind the end counted on from the start; each is asked for
pairs     nothing but a list of keys and values; the pair at the depth is asked for
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from eval.needle_facts import Fact, random_facts, random_pair
from eval.windows import first_tokens

KINDS = ("single", "several", "pairs")
SENTENCE_ENDS = (".", "!", "?", "\n")
_INTRODUCTION = "Read this and answer the question below it.\n\n"
# no text of a template looks like these
_CONTEXT, _QUESTION = "\u27eacontext\u27eb", "\u27eaquestion\u27eb"


@dataclass(frozen=True)
class Case:
    """One prompt to make.

    Attributes:
        kind: One of `KINDS`.
        context: Tokens before the question.
        depth: Where the fact is, 0 at the start and 1 at the end.
        seed: Of the facts, and of where in the haystack the text starts.
    """

    kind: str
    context: int
    depth: float
    seed: int

    def __str__(self) -> str:
        return f"{self.kind}, {self.context} tokens, depth {self.depth:g}, seed {self.seed}"


@dataclass(frozen=True)
class Question:
    """Tokens that follow the context, `[1, m]`, and those that answer them, `[n]`."""

    tokens: Tensor
    answer: Tensor


@dataclass(frozen=True)
class Prompt:
    """A context `[1, n]`, and what is asked about it."""

    context: Tensor
    questions: list[Question]


class PromptMaker:
    """Makes prompts for one tokenizer.

    Args:
        tokenizer: The model's.
        haystack: Text to hide facts in; it is repeated where a context is longer.
        several: Facts of a prompt of that kind.
        template: Use the tokenizer's chat template.
        bos: As in `windows.first_tokens`, for prompts without a template.

    Raises:
        ValueError: The haystack is empty, or the tokenizer has no template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        haystack: str,
        *,
        several: int,
        template: bool,
        bos: str = "auto",
    ) -> None:
        self.tokenizer = tokenizer
        self.several = several
        self.haystack = self._tokenize(haystack)
        if not self.haystack:
            raise ValueError("the haystack is empty")
        self.sentence_ends = {
            token
            for token in set(self.haystack)
            if tokenizer.decode([token]).endswith(SENTENCE_ENDS)
        }
        before, after = self._frame(template)
        self.start = ([] if template else first_tokens(tokenizer, bos)) + self._tokenize(before)
        self.after = after

    def make(self, case: Case) -> Prompt:
        """Returns the prompt of a case, the same for every call.

        Raises:
            ValueError: The context is too short for its facts.
        """
        stream = random.Random(f"{case.kind} {case.context} {case.depth} {case.seed}")
        room = case.context - len(self.start)
        if case.kind == "pairs":
            body, asked = self._list_pairs(stream, case, room)
        else:
            body, asked = self._hide_facts(stream, case, room)
        questions = [self._ask(fact) for fact in asked]
        return Prompt(torch.tensor([self.start + body]), questions)

    def _hide_facts(
        self, stream: random.Random, case: Case, room: int
    ) -> tuple[list[int], list[Fact]]:
        facts = random_facts(stream, self.several if case.kind == "several" else 1)
        needles = [self._tokenize(fact.statement) for fact in facts]
        room -= sum(map(len, needles))
        if room < 1:
            raise ValueError(f"{case}: no room for {len(facts)} facts in a text")
        first = stream.randrange(len(self.haystack))
        hay = [self.haystack[(first + i) % len(self.haystack)] for i in range(room)]
        depths = [case.depth + i / len(facts) for i in range(len(facts))]
        # what is just over the end starts anew, while the very end is a depth of its own
        places = [round((d if d <= 1 else d - 1) * room) for d in depths]
        placed = sorted(
            (self._sentence_end(hay, place), needle)
            for place, needle in zip(places, needles, strict=True)
        )
        # from the last on, so that the places before stay what they are
        for place, needle in reversed(placed):
            hay[place:place] = needle
        return hay, facts

    def _sentence_end(self, hay: Sequence[int], place: int) -> int:
        """Returns the last end of a sentence up to `place`; `place` itself if there is none."""
        if not 0 < place < len(hay):
            return place
        ends = (i for i in range(place, 0, -1) if hay[i - 1] in self.sentence_ends)
        return next(ends, place)

    def _list_pairs(
        self, stream: random.Random, case: Case, room: int
    ) -> tuple[list[int], list[Fact]]:
        lines: list[list[int]] = []
        pairs: list[Fact] = []
        while True:
            pair = random_pair(stream)
            line = self._tokenize(pair.statement)
            room -= len(line)
            if room < 0:
                break
            lines.append(line)
            pairs.append(pair)
        if not pairs:
            raise ValueError(f"{case}: no room for a pair")
        asked = pairs[round(case.depth * (len(pairs) - 1))]
        return [token for line in lines for token in line], [asked]

    def _ask(self, fact: Fact) -> Question:
        """Returns question and answer, parted where their tokens part.

        Tokenizers differ in whether the space belongs to the number behind it.
        """
        asked = self.after.replace(_QUESTION, fact.question) + fact.lead
        question, whole = self._tokenize(asked), self._tokenize(asked + fact.answer)
        shared = zip(question, whole, strict=False)
        count = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], shared))
        return Question(torch.tensor([whole[:count]]), torch.tensor(whole[count:]))

    def _frame(self, template: bool) -> tuple[str, str]:
        """Returns what stands before the context and behind it, the question's place marked."""
        content = f"{_INTRODUCTION}{_CONTEXT}\n\n{_QUESTION}"
        if not template:
            before, _, after = content.partition(_CONTEXT)
            return before, f"{after}\n\n"
        if self.tokenizer.chat_template is None:
            raise ValueError("--template always: this tokenizer has no chat template")
        messages = [{"role": "user", "content": content}]
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        before, _, after = str(text).partition(_CONTEXT)
        return before, after

    def _tokenize(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
