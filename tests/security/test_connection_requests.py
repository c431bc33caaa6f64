"""A tenant cannot make processes close the connections of others: requests come over the control database alone."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.engine import make_url

from tenancy_orm.control.notifications import CONNECTIONS_CHANNEL, ConnectionRequest
from tenancy_orm.tenancy import Tenancy
from tests.support.waiting import until


def idle(tenancy: Tenancy) -> int:
    return tenancy.internals.router.statistics().servers["default"].idle


async def test_a_tenant_cannot_ask_for_connections(tenancy: Tenancy) -> None:
    """What it sends in its own database is not received, and it may not connect to the control database."""
    acme = (await tenancy.tenants.create("acme")).tenant
    globex = (await tenancy.tenants.create("globex")).tenant
    payload = ConnectionRequest("another", "default", acme.id, has_none=True).payload
    notify = text("SELECT pg_notify(:channel, :payload)")
    values = {"channel": CONNECTIONS_CHANNEL, "payload": payload}
    await tenancy.fetch_value("SELECT 1", tenant=acme)

    for _ in range(3):
        async with tenancy.transaction(globex) as session:
            await session.execute(notify, values)
    assert globex.placement is not None
    control = make_url(tenancy.config.control_url)
    with pytest.raises(asyncpg.PostgresError) as refused:
        await asyncpg.connect(
            host=control.host,
            port=control.port or 5432,
            database=control.database,
            user=globex.placement.role,
            password=tenancy.internals.provisioner.password(globex),
        )
    assert refused.value.sqlstate == "42501"
    await asyncio.sleep(0.3)
    assert idle(tenancy) == 2

    async with tenancy.internals.control.transaction() as connection:
        await connection.execute(notify, values)
    await until(lambda: idle(tenancy) == 1)  # the control database can
