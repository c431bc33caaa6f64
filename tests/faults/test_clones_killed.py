"""SIGKILL at every step of a clone: nothing of it is left, or it is whole and has its end; and at its end, it ends."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from tenancy_orm.errors import TenantNotFoundError
from tenancy_orm.tenant import Status
from tests.support.clones_process import ENDED, KEPT, REMOVED
from tests.support.fleet import Fleet, open_fleet
from tests.support.killed import run_killed
from tests.support.postgres import Postgres
from tests.support.projects import NOTES, Project
from tests.support.runs_process import config_of
from tests.support.waiting import until

# what is left on the server is compared as a whole
pytestmark = [pytest.mark.new_installation, pytest.mark.timeout(600)]

SECONDS = 120.0
PRESENT = """
SELECT datname::text FROM pg_database WHERE starts_with(datname::text, $1)
UNION SELECT rolname::text FROM pg_roles WHERE starts_with(rolname::text, $1)
"""

Task = dict[str, Any]


@pytest.fixture
def task(postgres: Postgres, control_url: str, name_prefix: str, tmp_path: Path) -> Task:
    project = Project.create(tmp_path / "app")
    project.add("0001", NOTES)
    return {
        "control_url": control_url,
        "admin_url": postgres.admin_url,
        "name_prefix": name_prefix,
        "migrations": str(project.migrations),
    }


@pytest.fixture
async def fleet(task: Task) -> AsyncIterator[Fleet]:
    async with open_fleet(config_of(task), initialise=True) as opened:
        await opened.create("acme")
        async with opened.tenancy.transaction("acme") as session:
            await session.execute(sa.text("INSERT INTO notes (body) SELECT 'Original' FROM generate_series(1, 100)"))
        yield opened


async def present(fleet: Fleet) -> set[str]:
    """Databases and roles of tenants, and short-lived ones."""
    names = fleet.services.names
    connection = await fleet.provisioner.connect_admin("default")
    try:
        found = {row[0] for row in await connection.fetch(PRESENT, names.stem)}
    finally:
        await connection.close()
    return {name for name in found if name.startswith((names.tenant_stem, names.scratch("")))}


async def killed(task: Task, at: str, what: str = "clone") -> None:
    """Run another process that dies at a given point."""
    await run_killed("clones_process", {**task, "at": at, "what": what})


async def tidy(fleet: Fleet) -> None:
    """Do a part of what housekeeping does, until there is nothing left to do."""

    async def is_tidy() -> bool:
        return (await fleet.provisioner.reconcile()).clean

    await until(is_tidy, seconds=SECONDS)


async def bodies(fleet: Fleet, slug: str) -> set[str]:
    async with fleet.tenancy.session(slug) as session:
        return set(await session.scalars(sa.text("SELECT body FROM notes")))


async def test_a_clone_that_is_killed_before_it_is_whole_is_removed(fleet: Fleet, task: Task) -> None:
    """Whoever is first takes its slug again; the tenant is as it was."""
    before = await present(fleet)
    for at in REMOVED:
        await killed(task, at)
        await tidy(fleet)
        assert await present(fleet) == before, at
        with pytest.raises(TenantNotFoundError):
            await fleet.registry.find("clone")
        assert await fleet.services.control.fetch("SELECT FROM tenancy.operations") == [], at
    assert await bodies(fleet, "acme") == {"Original"}


@pytest.mark.parametrize("at", KEPT)
async def test_a_clone_that_is_whole_has_its_end_and_is_in_the_audit_log(fleet: Fleet, task: Task, at: str) -> None:
    """Both are written before anybody can use it."""
    await killed(task, at)
    await tidy(fleet)
    clone = await fleet.tenancy.tenants.get("clone")
    assert clone.status is Status.ACTIVE
    values = await bodies(fleet, "clone")
    assert len(values) == 1 and "Original" not in values
    recorded = await fleet.tenancy.clones.get("clone")
    assert recorded is not None and recorded.columns == ("public.notes.body",)
    assert recorded.expires_at > datetime.now(UTC)
    (into,) = await fleet.tenancy.audit.events(tenant="acme", action="tenant.cloned_to")
    assert into.detail is not None and into.detail["clone"] == str(clone.id)
    assert len(await fleet.tenancy.audit.events(tenant="clone", action="tenant.clone")) == 1


async def test_a_clone_that_has_expired_is_purged_whatever_is_killed(fleet: Fleet, task: Task) -> None:
    """By the next housekeeping, of whichever process."""
    before = await present(fleet)
    clone = (await fleet.tenancy.clones.create("acme", "clone", ttl=timedelta(hours=1))).tenant
    await fleet.services.control.fetch(
        "UPDATE tenancy.operations SET detail = detail || jsonb_build_object('expires_at', clock_timestamp()) "
        "WHERE kind = 'clone' RETURNING id"
    )
    for at in ENDED:
        await killed(task, at, "expire")
        # this is what the next process finds
        assert (await fleet.registry.get(clone.id)).status in (Status.ACTIVE, Status.DELETED), at
    await fleet.tenancy.run_housekeeping()
    await tidy(fleet)
    assert (await fleet.registry.get(clone.id)).status is Status.PURGED
    assert await present(fleet) == before
    assert await bodies(fleet, "acme") == {"Original"}
