"""Many requests at once to tenants that this process has not used before."""

from __future__ import annotations

import asyncio
import os

from sqlalchemy import text

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.events import ConnectionOpened, DirectoryMissed
from tests.support.postgres import Postgres

COLD_TENANTS = int(os.environ.get("COLD_TENANTS", "60"))


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
