"""What a user of the installed package reads: it has neither docs/ nor the repository's other files."""

from __future__ import annotations

import ast
import runpy
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


def documentation_of(tree: ast.AST) -> set[ast.AST]:
    """The docstrings of a module: users read them in the reference, where links are checked."""
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return {
        node.body[0].value
        for node in ast.walk(tree)
        if isinstance(node, holders) and node.body and isinstance(node.body[0], ast.Expr)
    }


def test_no_message_names_a_file_of_the_documentation() -> None:
    """Errors, logs and help name a page by its title."""
    found = []
    for file in sorted((ROOT / "tenancy_orm").rglob("*.py")):
        tree = ast.parse(file.read_text("utf-8"))
        docstrings = documentation_of(tree)
        found += [
            f"{file.relative_to(ROOT)}:{node.lineno}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docstrings
            if "docs/" in node.value.replace("/docs/current/", "")
        ]
    assert found == []


def test_the_readme_of_the_package_has_no_relative_link(monkeypatch: pytest.MonkeyPatch) -> None:
    """Links to pages lead to the documentation's site where there is one; of other files the text stays."""
    interface = ModuleType("hatchling.metadata.plugin.interface")
    interface.MetadataHookInterface = object  # type: ignore[attr-defined]
    for name in ("hatchling", "hatchling.metadata", "hatchling.metadata.plugin"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    hook = runpy.run_path(str(ROOT / "hatch_build.py"))
    readme = (ROOT / "README.md").read_text("utf-8")
    assert "](docs/quickstart.md)" in readme
    alone = hook["standalone"](readme, None)
    assert "](" not in alone and "[the\nquickstart]" not in alone and "quickstart" in alone
    linked = hook["standalone"](readme, "https://docs.example/")
    assert "[Quickstart](https://docs.example/quickstart/)" in linked
    assert "[Documentation](https://docs.example/)" in linked
    assert hook["standalone"]("[a](docs/keys.md#b) [c](https://d.example) [e](#f)", "https://g.example") == (
        "[a](https://g.example/keys/#b) [c](https://d.example) [e](#f)"
    )
