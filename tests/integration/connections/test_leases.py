"""Leases of connections. Each ``Tenancy`` is a process of its own here, as far as they can tell."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

import asyncpg
import pytest
from sqlalchemy import TextClause, text
from sqlalchemy.ext.asyncio import AsyncConnection

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.connections import Lease, rows
from tenancy_orm.connections.leases import FIRST
from tenancy_orm.connections.rows import ServerLeases
from tenancy_orm.control.notifications import LeaseCall
from tenancy_orm.errors import CheckoutTimeoutError
from tenancy_orm.events import ConnectionLeaseReclaimed
from tests.support.postgres import Postgres
from tests.support.processes import opened
from tests.support.waiting import until


async def leases_of(tenancy: Tenancy) -> ServerLeases:
    [found] = await tenancy.internals.leases.read()
    return found


async def granted(tenancy: Tenancy, other: Tenancy) -> int | None:
    """What another process has been granted."""
    found = await leases_of(tenancy)
    return {row.process: row.granted for row in found.leases}.get(other.internals.leases.lease("default").process)


async def set_cap(tenancy: Tenancy, cap: int) -> None:
    async with tenancy.internals.control.transaction() as connection:
        await connection.execute(text("UPDATE tenancy.servers SET max_connections = :cap"), {"cap": cap})


async def test_a_process_has_some_from_its_opening_until_it_is_closed(
    tenancy: Tenancy, tenancy_config: TenancyConfig, postgres: Postgres
) -> None:
    """Without a setting: of what the server accepts, less what others use; and within its own bound."""
    async with opened(tenancy_config.replace(pool={"max_connections": 2})) as other:
        assert await granted(tenancy, other) == 2
        assert other.internals.router.statistics().servers["default"].limit == 2
        found = await leases_of(tenancy)
        async with postgres.connect() as connection:
            assert found.accepted is not None
            assert FIRST < found.cap < found.accepted < int(await connection.fetchval("SHOW max_connections"))
        assert [row.state for row in found.leases] == ["active", "active"]
        acme = (await other.tenants.create("acme")).tenant

        async def use() -> None:
            async with other.session(acme) as session:
                await session.execute(text("SELECT pg_sleep(0.01)"))
                assert other.internals.router.statistics().servers["default"].open <= 2

        await asyncio.gather(*(use() for _ in range(8)))
    assert [row.granted for row in (await leases_of(tenancy)).leases] == [FIRST]


async def test_where_there_are_more_processes_than_connections_the_error_says_so(
    tenancy: Tenancy, tenancy_config: TenancyConfig
) -> None:
    """The latest has none; the oldest keeps its one."""
    acme = (await tenancy.tenants.create("acme")).tenant
    await set_cap(tenancy, 1)
    await until(lambda: has_one(tenancy))
    async with opened(tenancy_config.replace(pool={"checkout_timeout": 0.5})) as other:
        with pytest.raises(CheckoutTimeoutError, match=r"may have none; raise the cap .* 2 processes"):
            async with other.session(acme) as session:
                await session.execute(text("SELECT 1"))
        async with tenancy.session(acme) as session:
            await session.execute(text("SELECT 1"))
        # it gets it as soon as the other is closed
        await tenancy.internals.leases.close()
        async with other.session(acme) as session:
            await session.execute(text("SELECT 1"))


async def has_one(tenancy: Tenancy) -> bool:
    return [row.granted for row in (await leases_of(tenancy)).leases] == [1]


async def test_a_process_gives_back_what_another_one_needs(tenancy: Tenancy, tenancy_config: TenancyConfig) -> None:
    """Idle connections at once, busy ones when they are returned; the other gets its half at least."""
    created = [(await tenancy.tenants.create(f"t{number}", tier="enterprise")).tenant for number in range(4)]
    await set_cap(tenancy, 8)

    async def hold(one: Tenancy, stack: AsyncExitStack, number: int) -> None:
        tenant = created[number % len(created)]
        connection: Any = await stack.enter_async_context(one.internals.router.connection(tenant))
        await connection.exec_driver_sql("SELECT 1")

    async with opened(tenancy_config) as other, AsyncExitStack() as busy, AsyncExitStack() as more:
        for number in range(7):
            await hold(tenancy, busy, number)
        waiting = [asyncio.create_task(hold(other, more, number)) for number in range(4)]
        await until(lambda: sum(task.done() for task in waiting) == 1)
        # nothing is taken away while it is in use; what is returned goes to the other
        await busy.aclose()
        await asyncio.gather(*waiting)
        assert (await granted(tenancy, other) or 0) >= 4
        assert sum(row.granted for row in (await leases_of(tenancy)).leases) <= 8


async def test_the_connections_of_others_are_counted_again_when_the_server_is_full(
    tenancy: Tenancy, postgres: Postgres
) -> None:
    """The cap is smaller then; a connection of a process is none of others."""
    acme = (await tenancy.tenants.create("acme")).tenant
    lease = tenancy.internals.leases.lease("default")
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(tenancy.internals.router.connection(acme))
        for _ in range(12):
            stack.push_async_callback((await asyncpg.connect(postgres.admin_url)).close)
        before = (await leases_of(tenancy)).others
        lease.recount()

        async def counted() -> bool:
            return ((await leases_of(tenancy)).others or 0) >= max(12, before or 0)

        await until(counted)
        found = await leases_of(tenancy)
        assert found.accepted is not None and found.others is not None
        assert found.cap < found.accepted - found.others
        async with postgres.connect() as connection:
            named = "SELECT count(*)::int FROM pg_stat_activity WHERE application_name = $1"
            assert await connection.fetchval(named, f"tenancy/{lease.tag}") == 1


async def test_a_process_is_not_closed_before_its_statements_have_ended(
    tenancy: Tenancy, tenancy_config: TenancyConfig, postgres: Postgres
) -> None:
    """PostgreSQL runs a statement on when its client's socket is cut, so others must not get the connection yet."""
    acme = (await tenancy.tenants.create("acme")).tenant
    statement = text("SELECT pg_sleep(60)")

    async def use(one: Tenancy) -> None:
        async with one.session(acme) as session:
            await session.execute(statement)

    def use_in_thread(one: Tenancy) -> None:
        with one.sync.session(acme) as session:
            session.execute(statement)

    async with postgres.connect() as connection:
        running = "SELECT count(*)::int FROM pg_stat_activity WHERE application_name = $1 AND state = 'active'"

        async def run(name: str, number: int) -> bool:
            return bool(await connection.fetchval(running, name) == number)

        async with opened(tenancy_config) as other:
            name = f"tenancy/{other.internals.leases.lease('default').tag}"
            tasks = [asyncio.create_task(use(other)), asyncio.create_task(asyncio.to_thread(use_in_thread, other))]
            await until(lambda: run(name, 2))
            await other.internals.router.close(timeout=0.1)
            # the protection is not in the cutting of the sockets
            assert await run(name, 2)
        assert await run(name, 0)
    assert len((await leases_of(tenancy)).leases) == 1
    assert all(isinstance(result, Exception) for result in await asyncio.gather(*tasks, return_exceptions=True))


