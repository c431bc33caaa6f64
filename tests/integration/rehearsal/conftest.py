"""A fleet that a migration is rehearsed for."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from tenancy_orm.config import TenancyConfig
from tests.support.fleet import Fleet, fleet_config, open_fleet
from tests.support.postgres import Postgres
from tests.support.projects import NOTES, Project

_LEFTOVERS = (
    "SELECT datname::text FROM pg_database WHERE starts_with(datname::text, %(stem)s) UNION ALL "
    "SELECT rolname::text FROM pg_roles WHERE starts_with(rolname::text, %(stem)s)"
)

Leftovers = Callable[[], Awaitable[list[str]]]


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """An Alembic project with one revision, 0001, that makes the table ``notes``."""
    project = Project.create(tmp_path / "app")
    project.add("0001", NOTES, 'op.drop_table("notes")')
    return project


@pytest.fixture
def config(postgres: Postgres, name_prefix: str, control_url: str, project: Project) -> TenancyConfig:
    return fleet_config(postgres, control_url, name_prefix, project)


@pytest.fixture
async def fleet(config: TenancyConfig) -> AsyncIterator[Fleet]:
    """Two tenants at 0001: acme with a note, and globex with 20,000, the larger and younger one."""
    async with open_fleet(config, initialise=True) as opened:
        await opened.create("acme", "globex")
        await opened.execute("acme", "INSERT INTO notes (body) VALUES ('of acme')")
        await opened.execute("globex", "INSERT INTO notes (body) SELECT 'note ' || n FROM generate_series(1, 20000) n")
        yield opened


@pytest.fixture
def leftovers(fleet: Fleet, postgres: Postgres) -> Leftovers:
    """Returns the scratch databases and roles that exist."""
    stem = fleet.services.names.scratch("")

    async def find() -> list[str]:
        found = await postgres.administer(_LEFTOVERS.replace("%(stem)s", "%s"), (stem, stem))
        return [row[0] for row in found]

    return find
