"""A standby is promoted while the old primary is still up: writes find it, without a restart of the application."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import asyncpg
import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.errors import TenancyError
from tenancy_orm.events import PrimaryChanged
from tenancy_orm.postgres import login
from tenancy_orm.postgres.dsn import Dsn
from tests.support.outages import Writers, go_on, running
from tests.support.proxy import Proxy, proxied
from tests.support.replication import Standby, TestServer, primary_server, standby_of
from tests.support.waiting import until

SECONDS = 30.0
RECOVERED = 10.0


@pytest.fixture
def pair() -> Iterator[tuple[TestServer, Standby]]:
    """A primary, and a standby that a test promotes."""
    with primary_server() as primary, standby_of(primary) as standby:
        yield primary, standby


async def opened(config: TenancyConfig, url: str, *slugs: str) -> Tenancy:
    tenancy = Tenancy(
        config.replace(
            servers={"pair": url},
            default_server="pair",
            pool={"connect_timeout": 3.0, "max_connections_per_tenant": 1},
            breaker={"longest_pause": 0.3},
        )
    )
    await tenancy.open(initialise=True)
    for slug in slugs:
        await tenancy.tenants.create(slug)
    return tenancy


async def test_writes_move_to_a_promoted_standby_while_the_old_primary_is_up(
    tenancy_config: TenancyConfig, pair: tuple[TestServer, Standby]
) -> None:
    """On both sides. The old one is fenced: it takes logins, and answers reads, but takes no writes."""
    old, new = pair
    hosts = f"{old.url().rpartition('@')[0]}@127.0.0.1:{old.port},127.0.0.1:{new.port}/postgres"
    tenancy = await opened(tenancy_config, f"{hosts}?target_session_attrs=read-write", "acme", "eve", "sol")
    try:
        seen: list[PrimaryChanged] = []
        tenancy.events.subscribe(PrimaryChanged, seen.append)
        writers = [Writers(tenancy, "acme"), Writers(tenancy, "eve", sync=True), Writers(tenancy, "sol", alone=True)]
        places = [(await tenancy.tenants.get(slug)).placement for slug in ("acme", "eve", "sol")]

        def rows(server: TestServer) -> list[int]:
            count = "SELECT count(*) FROM notes"
            return [server.query(count, database=place.database) for place in places if place is not None]

        def read() -> None:
            with tenancy.sync.session("eve", read_only=True) as session:
                session.scalar(text("SELECT 1"))

        async def read_in_thread() -> None:
            with suppress(DBAPIError, TenancyError, OSError):
                await asyncio.to_thread(read)

        def fence(how: str) -> None:
            old.query(f"ALTER SYSTEM {how}")
            old.query("SELECT pg_reload_conf()")

        def write_on_driver() -> None:
            with tenancy.sync.session("eve") as session:
                driver: Any = session.connection().connection.driver_connection
                with driver.transaction():
                    driver.execute("INSERT INTO notes (body) VALUES ('lost')")

        # the transaction that psycopg itself begins, on a connection that only read before
        await asyncio.to_thread(read)
        await asyncio.to_thread(fence, "SET default_transaction_read_only = on")
        await until(lambda: old.query("SHOW default_transaction_read_only") == "on")
        with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
            await asyncio.to_thread(write_on_driver)
        await asyncio.to_thread(fence, "RESET default_transaction_read_only")
        await until(lambda: old.query("SHOW default_transaction_read_only") == "off")

        # with read-only sessions between, on the same connections
        readers = (partial(reads, tenancy, "acme", read_only=True), read_in_thread)
        async with running(*readers, *(w.write for w in writers)), asyncio.timeout(SECONDS):
            await until(lambda: all(len(writer.acknowledged) > 3 for writer in writers))
            await asyncio.to_thread(fence, "SET default_transaction_read_only = on")
            await until(lambda: all(writer.failures for writer in writers))
            fenced = await asyncio.to_thread(rows, old)
            await asyncio.to_thread(new.catch_up)
            await asyncio.to_thread(new.promote)
            await go_on(writers, seconds=RECOVERED)
        for writer in writers:
            await writer.check()
        assert await asyncio.to_thread(rows, old) == fenced
        assert old.is_running() and {event.server for event in seen} == {"pair"}
        # a transaction that asked to be read-only keeps its error, and its connection
        async with tenancy.internals.router.connection(await tenancy.tenants.get("acme")) as connection:
            await connection.execution_options(postgresql_readonly=True)
            with pytest.raises(DBAPIError) as caught:
                await connection.execute(text("INSERT INTO notes (body) VALUES ('x')"))
        assert not caught.value.connection_invalidated
    finally:
        await tenancy.close()


@pytest.fixture
async def address(pair: tuple[TestServer, Standby]) -> AsyncIterator[Proxy]:
    """One address, of whichever server: a virtual address, a name, HAProxy."""
    async with proxied(pair[0].url()) as proxy:
        yield proxy


async def test_writes_follow_an_address_that_moves(
    tenancy_config: TenancyConfig, pair: tuple[TestServer, Standby], address: Proxy
) -> None:
    """It led to a standby for a moment, and connections to that one are open; one of them is not used again."""
    old, new = pair
    tenancy = await opened(tenancy_config, address.url(old.url()), "acme", "eve")
    try:
        writers = [Writers(tenancy, "acme"), Writers(tenancy, "acme", sync=True), Writers(tenancy, "eve")]
        async with asyncio.timeout(SECONDS):
            await asyncio.to_thread(new.catch_up)
            address.lead_to("127.0.0.1", new.port)
            address.cut()
            # connections that only read, until the standby is promoted elsewhere and the address leads back
            async with tenancy.session("eve") as session:
                await until(lambda: reads(tenancy, "acme"))
                assert await session.scalar(text("SELECT pg_is_in_recovery()"))
            address.lead_to("127.0.0.1", old.port)
            for writer in writers:
                # the first finds a standby, and closes what leads there
                await writer.write()
            async with running(*(w.write for w in writers)):
                await go_on(writers, seconds=RECOVERED)
        assert sum(sum(writer.failures.values()) for writer in writers) <= 3
        for writer in writers:
            await writer.check()
    finally:
        await tenancy.close()


async def reads(tenancy: Tenancy, slug: str, *, read_only: bool = False) -> Any:
    try:
        async with tenancy.session(slug, read_only=read_only) as session:
            return await session.scalar(text("SELECT pg_is_in_recovery()"))
    except (DBAPIError, TenancyError, OSError):
        return None


async def test_a_tenant_that_makes_its_own_sessions_read_only_costs_no_other_tenant_a_connection(
    tenancy: Tenancy,
) -> None:
    """The server says what it is; the tenant's role cannot say that for it."""
    seen: list[PrimaryChanged] = []
    tenancy.events.subscribe(PrimaryChanged, seen.append)
    for slug in ("eve", "acme"):
        await tenancy.tenants.create(slug)
    backend = text("SELECT pg_backend_pid()")
    async with tenancy.session("acme") as session:
        before = await session.scalar(backend)
    outage = tenancy.internals.router._connectors["default"].outage
    async with tenancy.internals.router.connection(await tenancy.tenants.get("eve")) as connection:
        await connection.execute(text("SET default_transaction_read_only = on"))
        await connection.commit()
        held: Any = (await connection.get_raw_connection()).dbapi_connection
        assert outage.write_refused(held)
    await until(lambda: not tenancy.internals.router._connectors["default"]._tasks)
    async with tenancy.session("acme") as session:
        assert await session.scalar(backend) == before
    writer = Writers(tenancy, "eve")
    assert await writer.write() and not seen


