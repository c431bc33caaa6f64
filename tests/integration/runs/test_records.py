"""What is recorded of a run, and how operators go on with it."""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest
import sqlalchemy as sa
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from tenancy_orm import Actor, TenancyConfig
from tenancy_orm.drift import detection
from tenancy_orm.errors import (
    ControlUnavailableError,
    JobLostError,
    RunMismatchError,
    RunNotFoundError,
    RunStateError,
    SchemaDriftError,
)
from tenancy_orm.jobs import Claimant
from tenancy_orm.runs.claims import RunClaims
from tests.support.fleet import Fleet, activity, open_fleet, until
from tests.support.projects import Project

RATING = 'op.add_column("notes", sa.Column("rating", sa.Integer))'
NO_RATING = 'op.drop_column("notes", "rating")'
ALICE = Actor("operator", "cli:alice")


@asynccontextmanager
async def locked(fleet: Fleet, *slugs: str) -> Any:
    """Hold a lock that 0002 waits for, on tenants' tables; they can be read."""
    connections: list[asyncpg.Connection[Any]] = []
    try:
        for slug in slugs:
            placement = fleet.tenants[slug].placement
            assert placement is not None
            connection = await fleet.provisioner.connect_admin(placement.server, placement.database)
            connections.append(connection)
            await connection.execute("BEGIN; LOCK TABLE notes IN ACCESS SHARE MODE")
        yield connections[0]
    finally:
        for connection in connections:
            await connection.close()


async def is_waiting(connection: asyncpg.Connection[Any]) -> bool:
    return await activity(connection, "wait_event_type = 'Lock'") > 0


async def test_a_run_is_recorded_with_each_of_its_tenants(fleet: Fleet, project: Project) -> None:
    project.add("0002", RATING, NO_RATING, down="0001")
    await fleet.execute("globex", "ALTER TABLE notes ADD rating text")
    report = await fleet.migrations.upgrade(actor=ALICE)
    assert report.run is not None
    record = await fleet.migrations.get_run(report.run)
    assert (record.command, record.target, record.state, record.actor) == ("upgrade", "head", "failed", ALICE)
    assert record.tenants == {"waiting": 0, "running": 0, "done": 2, "failed": 1, "skipped": 0}
    assert record.reason == "1 of 3 tenants failed"
    assert record.ended_at is not None
    tenants = {one.slug: one for one in await fleet.migrations.run_tenants(report.run)}
    acme, globex = tenants["acme"], tenants["globex"]
    assert (acme.state, acme.revision_before, acme.revision_after) == ("done", "0001", "0002")
    assert acme.changed
    assert acme.is_read
    assert acme.attempts == 1
    assert acme.seconds is not None
    assert (globex.state, globex.sqlstate, globex.changed) == ("failed", "42701", False)
    assert [one.id for one in await fleet.migrations.runs()] == [report.run]
    with pytest.raises(RunNotFoundError, match="there is no run 99"):
        await fleet.migrations.get_run(99)


async def test_failed_tenants_alone_are_retried(fleet: Fleet, project: Project) -> None:
    project.add("0002", RATING, NO_RATING, down="0001")
    await fleet.execute("globex", "ALTER TABLE notes ADD rating text")
    run = (await fleet.migrations.upgrade()).run
    assert run is not None
    await fleet.execute("globex", "ALTER TABLE notes DROP rating")
    report = await fleet.migrations.retry(run, actor=ALICE)
    assert report.ok
    assert report.run == run
    attempts = {one.slug: one.attempts for one in await fleet.migrations.run_tenants(run)}
    assert attempts == {"acme": 1, "globex": 2, "initech": 1}
    done = await fleet.migrations.get_run(run)
    assert done.state == "done"
    assert await fleet.recorded("globex") == "0002"
    for again in (fleet.migrations.resume, fleet.migrations.retry):
        assert (await again(run)).ok
    assert await fleet.migrations.get_run(run) == done, "what is done stays as it is"
    assert len(await fleet.migrations.run_processes(run)) == 2


