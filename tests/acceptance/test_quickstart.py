"""The quickstart: one file, and the commands of its README."""

from __future__ import annotations

from pathlib import Path

from tests.support.shell import ROOT
from tests.support.walkthrough import blocks, walkthrough

QUICKSTART = ROOT / "examples" / "quickstart"


def test_the_quickstart_is_one_short_file() -> None:
    """A whole application takes at most 40 lines."""
    assert [path.name for path in QUICKSTART.glob("*.py") if path.name != "__init__.py"] == ["app.py"]
    assert len((QUICKSTART / "app.py").read_text().splitlines()) <= 40


def test_the_readme_keeps_two_tenants_apart(user_directory: Path) -> None:
    """What the README of the quickstart says is what happens."""
    # the README is for a reader in the checkout, where the data shall not be left
    (user_directory / "examples").symlink_to(ROOT / "examples")
    with walkthrough(user_directory) as walk:
        walk.follow(blocks(QUICKSTART / "README.md"))
        assert '["hello from acme"]' in walk.printed
