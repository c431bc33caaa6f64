"""The pool and the budget on a real server: never too many connections, none lost, none dead."""

from __future__ import annotations

import asyncio
import gc
import logging
import random
import traceback
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import Pool

from tenancy_orm.config import TenancyConfig
from tenancy_orm.errors import (
    CheckoutTimeoutError,
    LoginRefusedError,
    SecretError,
    ServerUnavailableError,
    TenancyError,
)
from tenancy_orm.events import CheckoutTimedOut, ConnectionEvicted, EventBus
from tenancy_orm.routing import BudgetStatistics, Router
from tenancy_orm.servers.breaker import Breaker
from tenancy_orm.tenant import Tenant
from tests.support import databases as support
from tests.support.databases import Databases, moved
from tests.support.postgres import Postgres
from tests.support.proxy import Proxy
from tests.support.waiting import HANGS, until


def counts(router: Router) -> BudgetStatistics:
    return router.statistics().servers["default"]


async def ask(router: Router, tenant: Tenant, sql: str = "SELECT 1") -> Any:
    async with router.session(tenant) as session:
        return await session.scalar(text(sql))


def breaker_of(router: Router) -> Breaker:
    return router._connectors["default"].server.breaker


async def pid(router: Router, tenant: Tenant) -> int:
    return int(await ask(router, tenant, "SELECT pg_backend_pid()"))


async def settled(router: Router) -> BudgetStatistics:
    """Return the pool's counts once all background work has ended."""
    await until(lambda: counts(router).open == counts(router).idle)
    return counts(router)


@asynccontextmanager
async def watching(made: Databases) -> AsyncIterator[list[int]]:
    """Sample, as the superuser, how many server processes serve the tenants."""
    seen: list[int] = []

    async def watch() -> None:
        while True:
            seen.append(await made.sessions())
            await asyncio.sleep(0.001)

    task = asyncio.create_task(watch())
    try:
        yield seen
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_connection_that_a_refused_begin_has_left_is_not_kept(made: Databases, router: Router) -> None:
    """After a refused BEGIN (53200) the driver considers a transaction open, so the connection is not reused."""
    [tenant] = await made.create_many(1)
    before = await pid(router, tenant)
    async with router.connection(tenant) as connection:
        driver = (await connection.get_raw_connection()).driver_connection
        assert driver is not None
        await driver.transaction().start()
        await driver.execute("ROLLBACK")
        with pytest.raises(DBAPIError) as caught:
            await connection.execute(text("SELECT 1"))
        assert getattr(caught.value.orig, "sqlstate", None) == "25P01"
    after = await pid(router, tenant)
    assert after != before
    assert await pid(router, tenant) == after


# --- the budget -----------------------------------------------------------------------------------------------------


async def test_ten_times_more_tenants_than_connections(made: Databases, config: TenancyConfig) -> None:
    """Every request is served, and the server never sees more connections than the budget."""
    tenants = await made.create_many(60)
    rounds = random.Random(1)
    events, evicted = EventBus(), list[ConnectionEvicted]()
    events.subscribe(ConnectionEvicted, evicted.append)
    async with support.router(made, config, events=events) as router, watching(made) as seen:

        async def use(tenant: Tenant) -> None:
            assert tenant.placement is not None
            for _ in range(4):
                await asyncio.sleep(rounds.random() * 0.05)
                assert await ask(router, tenant, "SELECT current_database()") == tenant.placement.database

        await asyncio.gather(*map(use, tenants))
        assert (await settled(router)).open <= 6
    assert len(seen) > 20
    assert 0 < max(seen) <= 6
    assert len(evicted) == counts(router).evictions > 40
    assert {event.server for event in evicted} == {"default"}


async def test_five_hundred_cold_requests_to_one_tenant(made: Databases, router: Router) -> None:
    """They share one engine, use at most the tenant's part of the budget, and all succeed."""
    tenant = await made.create()
    engines: set[int] = set()

    async def request(number: int) -> int:
        async with router.session(tenant) as session:
            engines.add(id(session.sync_session.get_bind()))
            return int(await session.scalar(text("SELECT CAST(:n AS int)"), {"n": number}) or 0)

    async with watching(made) as seen:
        assert await asyncio.gather(*map(request, range(500))) == list(range(500))
    assert len(engines) == 1
    assert 0 < max(seen) <= 3
    assert (await settled(router)).open <= 3