async def test_a_registration_of_which_the_answer_was_lost_is_repeated(tenancy: Tenancy) -> None:
    """Otherwise its own row would be in the way, and the process would have no connections as long as it runs."""
    lease = tenancy.internals.leases.lease("default")
    [before] = (await leases_of(tenancy)).leases
    lease.is_registered = False
    tenancy.internals.leases._renew_soon()
    await until(lambda: lease.is_registered)
    assert [row.process for row in (await leases_of(tenancy)).leases] == [before.process]
    assert lease.is_valid and lease.limit == FIRST


@pytest.mark.parametrize("when", ["before", "during"])
async def test_a_process_that_others_are_ending_changes_nothing(tenancy: Tenancy, when: str) -> None:
    """What it had may be another's in a moment: it gets a lease under another id, and at once."""
    leases = tenancy.internals.leases
    lease = leases.lease("default")
    former = lease.process
    end = text("UPDATE tenancy.connection_leases SET ending_at = clock_timestamp() WHERE process = :process")

    async def end_it(*_: object) -> None:
        async with tenancy.internals.control.transaction() as connection:
            await connection.execute(end, {"process": former})

    assert leases._runner is not None
    leases._runner.cancel()  # this test does its work
    if when == "before":
        await end_it()
        assert await leases._within(leases._change(lease))
    else:
        # the row is read, then another process begins
        with pytest.MonkeyPatch.context() as patch:
            grant = rows.grant

            async def late(*args: Any) -> bool:
                await end_it()
                return await grant(*args)

            patch.setattr(rows, "grant", late)
            assert await leases._within(leases._change(lease))
    assert lease.process != former and lease.is_valid and lease.limit > 0
    assert {row.process: row.state for row in (await leases_of(tenancy)).leases} == {
        former: "ending",
        lease.process: "active",
    }


def all_renewed(leases: list[Lease], since: list[float]) -> bool:
    return all(lease.valid_until > before for lease, before in zip(leases, since, strict=True))


