"""Runs that want different things of the same tenants, and operators who change their minds."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import text

from tenancy_orm import TenancyConfig
from tenancy_orm.errors import JobLostError, RunConflictError
from tenancy_orm.jobs import Claimant
from tenancy_orm.runs.claims import Finished, RunClaims
from tests.integration.runs.test_records import NO_RATING, RATING, is_waiting, locked
from tests.support.fleet import Fleet, open_fleet, until
from tests.support.postgres import Postgres
from tests.support.projects import Project

SLUGS = ("acme", "globex", "initech")


async def change(fleet: Fleet, table: str, assignment: str) -> None:
    """Change rows of runs as if something had happened."""
    async with fleet.services.control.transaction() as connection:
        await connection.execute(text(f"UPDATE tenancy.migration_run_{table} SET {assignment}"))


async def test_a_run_against_one_that_is_under_way_is_refused(
    fleet: Fleet, config: TenancyConfig, project: Project
) -> None:
    """Both would end well, and leave tenants at both revisions. What is done already may be moved."""
    project.add("0002", RATING, NO_RATING, down="0001")
    assert (await fleet.migrations.downgrade("base", tenants=["initech"])).run == 1
    await change(fleet, "tenants", "state = 'failed'")
    async with fleet.services.control.transaction() as connection:
        await connection.execute(text("UPDATE tenancy.migration_runs SET state = 'failed'"))
    async with open_fleet(config) as other, locked(fleet, "globex") as holder:
        run = asyncio.create_task(fleet.migrations.upgrade(concurrency=1))
        await until(lambda: is_waiting(holder))
        for contradicting in (
            other.migrations.downgrade("base"),
            other.migrations.stamp("0001", tenants=["initech"]),
            other.migrations.retry(1),
        ):
            with pytest.raises(
                RunConflictError, match=r"run 2 \(upgrade head\) .* tenancy migrate cancel 2"
            ) as refused:
                await contradicting
            assert refused.value.run == 2
        assert [(one.id, one.state) for one in await other.migrations.runs()] == [(2, "running"), (1, "failed")]
        assert (await other.migrations.upgrade(tenants=["acme"])).ok

        async def is_recorded() -> bool:
            return bool(await other.migrations.run_tenants(2, state="done"))

        # what is done counts as done once it is recorded
        await until(is_recorded)
        assert (await other.migrations.downgrade("0001", tenants=["acme"])).ok
    assert (await run).ok
    assert [await fleet.revision(slug) for slug in SLUGS] == ["0001", "0002", "0002"]


async def test_an_interrupted_run_is_cancelled_by_one_against_it(fleet: Fleet, project: Project) -> None:
    """Its process may only be frozen: once it goes on, it begins nothing any more."""
    project.add("0002", RATING, NO_RATING, down="0001")
    async with locked(fleet, "acme") as holder:
        run = asyncio.create_task(fleet.migrations.upgrade(concurrency=1))
        await until(lambda: is_waiting(holder))
        run.cancel()
        await asyncio.wait([run])
    frozen = RunClaims(fleet.services.control, 1, Claimant(), held=False)
    await fleet.migrations._recorded.records.join(1, frozen.claimant)
    async with fleet.services.control.transaction() as connection:
        await connection.execute(text("UPDATE tenancy.migration_runs SET wave = 0"))
    turn = await frozen.turn(wanted={"default": 3}, holding={}, concurrency=3, per_server=3)
    assert len(turn.claimed) == 3
    await change(fleet, "processes", "claimed_until = clock_timestamp()")
    assert [one.is_alive for one in await fleet.migrations.run_processes(1)] == [False, False]
    assert (await fleet.migrations.downgrade("base")).ok
    record = await fleet.migrations.get_run(1)
    assert (record.state, record.reason) == ("cancelled", "it was interrupted, and run 2 contradicts it")
    with pytest.raises(JobLostError):
        await frozen.begin(fleet.tenants["acme"].id, "0001", target="0002", seconds=1.0)
    assert {await fleet.revision(slug) for slug in SLUGS} == {None}


async def test_who_comes_late_does_not_pass_a_pause(fleet: Fleet, config: TenancyConfig, project: Project) -> None:
    """``join`` starts a run where there is none; a paused one goes on when an operator says so."""
    project.add("0002", RATING, NO_RATING, down="0001")
    async with open_fleet(config) as other:
        async with locked(fleet, "acme") as holder:
            run = asyncio.create_task(fleet.migrations.upgrade(concurrency=1, join=True))
            await until(lambda: is_waiting(holder))
            assert [one.is_alive for one in await other.migrations.run_processes(1)] == [True]
            await other.migrations.pause(1)
        assert (await run).state == "paused"
        late = await other.migrations.upgrade(join=True)
        assert (late.run, late.state, late.skipped) == (1, "paused", ("globex", "initech"))
        assert (await other.migrations.upgrade(beside=True)).run == 2
        # the paused one has been replaced
        assert (await other.migrations.upgrade(join=True, beside=True)).run == 3


async def test_a_tenant_that_was_given_up_is_retried(fleet: Fleet, project: Project) -> None:
    """Its lost processes count within an attempt of the operator's, and not for ever."""
    project.add("0002", RATING, NO_RATING, down="0001")
    await fleet.execute("globex", "ALTER TABLE notes ADD rating text")
    assert not (await fleet.migrations.upgrade()).ok
    await change(fleet, "tenants", "losses = 3, state = 'waiting' WHERE state = 'failed'")
    reason = (await fleet.migrations.resume(1)).reasons["globex"]
    assert "was lost each time; find what ends them, then try it again with: tenancy migrate retry 1" in reason
    await fleet.execute("globex", "ALTER TABLE notes DROP rating")
    assert (await fleet.migrations.retry(1)).ok


