"""A restore: beside the database in use, swapped while sessions wait, undone while the old one is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa

from tenancy_orm.config import TenancyConfig
from tenancy_orm.errors import (
    MigrationError,
    OperationConflictError,
    OperationError,
    OperationStateError,
    ProvisioningError,
    TenantNotFoundError,
)
from tenancy_orm.operations.switch import Paused, Switch
from tenancy_orm.restores import DumpSource
from tests.support.dumps import dump
from tests.support.fleet import Fleet, open_fleet
from tests.support.guests import BOTH, Guests, log_in
from tests.support.postgres import Postgres
from tests.support.projects import Project

ADD_COLUMN = 'op.add_column("notes", sa.Column("pinned", sa.Boolean))'


async def add(fleet: Fleet, slug: str, body: str) -> None:
    """Write a note as the tenant."""
    async with fleet.tenancy.session(slug) as session:
        await session.execute(sa.text("INSERT INTO notes (body) VALUES (:body)"), {"body": body})
        await session.commit()


async def notes(fleet: Fleet, slug: str) -> int:
    """Count the notes as the tenant."""
    async with fleet.tenancy.session(slug) as session:
        return int((await session.execute(sa.text("SELECT count(*) FROM notes"))).scalar_one())


async def databases(fleet: Fleet) -> set[str]:
    """The databases and roles of tenants, and short-lived ones, on the server."""
    names = fleet.services.names
    connection = await fleet.provisioner.connect_admin("default")
    try:
        rows = await connection.fetch(
            "SELECT datname::text AS name FROM pg_database WHERE starts_with(datname::text, $1) "
            "UNION SELECT rolname::text FROM pg_roles WHERE starts_with(rolname::text, $1)",
            names.stem,
        )
    finally:
        await connection.close()
    return {row["name"] for row in rows if row["name"].startswith((names.tenant_stem, names.scratch("")))}


async def test_a_restore_brings_back_what_was_dumped_and_an_undo_what_was_replaced(
    fleet: Fleet, tmp_path: Path
) -> None:
    """Rows, large objects and sequences are as they were; the neighbour's are as they are; both ways."""
    async with fleet.tenancy.session("acme") as session:
        await session.execute(sa.text("SELECT lo_from_bytea(4711, 'a large object')"))
        await session.commit()
    archive = await dump(fleet, "acme", tmp_path / "dump")
    await add(fleet, "acme", "after the dump")
    await add(fleet, "globex", "a neighbour's")
    key = await fleet.tenancy.keys.issue("acme", name="later")
    before, present = await fleet.registry.find("acme"), await databases(fleet)
    restores = fleet.tenancy.restores
    told: list[str] = []
    report = await restores.restore("acme", DumpSource(archive, before.id), progress=told.append)
    assert (report.state, report.differences, report.left_out) == ("done", (), ())
    assert told == ["restoring", "running missing revisions", "swapping"]
    assert await notes(fleet, "acme") == 100
    assert await notes(fleet, "globex") == 1
    async with fleet.tenancy.session("acme") as session:
        assert (await session.execute(sa.text("SELECT lo_get(4711)"))).scalar_one() == b"a large object"
        await session.execute(sa.text("SELECT lo_unlink(4711)"))
    await add(fleet, "acme", "after the restore")
    assert await fleet.fetch("acme", "SELECT max(id) FROM notes") == [(101,)]
    after = await fleet.registry.find("acme")
    assert (after.status, after.schema_revision) == (before.status, "0001")
    assert (await fleet.tenancy.tenants.get_by_api_key(key.text)).id == before.id
    # one database more, and no login that was made for it
    assert await databases(fleet) == present | {report.database}
    assert await fleet.fetch("acme", "SELECT DISTINCT tableowner::text FROM pg_tables WHERE schemaname = 'public'") == [
        (fleet.services.names.owner,)
    ]
    assert (await fleet.provisioner.reconcile()).clean
    drift = await fleet.tenancy.migrations.drift()
    assert (drift.ok, drift.total) == (True, 2)

    undone = await restores.undo("acme")
    assert (undone.database, undone.replaced) == (report.replaced, report.database)
    assert await notes(fleet, "acme") == 101
    assert (await fleet.provisioner.reconcile()).clean
    # ... and so is the undo
    await restores.undo("acme")
    assert await fleet.fetch("acme", "SELECT body FROM notes WHERE id = 101") == [("after the restore",)]
    actions = [entry.action for entry in await fleet.tenancy.audit.events(tenant="acme")]
    assert actions.count("tenant.restore_backup") == 1
    assert actions.count("tenant.undo_restore_backup") == 2
    assert (await fleet.tenancy.audit.verify()).ok


