"""Connections to the busiest tenants that are open before the first requests come."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import asyncpg
import pytest
from sqlalchemy import make_url

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.connections.leases import FIRST
from tenancy_orm.events import ConnectionOpened, DirectoryMissed
from tests.support.pgbouncer import free_port
from tests.support.postgres import Postgres
from tests.support.waiting import until

_COUNTS = "SELECT datname, xact_commit + xact_rollback FROM pg_stat_database WHERE datname = ANY($1::text[])"


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