async def test_a_dead_host_in_a_url_costs_one_connection_its_time(
    tenancy_config: TenancyConfig, control_url: str
) -> None:
    """The first host swallows what is sent to it; what is connected later does not wait for it. psycopg's too."""
    async with proxied(control_url) as dead:
        dead.swallow()
        user, _, where = control_url.rpartition("@")
        host, _, _ = where.partition("/")
        url = f"{user}@127.0.0.1:{dead.port},{host}/postgres"
        tenancy = await opened(tenancy_config.replace(pool={"max_connections": 40}), url, "acme")
        try:
            await until(lambda: dead.connections > 1)
            await tenancy.tenants.create("eve")
            before = dead.connections
            async with asyncio.timeout(SECONDS):
                for _ in range(20):
                    tenancy.internals.router.retire((await tenancy.tenants.get("acme")).id)
                    writer = Writers(tenancy, "acme")
                    assert await writer.write()
                    assert await Writers(tenancy, "acme", sync=True).write()
            assert dead.connections - before < 10
        finally:
            await tenancy.close()


async def test_a_standby_that_lags_refuses_no_login_to_what_the_primary_has(
    tenancy_config: TenancyConfig, pair: tuple[TestServer, Standby]
) -> None:
    """The URL names the standby first, which does not know of new databases and roles; on both sides."""
    primary, standby = pair
    user = primary.url().rpartition("@")[0]
    url = f"{user}@127.0.0.1:{standby.port},127.0.0.1:{primary.port}/postgres?target_session_attrs=read-write"
    await asyncio.to_thread(standby.pause_replay)
    await asyncio.to_thread(primary.query, "CREATE DATABASE fresh")
    fresh = Dsn.parse(url.replace("/postgres?", "/fresh?"))
    connection: asyncpg.Connection[asyncpg.Record] = await login.connect(fresh, purpose="test", timeout=SECONDS)
    assert await connection.fetchval("SELECT current_database()") == "fresh"
    await connection.close()
    assert login.hosts_to_try(fresh)[0] == ("127.0.0.1", primary.port)
    with pytest.raises(asyncpg.InvalidPasswordError):
        await login.connect(fresh, purpose="test", timeout=SECONDS, password="wrong")
    tenancy = await opened(tenancy_config, url, "acme")
    try:
        for sync in (False, True):
            assert await Writers(tenancy, "acme", sync=sync).write()
    finally:
        await tenancy.close()
