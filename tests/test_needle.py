# SPDX-License-Identifier: Apache-2.0
"""The needle test: prompts are what they say, and scores are those of greedy decoding."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import make_model
from transformers import AutoTokenizer, DynamicCache

from eval import needle, needle_plot, needle_reading
from eval.needle_facts import random_facts
from eval.needle_prompts import KINDS, Case, Prompt, PromptMaker, Question
from eval.settings import Setting, parse_settings

HAYSTACK = "The sea was calm. Nobody spoke! Was it late? The lamp burned on. " * 4
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CONTEXT = 700


@pytest.fixture
def tokenizer(saved_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(saved_model)


def make_prompt(tokenizer: Any, case: Case, **options: Any) -> Prompt:
    options = {"several": 3, "template": False, **options}
    return PromptMaker(tokenizer, HAYSTACK, **options).make(case)


@pytest.mark.parametrize("kind", KINDS)
def test_the_context_holds_what_is_asked(tokenizer: Any, kind: str) -> None:
    case = Case(kind, CONTEXT, 0.5, 0)
    prompt = make_prompt(tokenizer, case)
    text = tokenizer.decode(prompt.context[0])
    assert len(prompt.questions) == (3 if kind == "several" else 1)
    for question in prompt.questions:
        asked, answer = tokenizer.decode(question.tokens[0]), tokenizer.decode(question.answer)
        subject = asked.rpartition("\n\n")[2]
        assert f"{subject}{answer}." in text
        assert len(answer.strip()) == 7
    exact_length = kind != "pairs"
    assert prompt.context.shape[1] == CONTEXT if exact_length else CONTEXT - 40
    again = make_prompt(tokenizer, case)
    assert torch.equal(prompt.context, again.context)
    other = make_prompt(tokenizer, Case(kind, CONTEXT, 0.5, 1))
    assert not torch.equal(prompt.context[:, -500:], other.context[:, -500:])


@pytest.mark.parametrize("kind", ["single", "pairs"])
def test_depth_is_where_the_fact_is(tokenizer: Any, kind: str) -> None:
    places = []
    for depth in (0.0, 0.5, 1.0):
        prompt = make_prompt(tokenizer, Case(kind, 1500, depth, 2))
        lead = tokenizer.decode(prompt.questions[0].tokens[0]).rpartition("\n\n")[2]
        text = tokenizer.decode(prompt.context[0])
        assert text.count(lead) == 1
        places.append(text.index(lead) / len(text))
    assert places[0] < 0.06 and 0.4 < places[1] < 0.6 and places[2] > 0.9


def test_several_facts_go_round(tokenizer: Any) -> None:
    prompt = make_prompt(tokenizer, Case("several", 1500, 0.5, 0), several=2)
    text = tokenizer.decode(prompt.context[0])
    leads = [tokenizer.decode(q.tokens[0]).rpartition("\n\n")[2] for q in prompt.questions]
    middle, end = (text.index(lead) / len(text) for lead in leads)
    assert 0.4 < middle < 0.6 and end > 0.9


def test_facts_stand_between_sentences(tokenizer: Any) -> None:
    prompt = make_prompt(tokenizer, Case("single", CONTEXT, 0.4, 0))
    before = tokenizer.decode(prompt.context[0]).partition(" The secret number")[0]
    assert before[-1] in ".!?"


def test_the_template_surrounds_context_and_question(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="no chat template"):
        make_prompt(tokenizer, Case("single", CONTEXT, 0, 0), template=True)
    tokenizer.chat_template = TEMPLATE
    prompt = make_prompt(tokenizer, Case("single", CONTEXT, 0, 0), template=True)
    assert tokenizer.decode(prompt.context[0]).startswith("<user>Read this")
    question = tokenizer.decode(prompt.questions[0].tokens[0])
    assert "gives it?</user><assistant>The secret number of the" in question
    assert prompt.context.shape[1] == CONTEXT


def test_too_short_contexts_are_refused(tokenizer: Any) -> None:
    for kind in KINDS:
        with pytest.raises(ValueError, match=r"single|several|pairs.*no room"):
            make_prompt(tokenizer, Case(kind, 60, 0, 0))


def test_facts_differ() -> None:
    facts = random_facts(random.Random(0), 500)
    assert len({fact.lead for fact in facts}) == 500
    with pytest.raises(ValueError, match="not 9999"):
        random_facts(random.Random(0), 9999)


def test_an_answer_is_exact_if_greedy_decoding_gives_it(tokenizer: Any) -> None:
    model = make_model("llama")
    prompt = make_prompt(tokenizer, Case("single", 300, 0.5, 0))
    question = prompt.questions[0].tokens
    tokens = torch.cat((prompt.context, question), 1)
    greedy = model.generate(tokens, max_new_tokens=6, do_sample=False)[0, tokens.shape[1] :]
    wrong = greedy.clone()
    wrong[3] = (wrong[3] + 1) % 90
    results = []
    for wanted in (greedy, wrong):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(prompt.context, past_key_values=cache)
            results.append(needle_reading.answer(model, cache, Question(question, wanted)))
    right, off = results
    assert right.exact and right.chosen == greedy.tolist()
    assert not off.exact and off.logprob < right.logprob
    with torch.no_grad():
        scores = model(torch.cat((tokens, greedy[None]), 1)).logits[0, tokens.shape[1] - 1 : -1]
    expected = scores.double().log_softmax(-1).gather(1, greedy[:, None]).sum()
    assert right.logprob == pytest.approx(float(expected), rel=1e-4)


def run_needle(model: Path, out: Path, *options: str) -> dict[str, Any]:
    text = out.with_suffix(".txt")
    text.write_text(HAYSTACK)
    common = ["--model", str(model), "--text", str(text), "--out", str(out), "--device", "cpu"]
    grid = ["--contexts", "500", "600", "--depths", "2", "--seeds", "1", "--several", "2"]
    needle.main([*common, *grid, *options])
    return json.loads(out.read_text())


def test_the_script(saved_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "needle.json"
    names = ["dynamic", "near-lossless:8", "near-lossless:2"]
    result = run_needle(saved_model, out, "--kinds", *KINDS, "--settings", *names, "--plot")
    exact, fine, coarse = result["summary"]
    assert [row["prompts"] for row in result["summary"]] == [12] * 3
    assert exact["logprob_change"] == exact["score_change"] == 0
    # the question reads packed tokens, and they make the difference that they should
    assert exact["least_packed_tokens"] == 0 and fine["least_packed_tokens"] >= 256
    assert 0 < abs(fine["logprob_change"]) < abs(coarse["logprob_change"])
    assert len(fine["cells"]) == 3 * 2 * 2
    several = [r for r in result["records"] if r["kind"] == "several"]
    assert all(len(record["answers"]) == 2 for record in several)
    assert out.with_suffix(".png").stat().st_size > 0
    needle_plot.main([str(out), "--value", "logprob"])
    assert (tmp_path / "needle-logprob.png").stat().st_size > 0


def test_a_stopped_run_goes_on(
    saved_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "needle.json"
    read: list[str] = []
    real = needle.read_prompt

    def counted(model: Any, tokenizer: Any, prompt: Any, setting: Any) -> Any:
        read.append(setting.label)
        if len(read) == 4:
            raise KeyboardInterrupt
        return real(model, tokenizer, prompt, setting)

    monkeypatch.setattr(needle, "read_prompt", counted)
    options = ["--settings", "dynamic", "near-lossless:4"]
    with pytest.raises(KeyboardInterrupt):
        run_needle(saved_model, out, *options)
    before = json.loads(out.read_text())["records"]
    assert len(before) == 3
    after = run_needle(saved_model, out, *options)["records"]
    assert after[:3] == before and len(after) == 8
    assert read[4:] == ["near-lossless:4", *options[1:] * 2]


def test_caches_that_cannot_be_copied_read_the_context_again(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Uncopied(DynamicCache):
        def __deepcopy__(self, memo: Any) -> Any:
            raise RuntimeError("no copy of this")

    model, made = make_model("llama"), []

    def make(config: Any) -> DynamicCache:
        made.append(Uncopied(config=config))
        return made[-1]

    monkeypatch.setattr(needle_reading, "QuantizedCache", Uncopied)
    prompt = make_prompt(tokenizer, Case("several", CONTEXT, 0.5, 0))
    with torch.no_grad():
        record = needle_reading.read_prompt(
            model, tokenizer, prompt, Setting("uncopied", {}, make, False)
        )
        (exact,) = parse_settings(["dynamic"], strict=False)
        expected = needle_reading.read_prompt(model, tokenizer, prompt, exact)
    assert len(made) == 3 and record["answers"] == expected["answers"]


def test_depths_are_spread(tmp_path: Path) -> None:
    words = ["--model", "m", "--text", "t", "--settings", "dynamic", "--out", "o"]
    cases = needle.make_cases(needle.parse([*words, "--depths", "3", "--seeds", "1"]))
    depths = [case.depth for case in cases]
    assert depths == [0.0, 0.5, 1.0] * 2
    many = needle.make_cases(needle.parse([*words, "--depths", "3", "--seeds", "2"]))
    # a run that is cut short has every cell
    assert many[:6] == cases and [case.seed for case in many] == [0] * 6 + [1] * 6
    assert all(a <= b for a, b in pairwise(case.context for case in cases))
    (middle,) = {c.depth for c in needle.make_cases(needle.parse([*words, "--depths", "1"]))}
    assert middle == 0.5
    with pytest.raises(ValueError, match="at least 1"):
        needle.make_cases(needle.parse([*words, "--seeds", "0"]))
