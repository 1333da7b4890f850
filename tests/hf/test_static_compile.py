# SPDX-License-Identifier: Apache-2.0
"""Steps that are compiled: one graph without breaks, once for all prompts and caches alike."""

from __future__ import annotations

import pytest
import torch
from support.flows import assert_close
from support.models import make_model, make_tokens
from support.static import (
    LENGTH,
    NEW,
    PADDING,
    compiled,
    dynamic,
    forget_compiled,
    generate,
    graphs,
    make_prompt,
    packed,
    static,
)
from torch.utils._pytree import tree_leaves
from transformers import StaticCache

# a tile is packed in the third step
FEW = {"max_new_tokens": 8}


@pytest.mark.parametrize("attention", ["sdpa", "eager", "rotorquant"])
def test_steps_are_compiled_once(attention: str) -> None:
    model = make_model("llama")
    model.set_attn_implementation(attention)
    forget_compiled(model)
    cache = static(model)
    for padding in (0, PADDING):
        prompt = make_prompt(padding)
        expected = generate(model, prompt, dynamic(model), **FEW).sequences
        # the same cache after a reset, and in the end a new one
        used = cache if padding else static(model)
        for each in (cache, used):
            each.reset()
            mine = generate(model, prompt, each, **compiled(backend="aot_eager"), **FEW)
            assert torch.equal(mine.sequences, expected)
            assert packed(each) == {128}
    assert graphs() == 1


@pytest.mark.parametrize(
    ("family", "attention"),
    [
        ("gemma3", "sdpa"),
        ("gemma2", "rotorquant"),
        ("gpt-oss", "rotorquant"),
        ("qwen3-next", "sdpa"),
    ],
)
def test_models_of_several_kinds_of_layers_are_compiled(family: str, attention: str) -> None:
    model, prompt = make_model(family), make_prompt(PADDING)
    forget_compiled(model)
    theirs = StaticCache(config=model.config, max_cache_len=LENGTH + NEW)
    generate(model, prompt, theirs, **compiled(), **FEW)
    # a sliding layer of the host is compiled anew when it begins to count
    most = graphs()
    model.set_attn_implementation(attention)
    forget_compiled(model)
    mine = generate(model, prompt, static(model), **compiled(), **FEW)
    assert graphs() <= most
    expected = generate(model, prompt, dynamic(model), **FEW)
    assert torch.equal(mine.sequences, expected.sequences)


def test_compiled_by_hand() -> None:
    model, tokens = make_model("llama"), make_tokens(LENGTH, batch=2)
    expected = generate(model, make_prompt(), dynamic(model)).sequences
    forget_compiled(model)
    step = torch.compile(model, fullgraph=True, backend="eager")
    cache = static(model)
    with torch.no_grad():
        token = model(tokens, past_key_values=cache).logits[:, -1:].argmax(-1)
        for at in range(NEW):
            assert torch.equal(token[:, 0], expected[:, LENGTH + at])
            token = step(token, past_key_values=cache).logits.argmax(-1)
    assert graphs() == 1


def test_compiled_steps_give_all_outputs() -> None:
    model, prompt = make_model("llama"), make_prompt(PADDING)
    model.set_attn_implementation("eager")
    forget_compiled(model)
    names = ("scores", "attentions", "hidden_states")
    wanted = {f"output_{name}": True for name in names}
    theirs, mine = (
        generate(model, prompt, static(model), **options, **wanted, **FEW)
        for options in ({"disable_compile": True}, compiled(backend="aot_eager"))
    )
    assert graphs() == 1 and torch.equal(mine.sequences, theirs.sequences)
    for name in ("logits", *names):
        pairs = zip(tree_leaves(mine[name]), tree_leaves(theirs[name]), strict=True)
        for one, other in pairs:
            assert one.shape == other.shape and other.abs().max() > 0
            assert_close(one, other)


def test_compiled_prompts_break_the_graph_and_are_read_dense() -> None:
    model, tokens = make_model("llama", num_hidden_layers=1), make_tokens(LENGTH)
    forget_compiled(model)
    forward = torch.compile(model, backend="eager")
    mine, theirs = static(model), dynamic(model, path="dense")
    with torch.no_grad():
        for part in (tokens, tokens[:, :1]):
            logits = [
                run(part, past_key_values=cache).logits
                for run, cache in ((forward, mine), (model, theirs))
            ]
            assert_close(*logits)
