"""A fleet that a migration is rehearsed for."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from tenancy_orm.config import TenancyConfig
from tests.integration.migrations.conftest import config, project
from tests.support.fleet import Fleet, open_fleet
from tests.support.postgres import Postgres

__all__ = ["config", "fleet", "leftovers", "project"]

_LEFTOVERS = (
    "SELECT datname::text FROM pg_database WHERE starts_with(datname::text, %(stem)s) UNION ALL "
    "SELECT rolname::text FROM pg_roles WHERE starts_with(rolname::text, %(stem)s)"
)

Leftovers = Callable[[], Awaitable[list[str]]]


@pytest.fixture
async def fleet(config: TenancyConfig) -> AsyncIterator[Fleet]:
    """Two tenants at 0001: acme with a note, and globex with 20,000, the larger and younger one."""
    async with open_fleet(config) as opened:
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
