"""More tenants than ``max_engines``, on a real server."""

from __future__ import annotations

import asyncio
import gc
import random
from contextlib import AsyncExitStack

from sqlalchemy import text

from tenancy_orm.config import TenancyConfig
from tenancy_orm.events import EngineEvicted, EventBus
from tenancy_orm.routing.pool import TenantPool
from tenancy_orm.tenant import Tenant
from tests.support import databases as support
from tests.support.databases import Databases
from tests.support.waiting import until

BACKEND = text("SELECT pg_backend_pid()")


async def test_ten_times_more_tenants_than_the_cache_holds(made: Databases, config: TenancyConfig) -> None:
    """Every request is served, open sessions keep their connections, and dropped engines are freed."""
    tenants = await made.create_many(44)
    held, others = tenants[:4], tenants[4:]
    chance = random.Random(4)
    events, dropped = EventBus(), list[EngineEvicted]()
    events.subscribe(EngineEvicted, dropped.append)
    small = config.replace(pool={"max_engines": 4, "max_connections": 10})
    async with support.router(made, small, events=events) as router, AsyncExitStack() as stack:
        sessions = [await stack.enter_async_context(router.session(tenant)) for tenant in held]
        backends = [await session.scalar(BACKEND) for session in sessions]

        async def use(tenant: Tenant) -> None:
            assert tenant.placement is not None
            for _ in range(3):
                await asyncio.sleep(chance.random() * 0.02)
                async with router.session(tenant) as session:
                    database = await session.scalar(text("SELECT current_database()"))
                    assert database == tenant.placement.database
                    statistics = router.statistics()
                    assert statistics.engines <= max(4, statistics.leased)

        await asyncio.gather(*map(use, others))
        assert [await session.scalar(BACKEND) for session in sessions] == backends
        assert len(dropped) >= len(others)
        assert {event.tenant_id for event in dropped}.isdisjoint(tenant.id for tenant in held)
        await stack.aclose()
        assert router.statistics().engines == 4
        counted = router.statistics().servers["default"]
        await until(lambda: router.statistics().servers["default"].closing == 0)
        assert counted.in_use == 0
        gc.collect()
        pools = [one for one in gc.get_objects() if isinstance(one, TenantPool) and one.connector.events is events]
        assert len(pools) == 4
