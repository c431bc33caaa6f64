"""Many requests at once to tenants that this process has not used before."""

from __future__ import annotations

import asyncio

from sqlalchemy import text

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.events import ConnectionOpened, DirectoryMissed
from tests.support.control import control_plane


async def test_five_hundred_requests_for_one_cold_tenant(tenancy_config: TenancyConfig) -> None:
    """One look-up, one engine, at most as many connections as a tenant may have, and every request is answered."""
    most = tenancy_config.pool.max_connections_per_tenant
    maker = Tenancy(tenancy_config)
    await maker.open(initialise=True)
    await maker.tenants.create("acme")
    await maker.close()
    async with Tenancy(tenancy_config) as tenancy:
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
