"""The page on migrations, followed in a project that uses Alembic already."""

from __future__ import annotations

import base64
import secrets
from pathlib import Path

import pytest

from tests.support.env_files import add_revision, make_project
from tests.support.postgres import Postgres
from tests.support.shell import ROOT
from tests.support.walkthrough import blocks, walkthrough

PAGE = ROOT / "docs" / "migrations.md"


@pytest.fixture
def variables(postgres: Postgres, name_prefix: str, empty_url: str) -> dict[str, str]:
    """A control database, as a deployment's environment names it."""
    return {
        "TENANCY_CONTROL_URL": empty_url,
        "TENANCY_SERVERS": f"default={postgres.admin_url}",
        "TENANCY_ENCRYPTION_KEYS": "1:" + base64.b64encode(secrets.token_bytes(32)).decode(),
        "TENANCY_NAME_PREFIX": name_prefix,
    }


@pytest.mark.parametrize("template", ["generic", "pyproject_async"])
def test_its_history_becomes_the_tenants(tmp_path: Path, variables: dict[str, str], template: str) -> None:
    """What the page says of each template is what happens, and the lines to change are those that init prints."""
    root = tmp_path / "shop"
    add_revision(make_project(root, template))
    page = blocks(PAGE, heading="An existing Alembic project")
    [change] = [block.text for block in page if block.language == "diff"]
    with walkthrough(root, **variables) as walk:
        printed = walk.terminals[0].run("tenancy init")
        shown = [
            line for line in printed.splitlines() if line[:1] in ("+", "-", " ") and line[:3] not in ("+++", "---")
        ]
        assert [line for line in shown if line.strip()] == [line for line in change.splitlines() if line.strip()]
        walk.follow(page)
        assert "acme: 0001 (head)" in walk.terminals[0].said


def test_its_history_stays_beside_the_tenants(tmp_path: Path, variables: dict[str, str]) -> None:
    """The project's own alembic.ini and env.py are as before."""
    root = tmp_path / "shop"
    add_revision(make_project(root, "async"))
    before = [(root / name).read_bytes() for name in ("alembic.ini", "alembic/env.py")]
    with walkthrough(root, **variables) as walk:
        walk.follow(blocks(PAGE, heading="A history of the tenants' own"))
        assert "the project's own migrations are used: tenants\n" in walk.terminals[0].said
        assert walk.terminals[0].run("tenancy create acme; alembic -c tenants.ini current").count("(head)") == 1
    assert [(root / name).read_bytes() for name in ("alembic.ini", "alembic/env.py")] == before