async def test_beginnings_are_recorded_together(
    fleet: Fleet, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What begins while others are being recorded is recorded with the next statement; one that is lost fails alone."""
    project.add("0002", RATING, NO_RATING, down="0001")
    report = await fleet.migrations.upgrade()
    assert report.run is not None
    control, claimant = fleet.services.control, Claimant()
    async with control.transaction() as connection:
        await connection.execute(text("UPDATE tenancy.migration_runs SET state = 'running'"))
        await connection.execute(
            text("UPDATE tenancy.migration_run_tenants SET claim = :me, is_read = false, revision_before = NULL"),
            {"me": claimant.id},
        )
    asked: list[list[Any]] = []
    fetch = control.fetch

    async def counting(query: str, *args: Any) -> Any:
        asked.append(args[3])
        return await fetch(query, *args)

    monkeypatch.setattr(control, "fetch", counting)
    claims = RunClaims(control, report.run, claimant, held=False)
    ids = {slug: tenant.id for slug, tenant in fleet.tenants.items()}

    def begin(slug: str) -> asyncio.Task[None]:
        return asyncio.create_task(claims.begin(ids[slug], slug, target="0002", seconds=60.0))

    async with control.transaction() as connection:
        await connection.execute(
            text("SELECT FROM tenancy.migration_run_tenants WHERE tenant_id = :id FOR UPDATE"), {"id": ids["acme"]}
        )
        first = begin("acme")
        await until(lambda: waits_for_a_lock(connection))
        others = [begin("globex"), begin("initech")]
        cancelled = begin("acme")
        await asyncio.sleep(0)
        cancelled.cancel()
        await connection.execute(
            text("UPDATE tenancy.migration_run_tenants SET claim = NULL WHERE tenant_id = :id"), {"id": ids["globex"]}
        )
    ended = await asyncio.gather(first, *others, cancelled, return_exceptions=True)
    assert [type(one) for one in ended] == [type(None), JobLostError, type(None), asyncio.CancelledError]
    assert asked == [[ids["acme"]], [ids["globex"], ids["initech"]]]
    before = {one.slug: one.revision_before for one in await fleet.migrations.run_tenants(report.run) if one.is_read}
    assert before == {"acme": "acme", "initech": "initech"}
    monkeypatch.undo()
    async with control.connect() as connection:
        rows = await connection.execute(text("SELECT slug, migrating_to FROM tenancy.tenants"))
        assert dict(rows.all()) == {"acme": "0002", "globex": None, "initech": "0002"}
    monkeypatch.setattr(control, "fetch", refuse)
    for failed in await asyncio.gather(begin("acme"), begin("initech"), return_exceptions=True):
        assert isinstance(failed, ControlUnavailableError)


async def refuse(query: str, *args: Any) -> Any:
    raise ControlUnavailableError("the control database is not available")


async def waits_for_a_lock(connection: AsyncConnection) -> bool:
    found = await connection.scalar(text("SELECT count(*) FROM pg_locks WHERE NOT granted"))
    return bool(found)


async def test_another_machine_takes_part(fleet: Fleet, config: TenancyConfig, project: Project) -> None:
    project.add("0002", RATING, NO_RATING, down="0001")
    async with open_fleet(config) as other:
        async with locked(fleet, "acme") as holder:
            first = asyncio.create_task(fleet.migrations.upgrade(concurrency=1, server_concurrency=2))
            await until(lambda: is_waiting(holder))
            second = asyncio.create_task(other.migrations.upgrade(join=True))
            await until(lambda: fleet.recorded("initech"), "0002")
            assert await fleet.recorded("acme") == "0001"
            assert (await fleet.migrations.progress(1)).running == 1
        reports = await first, await second
    assert [report.run for report in reports] == [1, 1]
    assert all(report.ok and len(report.changed) == 3 for report in reports)
    async with fleet.services.control.transaction() as connection:
        await connection.execute(text("UPDATE tenancy.migration_run_tenants SET state = 'running'"))
    assert (await fleet.migrations.progress(1)).running == 0, "no more than the processes can migrate at once"


async def test_who_joins_a_run_that_began_without_drift_does_not_look_for_drift(
    fleet: Fleet, config: TenancyConfig, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tenants that the run migrates cannot be compared; that would refuse every machine but the first."""
    monkeypatch.setattr(detection, "_LOCK_SECONDS", 0.1)
    project.add("0002", RATING, NO_RATING, down="0001")

    async def took_part(run: int) -> int:
        return len(await fleet.migrations.run_processes(run))

    async with open_fleet(config.replace(migration={"lock_timeout": 0.5})) as other:
        async with locked(fleet, "acme") as holder:
            unchecked = asyncio.create_task(fleet.migrations.upgrade())
            await until(lambda: is_waiting(holder))
            with pytest.raises(SchemaDriftError, match="1 could not be compared: acme"):
                await other.migrations.upgrade(join=True, refuse_drift=True)
        assert (await unchecked).ok
        assert (await fleet.migrations.downgrade("0001")).ok
        async with locked(fleet, "acme") as holder:
            first = asyncio.create_task(fleet.migrations.upgrade(refuse_drift=True))
            await until(lambda: is_waiting(holder))
            second = asyncio.create_task(other.migrations.upgrade(join=True, refuse_drift=True))
            await until(lambda: took_part(3), 2)
        assert [(report.run, report.ok) for report in (await first, await second)] == [(3, True), (3, True)]


async def test_a_cancelled_run_finishes_what_is_running_and_can_be_resumed(
    fleet: Fleet, config: TenancyConfig, project: Project
) -> None:
    project.add("0002", RATING, NO_RATING, down="0001")
    async with open_fleet(config) as other:
        async with locked(fleet, "acme") as holder:
            run = asyncio.create_task(fleet.migrations.upgrade(concurrency=1))
            await until(lambda: is_waiting(holder))
            record = await other.migrations.cancel(1, actor=ALICE)
            assert record.state == "cancelled"
        report = await run
        assert [one.slug for one in report.changed] == ["acme"]
        assert report.skipped == ("globex", "initech")
        assert report.reasons["globex"] == "not started: the run was cancelled"
        with pytest.raises(RunStateError, match="run 1 is cancelled, and cannot be cancelled"):
            await other.migrations.cancel(1)
        report = await other.migrations.resume(1)
    assert report.ok
    assert len(report.changed) == 3


async def test_an_interrupted_run_is_resumed(fleet: Fleet, project: Project) -> None:
    project.add("0002", RATING, NO_RATING, down="0001")
    await fleet.provisioner.template("default")
    async with locked(fleet, "acme") as holder:
        run = asyncio.create_task(fleet.migrations.upgrade())
        await until(lambda: is_waiting(holder))
        await until(lambda: fleet.recorded("globex"), "0002")
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
        record = await fleet.migrations.get_run(1)
        assert record.is_interrupted
        assert record.tenants["waiting"] == 1
    report = await fleet.migrations.resume(1)
    assert report.ok
    (acme,) = [one for one in await fleet.migrations.run_tenants(1) if one.slug == "acme"]
    assert (acme.attempts, acme.changed, acme.revision_before) == (2, True, "0001")


async def test_the_progress_says_whose_tenants_a_run_waits_for(fleet: Fleet, project: Project) -> None:
    """A process that works is not named; one that has not renewed its claim is."""
    project.add("0002", RATING, NO_RATING, down="0001")

    async def done(run: int) -> int:
        return (await fleet.migrations.get_run(run)).tenants["done"]

    async with locked(fleet, "acme") as holder:
        run = asyncio.create_task(fleet.migrations.upgrade())
        await until(lambda: is_waiting(holder))
        await until(lambda: done(1), 2)
        assert (await fleet.migrations.progress(1)).silent == ()
        async with fleet.tenancy.internals.control.transaction() as connection:
            expiring = "UPDATE tenancy.migration_run_processes SET claimed_until = clock_timestamp() + interval '15 s'"
            await connection.execute(sa.text(expiring))
        progress = await fleet.migrations.progress(1)
        (silent,) = progress.silent
        assert (silent.pid, silent.host, silent.tenants) == (os.getpid(), socket.gethostname(), 1)
        assert f"waits for 1 tenant claimed by {silent.host}:{silent.pid} until " in progress.line()
    assert (await run).ok


async def test_other_code_takes_no_part(fleet: Fleet, project: Project) -> None:
    project.add("0002", RATING, NO_RATING, down="0001")
    assert (await fleet.migrations.upgrade(x=["who=alice"])).run == 1
    with pytest.raises(RunMismatchError, match="run 1 was started with the -x arguments who: give the same"):
        await fleet.migrations.join(1)
    assert (await fleet.migrations.join(1, x=["who=alice"])).ok
    project.add("0003", down="0002")
    with pytest.raises(RunMismatchError, match="run 1 was started with other revisions or options"):
        await fleet.migrations.resume(1, x=["who=alice"])
