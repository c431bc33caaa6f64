"""The warm pool of an open ``Tenancy``: the first row, seeds, servers, jobs and commands."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.errors import ConfigurationError
from tenancy_orm.provisioning.reconciling.reconcile import Reconciler
from tenancy_orm.registry.rows import TenantDraft, uuid7
from tenancy_orm.tenant import Tenant
from tests.support.postgres import Postgres
from tests.support.provisioning import placement
from tests.support.waiting import until


@pytest.fixture
async def warm(tenancy_config: TenancyConfig) -> AsyncIterator[Tenancy]:
    """An open one, with two warm databases."""
    opened = Tenancy(
        tenancy_config.replace(provisioning={"warm_pool": 2, "warm_pool_max": 2, "warm_pool_background": False})
    )
    await opened.open(initialise=True)
    try:
        assert (await opened.warm_pool.refill()).errors == ()
        yield opened
    finally:
        await opened.close()


async def backends(tenancy: Tenancy, tenant: Tenant) -> list[int]:
    """The connections of a tenant."""
    connection = await tenancy.internals.servers["default"].connect_admin()
    try:
        query = "SELECT pid FROM pg_stat_activity WHERE usename = $1"
        return [row["pid"] for row in await connection.fetch(query, placement(tenant).role)]
    finally:
        await connection.close()


async def test_the_first_request_needs_no_further_login(warm: Tenancy) -> None:
    """The connection that has proved the login serves it, also after the notification of the creation."""
    created = await warm.tenants.create("acme")
    (pid,) = await backends(warm, created.tenant)
    # what is notified later than the creation arrives later
    received: list[UUID | None] = []
    warm.internals.directory.on_invalidate(received.append)
    other = await warm.tenants.create("globex")
    async with warm.internals.control.transaction() as connection:
        await connection.execute(text("UPDATE tenancy.tenants SET reason = 'seen' WHERE slug = 'globex'"))
    await until(lambda: received == [other.id])
    for _ in range(2):
        assert await warm.fetch_value("SELECT pg_backend_pid()", tenant=created.tenant) == pid
    assert (await warm.tenants.get_by_api_key(created.api_key)).id == created.id
    # a suspension ends it all the same
    await warm.tenants.suspend("acme")
    assert await backends(warm, created.tenant) == []


async def test_seeds_run_in_a_warm_database(tenancy_config: TenancyConfig) -> None:
    """They are the tenant's own, and not the pool's."""

    async def fill(session: AsyncSession, tenant: Tenant) -> None:
        assert await session.scalar(text("SELECT current_user")) == placement(tenant).role
        seen.append(tenant.slug)

    seen: list[str] = []
    tenancy = Tenancy(tenancy_config.replace(provisioning={"warm_pool": 1, "warm_pool_background": False}))
    tenancy.on_create(fill)
    await tenancy.open(initialise=True)
    try:
        made = (await tenancy.warm_pool.refill()).made
        created = await tenancy.tenants.create("acme")
        assert placement(created.tenant).database in made
        assert seen == ["acme"]
        assert (await tenancy.internals.provisioner.reconcile()).clean
    finally:
        await tenancy.close()


async def test_a_server_in_drain_has_no_pool(warm: Tenancy, postgres: Postgres) -> None:
    """One with a pool is not removed without it."""
    await warm.servers.add("eu", postgres.admin_url, same_cluster=True)
    assert len((await warm.warm_pool.refill(servers=["eu"])).made) == 2
    created = await warm.tenants.create("acme", server="eu")
    # two names of one cluster: a reconcile of the one leaves the other's alone
    assert (await warm.internals.provisioner.reconcile()).clean
    await warm.tenants.delete("acme")
    await warm.tenants.purge(created.tenant)
    async with warm.internals.control.transaction() as connection:
        await connection.execute(text("DELETE FROM tenancy.templates WHERE server = 'eu'"))
    with pytest.raises(ConfigurationError, match="has 1 warm database; drop them as well"):
        await warm.servers.remove("eu")
    await warm.servers.drain("eu")
    await until(lambda: (server := warm.internals.servers["eu"]).row is not None and server.row.state == "drain")
    report = await warm.warm_pool.refill()
    assert (report.made, len(report.dropped)) == ((), 1)
    await warm.servers.remove("eu", templates="forget")
    assert [one.server for one in await warm.warm_pool.status()] == ["default"]


async def test_a_claim_during_a_reconcile_of_the_same_cluster_keeps_its_database(
    warm: Tenancy, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cluster's other name has neither a tenant nor a warm database of that name."""
    await warm.servers.add("eu", postgres.admin_url, same_cluster=True)
    async with warm.internals.control.connect() as connection:
        wanted = await connection.scalar(text("SELECT min(recipe) FROM tenancy.warm_databases"))
    claims: list[Tenant] = []

    def claiming(look: Callable[..., Awaitable[object]]) -> Callable[..., Awaitable[object]]:
        async def answer(*args: Any) -> object:
            found = await look(*args)
            if not claims:
                draft = replace(template, id=uuid7())
                claims.append(await warm.internals.registry.register(draft, recipe=wanted, claimed_step="proved"))
            return found

        return answer

    template = TenantDraft(
        id=uuid7(), slug="acme", tier="free", server="default", database="d", role="d", sealed_password=b"x"
    )
    for name in ("_status", "_is_warm"):
        monkeypatch.setattr(Reconciler, name, claiming(getattr(Reconciler, name)))
    report = await warm.internals.provisioner.reconcile()
    assert claims and placement(claims[0]).database not in report.orphans


async def test_the_worker_fills_the_pool(warm: Tenancy) -> None:
    """It is one of its jobs where there is a pool."""
    created = await warm.tenants.create("acme")
    report = await warm.worker(["warm_pool"]).run(once=True)
    assert (report.done, report.failed) == (1, 0)
    (status,) = await warm.warm_pool.status()
    assert (status.ready, status.target) == (2, 2)
    assert placement(created.tenant).server == "default"
