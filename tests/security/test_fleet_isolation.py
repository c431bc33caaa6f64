"""A migration runs on the database of the tenant it was meant for, or not at all."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy import text

from tenancy_orm.migrations import connections
from tests.support.fleet import Fleet, fleet_config, open_fleet
from tests.support.postgres import Postgres
from tests.support.projects import NOTES, Project

SIGN = """
tenant = op.get_context().opts["tenant"]
if tenant is not None:
    op.get_bind().execute(sa.text("INSERT INTO notes (body) VALUES (:slug)"), {"slug": tenant.slug})
"""


@pytest.fixture
async def swapped(
    postgres: Postgres, name_prefix: str, control_url: str, tmp_path: Path
) -> AsyncIterator[tuple[Fleet, dict[str, str]]]:
    """A fleet with acme's and globex's databases swapped in the registry, and a revision that signs."""
    project = Project.create(tmp_path)
    project.add("0001", NOTES)
    async with open_fleet(fleet_config(postgres, control_url, name_prefix, project), initialise=True) as fleet:
        await fleet.create("acme", "globex")
        databases = {slug: fleet.database(slug) for slug in ("acme", "globex")}
        statement = text("UPDATE tenancy.tenants SET database_name = :name WHERE slug = :slug")
        async with fleet.tenancy.internals.control.transaction() as connection:
            for slug, name in (("acme", "-"), ("globex", databases["acme"]), ("acme", databases["globex"])):
                await connection.execute(statement, {"slug": slug, "name": name})
        project.add("0002", SIGN, down="0001")
        yield fleet, databases


async def signatures(postgres: Postgres, database: str) -> list[str]:
    async with postgres.connect(database) as connection:
        return [row[0] for row in await connection.fetch("SELECT body FROM notes")]


async def test_without_the_marker_one_tenants_migration_runs_on_anothers_database(
    swapped: tuple[Fleet, dict[str, str]], postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet, databases = swapped
    monkeypatch.setattr(connections, "marker_text", lambda installation, tenant_id: None)
    assert (await fleet.migrations.upgrade()).ok
    assert await signatures(postgres, databases["acme"]) == ["globex"]


async def test_a_database_that_is_another_tenants_is_refused(
    swapped: tuple[Fleet, dict[str, str]], postgres: Postgres
) -> None:
    fleet, databases = swapped
    report = await fleet.migrations.upgrade()
    assert {failure.slug for failure in report.failures} == {"acme", "globex"}
    assert all("is not the one of tenant" in str(failure.error) for failure in report.failures)
    for database in databases.values():
        assert await signatures(postgres, database) == []
