# SPDX-License-Identifier: Apache-2.0
"""The README's Python code runs as it stands; tables and links hold, also those of RESULTS.md."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from eval import tables
from rq_hf import RotorQuantCache, RotorQuantConfig
from rq_hf.config import CHOICES, PRESETS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def test_code_runs(
    saved_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # a folder of that name below the working directory comes before the hub
    (name,) = re.findall(r'^name = "(.*)"$', README, flags=re.MULTILINE)
    folder = tmp_path / name
    folder.parent.mkdir(parents=True)
    folder.symlink_to(saved_model)
    monkeypatch.chdir(tmp_path)

    variables: dict[str, Any] = {}
    for block in BLOCKS:
        exec(block, variables)
    prompt = variables["inputs"].input_ids
    assert torch.equal(variables["tokens"][:, : prompt.shape[1]], prompt)
    assert isinstance(variables["cache"], RotorQuantCache)
    # the last token is never fed back
    assert variables["cache"].get_seq_length() == prompt.shape[1] + 8 - 1
    assert "bits a number" in capsys.readouterr().out


def test_settings_table_states_the_defaults() -> None:
    stated = dict(re.findall(r"^\| `(\w+)` \| `(.*?)` \|", README, flags=re.MULTILINE))
    defaults = {
        name: repr(field.default).replace("'", '"')
        for name, field in RotorQuantConfig.__dataclass_fields__.items()
        if name != "strict"  # for evaluation only
    }
    assert stated == defaults


@pytest.mark.parametrize("value", [v for values in [*CHOICES.values(), PRESETS] for v in values])
def test_every_choice_is_named(value: str) -> None:
    assert value in README


def test_every_flow_names_a_test_file_that_is_there() -> None:
    _, start, rest = README.partition("| flow | status | shown by |\n| --- | --- | --- |\n")
    assert start
    rows = rest.partition("\n\n")[0].splitlines()
    for row in rows:
        _, flow, status, files, _ = row.split("|")
        named = re.findall(r"`(tests/[\w/]+\.py)`", files)
        assert named and status.strip(), flow
        missing = [name for name in named if not (ROOT / name).is_file()]
        assert not missing, flow


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_tables_are_those_of_the_result_files(page: Path) -> None:
    text = page.read_text()
    assert "<!-- table: " in text
    assert tables.fill(text) == text, "run python -m eval.tables"


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_pictures_linked_files_and_sections_are_there(page: Path) -> None:
    links = re.findall(r"\]\(([^):]+)\)", page.read_text())
    assert any(link.endswith(".png") for link in links)
    missing = [link for link in links if not _leads_somewhere(page, link)]
    assert not missing


def _leads_somewhere(page: Path, link: str) -> bool:
    name, _, section = link.partition("#")
    file = ROOT / name if name else page
    return file.is_file() and (not section or section in _sections(file.read_text()))


def _sections(text: str) -> set[str]:
    """Returns the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
