"""A server or control database that does not answer is reported differently from a tenant that fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from socket import create_server, socket
from typing import Any

import pytest
from sqlalchemy import text

from tenancy_orm import TenancyConfig
from tenancy_orm.errors import ControlUnavailableError
from tenancy_orm.runs import patience
from tests.support.fleet import Fleet, activity, open_fleet, until
from tests.support.postgres import Postgres
from tests.support.projects import Project

RATING = 'op.add_column("notes", sa.Column("rating", sa.Integer))'


@pytest.fixture
def silent() -> Iterator[socket]:
    """A socket that accepts connections and never answers."""
    with create_server(("127.0.0.1", 0)) as listening:
        yield listening


@pytest.fixture
def closed() -> int:
    """A port that refuses connections."""
    with create_server(("127.0.0.1", 0)) as listening:
        return port_of(listening)


def port_of(listening: socket) -> int:
    port: int = listening.getsockname()[1]
    return port


@asynccontextmanager
async def with_lost_server(fleet: Fleet, config: TenancyConfig, port: int) -> AsyncIterator[Fleet]:
    """The fleet as if acme and globex were on a server at ``port``."""
    servers = {**(config.servers or {}), "lost": f"postgresql://postgres:secret@127.0.0.1:{port}/postgres"}
    async with open_fleet(config.replace(servers=servers, pool={"connect_timeout": 1.0})) as opened:
        async with opened.tenancy.internals.control.transaction() as connection:
            await connection.execute(
                text("UPDATE tenancy.tenants SET server = 'lost' WHERE slug IN ('acme', 'globex')")
            )
        yield opened


@pytest.mark.parametrize("revision", ["head", "+1"])
async def test_a_server_that_does_not_answer_costs_one_wait_and_none_for_each_of_its_tenants(
    fleet: Fleet,
    config: TenancyConfig,
    project: Project,
    silent: socket,
    revision: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    project.add("0002", RATING, down="0001")
    # a breaker would refuse them too
    without_breaker = config.replace(breaker={"enabled": False})
    async with with_lost_server(fleet, without_breaker, port_of(silent)) as opened:
        provisioner, tenants = opened.services.provisioner, []
        connect_admin = provisioner.connect_admin

        async def connect(server: str, database: str | None = None, **options: Any) -> Any:
            if database is not None:
                tenants.append(server)
            return await connect_admin(server, database, **options)

        monkeypatch.setattr(provisioner, "connect_admin", connect)
        report = await opened.migrations.upgrade(revision, concurrency=1)
    assert {failure.slug for failure in report.failures} == {"acme", "globex"}
    assert all("server 'lost' is not available" in str(failure.error) for failure in report.failures)
    assert [outcome.slug for outcome in report.changed] == ["initech"]
    assert await fleet.revision("initech") == "0002"
    assert set(tenants) == {"default"}


async def test_a_server_that_refuses_connections_is_its_own_tenants_failure(
    fleet: Fleet, config: TenancyConfig, project: Project, closed: int
) -> None:
    project.add("0002", RATING, down="0001")
    async with with_lost_server(fleet, config, closed) as opened:
        report = await opened.migrations.upgrade()
        status = {item.slug: item for item in await opened.migrations.status(verify=True)}
    assert {failure.slug for failure in report.failures} == {"acme", "globex"}
    assert "secret" not in str(report)
    assert status["acme"].at_head is None
    assert "not available" in str(status["acme"].error)
    assert status["initech"].at_head is True


async def test_a_machine_that_does_not_reach_a_server_leaves_its_tenants_to_others(
    fleet: Fleet, config: TenancyConfig, project: Project, closed: int
) -> None:
    """It would fail each at once, and so be given the most."""
    project.add("0002", RATING, down="0001")
    astray = config.replace(servers={"default": f"postgresql://postgres:secret@127.0.0.1:{closed}/postgres"})
    async with fleet.connect("acme") as holder, open_fleet(astray) as other:
        async with holder.transaction():
            await holder.execute("LOCK TABLE notes")
            run = asyncio.create_task(fleet.migrations.upgrade(concurrency=1))
            await until(lambda: activity(holder, "wait_event_type = 'Lock'"), 1)
            joined = asyncio.create_task(other.migrations.join(1))

            async def is_known() -> list[dict[str, int]]:
                return [dict(one.slots) for one in (await fleet.migrations.run_processes(1))[1:]]

            await until(is_known, [{"default": -1}])
        for report in (await run, await joined):
            assert report.ok, report.reasons
    assert {await fleet.revision(slug) for slug in fleet.tenants} == {"0002"}


@pytest.mark.parametrize("seconds", [0.0, 60.0])
async def test_what_is_migrated_while_the_control_database_is_away_is_recorded_once_it_is_back(
    fleet: Fleet, project: Project, postgres: Postgres, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """Whoever does not wait for it is told how to go on; the run finds what is true then."""
    monkeypatch.setattr(patience, "PATIENCE_SECONDS", seconds)
    project.add("0002", RATING, down="0001")
    control = fleet.tenancy.internals.control.database
    async with postgres.connect() as admin, fleet.connect("acme") as holder:
        transaction = holder.transaction()
        await transaction.start()
        await holder.execute("LOCK TABLE notes")
        run = asyncio.create_task(fleet.migrations.upgrade(tenants=["acme"]))
        await until(lambda: activity(holder, "wait_event_type = 'Lock'"), 1)
        await admin.execute(f'ALTER DATABASE "{control}" ALLOW_CONNECTIONS false')
        await admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1", control)
        await transaction.commit()
        try:
            await until(lambda: holder.fetchval("SELECT version_num FROM alembic_version"), "0002")
            if not seconds:
                with pytest.raises(ControlUnavailableError, match="tenancy migrate resume 1"):
                    await run
        finally:
            await admin.execute(f'ALTER DATABASE "{control}" ALLOW_CONNECTIONS true')
    if not seconds:
        # what it could not give back is free for others once its claim has expired
        await fleet.expire_claims()
    report = await run if seconds else await fleet.migrations.resume(1)
    assert report.ok
    assert [(one.before, one.after, one.changed) for one in report.outcomes] == [("0001", "0002", True)]
    assert await fleet.recorded("acme") == "0002"
