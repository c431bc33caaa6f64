"""Sessions that give themselves another ``application_name`` than the one that shows whose they are."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

import pytest
from sqlalchemy import text

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.connections import Lease, rows, usage
from tenancy_orm.postgres.connections import Connection
from tenancy_orm.tenant import Tenant
from tests.support.postgres import Postgres
from tests.support.processes import opened
from tests.support.waiting import until

RENAME = "SET application_name = 'web'"
RENAMING = "SELECT set_config('application_name', 'web', false)"


async def use_all(tenancy: Tenancy, tenant: Tenant, stack: AsyncExitStack, *, name: str | None = None) -> Lease:
    """Use all connections that the process was granted so far."""
    lease = tenancy.internals.leases.lease("default")
    while lease.in_use < lease.granted:
        session = await stack.enter_async_context(tenancy.session(tenant))
        await session.execute(text("SELECT 1" if name is None else f"SET application_name = '{name}'"))
    return lease


async def others(tenancy: Tenancy, monkeypatch: pytest.MonkeyPatch, before: Callable[[], Awaitable[None]]) -> int:
    """Count the connections to the server as one of the processes does, after another function was called.

    Returns:
        How many of tenants' roles count as others': how many the rest of the server has changes all the time.
    """
    leases, counting, foreign = tenancy.internals.leases, usage.count, 0

    async def count(connection: Connection, stem: str) -> usage.ServerCount:
        nonlocal foreign
        await before()
        counted = await counting(connection, stem)
        foreign = counted.foreign
        return counted

    async with tenancy.internals.control.transaction() as connection:
        await connection.execute(text("UPDATE tenancy.connection_caps SET others = NULL"))
    [found] = await leases.read()
    known = {rows.tag_of(row.process): row.granted for row in found.leases}
    with monkeypatch.context() as patch:
        patch.setattr(usage, "count", count)
        await leases._care._count(found.server, known, every=0.0)
    [found] = await leases.read()
    assert found.others is not None
    return found.others - foreign


async def names(postgres: Postgres, tenancy: Tenancy) -> list[str]:
    """The names of tenants' sessions."""
    stem = tenancy.internals.leases._care._stem
    async with postgres.connect() as connection:
        query = "SELECT application_name FROM pg_stat_activity WHERE starts_with(usename, $1) ORDER BY 1"
        return [row["application_name"] for row in await connection.fetch(query, stem)]


async def nothing() -> None:
    """Do nothing."""