async def test_a_loud_tenant_does_not_keep_a_quiet_one_waiting(made: Databases, config: TenancyConfig) -> None:
    """When the budget is spent and another tenant has a long queue, a single request is served among the first."""
    loud, quiet = await made.create(), await made.create()
    async with support.router(made, config.replace(pool={"max_connections": 3})) as router:
        served: list[str] = []

        async def request(tenant: Tenant) -> None:
            await ask(router, tenant, "SELECT pg_sleep(0.01)")
            served.append(tenant.slug)

        crowd = [asyncio.create_task(request(loud)) for _ in range(60)]
        await until(lambda: counts(router).waiting == 57)
        await request(quiet)
        assert served.index(quiet.slug) < 20
        await asyncio.gather(*crowd)


async def test_a_wait_ends_at_its_deadline_with_a_clear_error(made: Databases, config: TenancyConfig) -> None:
    """The error has the server, the tenant, the time and the limit that was reached; an event is emitted."""
    a, b = await made.create(), await made.create()
    events, told = EventBus(), list[CheckoutTimedOut]()
    events.subscribe(CheckoutTimedOut, told.append)
    small = config.replace(pool={"max_connections": 3, "max_connections_per_tenant": 2, "checkout_timeout": 0.2})
    async with support.router(made, small, events=events) as router:
        async with router.connection(a), router.connection(a):
            with pytest.raises(CheckoutTimeoutError) as caught:
                await ask(router, a)
            assert (caught.value.tenant, caught.value.limit, caught.value.timeout) == (a.slug, 2, 0.2)
            async with router.connection(b):
                with pytest.raises(CheckoutTimeoutError) as caught:
                    await ask(router, b)
                assert (caught.value.server, caught.value.tenant, caught.value.limit) == ("default", b.slug, 3)
        assert [event.slug for event in told] == [a.slug, b.slug]
        assert counts(router).waiting == 0
        assert await ask(router, b) == 1


async def test_an_idle_connection_is_not_reused_after_idle_timeout(made: Databases, config: TenancyConfig) -> None:
    """A connection is closed once it is idle for too long, without another checkout."""
    a = await made.create()
    async with support.router(made, config.replace(pool={"idle_timeout": 0.3})) as router:
        first = await pid(router, a)
        assert await pid(router, a) == first
        await until(lambda: counts(router).open == 0)
        assert await made.sessions() == 0
        assert await pid(router, a) != first


# --- cancellation ---------------------------------------------------------------------------------------------------


async def test_cancellations_leak_nothing(made: Databases, router: Router) -> None:
    """After two thousand requests, many cancelled at random points, no slot is lost, and the others are answered."""
    tenants = await made.create_many(9)
    chance = random.Random(2)
    answered = 0

    async def request(tenant: Tenant, number: int) -> None:
        nonlocal answered
        assert tenant.placement is not None
        async with router.session(tenant) as session:
            row = (await session.execute(text("SELECT current_database(), CAST(:n AS int)"), {"n": number})).one()
            assert tuple(row) == (tenant.placement.database, number)
            if number % 7 == 0:
                await session.execute(text("SELECT pg_sleep(0.002)"))
        answered += 1

    async def attempt(number: int) -> None:
        task = asyncio.create_task(request(chance.choice(tenants), number))
        # anywhere between before its first step and after its end
        await asyncio.sleep(chance.choice((0.0, chance.random() * 0.004, chance.random() * 0.04)))
        if chance.random() < 0.9:
            task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    numbers = iter(range(2_400))

    async def worker() -> None:
        for number in numbers:
            await attempt(number)

    async with watching(made) as seen:
        await asyncio.gather(*(worker() for _ in range(24)))
    assert 200 < answered < 2_300, "both happened"
    assert max(seen) <= 6
    left = await settled(router)
    assert (left.in_use, left.opening, left.closing, left.waiting) == (0, 0, 0, 0)
    assert router.statistics().leased == 0
    assert await made.sessions() == left.idle
    for tenant in tenants:
        assert await ask(router, tenant) == 1