async def test_roles_of_the_grant_hook_write_to_no_database_that_is_not_in_use(
    config: TenancyConfig, postgres: Postgres, name_prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are shut out of the restored one until the swap, and of the old one from the pause on until an undo."""
    guests = Guests.named(name_prefix)
    await postgres.administer(guests.statements)
    hooked = config.replace(provisioning=config.provisioning.model_copy(update={"grants": guests.hook}))
    original = Switch._close
    seen: list[list[str]] = []

    async with open_fleet(hooked, initialise=True) as fleet:
        await fleet.create("acme")
        archive = await dump(fleet, "acme", tmp_path / "dump")
        restores = fleet.tenancy.restores

        async def at() -> str:
            place = (await fleet.registry.find("acme")).placement
            assert place is not None
            return postgres.url(place.database)

        async def close(switch: Switch, paused: Paused, *arguments: Any) -> None:
            await original(switch, paused, *arguments)
            seen.append(guests.let_in(await at()))

        monkeypatch.setattr(Switch, "_close", close)
        old = await at()
        with log_in(old, guests.writer) as since:
            waiting = await restores.restore("acme", DumpSource(archive), inspect=True)
            new = postgres.url(waiting.database)
            assert (guests.let_in(old), guests.let_in(new)) == (BOTH, [])
            assert waiting.operation is not None
            await restores.resume(waiting.operation)
            with pytest.raises(psycopg.OperationalError):
                since.execute("INSERT INTO notes (body) VALUES ('lost')")
        assert (await at(), seen) == (new, [[]])
        assert (guests.let_in(old), guests.let_in(new)) == ([], BOTH)
        await restores.undo("acme")
        assert (await at(), seen) == (old, [[], []])
        assert (guests.let_in(old), guests.let_in(new)) == (BOTH, [])

        # a swap that fails, and whose process does not end its pause
        async def fail(*_: Any, **__: Any) -> None:
            raise OperationError("the swap failed")

        with monkeypatch.context() as patch:
            patch.setattr(Paused, "to", fail)
            patch.setattr(Switch, "_resume", fail)
            with pytest.raises(OperationError, match="the swap failed"):
                await restores.undo("acme")
        assert (guests.let_in(old), guests.let_in(new)) == (BOTH, [])
        await restores.undo("acme")
        assert (guests.let_in(old), guests.let_in(new)) == ([], BOTH)


async def test_what_a_restore_has_replaced_is_dropped_after_its_time_or_with_the_tenant(
    fleet: Fleet, tmp_path: Path
) -> None:
    """Housekeeping drops it; until then nobody can connect to it. A purge drops all databases of the tenant."""
    archive, restores = await dump(fleet, "acme", tmp_path / "dump"), fleet.tenancy.restores
    tenant = await fleet.registry.find("acme")
    first = await restores.restore("acme", DumpSource(archive))
    assert first.replaced is not None
    with pytest.raises(Exception, match="not currently accepting connections"):
        await fleet.provisioner.connect_admin("default", first.replaced)
    assert await restores.tidy() == await restores.tidy()
    assert first.replaced in await databases(fleet)
    async with fleet.services.control.transaction() as connection:
        await connection.execute(sa.text("UPDATE tenancy.tenant_databases SET kept_until = now()"))
    assert (await restores.tidy()).dropped == (first.replaced,)
    assert first.replaced in await databases(fleet)  # the role, which has its name
    with pytest.raises(OperationStateError, match="no database that it has replaced is kept"):
        await restores.undo("acme")
    second = await restores.restore("acme", DumpSource(archive), inspect=True)
    assert second.state == "waiting"
    await fleet.tenancy.tenants.delete("acme")
    await fleet.tenancy.tenants.purge("acme")
    left = await databases(fleet)
    assert not left & {first.database, first.replaced, second.database}
    assert await fleet.registry.databases_of(tenant.id) == ()
    with pytest.raises(TenantNotFoundError):
        await restores.restore("acme", DumpSource(archive, tenant.id))
    with pytest.raises(TenantNotFoundError):
        await restores.restore_as("acme-copy", DumpSource(archive, tenant.id))
    assert (await restores.tidy()).ended == (second.operation,)
    with pytest.raises(OperationStateError, match="undone"):
        await restores.resume(second.operation or 0)
    assert (await fleet.provisioner.reconcile()).clean


async def test_a_dump_is_restored_where_the_tenants_database_is_lost(fleet: Fleet, tmp_path: Path) -> None:
    """Into the tenant, whose database would have said which extensions it has, and as another one."""
    source = DumpSource(await dump(fleet, "acme", tmp_path / "dump"), fleet.tenants["acme"].id)
    connection = await fleet.provisioner.connect_admin("default")
    try:
        await connection.execute(f'DROP DATABASE "{fleet.database("acme")}" WITH (FORCE)')
    finally:
        await connection.close()
    await fleet.tenancy.restores.restore_as("acme-copy", source)
    report = await fleet.tenancy.restores.restore("acme", source)
    assert report.state == "done"
    assert (await notes(fleet, "acme"), await notes(fleet, "acme-copy")) == (100, 100)


async def test_a_restore_is_inspected_before_it_is_swapped_or_discarded(fleet: Fleet, tmp_path: Path) -> None:
    """Until then the tenant writes to its old database, and no other restore begins."""
    archive, restores = await dump(fleet, "acme", tmp_path / "dump"), fleet.tenancy.restores
    present = await databases(fleet)
    waiting = await restores.restore("acme", DumpSource(archive), inspect=True)
    await add(fleet, "acme", "in the old one")
    connection = await fleet.provisioner.connect_admin("default", waiting.database)
    assert await connection.fetchval("SELECT count(*) FROM notes") == 100
    await connection.close()
    with pytest.raises(OperationConflictError, match="is waiting"):
        await restores.restore("acme", DumpSource(archive))
    await restores.discard(waiting.operation or 0)
    assert await databases(fleet) == present
    waiting = await restores.restore("acme", DumpSource(archive), inspect=True)
    assert await notes(fleet, "acme") == 101
    done = await restores.resume(waiting.operation or 0)
    assert (done.state, done.database) == ("done", waiting.database)
    assert await notes(fleet, "acme") == 100
    with pytest.raises(OperationStateError, match="it is done"):
        await restores.resume(waiting.operation or 0)


async def test_missing_revisions_run_and_newer_contents_are_refused(
    fleet: Fleet, project: Project, tmp_path: Path
) -> None:
    """An old backup is brought to this code's head, and so is a database that an undo goes back to."""
    archive, restores = await dump(fleet, "acme", tmp_path / "old"), fleet.tenancy.restores
    project.add("0002", ADD_COLUMN, 'op.drop_column("notes", "pinned")', down="0001")
    await fleet.tenancy.migrations.upgrade()
    newer = await dump(fleet, "acme", tmp_path / "newer")
    report = await restores.restore("acme", DumpSource(archive))
    assert report.revision == "0002"
    assert await fleet.columns("acme") == ["id", "body", "pinned"]
    assert await fleet.recorded("acme") == "0002"
    project.add("0003", 'op.execute("CREATE TABLE more ()")', 'op.drop_table("more")', down="0002")
    await fleet.tenancy.migrations.upgrade()
    undone = await restores.undo("acme")
    assert (undone.revision, await fleet.revision("acme")) == ("0003", "0003")
    await fleet.tenancy.migrations.downgrade("0001")
    for revision in ("0003", "0002"):
        (project.migrations / "versions" / f"{revision}.py").unlink()
    present = await databases(fleet)
    for source in (DumpSource(newer), DumpSource(newer, revision="0002")):
        with pytest.raises(MigrationError, match="newer than the code"):
            await restores.restore("acme", source)
    assert await databases(fleet) == present
    assert await notes(fleet, "acme") == 100


async def test_the_locale_and_the_settings_of_the_database_are_kept(fleet: Fleet, tmp_path: Path) -> None:
    """An archive has neither; whoever has stopped the writers by a setting gets a database that takes writes."""
    archive = await dump(fleet, "acme", tmp_path / "dump")
    await fleet.change_properties("acme")
    before, tenant = await fleet.properties("acme"), await fleet.registry.find("acme")
    assert tenant.placement is not None and before[2] == ["TimeZone=Asia/Kathmandu"]
    frozen = f'ALTER DATABASE "{tenant.placement.database}" SET default_transaction_read_only = on'
    await fleet.execute("acme", frozen)
    await fleet.tenancy.restores.restore("acme", DumpSource(archive, tenant.id))
    assert await fleet.properties("acme") == before
    await add(fleet, "acme", "after the restore")


async def test_another_tenant_is_made_of_a_backup(fleet: Fleet, tmp_path: Path) -> None:
    """It has a database, a role and a key of its own; the first one is as it was."""
    archive, restores = await dump(fleet, "acme", tmp_path / "dump"), fleet.tenancy.restores
    acme = await fleet.registry.find("acme")
    report = await restores.restore_as("acme-copy", DumpSource(archive, acme.id))
    assert report.api_key is not None
    assert (await fleet.tenancy.tenants.get_by_api_key(report.api_key)).slug == "acme-copy"
    await add(fleet, "acme-copy", "a copy's")
    assert (await notes(fleet, "acme-copy"), await notes(fleet, "acme")) == (101, 100)
    assert (await fleet.provisioner.reconcile()).clean
    present = await databases(fleet)
    with pytest.raises(OperationError, match="another tenant"):
        await restores.restore("globex", DumpSource(archive, acme.id))
    with pytest.raises(OperationError, match="names no tenant"):
        await restores.restore_as("other", DumpSource(archive))
    rows = max(archive.glob("[0-9]*"), key=lambda file: file.stat().st_size)
    for damaged in (rows, archive / "toc.dat"):
        damaged.write_bytes(damaged.read_bytes()[:-20])
        with pytest.raises(ProvisioningError, match="pg_restore"):
            await restores.restore_as("other", DumpSource(archive, acme.id))
        with pytest.raises(ProvisioningError, match="pg_restore"):
            await restores.restore("acme", DumpSource(archive, acme.id))
    assert (await fleet.tenancy.operations.list())[0].state == "failed"
    assert await databases(fleet) == present
    with pytest.raises(TenantNotFoundError):
        await fleet.registry.find("other")
