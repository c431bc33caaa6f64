"""Many requests at once to tenants that this process has not used before."""

from __future__ import annotations

import asyncio
import logging
import os
from typing import Any

import asyncpg
import pytest
from sqlalchemy import make_url, text

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.connections.leases import FIRST
from tenancy_orm.events import ConnectionOpened, DirectoryMissed
from tests.support.control import control_plane
from tests.support.pgbouncer import free_port
from tests.support.postgres import Postgres
from tests.support.waiting import until

COLD_TENANTS = int(os.environ.get("COLD_TENANTS", "60"))

_COUNTS = "SELECT datname, xact_commit + xact_rollback FROM pg_stat_database WHERE datname = ANY($1::text[])"


async def test_five_hundred_requests_for_one_cold_tenant(tenancy_config: TenancyConfig) -> None:
    """One look-up, one engine, at most as many connections as a tenant may have, and every request is answered."""
    # none is refused for a deadline that a slow machine cannot keep
    patient = tenancy_config.replace(pool={"checkout_timeout": 60.0}, directory={"timeout": 60.0})
    most = patient.pool.max_connections_per_tenant
    maker = Tenancy(patient)
    await maker.open(initialise=True)
    await maker.tenants.create("acme")
    await maker.close()
    async with Tenancy(patient) as tenancy:
        looked_up: list[DirectoryMissed] = []
        opened: list[ConnectionOpened] = []
        tenancy.events.subscribe(DirectoryMissed, looked_up.append)
        tenancy.events.subscribe(ConnectionOpened, opened.append)

        async def request(number: int) -> int:
            async with tenancy.session("acme") as session:
                return int(await session.scalar(text("SELECT CAST(:number AS int)"), {"number": number}) or 0)

        assert await asyncio.gather(*map(request, range(500))) == [*range(500)]
        assert [event.tenants for event in looked_up] == [1]
        assert 1 <= len(opened) <= most
        statistics = tenancy.internals.router.statistics()
        assert statistics.engines == 1
        assert statistics.servers["default"].open <= most


