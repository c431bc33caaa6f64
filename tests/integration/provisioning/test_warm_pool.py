"""The warm pool: databases made ahead of need, each for one creation, and never for a second one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
from sqlalchemy import text

from tenancy_orm.provisioning import ReconcileReport
from tenancy_orm.provisioning.warm_pool import WarmReport
from tenancy_orm.registry.rows import uuid7
from tenancy_orm.tenant import Status
from tests.support.postgres import Postgres
from tests.support.provisioning import Workshop, names_of, open_workshop, placement

# what is left on the server is compared as a whole
pytestmark = pytest.mark.new_installation

POOL: dict[str, Any] = {"warm_pool": 2, "warm_pool_max": 2, "warm_pool_background": False}


@pytest.fixture
async def workshop(postgres: Postgres, control_url: str, name_prefix: str) -> AsyncIterator[Workshop]:
    """A provisioner with an empty pool of two."""
    opened = await open_workshop(
        control_url=control_url, admin_url=postgres.admin_url, name_prefix=name_prefix, provisioning=POOL
    )
    try:
        yield opened
    finally:
        await opened.close()


async def ready(workshop: Workshop) -> list[str]:
    """The warm databases that can be claimed."""
    async with workshop.control.connect() as connection:
        return list(await connection.scalars(text("SELECT name FROM tenancy.warm_databases WHERE state = 'ready'")))


async def fill(workshop: Workshop) -> list[str]:
    """Fill the pool; the names of what is in it."""
    report = await workshop.provisioner.warm_pool.refill()
    assert report.errors == ()
    return await ready(workshop)


async def test_a_creation_claims_a_warm_database(workshop: Workshop) -> None:
    """The tenant is complete, with an id made at the claim; the database keeps its name, and is nobody else's."""
    warm = await fill(workshop)
    assert len(warm) == 2
    before = uuid7()
    tenant, other = await workshop.create("acme", tier="enterprise"), await workshop.create("globex")
    assert {placement(tenant).database, placement(other).database} == set(warm)
    assert placement(tenant).database == placement(tenant).role != workshop.names.tenant(tenant.id)
    assert before.int >> 80 <= tenant.id.int >> 80 <= other.id.int >> 80  # milliseconds
    assert all(workshop.names.parse(name) < before for name in warm)
    assert (tenant.status, tenant.schema_revision) == (Status.ACTIVE, "0001")
    assert await ready(workshop) == []
    assert await workshop.present() == names_of(tenant) | names_of(other)
    async with workshop.connect(tenant) as connection:
        await connection.execute("INSERT INTO notes (body) VALUES ('hello')")
        assert await connection.fetchval("SELECT body FROM bodies") == "hello"
        limit = await connection.fetchval("SELECT rolconnlimit FROM pg_roles WHERE rolname = current_user")
    assert limit == workshop.config.tiers["enterprise"].connection_limit
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        async with workshop.connect(tenant, placement(other).database):
            pass
    assert await workshop.provisioner.reconcile() == ReconcileReport()
    # empty: a cold one
    cold = await workshop.create("initech")
    assert placement(cold).database == workshop.names.tenant(cold.id)
    assert await workshop.provisioner.reconcile() == ReconcileReport()


async def test_nobody_can_use_a_warm_database(workshop: Workshop) -> None:
    """It is sealed, PUBLIC has no right on it, and its role has neither LOGIN nor a password."""
    tenant = await workshop.create("acme")
    (name, _) = await fill(workshop)
    for _ in range(2):
        with pytest.raises((asyncpg.ObjectNotInPrerequisiteStateError, asyncpg.InsufficientPrivilegeError)):
            async with workshop.connect(tenant, name):
                pass
        # the rights hold without the seal
        async with workshop.admin() as connection:
            await connection.execute(f'ALTER DATABASE "{name}" WITH ALLOW_CONNECTIONS true')
    async with workshop.admin() as connection:
        row = await connection.fetchrow("SELECT rolcanlogin, rolpassword FROM pg_authid WHERE rolname = $1", name)
        assert tuple(row) == (False, None)
        assert not await connection.fetchval("SELECT has_database_privilege($1::text, $1::text, 'CONNECT')", name)
    # what somebody has opened is not given to a tenant
    report = await workshop.provisioner.reconcile()
    assert report == ReconcileReport(orphans=(name,))
    assert name not in await ready(workshop)


async def test_many_creations_get_different_databases(workshop: Workshop) -> None:
    """Two of them are warm; all are whole."""
    warm = await fill(workshop)
    tenants = await asyncio.gather(*(workshop.create(f"t{number}") for number in range(6)))
    names = {placement(tenant).database for tenant in tenants}
    assert len(names) == 6 and names > set(warm)
    assert await workshop.consistent()
    for tenant in tenants:
        async with workshop.connect(tenant) as connection:
            assert await connection.fetchval("SELECT count(*) FROM notes") == 0
    assert await workshop.provisioner.reconcile() == ReconcileReport()


@pytest.mark.parametrize("damage", ["dropped", "opened", "marked", "no role"])
async def test_a_damaged_warm_database_is_replaced(workshop: Workshop, damage: str) -> None:
    """The creation makes a cold one; what is left of the other is removed."""
    for name in await fill(workshop):
        statement = {
            "dropped": f'DROP DATABASE "{name}"',
            "opened": f'ALTER DATABASE "{name}" WITH ALLOW_CONNECTIONS true',
            "marked": f"COMMENT ON DATABASE \"{name}\" IS 'another tenant''s'",
            "no role": f'ALTER ROLE "{name}" RENAME TO "{name}x"',
        }[damage]
        async with workshop.admin() as connection:
            await connection.execute(statement)
    tenant = await workshop.create("acme")
    assert placement(tenant).database == workshop.names.tenant(tenant.id)
    async with workshop.connect(tenant) as connection:
        await connection.execute("INSERT INTO notes (body) VALUES ('hello')")
    assert len(await ready(workshop)) == 1


async def test_a_refused_creation_takes_nothing_from_the_pool(workshop: Workshop) -> None:
    """The claim and the tenant's row are one transaction."""
    await workshop.create("acme")
    warm = await fill(workshop)
    with pytest.raises(Exception, match="acme"):
        await workshop.create("acme")
    assert await ready(workshop) == warm


async def test_filling_stops_at_the_target(workshop: Workshop) -> None:
    """A second filling makes nothing, and one that runs at the same time does not either."""
    pool = workshop.provisioner.warm_pool
    reports = await asyncio.gather(pool.refill(), pool.refill())
    assert sorted(len(report.made) for report in reports) == [0, 2]
    assert await pool.refill() == WarmReport()
    (status,) = await pool.status()
    assert (status.ready, status.target, status.incomplete, status.others) == (2, 2, 0, 0)
    drained = await pool.drain()
    assert len(drained.dropped) == 2 and await workshop.present() == set()
