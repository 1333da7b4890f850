# SPDX-License-Identifier: Apache-2.0
"""Import arrows of the package, read from its source, and what importing it loads."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "rq_hf"

# unit: the units that it may import; everything may import its own unit
ARROWS = {
    "config": set(),
    "memory": set(),
    "validation": set(),
    "quant": set(),
    "storage": {"quant"},
    "ops": {"quant"},
    "rope": {"quant"},
    "statistics": set(),
    "watch": {"ops"},
    "handle": set(),
    "sources": {"ops", "statistics"},
    "packed_states": {"config", "ops", "quant", "statistics", "storage", "validation"},
    "watched_states": {"config", "packed_states", "quant", "validation", "watch"},
    "pickling": {"packed_states", "watched_states"},
    "layers": {
        "config",
        "handle",
        "ops",
        "pickling",
        "quant",
        "sources",
        "validation",
        "watched_states",
    },
    "places": set(),
    "sliding": {"config", "layers", "sources"},
    "attention": {"handle", "ops", "sources", "static_handle"},
    "static_ops": {"ops", "quant"},
    "static_sources": {"sources"},
    "static_handle": {"handle", "static_ops", "static_sources"},
    "static_store": {"ops", "quant", "static_ops", "storage"},
    "static_limits": {"layers"},
    "static_layer": {
        "config",
        "handle",
        "ops",
        "packed_states",
        "quant",
        "static_handle",
        "static_limits",
        "static_ops",
        "static_sources",
        "static_store",
    },
    "static_exact": {"static_limits"},
    "description": {"layers", "sliding", "static_layer"},
    "model_layers": {
        "config",
        "layers",
        "quant",
        "rope",
        "sliding",
        "static_exact",
        "static_layer",
    },
    "cropping": {"layers"},
    "host_history": {"cropping"},
    "noted": {"host_history", "layers", "validation"},
    "linear_states": set(),
    "pass_cache": {"cropping", "host_history", "layers", "linear_states", "noted"},
    "counting": {"layers", "memory"},
    "cache": {
        "attention",
        "config",
        "counting",
        "cropping",
        "description",
        "layers",
        "memory",
        "model_layers",
        "noted",
        "pass_cache",
        "places",
        "serialization",
        "validation",
        "watched_states",
    },
    "static_cache": {
        "cache",
        "config",
        "cropping",
        "model_layers",
        "places",
        "static_exact",
        "static_layer",
        "static_limits",
    },
    "graph_inputs": set(),
    "graph_state": {"memory", "static_cache", "static_exact", "static_layer", "static_ops"},
    "graph": {"graph_inputs", "graph_state", "static_cache"},
    "integration": {"attention", "cache"},
    "cache_file": {""},
    "cache_header": {"config", "quant"},
    "cache_linear": {"cache_file", "cache_header"},
    "cache_model": {"cache", "cache_header", "layers"},
    "cache_probe": {"cache_file", "cache_header", "config", "packed_states", "quant"},
    "serialization": {
        "",
        "cache",
        "cache_file",
        "cache_header",
        "cache_linear",
        "cache_model",
        "cache_probe",
        "config",
        "layers",
        "model_layers",
        "places",
        "quant",
        "sliding",
        "storage",
    },
    "": {"cache", "config", "graph", "integration", "static_cache"},
    "loading": set(),
    "cli": {"", "cache", "layers", "loading", "memory", "ops", "quant"},
}
# these may import transformers
HOST = {
    "attention",
    "cache",
    "cache_linear",
    "cache_model",
    "cropping",
    "description",
    "graph",
    "graph_state",
    "host_history",
    "integration",
    "layers",
    "linear_states",
    "loading",
    "model_layers",
    "noted",
    "pass_cache",
    "rope",
    "serialization",
    "static_cache",
    "static_exact",
    "cli",
}  # may import transformers
SCRIPTS = {"eval": {"", "quant", "ops", "memory"}, "examples": {"", "loading", "memory"}}


def modules(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def unit_of(module: str) -> str:
    """`rq_hf.quant.packing` -> `quant`; `rq_hf` itself -> the empty string."""
    return ".".join(module.split(".")[1:2])


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(source: str, package: str) -> Iterator[str]:
    """Yields the absolute names of all modules imported, inside functions too.

    What stands under `if TYPE_CHECKING:` is not imported.
    """
    for node in runtime_nodes(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*(parents if node.level else []), *filter(None, [node.module])])
            yield base
            # `from rq_hf import quant` imports a module as well
            yield from (f"{base}.{alias.name}" for alias in node.names)


def runtime_nodes(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield from runtime_nodes(child)


def imports_of(path: Path) -> set[str]:
    name = module_name(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    return set(imports(path.read_text(), package))


def imported_units(path: Path) -> set[str]:
    """Units of the package that a file imports; a public name counts as the package itself."""
    units = {p.relative_to(PACKAGE).with_suffix("").parts[0] for p in modules(PACKAGE)}
    found = {name for name in imports_of(path) if name.split(".")[0] == PACKAGE.name}
    return {unit if (unit := unit_of(name)) in units else "" for name in found}


def top_level(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports_of(path)}


def test_reader_sees_every_form_of_import() -> None:
    source = """
import a.b
from c import d
from . import e
def f():
    from ..g import h
if TYPE_CHECKING:
    import i
"""
    assert set(imports(source, "p.q")) == {"a.b", "c", "c.d", "p.q", "p.q.e", "p.g", "p.g.h"}


@pytest.mark.parametrize("path", modules(PACKAGE), ids=module_name)
def test_module_imports_only_what_lies_below_it(path: Path) -> None:
    unit = unit_of(module_name(path))
    assert unit in ARROWS, f"say in ARROWS what {unit} may import"
    # `from rq_hf.quant import x` loads the package first: only the deeper name counts
    wrong = imported_units(path) - ARROWS[unit] - {unit}
    assert not wrong, f"{unit} must not import {sorted(wrong)}"


@pytest.mark.parametrize("path", modules(PACKAGE), ids=module_name)
def test_only_the_plug_in_imports_the_host(path: Path) -> None:
    if unit_of(module_name(path)) not in HOST:
        assert "transformers" not in top_level(path)


@pytest.mark.parametrize("path", modules(PACKAGE), ids=module_name)
def test_package_does_not_import_scripts_or_tests(path: Path) -> None:
    assert not top_level(path) & {"eval", "examples", "tests"}


@pytest.mark.parametrize("path", modules(PACKAGE), ids=module_name)
def test_triton_is_imported_only_by_kernels(path: Path) -> None:
    if "triton" not in path.relative_to(PACKAGE).parts:
        assert "triton" not in top_level(path)


@pytest.mark.parametrize("folder", SCRIPTS)
def test_scripts_use_public_names(folder: str) -> None:
    for path in modules(ROOT / folder):
        wrong = imported_units(path) - SCRIPTS[folder]
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("rq_hf", ["triton", "eval", "tests"]),
        ("rq_hf.quant", ["triton", "transformers"]),
    ],
)
def test_import_stays_light(module: str, absent: list[str]) -> None:
    program = f"import sys, {module}; print(sorted(set({absent}) & set(sys.modules)))"
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_modules_carry_a_licence_line() -> None:
    for folder in (PACKAGE, ROOT / "tests", ROOT / "examples", ROOT / "eval"):
        for path in modules(folder):
            first = path.read_text().partition("\n")[0]
            assert first == "# SPDX-License-Identifier: Apache-2.0", path