async def test_a_connection_that_nobody_waits_for_any_more_is_kept(made: Databases, router: Router) -> None:
    """The connection that was being opened for a cancelled caller goes to the next one."""
    a = await made.create()
    task = asyncio.create_task(ask(router, a))
    await until(lambda: counts(router).opening == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: counts(router).idle == 1)
    assert await ask(router, a) == 1
    assert counts(router).open == 1


async def test_a_waiter_cancelled_as_it_is_served_passes_it_on(made: Databases, config: TenancyConfig) -> None:
    """A waiter that is cancelled in the turn of the loop in which it is served passes the connection on."""
    a = await made.create()
    async with support.router(made, config.replace(pool={"max_connections_per_tenant": 1})) as router:
        async with router.connection(a):
            first = asyncio.create_task(ask(router, a))
            second = asyncio.create_task(ask(router, a))
            await until(lambda: counts(router).waiting == 2)
            pool = (await router.lease(a).__aenter__()).sync_engine.pool
            put = pool.connector.budget.put  # type: ignore[attr-defined]

            def put_and_cancel(*args: Any) -> None:
                put(*args)
                first.cancel()

            pool.connector.budget.put = put_and_cancel  # type: ignore[attr-defined]
        del pool.connector.budget.put  # type: ignore[attr-defined]
        assert await second == 1
        with pytest.raises(asyncio.CancelledError):
            await first
        assert (await settled(router)).idle == 1


# --- connections that SQLAlchemy drops ------------------------------------------------------------------------------


async def _invalidate(router: Router, tenant: Tenant) -> None:
    async with router.connection(tenant) as connection:
        await connection.invalidate()
        assert await connection.scalar(text("SELECT 1")) == 1


async def _detach(router: Router, tenant: Tenant) -> None:
    async with router.lease(tenant) as engine:
        raw = await engine.raw_connection()
        raw.detach()
        assert counts(router).open == 1, "a detached connection still has its slot"
        raw.close()


async def _detach_and_lose(router: Router, tenant: Tenant) -> None:
    async with router.lease(tenant) as engine:
        raw = await engine.raw_connection()
        raw.detach()
        del raw
    gc.collect()


