"""Upgrades in the background: by ``tenancy worker``, the busiest tenants first, in recorded runs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from sqlalchemy import text

from tenancy_orm import TenancyConfig
from tenancy_orm.errors import ConfigurationError
from tenancy_orm.events import TenantMigrated
from tenancy_orm.runs import Wave, Waves
from tenancy_orm.servers.activity import read_activity
from tests.support.fleet import until
from tests.support.projects import Project
from tests.support.releases import Release, next_project, released


@pytest.fixture
async def old(config: TenancyConfig, project: Project) -> AsyncIterator[Release]:
    """The present release, at 0002, with the tenants acme, globex and hooli; its worker would upgrade them, too."""
    next_project(project)
    async with released(config.replace(migration={"background": True}), "*", initialise=True) as release:
        await release.fleet.create("acme", "globex", "hooli")
        yield release


@pytest.fixture
async def new(old: Release, config: TenancyConfig, project: Project) -> AsyncIterator[Release]:
    """The next release, at 0003."""
    migrations = Project(project.root.parent / "next").migrations
    settings = config.replace(migrations=migrations, migration={"background": True, "background_concurrency": 1})
    async with released(settings, "id, rating") as release:
        release.fleet.tenants = old.fleet.tenants
        yield release


async def work(release: Release) -> tuple[Any, str | None]:
    """Do the job once, and return its result and its error."""
    await release.tenancy.jobs.ensure(["upgrades"])
    await release.tenancy.jobs.hasten("upgrades")
    await release.tenancy.worker(["upgrades"]).run(once=True)
    [job] = [job for job in await release.tenancy.jobs.list() if job.name == "upgrades"]
    return job.result, job.error


async def revisions(release: Release) -> list[str | None]:
    return [await release.fleet.recorded(slug) for slug in ("acme", "globex", "hooli")]


def canary(slug: str) -> Waves:
    return Waves((Wave(tenants=[slug], pause=True),))


async def held(release: Release) -> list[str]:
    async with release.fleet.services.control.connect() as connection:
        query = "SELECT slug FROM tenancy.tenants WHERE held_at IS NOT NULL ORDER BY slug"
        return list(await connection.scalars(text(query)))


async def test_what_a_cancelled_run_has_not_reached_is_left_to_operators(old: Release, new: Release) -> None:
    """As what was moved back; until an operator upgrades it. A run that a worker cancels by itself holds nothing."""
    migrations = new.fleet.migrations
    paused = await migrations.upgrade(waves=canary("acme"))
    assert paused.run is not None
    await migrations.cancel(paused.run)
    assert await held(new) == ["globex", "hooli"]
    assert await work(new) == ({}, None)
    assert await revisions(new) == ["0003", "0002", "0002"]
    (await migrations.resume(paused.run)).raise_for_failures()
    assert await held(new) == []
    assert await revisions(new) == ["0003", "0003", "0003"]

    await old.fleet.create("late", "later")
    again = await migrations.upgrade(waves=canary("late"))
    assert again.run is not None
    await migrations.cancel(again.run, hold=False)
    assert await held(new) == []


async def test_what_an_undone_run_has_not_reached_is_left_to_operators(old: Release, new: Release) -> None:
    """Only where the run is undone as a whole, and not what is at its target."""
    migrations = new.fleet.migrations
    paused = await migrations.upgrade(waves=canary("acme"))
    assert paused.run is not None
    assert await revisions(new) == ["0003", "0002", "0002"]
    (await migrations.undo(paused.run)).raise_for_failures()
    assert await held(new) == ["acme", "globex", "hooli"]
    assert await work(new) == ({}, None)
    assert await revisions(new) == ["0002", "0002", "0002"]
    (await migrations.upgrade()).raise_for_failures()
    assert await held(new) == []

    await old.fleet.create("late", "later")
    for tenants, expected in ((["late"], ["late"]), (None, ["late", "later"])):
        paused = await migrations.upgrade(waves=canary("late"))
        assert paused.run is not None
        (await migrations.undo(paused.run, tenants=tenants)).raise_for_failures()
        assert await held(new) == expected


async def test_the_busiest_come_first(old: Release, new: Release) -> None:
    """Those that somebody is connected to, then those with the most transactions; in any run that is asked for it."""
    received: list[str] = []
    new.tenancy.events.subscribe(TenantMigrated, lambda event: received.append(event.slug))
    services = new.fleet.services
    async with old.fleet.connect("hooli"):
        async with old.fleet.connect("globex") as connection:
            for _ in range(200):
                await connection.execute("SELECT 1")

        async def ranked() -> list[str]:
            activity = await read_activity(services.servers["default"], services.names.tenant_stem)
            return sorted(("acme", "globex", "hooli"), key=lambda slug: activity[old.fleet.database(slug)])

        await until(ranked, ["acme", "globex", "hooli"])
        report = await new.fleet.migrations.upgrade(order="busiest", concurrency=1)
        assert report.ok
    assert received == ["hooli", "globex", "acme"]
    assert (await new.fleet.migrations.get_run(report.run or 0)).plan["order"] == "busiest"
    with pytest.raises(ConfigurationError, match="no order 'size'"):
        await new.fleet.migrations.upgrade(order="size")  # type: ignore[arg-type]


async def test_a_worker_upgrades_what_is_behind(old: Release, new: Release) -> None:
    """In a recorded run. What failed, and what an operator has moved back, is left alone by the next one."""
    await old.fleet.execute("globex", "ALTER TABLE notes ADD rating text")
    await new.fleet.migrations.upgrade(tenants=["hooli"])
    await new.fleet.migrations.downgrade("0002", tenants=["hooli"])
    result, error = await work(new)
    assert (result["migrated"], "globex: " in (error or "")) == (1, True)
    assert await revisions(new) == ["0003", "0002", "0002"]
    run = await new.fleet.migrations.get_run(result["run"])
    assert (run.state, run.plan["order"], run.plan["background"], run.plan["all"]) == ("failed", "busiest", True, False)
    assert {one.slug for one in await new.fleet.migrations.run_tenants(run.id)} == {"acme", "globex"}
    assert await work(new) == ({}, None)
    assert [one.slug for one in await new.fleet.registry.failed_upgrades()] == ["globex"]
    # older code's worker leaves all as it is
    assert await work(old) == ({}, None)
    await old.fleet.execute("globex", "ALTER TABLE notes DROP rating")
    await new.fleet.migrations.upgrade(tenants=["hooli", "globex"])
    await new.fleet.registry.set_fleet_revision(None)
    await old.fleet.create("late")
    result, error = await work(new)
    assert (result["migrated"], error, await new.fleet.recorded("late")) == (1, None, "0003")
    # all are there, so tenants of older code can catch up by themselves
    assert await new.fleet.registry.fleet_revision() == "0003"


async def test_another_run_that_is_not_finished_is_left_to_its_operator(old: Release, new: Release) -> None:
    """A pause between waves is there to be looked at."""
    report = await new.fleet.migrations.upgrade(tenants=["acme"])
    async with new.tenancy.internals.control.transaction() as connection:
        await connection.execute(text("UPDATE tenancy.migration_runs SET state = 'paused', ended_at = NULL"))
    assert await work(new) == ({}, None)
    assert await revisions(new) == ["0003", "0002", "0002"]
    await new.fleet.migrations.cancel(report.run or 0)
    assert (await work(new))[0]["migrated"] == 2


async def test_an_interrupted_run_is_resumed_and_one_of_other_code_cancelled(old: Release, new: Release) -> None:
    upgrades = next(job for job in new.tenancy._lifetime.parts.built_in_jobs if job.name == "upgrades")

    async def interrupt() -> int:
        async with old.fleet.connect("acme") as other, other.transaction():
            await other.execute("LOCK TABLE notes")
            task = asyncio.ensure_future(upgrades.run())
            await until(lambda: other.fetchval("SELECT count(*) > 0 FROM pg_locks WHERE NOT granted"))
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        [run] = await new.fleet.migrations.runs(state="running")
        return run.id

    interrupted = await interrupt()
    result, error = await work(new)
    assert (result["run"], error, await revisions(new)) == (interrupted, None, ["0003"] * 3)
    await new.fleet.migrations.downgrade("0002")
    await new.fleet.migrations.stamp("0003")
    async with new.tenancy.internals.control.transaction() as connection:
        await connection.execute(
            text("UPDATE tenancy.migration_runs SET state = 'running', ended_at = NULL WHERE id = :id"),
            {"id": interrupted},
        )
    assert await work(old) == ({}, None)
    assert (await new.fleet.migrations.get_run(interrupted)).state == "cancelled"