@pytest.mark.parametrize("name", ["web", "web/0123456789ab"])
async def test_a_session_that_names_itself_is_none_of_others(
    tenancy: Tenancy, postgres: Postgres, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """It is one of those that its process was granted; counted twice, it would make the cap smaller.

    Any tenant's own SQL may do so, also with what looks like the tag of a process.
    """
    acme = (await tenancy.tenants.create("acme", tier="enterprise")).tenant
    async with AsyncExitStack() as stack:
        lease = await use_all(tenancy, acme, stack, name=name)
        assert await names(postgres, tenancy) == [name] * lease.granted
        assert await others(tenancy, monkeypatch, nothing) == 0


async def test_tenants_connections_that_no_process_was_granted_are_others(
    tenancy: Tenancy, tenancy_config: TenancyConfig, postgres: Postgres
) -> None:
    """As those of a process that was stopped, which had named themselves, after its lease is gone."""
    acme = (await tenancy.tenants.create("acme", tier="enterprise")).tenant
    async with AsyncExitStack() as stack, postgres.connect() as admin:
        lease = await use_all(tenancy, acme, stack, name="web")
        counted = await usage.count(admin, tenancy.internals.leases._care._stem)
        assert counted.tenants == {None: lease.granted}
        assert counted.others({lease.tag: lease.granted - 2}) == counted.foreign + 2


async def in_session(tenancy: Tenancy) -> None:
    async with tenancy.session("acme") as session:
        await session.execute(text(RENAME))
        await session.commit()


async def in_reading_session(tenancy: Tenancy) -> None:
    async with tenancy.session("acme", read_only=True) as session:
        await session.execute(text(RENAMING))


async def in_statement(tenancy: Tenancy) -> None:
    await tenancy.fetch_value(RENAMING, tenant="acme")


async def in_thread(tenancy: Tenancy) -> None:
    def work() -> None:
        with tenancy.sync.session("acme") as session:
            session.execute(text(RENAME))
            session.commit()

    await asyncio.to_thread(work)


async def in_reading_thread(tenancy: Tenancy) -> None:
    await asyncio.to_thread(tenancy.sync.fetch_value, RENAMING, tenant="acme")


@pytest.mark.parametrize("rename", [in_session, in_reading_session, in_statement, in_thread, in_reading_thread])
async def test_a_session_keeps_its_name_and_its_connection_shows_again_whose_it_is(
    tenancy: Tenancy, postgres: Postgres, rename: Callable[[Tenancy], Awaitable[None]]
) -> None:
    """So the process's connections can be counted, and ended if it is lost."""
    await tenancy.tenants.create("acme")
    tag = tenancy.internals.leases.lease("default").tag

    async def are_tagged() -> bool:
        found = await names(postgres, tenancy)
        return f"web/{tag}" in found and all(name.endswith(f"/{tag}") for name in found)

    for _ in range(2):
        await rename(tenancy)
        await until(are_tagged, seconds=20.0)
        assert await tenancy.fetch_value("SELECT 1", tenant="acme") == 1
        assert await asyncio.to_thread(tenancy.sync.fetch_value, "SELECT 1", tenant="acme") == 1


async def test_a_session_that_gives_its_name_back_has_the_tag_once(tenancy: Tenancy, postgres: Postgres) -> None:
    """The name that a connection began with has it already."""
    await tenancy.tenants.create("acme")
    tag = tenancy.internals.leases.lease("default").tag

    def give_back() -> None:
        with tenancy.sync.session("acme") as session:
            session.execute(text("RESET application_name"))
            session.commit()

    async def is_named(name: str) -> bool:
        return await names(postgres, tenancy) == [f"{name}/{tag}"]

    await in_session(tenancy)
    await until(lambda: is_named("web"), seconds=20.0)
    async with tenancy.session("acme") as session:
        await session.execute(text("RESET application_name"))
        await session.commit()
    await until(lambda: is_named("tenancy"), seconds=20.0)
    acme = await tenancy.tenants.get("acme")
    tenancy.internals.router.retire(acme.id)
    await in_thread(tenancy)
    await until(lambda: is_named("web"), seconds=20.0)
    await asyncio.to_thread(give_back)
    await until(lambda: is_named("tenancy"), seconds=20.0)


async def test_a_process_that_opens_during_a_count_is_none_of_others(
    tenancy: Tenancy, tenancy_config: TenancyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its connections are counted, and its lease is not one of those that were known before."""
    acme = (await tenancy.tenants.create("acme", tier="enterprise")).tenant
    async with AsyncExitStack() as stack:
        await use_all(tenancy, acme, stack)

        async def open_another() -> None:
            other = await stack.enter_async_context(opened(tenancy_config))
            await use_all(other, acme, stack)

        assert await others(tenancy, monkeypatch, open_another) == 0


async def test_a_burst_of_others_is_forgotten_by_halves(tenancy: Tenancy) -> None:
    """Fewer than before may be more again in a moment; but the cap must not be too small for half an hour."""
    found = []
    async with tenancy.internals.control.transaction() as connection:
        await connection.execute(text("UPDATE tenancy.connection_caps SET others = 80"))
        for number in (16, 16, 16, 40, 16):
            await rows.save_count(connection, "default", accepted=97, others=number)
            found.append((await rows.read(connection, ["default"]))["default"].others)
    assert found == [48, 32, 24, 40, 28]