async def test_one_request_for_each_of_many_cold_tenants(tenancy_config: TenancyConfig, postgres: Postgres) -> None:
    """Each in a database of its own, on few connections: every request gets its own tenant's row, none is refused."""
    patient = tenancy_config.replace(
        pool={"checkout_timeout": 600.0, "max_connections": 20, "max_engines": COLD_TENANTS // 2},
        directory={"timeout": 600.0},
        provisioning={"timeout": 600.0},
    )
    slugs = [f"cold-{number}" for number in range(COLD_TENANTS)]
    maker = Tenancy(patient)
    await maker.open(initialise=True)
    at_once = asyncio.Semaphore(4)

    async def make(slug: str) -> None:
        async with at_once:
            await maker.tenants.create(slug)
            await maker.execute("INSERT INTO notes (body) VALUES (:slug)", {"slug": slug}, tenant=slug)

    await asyncio.gather(*map(make, slugs))
    await maker.close()
    most, ended = 0, asyncio.Event()
    stem = "SELECT count(*) FROM pg_stat_activity WHERE starts_with(usename, $1)"

    async with Tenancy(patient) as tenancy, postgres.connect() as admin:
        role = tenancy.internals.provisioner.names.stem + "_t_"

        async def sample() -> None:
            nonlocal most
            while not ended.is_set():
                most = max(most, await admin.fetchval(stem, role))

        async def request(slug: str) -> str:
            async with tenancy.session(slug) as session:
                return str(await session.scalar(text("SELECT body FROM notes")))

        sampling = asyncio.create_task(sample())
        assert await asyncio.gather(*map(request, slugs)) == slugs
        ended.set()
        await sampling
        statistics = tenancy.internals.router.statistics().servers["default"]
        assert (statistics.refused, statistics.timed_out) == (0, 0)
    assert 0 < most <= 20


async def test_cold_tenants_are_looked_up_together(control_url: str) -> None:
    """The control database gets few queries, on few connections."""
    async with control_plane(control_url) as plane:
        tenants = [(await plane.tenant(f"tenant-{number}"))[0] for number in range(300)]
        plane.directory.invalidate()
        queries: list[DirectoryMissed] = []
        plane.events.subscribe(DirectoryMissed, queries.append)
        found = await asyncio.gather(*(plane.directory.tenant(tenant.slug) for tenant in tenants))
        assert [one.id for one in found] == [tenant.id for tenant in tenants]
        # two workers begin with what there is, and take up to two hundred from then on
        assert len(queries) <= 4
        assert sum(query.tenants for query in queries) == 300
        assert plane.directory._lookups._control.engine.sync_engine.pool.checkedin() <= 2  # type: ignore[attr-defined]


async def test_busy_tenants_are_warmed_in_the_background(
    tenancy_config: TenancyConfig, postgres: Postgres, caplog: pytest.LogCaptureFixture
) -> None:
    """Their connections are open before the first request; a suspended tenant and an idle one have none."""
    caplog.set_level(logging.INFO, logger="tenancy_orm")
    maker = Tenancy(tenancy_config)
    await maker.open(initialise=True)
    slugs = ["busy", "busier", "suspended", "idle"]
    placed = {slug: (await maker.tenants.create(slug)).tenant.placement for slug in slugs}
    for slug in slugs[:3]:
        # far beyond what the creation has counted, which no statistics are sent for at a known moment
        for _ in range(100 if slug == "busy" else 200):
            await maker.fetch_value("SELECT 1", tenant=slug)
    await maker.tenants.suspend("suspended", reason="unpaid")
    names = [placement.database for placement in placed.values() if placement is not None]
    await maker.close()

    admin = await asyncpg.connect(postgres.admin_url)
    try:
        await until(lambda: _all_counted(admin, dict(zip(names, (100, 200, 200), strict=False))))
    finally:
        await admin.close()

    async def warmed(**options: Any) -> tuple[Tenancy, list[ConnectionOpened]]:
        tenancy, opened = Tenancy(tenancy_config.replace(pool={"warm_tenants": 2, **options})), list[ConnectionOpened]()
        tenancy.events.subscribe(ConnectionOpened, opened.append)
        caplog.clear()
        await tenancy.open()
        assert _is_warming()
        await until(lambda: "busy tenants have a connection" in caplog.text)
        return tenancy, opened

    tenancy, opened = await warmed()
    async with tenancy:
        await tenancy.events.drain()
        assert {event.slug for event in opened} == {"busy", "busier"}
        assert "2 of 2 busy tenants have a connection before their first request; 0 could not" in caplog.text
        looked_up: list[DirectoryMissed] = []
        tenancy.events.subscribe(DirectoryMissed, looked_up.append)
        placed_ids = [event.tenant_id for event in opened]
        assert [await tenancy.fetch_value("SELECT 1", tenant=tenant_id) for tenant_id in placed_ids] == [1, 1]
        await tenancy.events.drain()
        assert (len(opened), looked_up) == (2, [])
    # half of what it may have stays free
    tenancy, opened = await warmed(max_connections=2, max_connections_per_tenant=1)
    await tenancy.close()
    assert [event.slug for event in opened] == ["busier"]
    # a command line is not an application, and nothing is dropped for an engine
    tenancy, opened = await warmed(max_engines=1)
    await tenancy.close()
    assert [event.slug for event in opened] == ["busier"]
    tenancy = Tenancy(tenancy_config.replace(pool={"warm_tenants": 2}))
    await tenancy.open(warm=False)
    assert not _is_warming()
    await tenancy.close()


def _is_warming() -> bool:
    return any("Warming.run" in repr(task) for task in asyncio.all_tasks())


async def _all_counted(admin: Any, least: dict[str, int]) -> bool:
    counts = dict(await admin.fetch(_COUNTS, list(least)))
    return all(counts.get(name, 0) >= number for name, number in least.items())


async def test_warming_more_tenants_than_a_lease_begins_with(
    tenancy_config: TenancyConfig, postgres: Postgres, caplog: pytest.LogCaptureFixture
) -> None:
    """It takes connections that no other process needs; a server that does not answer fails nothing."""
    caplog.set_level(logging.INFO, logger="tenancy_orm")
    maker = Tenancy(tenancy_config)
    await maker.open(initialise=True)
    for number in range(FIRST + 2):
        await maker.tenants.create(f"tenant-{number}")
    await maker.close()
    async with Tenancy(tenancy_config.replace(pool={"warm_tenants": 20})) as tenancy:
        await until(lambda: "busy tenants have a connection" in caplog.text)
        assert f"{FIRST + 2} of {FIRST + 2} busy tenants" in caplog.text
        assert tenancy.internals.router.statistics().servers["default"].idle == FIRST + 2
    # closed in the middle of it, which ends it without an error
    caplog.clear()
    async with Tenancy(tenancy_config.replace(pool={"warm_tenants": 20})):
        await asyncio.sleep(0)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    away = make_url(postgres.admin_url).set(port=free_port()).render_as_string(hide_password=False)
    caplog.clear()
    async with Tenancy(tenancy_config.replace(servers={"default": away}, pool={"warm_tenants": 20})):
        await until(lambda: "0 of 0 busy tenants" in caplog.text)
        assert "the tenants of server default are not warmed" in caplog.text
