"""What a run has left half-way, by a failure, a limit or an interruption, is true in its record and finished later."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tenancy_orm import TenancyConfig
from tenancy_orm.errors import MigrationError
from tenancy_orm.migrations.state import lock
from tenancy_orm.provisioning import Provisioner
from tests.support.fleet import Fleet, activity, open_fleet, until
from tests.support.postgres import Postgres
from tests.support.projects import Project
from tests.support.runs_process import keep_ledger

FILL = """

from tenancy_orm.migrations import data_migration

@data_migration(table="notes", batch_size=10, max_batch_size=10)
def fill(batch):
    bad = "CASE WHEN body = 'bad' THEN (1 / (id - id))::text ELSE 'filled' END"
    return f"UPDATE notes SET c0002 = {bad} WHERE {batch.rows}"
"""
ROWS = "INSERT INTO notes (body) SELECT CASE WHEN n = 25 THEN '{}' ELSE 'good' END FROM generate_series(1, 40) AS n"


def add(project: Project, revision: str, down: str, *, first: str = "", data: str = "") -> None:
    """Add a revision that makes a column of its name, after ``first``."""
    up, back = f'op.add_column("notes", sa.Column("c{revision}", sa.Text))', f'op.drop_column("notes", "c{revision}")'
    project.add(revision, f"{first}\n{up}", back, down=down)
    path = project.migrations / "versions" / f"{revision}.py"
    path.write_text(path.read_text() + data)


def for_acme(body: str) -> str:
    return f't = op.get_context().opts["tenant"]\nif t is not None and t.slug == "acme":\n    {body}'


async def revisions(fleet: Fleet) -> list[str | None]:
    return [await fleet.revision(slug) for slug in ("acme", "globex", "initech")]


async def test_a_retry_counts_a_relative_target_from_where_the_tenant_was(
    fleet: Fleet, project: Project, tmp_path: Path
) -> None:
    """A part of the way was committed before the failure."""
    project.configure("target_metadata=target_metadata, transaction_per_migration=True")
    mended = tmp_path / "mended"
    add(project, "0002", "0001")
    add(project, "0003", "0002", first=for_acme(f"assert __import__('pathlib').Path({str(mended)!r}).exists()"))
    add(project, "0004", "0003")
    add(project, "0005", "0004")
    report = await fleet.migrations.upgrade("+2")
    assert await revisions(fleet) == ["0002", "0003", "0003"]
    mended.touch()
    assert report.run is not None
    again = await fleet.migrations.retry(report.run)
    assert again.ok
    assert await revisions(fleet) == ["0003"] * 3
    assert {(one.before, one.after) for one in again.outcomes} == {("0001", "0003")}


async def test_a_retry_of_a_relative_target_leaves_a_tenant_alone_that_others_have_moved(
    fleet: Fleet, project: Project
) -> None:
    add(project, "0002", "0001", data=FILL)
    add(project, "0003", "0002")
    await fleet.execute("acme", ROWS.format("bad"))
    report = await fleet.migrations.upgrade("+1")
    assert [one.slug for one in report.failures] == ["acme"]
    await fleet.execute("acme", "UPDATE notes SET body = 'good'")
    assert report.run is not None
    assert (await fleet.migrations.upgrade("0003", tenants=["acme"])).ok
    again = await fleet.migrations.retry(report.run)
    assert "another run has moved it to 0003" in again.reasons["acme"]
    assert await revisions(fleet) == ["0003", "0002", "0002"]


async def test_a_migration_that_took_too_long_is_recorded_where_it_has_come_to(
    fleet: Fleet, config: TenancyConfig, project: Project
) -> None:
    """One of two revisions is committed by then: code that cannot work with it must not serve the tenant."""
    project.configure("target_metadata=target_metadata, transaction_per_migration=True")
    add(project, "0002", "0001")
    project.add("0003", for_acme('op.execute("SELECT pg_sleep(600)")'), down="0002")
    async with open_fleet(config.replace(migration={"timeout": 2.0})) as other:
        report = await other.migrations.upgrade(tenants=["acme"])
    ((slug, reason),) = report.reasons.items()
    assert (slug, "not done within 2 s" in reason) == ("acme", True)
    assert [(one.before, one.after, one.changed) for one in report.outcomes] == [("0001", "0002", True)]
    assert await fleet.revision("acme") == await fleet.recorded("acme") == "0002"
    assert (await fleet.registry.get(fleet.tenants["acme"].id)).migrating_to is None


@pytest.mark.parametrize("how", ["interrupted", "failed"])
async def test_the_rights_are_set_on_what_was_committed(
    config: TenancyConfig, project: Project, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """The grant hook did not come to its end; the next run finds nothing to migrate, and sets the rights."""
    async with open_fleet(config.replace(provisioning={"grants": keep_ledger}), initialise=True) as fleet:
        await fleet.create("acme")
        create = 'op.execute("CREATE TABLE ledger (n integer)")'
        project.add("0002", create, 'op.execute("DROP TABLE ledger")', down="0001")
        original, entered = Provisioner.apply_grants, asyncio.Event()

        async def fails(self: Provisioner, *arguments: Any, **options: Any) -> None:
            if entered.is_set() or how == "failed":
                raise MigrationError("the hook is broken")
            entered.set()
            await asyncio.Event().wait()

        monkeypatch.setattr(Provisioner, "apply_grants", fails)
        run = asyncio.create_task(fleet.migrations.upgrade())
        if how == "interrupted":
            await entered.wait()
            run.cancel()
            with pytest.raises(asyncio.CancelledError):
                await run
        else:
            assert "the hook is broken" in (await run).reasons["acme"]
        assert await fleet.revision("acme") == "0002"
        assert await fleet.recorded("acme") == "0001"
        monkeypatch.setattr(Provisioner, "apply_grants", original)
        assert (await fleet.migrations.upgrade()).ok
        assert await fleet.recorded("acme") == "0002"
        assert await fleet.may("acme", "UPDATE", "ledger") is False


async def test_the_rights_are_set_on_the_revisions_before_the_one_that_failed(
    config: TenancyConfig, project: Project
) -> None:
    project.configure("target_metadata=target_metadata, transaction_per_migration=True")
    async with open_fleet(config.replace(provisioning={"grants": keep_ledger}), initialise=True) as fleet:
        await fleet.create("acme")
        project.add("0002", 'op.execute("CREATE TABLE ledger (n integer)")', down="0001")
        project.add("0003", for_acme("raise RuntimeError('broken')"), down="0002")
        assert not (await fleet.migrations.upgrade()).ok
        assert await fleet.recorded("acme") == "0002"
        assert await fleet.may("acme", "UPDATE", "ledger") is False


async def test_a_tenant_that_is_purged_during_a_run_does_not_keep_the_fleets_revision_from_being_recorded(
    fleet: Fleet, project: Project
) -> None:
    """Tenants that older code creates later are upgraded by it."""
    add(project, "0002", "0001")
    async with fleet.connect("acme") as holder, holder.transaction():
        await holder.execute("LOCK TABLE notes")
        run = asyncio.create_task(fleet.migrations.upgrade(concurrency=1))
        await until(lambda: activity(holder, "wait_event_type = 'Lock'"), 1)
        await fleet.tenancy.tenants.delete("initech")
        await fleet.tenancy.tenants.purge("initech")
    assert (await run).ok
    assert await fleet.registry.fleet_revision() == "0002"


async def test_a_retry_of_an_undo_finishes_the_data_migrations_of_the_way_up(fleet: Fleet, project: Project) -> None:
    """It undoes a downgrade; a run that is called done has left no row as it was."""
    await fleet.execute("acme", ROWS.format("good"))
    add(project, "0002", "0001", data=FILL)
    assert (await fleet.migrations.upgrade()).ok
    down = await fleet.migrations.downgrade("0001")
    assert down.ok
    assert down.run is not None
    await fleet.execute("acme", "UPDATE notes SET body = 'bad' WHERE id = 25")
    undo = await fleet.migrations.undo(down.run)
    assert [one.slug for one in undo.failures] == ["acme"]
    await fleet.execute("acme", "UPDATE notes SET body = 'good'")
    assert undo.run is not None
    assert (await fleet.migrations.retry(undo.run)).ok
    assert await fleet.fetch("acme", "SELECT c0002, count(*) FROM notes GROUP BY 1") == [("filled", 40)]


async def test_a_control_database_that_is_away_for_a_moment_fails_no_tenant(
    fleet: Fleet, project: Project, postgres: Postgres
) -> None:
    """Its connections are ended right before a tenant's first change is announced."""
    add(project, "0002", "0001")
    control = fleet.tenancy.internals.control.database
    async with postgres.connect() as admin, fleet.connect("acme") as holder:
        await lock(holder, timeout=5)
        run = asyncio.create_task(fleet.migrations.upgrade(tenants=["acme"]))
        await until(lambda: activity(holder, "application_name LIKE 'tenancy-migration%'"), 1)
        await admin.execute(f'ALTER DATABASE "{control}" ALLOW_CONNECTIONS false')
        await admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1", control)
        await holder.execute("SELECT pg_advisory_unlock_all()")
        await until(lambda: activity(holder, "application_name LIKE 'tenancy-migration%' AND state LIKE 'idle%'"), 1)
        await admin.execute(f'ALTER DATABASE "{control}" ALLOW_CONNECTIONS true')
    assert (await run).ok
    assert await fleet.revision("acme") == await fleet.recorded("acme") == "0002"