async def _lose(router: Router, tenant: Tenant) -> None:
    async with router.lease(tenant) as engine:
        connection = await engine.connect().start()
        await connection.execute(text("SELECT 1"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SQLAlchemy's, that it should have been closed
            del connection
            gc.collect()


async def _lose_in_a_thread(router: Router, tenant: Tenant) -> None:
    async with router.lease(tenant) as engine:
        connections = [await engine.connect().start()]
        await connections[0].execute(text("SELECT 1"))

        def drop() -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                connections.clear()
                gc.collect()

        await asyncio.to_thread(drop)


async def _close_behind_its_back(router: Router, tenant: Tenant) -> None:
    async with router.connection(tenant) as connection:
        raw = await connection.get_raw_connection()
        assert raw.driver_connection is not None
        await raw.driver_connection.close()


async def _leave_a_transaction(router: Router, tenant: Tenant) -> None:
    async with router.connection(tenant) as connection:
        raw = await connection.get_raw_connection()
        assert raw.driver_connection is not None
        await raw.driver_connection.execute("BEGIN")


async def _fail_a_listener(router: Router, tenant: Tenant) -> None:
    def listener(*_: object) -> None:
        raise ZeroDivisionError

    event.listen(Pool, "connect", listener)
    try:
        with pytest.raises(ZeroDivisionError):
            await ask(router, tenant)
    finally:
        event.remove(Pool, "connect", listener)


async def _dispose(router: Router, tenant: Tenant) -> None:
    async with router.lease(tenant) as engine:
        async with router.connection(tenant):
            await engine.dispose()
            assert await ask(router, tenant) == 1
        await engine.dispose()


async def _retire(router: Router, tenant: Tenant) -> None:
    await ask(router, tenant)
    router.retire(tenant.id)


@pytest.mark.parametrize(
    "drop",
    [
        _invalidate,
        _detach,
        _detach_and_lose,
        _lose,
        _lose_in_a_thread,
        _close_behind_its_back,
        _leave_a_transaction,
        _fail_a_listener,
        _dispose,
        _retire,
    ],
    ids=lambda drop: drop.__name__.strip("_"),
)
async def test_no_way_of_dropping_a_connection_leaks_its_slot(
    made: Databases, router: Router, drop: Callable[[Router, Tenant], Awaitable[None]]
) -> None:
    """However a connection is dropped, its slot is freed with its socket, and the tenant can connect again."""
    a = await made.create()
    await drop(router, a)
    await until(lambda: counts(router).open == counts(router).idle)
    await until(lambda: _agree(made, router))
    for _ in range(3):
        assert await ask(router, a) == 1
    assert (await settled(router)).open == 1


async def _agree(made: Databases, router: Router) -> bool:
    return await made.sessions() == counts(router).open


async def test_a_retired_engine_closes_what_is_idle_now_and_what_is_busy_when_it_returns(
    made: Databases, router: Router
) -> None:
    """An open session keeps its connection until it ends; a new session gets a new engine."""
    a = await made.create()
    async with router.session(a) as session:
        before = await session.scalar(text("SELECT pg_backend_pid()"))
        await ask(router, a)
        await until(lambda: _has(counts(router), idle=1, in_use=1))
        router.retire(a.id)
        await until(lambda: _has(counts(router), idle=0, in_use=1, open=1))
        assert await session.scalar(text("SELECT pg_backend_pid()")) == before
        after = await pid(router, a)
        assert after != before
    await until(lambda: counts(router).open == 1)
    assert await pid(router, a) == after


def _has(statistics: BudgetStatistics, **values: int) -> bool:
    return all(getattr(statistics, name) == value for name, value in values.items())


async def test_closing_cuts_what_is_not_returned_in_time(made: Databases, config: TenancyConfig) -> None:
    """A request that hangs does not keep the router from closing."""
    a = await made.create()
    async with support.router(made, config) as router:
        scope = router.session(a)
        session = await scope.__aenter__()
        await session.scalar(text("SELECT 1"))
        await router.close(timeout=0.1)
        with pytest.raises(DBAPIError):
            await session.scalar(text("SELECT 1"))
        await scope.__aexit__(None, None, None)
        await until(lambda: counts(router).open == 0)
        await until(lambda: _none_left(made))


async def _none_left(made: Databases) -> bool:
    return await made.sessions() == 0


# --- a server that goes away ----------------------------------------------------------------------------------------


async def test_no_dead_connection_is_handed_out(made: Databases, router: Router) -> None:
    """When all server processes are ended at once, as by a restart, the next request works, every time."""
    tenants = await made.create_many(3)
    for _ in range(5):
        await asyncio.gather(*(ask(router, tenant) for tenant in tenants for _ in range(2)))
        ended = await made.admin.fetch(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE starts_with(usename, $1)",
            made.names.stem,
        )
        assert ended
        for tenant in tenants:
            assert await ask(router, tenant) == 1
    assert (await settled(router)).open == 3


async def test_a_connection_lost_in_use_is_an_error_of_sqlalchemy_and_not_reused(
    made: Databases, router: Router
) -> None:
    """The application gets the error of any SQLAlchemy engine, and the next session works."""
    a = await made.create()
    async with router.session(a) as session:
        backend = await session.scalar(text("SELECT pg_backend_pid()"))
        await made.admin.fetchval("SELECT pg_terminate_backend($1, 5000)", backend)
        with pytest.raises(DBAPIError) as caught:
            await session.scalar(text("SELECT 1"))
        assert caught.value.connection_invalidated
    assert await ask(router, a) == 1
    assert (await settled(router)).open == 1


@pytest.fixture
async def proxy(postgres: Postgres) -> AsyncIterator[Proxy]:
    """A network that can fail."""
    url = make_url(postgres.admin_url)
    proxy = Proxy(url.host or "127.0.0.1", url.port or 5432)
    await proxy.start()
    yield proxy
    await proxy.stop()


async def test_a_server_that_refuses_is_unavailable_until_it_is_back(
    made: Databases, config: TenancyConfig, postgres: Postgres, proxy: Proxy
) -> None:
    """The error comes at once, no slot is lost, and requests work again without a restart."""
    a = await made.create()
    through = config.replace(servers={"default": proxy.url(postgres.admin_url)})
    async with support.router(made, through) as router:
        assert await ask(router, a) == 1
        proxy.refuse()
        await until(lambda: not proxy._writers)
        for _ in range(10):
            with pytest.raises(ServerUnavailableError) as caught:
                await ask(router, a)
            assert (caught.value.server, caught.value.tenant) == ("default", a.slug)
        assert (await settled(router)).open == 0
        proxy.restore()
        await until(lambda: not breaker_of(router).is_open)
        assert await ask(router, a) == 1


async def test_a_server_that_does_not_answer_is_given_up_at_the_deadline(
    made: Databases, config: TenancyConfig, postgres: Postgres, proxy: Proxy
) -> None:
    """If packets are lost, a connect fails after ``connect_timeout``."""
    a = await made.create()
    through = config.replace(servers={"default": proxy.url(postgres.admin_url)}, pool={"connect_timeout": 0.3})
    async with support.router(made, through) as router:
        proxy.swallow()
        async with asyncio.timeout(HANGS):
            with pytest.raises(ServerUnavailableError):
                await ask(router, a)
        assert (await settled(router)).open == 0
        proxy.restore()
        await until(lambda: not breaker_of(router).is_open)
        assert await ask(router, a) == 1


async def test_a_cancelled_end_of_a_session_leaves_nothing_behind(
    made: Databases, config: TenancyConfig, postgres: Postgres, proxy: Proxy
) -> None:
    """If a roll-back without an answer is cancelled, the lease ends at once, and the socket is closed later."""
    a = await made.create()
    through = config.replace(servers={"default": proxy.url(postgres.admin_url)})
    async with support.router(made, through) as router:

        async def request() -> None:
            async with router.session(a) as session:
                await session.scalar(text("SELECT 1"))
                proxy.swallow()

        task = asyncio.create_task(request())
        await until(lambda: not proxy._open.is_set())
        await asyncio.sleep(0.05)
        assert not task.done()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert router.statistics().leased == 0
        await until(lambda: counts(router).open == 0)
        proxy.restore()
        assert await ask(router, a) == 1


# --- a login that is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "sqlstate"),
    [
        ("ALTER ROLE {role} PASSWORD 'another'", "28P01"),
        ("ALTER ROLE {role} NOLOGIN", "28000"),
        ("REVOKE CONNECT ON DATABASE {role} FROM {role}", "42501"),
        ("ALTER DATABASE {role} RENAME TO {role}_away", "3D000"),
    ],
    ids=("password", "nologin", "connect", "database"),
)
async def test_a_refused_login_says_why(made: Databases, router: Router, damage: str, sqlstate: str) -> None:
    """The session's first statement raises ``LoginRefusedError`` with PostgreSQL's SQLSTATE."""
    a = await made.create()
    assert a.placement is not None
    await made.admin.execute(damage.format(role=a.placement.role))
    async with router.session(a) as session:
        with pytest.raises(LoginRefusedError) as caught:
            await session.execute(text("SELECT 1"))
    assert (caught.value.sqlstate, caught.value.tenant, caught.value.server) == (sqlstate, a.slug, "default")
    assert (await settled(router)).open == 0


async def test_a_role_at_its_connection_limit_waits_for_one_to_be_returned(made: Databases, router: Router) -> None:
    """If other processes use up a role's connection limit, a request waits until a connection is returned."""
    a = await made.create(connection_limit=1)
    async with router.connection(a):
        waiting = [asyncio.create_task(ask(router, a)) for _ in range(5)]
        await asyncio.sleep(0.1)
        assert not any(task.done() for task in waiting)
    assert await asyncio.gather(*waiting) == [1] * 5
    assert (await settled(router)).open == 1


async def test_a_role_that_stays_at_its_connection_limit_is_unavailable(made: Databases, config: TenancyConfig) -> None:
    """At the deadline the error is ``ServerUnavailableError``, not a refused login: trying again may help."""
    a = await made.create(connection_limit=1)
    async with support.router(made, config.replace(pool={"checkout_timeout": 0.3})) as router, router.connection(a):
        with pytest.raises(ServerUnavailableError) as caught:
            await ask(router, a)
        assert caught.value.sqlstate == "53300"
        assert not isinstance(caught.value, LoginRefusedError)


async def test_our_errors_are_not_wrapped_where_sqlalchemy_reconnects_by_itself(
    made: Databases, router: Router
) -> None:
    """SQLAlchemy wraps most exceptions of a statement, but not ours when it reconnects."""
    a = await made.create()
    assert a.placement is not None
    async with router.connection(a) as connection:
        await connection.invalidate()
        await made.admin.execute(f"ALTER ROLE {a.placement.role} NOLOGIN")
        with pytest.raises(TenancyError) as caught:
            await connection.execute(text("SELECT 1"))
    assert type(caught.value) is LoginRefusedError


async def test_a_changed_password_makes_a_new_engine(made: Databases, router: Router) -> None:
    """A tenant that was looked up after a change of its password gets a new engine, and can log in."""
    a = await made.create()
    assert await ask(router, a) == 1
    assert a.placement is not None
    await made.admin.execute(f"ALTER ROLE {a.placement.role} PASSWORD 'changed'")
    changed = moved(a, sealed_password=made.keyring.seal_password(a.id, "changed"))
    before = await pid(router, a)
    assert await pid(router, changed) != before
    await until(lambda: counts(router).open == 1)


# --- dirty connections ----------------------------------------------------------------------------------------------

_DIRT = (
    "SET search_path = pg_catalog; SET statement_timeout = '1h'; SET my.secret = 'x'; SET ROLE NONE; "
    "CREATE TEMP TABLE left_behind (id int); SELECT pg_advisory_lock(42); LISTEN channel; "
    "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY; DECLARE kept CURSOR WITH HOLD FOR SELECT 1"
)
_STATE = (
    "SELECT current_setting('search_path'), current_setting('statement_timeout'), "
    "coalesce(current_setting('my.secret', true), ''), current_setting('default_transaction_read_only'), "
    "to_regclass('pg_temp.left_behind')::text, (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' "
    "AND pid = pg_backend_pid())::int, (SELECT count(*) FROM pg_listening_channels())::int, "
    "(SELECT count(*) FROM pg_cursors WHERE is_holdable)::int, current_user = session_user"
)


async def _soil(router: Router, tenant: Tenant) -> tuple[int, tuple[Any, ...], list[str]]:
    async with router.connection(tenant) as connection:
        raw = await connection.get_raw_connection()
        driver = raw.driver_connection
        assert driver is not None
        clean = tuple(await driver.fetchrow(_STATE))
        received: list[str] = []
        await driver.add_listener("spoken", lambda *args: received.append(args[-1]))
        await driver.execute(_DIRT)
        return driver.get_server_pid(), clean, received


async def _look(router: Router, tenant: Tenant) -> tuple[int, tuple[Any, ...]]:
    async with router.connection(tenant) as connection:
        driver = (await connection.get_raw_connection()).driver_connection
        assert driver is not None
        return driver.get_server_pid(), tuple(await driver.fetchrow(_STATE))


@pytest.mark.parametrize("full_reset", [False, True])
async def test_a_dirty_connection_is_clean_at_the_next_checkout(
    made: Databases, config: TenancyConfig, full_reset: bool
) -> None:
    """The full reset cleans a connection of the same server process; a roll-back alone leaves its state."""
    a = await made.create()
    assert a.placement is not None
    await made.admin.execute(f"GRANT TEMP ON DATABASE {a.placement.database} TO {a.placement.role}")
    async with support.router(made, config.replace(pool={"full_reset": full_reset})) as router:
        # prepared, so that the next use shows whether the reset took it away
        statement = "SELECT count(*) FROM public.notes"
        assert await ask(router, a, statement) == 0
        backend, clean, received = await _soil(router, a)
        await settled(router)
        assert await ask(router, a, statement) == 0
        await settled(router)
        found, state = await _look(router, a)
        assert found == backend
        assert (state == clean) is full_reset
        await made.admin.execute("SELECT 1")
        async with made.postgres.connect(a.placement.database) as other:
            await other.execute("NOTIFY spoken, 'word'")
        await ask(router, a)
        assert received == ([] if full_reset else ["word"])


async def test_what_a_tenant_changed_in_its_schema_is_prepared_anew_for_it_alone(
    made: Databases, router: Router
) -> None:
    """After a tenant's schema change only that tenant's connections prepare their statements again."""
    a, b = await made.create(), await made.create()
    statement = "SELECT * FROM notes"
    for tenant in (a, b):
        await ask(router, tenant, statement)
    assert a.placement is not None
    async with made.postgres.connect(a.placement.database) as inside:
        await inside.execute("ALTER TABLE notes ADD COLUMN extra int")
    async with router.session(a) as session:
        await session.execute(text("SELECT 1"))
        with pytest.raises(DBAPIError):
            await session.execute(text(statement))
    assert await ask(router, a, statement) is None
    async with router.lease(a) as one, router.lease(b) as other:
        pools: list[Any] = [engine.sync_engine.pool for engine in (one, other)]
    changed = [pool.route.schema_changed_at for pool in pools]
    assert changed[0] > 0
    assert changed[1] == 0


async def test_statement_timeout_and_application_name_are_in_force_from_the_start(
    made: Databases, config: TenancyConfig
) -> None:
    """They are startup parameters, so a reset keeps them."""
    a = await made.create()
    async with support.router(made, config.replace(sessions={"statement_timeout": 0.2})) as router:
        assert await ask(router, a, "SHOW application_name") == "tenancy"
        with pytest.raises(DBAPIError) as caught:
            await ask(router, a, "SELECT pg_sleep(10)")
        assert getattr(caught.value.orig, "sqlstate", None) == "57014"


async def test_listeners_on_all_pools_see_a_tenants_connections(made: Databases, router: Router) -> None:
    """Listeners on the ``Pool`` class, which drivers' extensions and tracing use, get a tenant's connections."""
    seen: list[str] = []

    def connected(connection: Any, _record: object) -> None:
        seen.append(connection.run_async(lambda raw: raw.fetchval("SELECT 'asked'")))

    event.listen(Pool, "connect", connected)
    try:
        a = await made.create()
        await ask(router, a)
        await ask(router, a)
    finally:
        event.remove(Pool, "connect", connected)
    assert seen == ["asked"]


# --- secrets --------------------------------------------------------------------------------------------------------


async def test_no_password_shows_in_errors_logs_or_reprs(
    made: Databases, router: Router, caplog: pytest.LogCaptureFixture
) -> None:
    """No password is in an error, even with local variables as error trackers record them, nor in a DEBUG log."""
    caplog.set_level(logging.DEBUG, logger="")
    a = await made.create()
    assert a.placement is not None
    async with router.session(a) as session:
        await session.execute(text("SELECT 1"))
        shown = [repr(session.sync_session.get_bind())]
    async with router.connection(a) as connection:
        raw = await connection.get_raw_connection()
        pool = raw._pool
        shown += [
            repr(vars(pool)),
            repr(vars(pool.connector)),
            repr(raw.driver_connection),
            repr(connection.engine.url),
        ]
        driver = raw.driver_connection
        assert driver is not None
        shown += [repr(getattr(driver, name)) for name in ("_params", "_config")]
    router.retire(a.id)
    await made.admin.execute(f"ALTER ROLE {a.placement.role} PASSWORD 'changed'")
    async with router.session(a) as session:
        with pytest.raises(LoginRefusedError) as caught:
            await session.execute(text("SELECT 1"))
    shown += traceback.TracebackException.from_exception(caught.value, capture_locals=True).format()
    shown.append(caplog.text)
    assert len("".join(shown)) > 1_000
    assert made.passwords[a.id] not in "".join(shown)


async def test_a_password_opens_for_its_own_tenant_alone(made: Databases, router: Router) -> None:
    """If the sealed passwords of two rows are exchanged, neither opens, and neither tenant connects."""
    a, b = await made.create(), await made.create()
    assert a.placement is not None and b.placement is not None
    for tenant, other in ((a, b.placement), (b, a.placement)):
        with pytest.raises(SecretError):
            await ask(router, moved(tenant, sealed_password=other.sealed_password))
    assert await made.sessions() == 0
    assert (await settled(router)).open == 0
