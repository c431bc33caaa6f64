"""SIGKILL at every step of a restore: one writable copy is left, and housekeeping undoes or finishes the rest."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from tenancy_orm.errors import OperationStateError, TenantNotFoundError
from tests.support.dumps import dump
from tests.support.fleet import Fleet, open_fleet
from tests.support.killed import run_killed
from tests.support.postgres import Postgres
from tests.support.projects import NOTES, Project
from tests.support.restores_process import FINISHED, UNDONE
from tests.support.runs_process import config_of
from tests.support.waiting import until

# what is left on the server is compared as a whole
pytestmark = [pytest.mark.new_installation, pytest.mark.timeout(600)]

SECONDS = 120.0
PRESENT = """
SELECT datname::text FROM pg_database WHERE starts_with(datname::text, $1)
UNION SELECT rolname::text FROM pg_roles WHERE starts_with(rolname::text, $1)
"""
CONNECTS = """
SELECT datname::text FROM pg_database WHERE starts_with(datname::text, $1) AND datallowconn
   AND has_database_privilege($2::name, oid, 'CONNECT')
"""
REPLACED = """
SELECT datname::text FROM pg_database WHERE starts_with(datname::text, $1)
   AND shobj_description(oid, 'pg_database') ~ ':replaced:'
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
        "archive": str(tmp_path / "dump"),
        "what": "restore",
    }


@pytest.fixture
async def fleet(task: Task) -> AsyncIterator[Fleet]:
    """A tenant with one note in the dump, and a second one in its database."""
    async with open_fleet(config_of(task), initialise=True) as opened:
        await opened.create("acme")
        await write(opened, "dumped")
        await dump(opened, "acme", Path(task["archive"]))
        await write(opened, "later")
        yield opened


async def write(fleet: Fleet, body: str) -> None:
    async with fleet.tenancy.session("acme") as session:
        await session.execute(sa.text("INSERT INTO notes (body) VALUES (:body)"), {"body": body})
        await session.commit()


async def bodies(fleet: Fleet, slug: str = "acme") -> list[str]:
    async with fleet.tenancy.session(slug) as session:
        return list(await session.scalars(sa.text("SELECT body FROM notes ORDER BY id")))


async def ask(fleet: Fleet, sql: str, *values: Any) -> set[str]:
    connection = await fleet.provisioner.connect_admin("default")
    try:
        return {row[0] for row in await connection.fetch(sql, *values)}
    finally:
        await connection.close()


async def present(fleet: Fleet) -> set[str]:
    names = fleet.services.names
    return {
        name
        for name in await ask(fleet, PRESENT, names.stem)
        if name.startswith((names.tenant_stem, names.scratch("")))
    }


async def killed(task: Task, at: str, what: str = "restore") -> None:
    """Run another process that dies at a given point."""
    await run_killed("restores_process", {**task, "at": at, "what": what})


async def expire(fleet: Fleet) -> None:
    """Let the time pass after which others take over what a silent process has claimed."""
    async with fleet.services.control.transaction() as connection:
        await connection.execute(sa.text("UPDATE tenancy.operations SET claimed_until = clock_timestamp()"))
        await connection.execute(sa.text("UPDATE tenancy.tenants SET paused_until = clock_timestamp()"))


async def tidy(fleet: Fleet) -> None:
    """Do what housekeeping does, until there is nothing left to do."""

    async def is_tidy() -> bool:
        report = await fleet.tenancy.restores.tidy()
        assert report.errors == ()
        found = await fleet.provisioner.reconcile()
        return not report.ended and found.clean

    await until(is_tidy, seconds=SECONDS)


async def writable(fleet: Fleet) -> set[str]:
    """The databases that the tenant's role can connect to."""
    place = (await fleet.registry.find("acme")).placement
    assert place is not None
    return await ask(fleet, CONNECTS, fleet.services.names.tenant_stem, place.role)


async def test_a_restore_that_is_killed_before_its_swap_is_undone(fleet: Fleet, task: Task) -> None:
    """The tenant goes on with the database that it has, and nothing else is left."""
    before = await present(fleet)
    for at in UNDONE:
        await killed(task, at)
        assert await writable(fleet) == {fleet.database("acme")}, at
        assert await bodies(fleet) == ["dumped", "later"], at
        # others leave alone what may only be slow
        assert (await fleet.tenancy.restores.tidy()).ended == (), at
        assert (await fleet.provisioner.reconcile()).errors == (), at
        await expire(fleet)
        await tidy(fleet)
        assert await present(fleet) == before, at
        (operation, *_) = await fleet.tenancy.operations.list()
        assert operation.state == "undone", at
    await killed(task, UNDONE[-1])
    await expire(fleet)
    report = await fleet.tenancy.restores.resume((await fleet.tenancy.operations.list())[0].id)
    assert (report.state, await bodies(fleet)) == ("done", ["dumped"])


async def test_a_restore_that_is_killed_in_its_swap_is_finished(fleet: Fleet, task: Task) -> None:
    """At no point two databases are the tenant's; an undo that is killed is finished too."""
    restored = False
    for number, at in enumerate(FINISHED):
        await killed(task, at, "undo" if restored else "restore")
        assert len(await writable(fleet)) <= 1, at
        await expire(fleet)
        (operation, *_) = await fleet.tenancy.operations.list()
        if number % 2:
            await fleet.tenancy.restores.resume(operation.id)
        await tidy(fleet)
        assert (await fleet.tenancy.operations.get(operation.id)).state == "done", at
        restored = not restored
        assert await bodies(fleet) == (["dumped"] if restored else ["dumped", "later"]), at
        place = (await fleet.registry.find("acme")).placement
        assert place is not None
        assert await writable(fleet) == {place.database}, at
        kept = {one.name for one in await fleet.registry.databases_of(operation.tenant_id)}
        assert await ask(fleet, REPLACED, fleet.services.names.tenant_stem) == kept, at
        with pytest.raises(OperationStateError, match="it is done"):
            await fleet.tenancy.restores.resume(operation.id)
        if not restored:
            # back to one database, for the next one
            await drop_kept(fleet)


async def drop_kept(fleet: Fleet) -> None:
    async with fleet.services.control.transaction() as connection:
        await connection.execute(sa.text("UPDATE tenancy.tenant_databases SET kept_until = clock_timestamp()"))
    assert len((await fleet.tenancy.restores.tidy()).dropped) == 1


async def test_another_tenant_of_a_backup_is_removed_where_its_creation_is_killed(fleet: Fleet, task: Task) -> None:
    """All or nothing, as any creation."""
    before = await present(fleet)
    for at in ("after the empty database", "after the contents", "after the rights", "after all is handed over"):
        await killed(task, at, "as")
        await tidy(fleet)
        assert await present(fleet) == before, at
        with pytest.raises(TenantNotFoundError):
            await fleet.registry.find("copy")
