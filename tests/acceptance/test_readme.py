"""The README and the quickstart page, followed to the letter in an empty directory."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.shell import ROOT
from tests.support.walkthrough import blocks, walkthrough


def test_the_readme_leads_to_two_tenants(user_directory: Path) -> None:
    """From nothing to a working application with two tenants by the README's own commands."""
    with walkthrough(user_directory) as walk:
        walk.follow(blocks(ROOT / "README.md", heading="From nothing to two tenants"))
        assert re.search(r"acme .*active.*pro", walk.printed), walk.printed
        assert re.search(r"globex .*active.*free", walk.printed), walk.printed


def test_the_quickstart_page_does_what_it_says(user_directory: Path) -> None:
    """Every command of the page works, and prints what the page says."""
    with walkthrough(user_directory) as walk:
        walk.follow(blocks(ROOT / "docs" / "quickstart.md"))


def test_the_agent_platforms_readme_does_what_it_says(user_directory: Path) -> None:
    """The larger example can be run by hand as its README says."""
    page = blocks(ROOT / "examples" / "agent_platform" / "README.md", heading="Run it by hand")
    (user_directory / "examples").symlink_to(ROOT / "examples")
    with walkthrough(user_directory) as walk:
        walk.follow(page)
        assert "acme" in walk.printed and "0001 (head)" in walk.printed, walk.printed


@pytest.mark.parametrize("command", ["make demo", "make test"])
def test_the_readmes_commands_are_targets_of_the_makefile(command: str) -> None:
    """The README's first two commands exist."""
    assert re.search(rf"^{command}\b", (ROOT / "README.md").read_text(), re.MULTILINE)
    target = command.removeprefix("make ")
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_the_readmes_links_lead_somewhere() -> None:
    """Every relative link of the README is a file of the repository."""
    links = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / "README.md").read_text())
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
