"""What a tenant weighs in the process while nobody uses it.

Run by ``make bench ARGS='-k memory'``.
"""

from __future__ import annotations

import gc
import os
import tracemalloc
from uuid import uuid4

import pytest
from sqlalchemy import select

from tenancy_orm.config import PoolConfig, TenancyConfig
from tenancy_orm.events import EventBus
from tenancy_orm.routing import Router
from tenancy_orm.secrets.keyring import Keyring, new_password
from tenancy_orm.servers import Servers
from tenancy_orm.tenant import Placement, Status, Tenant
from tests.support import databases as support
from tests.support.models import Note, Tag
from tests.support.postgres import Postgres

TENANTS = int(os.environ.get("BENCH_ENGINES", "10000"))
USED = int(os.environ.get("BENCH_USED_ENGINES", "100"))


def measured() -> int:
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


@pytest.fixture(autouse=True)
def traced() -> object:
    """Count what Python allocates."""
    tracemalloc.start()
    yield
    tracemalloc.stop()


def tenant(keyring: Keyring) -> Tenant:
    tenant_id = uuid4()
    name = f"tenancy_1a2b3c4d_t_{tenant_id.hex}"
    return Tenant(
        id=tenant_id,
        slug=f"customer-{tenant_id.hex[:12]}",
        status=Status.ACTIVE,
        tier="free",
        placement=Placement("default", name, name, keyring.seal_password(tenant_id, new_password())),
    )


async def test_bench_memory_of_an_engine() -> None:
    """Tenants and their engines, leased once."""
    config = TenancyConfig(control_url="postgresql://nobody@127.0.0.1:1/none", pool=PoolConfig(max_engines=TENANTS))
    keyring = Keyring({"1": bytes(32)})
    router = Router(config, Servers(config), keyring, uuid4(), EventBus())
    async with router.lease(tenant(keyring)):
        pass
    before = measured()
    tenants = [tenant(keyring) for _ in range(TENANTS)]
    identities = measured()
    for one in tenants:
        async with router.lease(one):
            pass
    engines = measured()
    print(f"\n{TENANTS} routed tenants: {(engines - before) / 1024**2:.0f} MiB (goal for 10,000: under 100 MB)", end="")
    print(
        f"\nmemory of {TENANTS} idle tenants: {(engines - before) / TENANTS / 1024:.2f} KiB each (goal: under 10), "
        f"of which the engine {(engines - identities) / TENANTS / 1024:.2f} KiB"
    )


async def test_bench_memory_of_an_engine_that_was_used(postgres: Postgres, name_prefix: str) -> None:
    """Engines that have run statements, and whose connections were closed to make room for others."""
    config = support.configuration(postgres, name_prefix, pool={"max_connections": 2})
    async with support.databases(postgres, config) as made, support.router(made, config) as router:
        tenants = await made.create_many(USED + 1)

        async def use(one: Tenant) -> None:
            async with router.session(one) as session:
                session.add(Note(body="note", tags=[Tag(name="tag")]))
                await session.flush()
                await session.scalars(select(Note).join(Note.tags))

        await use(tenants.pop())
        before = measured()
        for one in tenants:
            await use(one)
        used = measured()
    print(f"\nmemory of {USED} tenants' engines after use, idle again: {(used - before) / USED / 1024:.2f} KiB each")
