"""What a revision of the control database runs is its own text, which later versions of the package do not change."""

from __future__ import annotations

import ast
import hashlib
from pathlib import Path

import pytest

from tenancy_orm.control import scripts

VERSIONS = Path(scripts.__file__).parent / "migrations" / "versions"


@pytest.mark.parametrize("path", sorted(VERSIONS.glob("*.py")), ids=lambda path: path.stem)
def test_a_revision_imports_nothing_that_changes(path: Path) -> None:
    """Of the package it takes what runs a script, and the one frozen text."""
    found = {
        (node.module, alias.name)
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    } | {
        (alias.name, "")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    frozen = {("tenancy_orm.control.scripts", name) for name in ("run_script", "for_applications")}
    assert found <= frozen


def test_the_text_that_revisions_share_is_frozen() -> None:
    """A change would change what released revisions do: give later revisions another function."""
    text = scripts.for_applications("GRANT SELECT ON tenancy.t TO %1$I")
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "33a73e2e792ab1c396206348f23353f8ca6586e89e802ba109dcf5fe4adcd6cb"
    )
