"""SIGKILL at every step of rebuilding the registry: a second run finishes it, and no tenant loses anything."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from tenancy_orm import Tenancy
from tests.support.killed import run_killed
from tests.support.postgres import Postgres
from tests.support.processes import opened
from tests.support.projects import NOTES, Project
from tests.support.rebuild_process import POINTS
from tests.support.runs_process import config_of

pytestmark = [pytest.mark.new_installation, pytest.mark.timeout(600)]


async def killed(task: dict[str, Any], at: str) -> None:
    """Run another process that dies at a given point."""
    await run_killed("rebuild_process", {**task, "at": at})


async def bodies(tenancy: Tenancy, slug: str) -> list[str]:
    async with tenancy.session(slug) as session:
        return list(await session.scalars(sa.text("SELECT body FROM notes ORDER BY id")))


async def test_a_second_run_finishes_what_was_killed(
    postgres: Postgres, control_url: str, name_prefix: str, tmp_path: Any
) -> None:
    """Also with a reconcile in between, which removes nothing of it; and no clone is without its end."""
    project = Project.create(tmp_path / "app")
    project.add("0001", NOTES)
    task: dict[str, Any] = {
        "control_url": control_url,
        "admin_url": postgres.admin_url,
        "name_prefix": name_prefix,
        "migrations": str(project.migrations),
    }
    slugs = {}
    async with opened(config_of(task), initialise=True) as tenancy:
        for slug in ("acme", "globex"):
            slugs[(await tenancy.tenants.create(slug)).id] = slug
            async with tenancy.transaction(slug) as session:
                await session.execute(sa.text("INSERT INTO notes (body) VALUES (:body)"), {"body": slug})
        clone = await tenancy.clones.create("acme", "debug", ttl=timedelta(days=2))
        slugs[clone.tenant.id] = "debug"
    task["slugs"] = {str(tenant_id): slug for tenant_id, slug in slugs.items()}
    for at in POINTS:
        lost, name = task["control_url"].rpartition("/")[2], postgres.new_name()
        await postgres.administer(f'DROP DATABASE "{lost}" WITH (FORCE)')
        task["control_url"] = await postgres.create_database(name)
        async with opened(config_of(task), initialise=True):
            pass
        await killed(task, at)
        await release(task)
        if at not in ("before the id is committed", "after the id", "before the viewer"):
            async with opened(config_of(task)) as tenancy:
                report = await tenancy.internals.provisioner.reconcile()
                assert (report.removed, report.purged) == ((), ()), at
        async with opened(config_of(task)) as tenancy:
            looked = await tenancy.rebuilding.look(slugs=slugs)
            initialise = await tenancy.rebuilding.take_installation(looked.installation)
        async with opened(config_of(task), initialise=initialise) as tenancy:
            assert (await tenancy.rebuilding.run(slugs=slugs)).complete, at
            assert [one.slug async for one in tenancy.tenants.iterate()] == ["acme", "globex", "debug"], at
            for tenant_id, slug in slugs.items():
                found = await tenancy.tenants.get(slug)
                assert (found.id, found.status, found.schema_revision) == (tenant_id, "active", "0001"), at
                assert await bodies(tenancy, slug) == ["acme" if slug == "debug" else slug], at
            ends = await tenancy.clones.get("debug")
            assert ends is not None and ends.expires_at == clone.clone.expires_at, at
            assert (await tenancy.rebuilding.run(slugs=slugs)).databases == (), at
            assert (await tenancy.internals.provisioner.reconcile(check=True)).clean, at
    await postgres.drop_database(task["control_url"].rpartition("/")[2])


async def release(task: dict[str, Any]) -> None:
    """Let the time pass after which a killed process counts as gone."""
    async with opened(config_of(task)) as tenancy:
        own = list(map(str, tenancy.internals.leases.processes))
        async with tenancy.internals.control.transaction() as connection:
            await connection.execute(
                sa.text("DELETE FROM tenancy.connection_leases WHERE process::text <> ALL(:own)"), {"own": own}
            )