async def test_the_clock_of_the_control_database_may_be_set(
    tenancy: Tenancy, tenancy_config: TenancyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward: no living process loses its connections. Back: what a dead one had does not stay lost for as long."""
    reclaimed: list[ConnectionLeaseReclaimed] = []
    tenancy.events.subscribe(ConnectionLeaseReclaimed, reclaimed.append)
    control = tenancy.internals.control

    async def run(statement: str) -> Any:
        async with control.transaction() as connection:
            return await connection.execute(text(statement))

    await run("CREATE TABLE tenancy.clock (ahead interval NOT NULL)")
    await run("INSERT INTO tenancy.clock VALUES ('0')")
    shifted = "(clock_timestamp() + (SELECT ahead FROM tenancy.clock))"
    for name, statement in vars(rows).items():
        if isinstance(statement, TextClause):
            monkeypatch.setattr(rows, name, text(statement.text.replace("clock_timestamp()", shifted)))
    unrenewed = f"SELECT count(*) FROM tenancy.connection_leases WHERE expires_at NOT BETWEEN {shifted} AND {shifted}"

    async def is_renewed() -> bool:
        return not (await run(f"{unrenewed} + interval '1 minute'")).scalar()

    async with opened(tenancy_config) as other:
        other.events.subscribe(ConnectionLeaseReclaimed, reclaimed.append)
        processes = [one.internals.leases.processes for one in (tenancy, other)]
        for ahead in ("1 hour", "0"):
            # each has looked at the leases before
            known = [one.internals.leases.lease("default") for one in (tenancy, other)]
            seen = [lease.valid_until for lease in known]
            await until(partial(all_renewed, known, seen))
            await run(f"UPDATE tenancy.clock SET ahead = '{ahead}'")
            if ahead == "0":
                await run(
                    "INSERT INTO tenancy.connection_leases SELECT server, gen_random_uuid(), host, pid, 1, 1, 1, 0, "
                    "started_at, expires_at, NULL FROM tenancy.connection_leases LIMIT 1"
                )
                await until(lambda: reclaimed)
            await until(is_renewed)
            assert [one.internals.leases.processes for one in (tenancy, other)] == processes
        assert len(reclaimed) == 1


async def test_a_process_that_is_stopped_while_it_opens_opens_all_the_same(
    tenancy: Tenancy, tenancy_config: TenancyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostgreSQL has ended its transaction, since it held a lock that other processes wait for."""
    stops, read = iter([True]), rows.read

    async def stopped(*args: Any) -> Any:
        if next(stops, False):
            time.sleep(2)  # noqa: ASYNC251 - as by SIGSTOP: the event loop does nothing
        return await read(*args)

    monkeypatch.setattr(rows, "read", stopped)
    async with opened(tenancy_config) as other:
        assert next(stops, None) is None
        assert await granted(tenancy, other) == FIRST


async def test_what_is_opened_waits_for_a_lease_that_has_expired(tenancy: Tenancy) -> None:
    """As after a suspension of the machine, in synchronous code too: it is renewed at once, and nothing is refused."""

    async def in_thread(statement: str, *, tenant: str) -> Any:
        return await asyncio.to_thread(tenancy.sync.fetch_value, statement, tenant=tenant)

    fetches: list[Callable[..., Any]] = [tenancy.fetch_value, in_thread]
    for number, fetch in enumerate(fetches):
        before, slug = [(await tenancy.tenants.create(f"{name}{number}")).tenant.slug for name in ("before", "after")]
        await fetch("SELECT 1", tenant=before)  # what the first login finds out is known
        tenancy.internals.leases.lease("default").valid_until = -math.inf
        assert await fetch("SELECT 1", tenant=slug) == 1


async def test_what_is_asked_for_during_a_look_is_not_forgotten(
    tenancy: Tenancy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The look had begun without that need, and ends after it has come up."""
    numbers: list[int] = []

    async def grant(connection: AsyncConnection, server: str, number: int, demand: rows.Demand) -> bool:
        numbers.append(number)
        return await grant_number(connection, server, number, demand)

    grant_number = rows.grant
    monkeypatch.setattr(rows, "grant", grant)
    acme = (await tenancy.tenants.create("acme")).tenant
    leases = tenancy.internals.leases
    lease = leases.lease("default")
    async with tenancy.internals.router.connection(acme), tenancy.internals.router.connection(acme):
        async with tenancy.internals.control.transaction() as connection:
            await connection.execute(text("SELECT FROM tenancy.connection_leases FOR UPDATE"))
            leases.called(LeaseCall("default", frozenset({lease.tag})))
            blocked = text("SELECT pg_backend_pid() = ANY(pg_blocking_pids(pid)) FROM pg_stat_activity")

            async def is_blocked() -> bool:
                return True in (await connection.scalars(blocked)).all()

            await until(is_blocked)
            asked = asyncio.create_task(lease.ask(timeout=30))
            await asyncio.sleep(0)
            numbers.clear()
        await until(lambda: any(number >= lease.desired for number in numbers))
        await asked