async def test_what_is_given_back_late_waits_again(fleet: Fleet, project: Project) -> None:
    """A process that has seen the cancellation, and not that the run was resumed, skips nothing."""
    project.add("0002", RATING, NO_RATING, down="0001")
    await fleet.migrations.upgrade()
    records = fleet.migrations._recorded.records
    claims = RunClaims(fleet.services.control, 1, Claimant(), held=False)
    await records.join(1, claims.claimant)
    given = [Finished(tenant_id=tenant.id, state="waiting", counts=False) for tenant in fleet.tenants.values()]

    async def states_after(state: str) -> set[str]:
        async with fleet.services.control.transaction() as connection:
            await connection.execute(text(f"UPDATE tenancy.migration_runs SET state = '{state}'"))
            values = {"me": claims.claimant.id}
            await connection.execute(text("UPDATE tenancy.migration_run_tenants SET claim = :me"), values)
        await claims.turn(given, wanted={}, holding={}, concurrency=1, per_server=1)
        return {one.state for one in await records.tenants(1)}

    assert await states_after("cancelled") == {"skipped"}
    assert await states_after("running") == {"waiting"}


async def test_runs_belong_to_no_owner(
    fleet: Fleet, config: TenancyConfig, project: Project, postgres: Postgres
) -> None:
    """The application's own role of the control database starts, undoes, lists and removes runs."""
    project.add("0002", RATING, NO_RATING, down="0001")
    role, database = postgres.new_name("app"), fleet.services.control.database
    async with postgres.connect() as admin:
        await admin.execute(f"CREATE ROLE \"{role}\" LOGIN PASSWORD 'app-secret'")
    await fleet.services.control.grant_application(role)
    url = postgres.url(database, user=role, password="app-secret")
    async with open_fleet(config.replace(control_url=url)) as app:
        assert (await app.migrations.upgrade(join=True)).ok
        assert (await app.migrations.retry(1)).ok
        assert (await app.migrations.undo(1)).ok
        assert [one.state for one in await app.migrations.runs()] == ["done", "done"]
        assert len(await app.migrations.run_processes(1)) == 1
        assert await app.migrations._recorded.records.prune(older_than=-60.0) == 2
    async with postgres.connect(database) as admin:
        await admin.execute(f'DROP OWNED BY "{role}"; DROP ROLE "{role}"')
