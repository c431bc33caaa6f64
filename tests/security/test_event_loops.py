"""A ``Tenancy`` works in the event loop that opened it; from any other loop or thread it is refused.

A connection of asyncpg's that two loops use is left amid a query; in two threads at once it has ended the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any

import anyio.from_thread
import anyio.to_thread
import asyncpg
import httpx
import pytest
import pytest_asyncio
from fastapi import FastAPI
from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.asgi import TenancyMiddleware
from tenancy_orm.control.notifications import ConnectionRequest
from tenancy_orm.errors import NotOpenError, WrongEventLoopError
from tenancy_orm.events import TenantUpdated
from tenancy_orm.loops import HomeLoop
from tenancy_orm.tenants.manager import CreatedTenant
from tests.support.models import Base, Note
from tests.support.postgres import Postgres
from tests.support.provisioning import lasting_control_database
from tests.support.served import variables
from tests.support.shell import ROOT, environment
from tests.support.waiting import HANGS

Use = Callable[[Tenancy], Awaitable[Any]]

PID = "SELECT pg_backend_pid()"


async def entered(scope: Any) -> None:
    async with scope:
        pass


async def in_a_thread(use: Use, tenancy: Tenancy) -> BaseException | None:
    """What a use in a loop of its own, in a thread of its own, raises."""

    def run() -> BaseException | None:
        async def main() -> None:
            await use(tenancy)

        try:
            asyncio.run(main())
        except BaseException as exc:  # noqa: BLE001 - it is what the test asks for
            return exc
        return None

    return await asyncio.to_thread(run)


@pytest.fixture
async def acme(tenancy: Tenancy) -> CreatedTenant:
    """A tenant with a note; its connection is idle in the pool, its key and its row are remembered."""
    created = await tenancy.tenants.create("acme")
    async with tenancy.transaction("acme") as session:
        session.add(Note(body="of acme"))
    await tenancy.internals.directory.authenticate(created.api_key)
    return created


async def pid_of(tenancy: Tenancy) -> int:
    return int(await tenancy.fetch_value(PID, tenant="acme"))


# --- the attack, where nothing protects -----------------------------------------------------------------------------


def test_asyncpg_s_connection_is_broken_by_another_loop(postgres: Postgres) -> None:
    """What the check is for. One after the other here, so that it is the same each time; at once it may crash."""
    mine, other = asyncio.new_event_loop(), asyncio.new_event_loop()
    connection: Any = mine.run_until_complete(asyncpg.connect(postgres.admin_url, timeout=10))
    try:
        with pytest.raises(RuntimeError, match="different loop"):
            other.run_until_complete(connection.fetchval(PID))
        with pytest.raises(asyncpg.InterfaceError, match="another operation"):
            mine.run_until_complete(connection.fetchval(PID))
    finally:
        connection.terminate()
        mine.run_until_complete(asyncio.sleep(0))
        other.close()
        mine.close()


# --- every way in ---------------------------------------------------------------------------------------------------

WAYS_IN: dict[str, Use] = {
    "open": lambda t: t.open(),
    "close": lambda t: t.close(),
    "async with": entered,
    "session": lambda t: entered(t.session("acme")),
    "transaction": lambda t: entered(t.transaction("acme")),
    "scope": lambda t: entered(t.scope("acme")),
    "run": lambda t: t.run("acme", lambda: None),
    "each": lambda t: anext(t.each()),
    "fetch_value": lambda t: t.fetch_value(PID, tenant="acme"),
    "fetch_all": lambda t: t.fetch_all(PID, tenant="acme"),
    "fetch_one": lambda t: t.fetch_one(PID, tenant="acme"),
    "execute": lambda t: t.execute(PID, tenant="acme"),
    "run_housekeeping": lambda t: t.run_housekeeping(),
    "tenants.get": lambda t: t.tenants.get("acme"),
    "tenants.create": lambda t: t.tenants.create("globex"),
    "tenants.suspend": lambda t: t.tenants.suspend("acme", reason="x"),
    "tenants.list": lambda t: t.tenants.list(),
    "tenants.iterate": lambda t: anext(aiter(t.tenants.iterate())),
    "keys.list": lambda t: t.keys.list("acme"),
    "keys.issue": lambda t: t.keys.issue("acme", name="x"),
    "quotas.usage": lambda t: t.quotas.usage("acme"),
    "quotas.consume": lambda t: t.quotas.consume("acme", "users"),
    "quotas.hold": lambda t: entered(t.quotas.hold("acme", "users")),
    "domains.list": lambda t: t.domains.list("acme"),
    "audit.events": lambda t: t.audit.events(),
    "audit.verify": lambda t: t.audit.verify(),
    "tiers.in_force": lambda t: t.tiers.in_force(),
    "tiers.weights": lambda t: t.tiers.weights(),
    "metrics.history": lambda t: t.metrics.history("acme"),
    "sampler.run": lambda t: t.internals.sampler.run(),
    "registry.find": lambda t: t.internals.registry.find("acme"),
    "provisioner.reconcile": lambda t: t.internals.provisioner.reconcile(),
    "provisioner.prepare_server": lambda t: t.internals.provisioner.prepare_server("default"),
    "provisioner.end_excessive_sessions": lambda t: t.internals.provisioner.end_excessive_sessions(),
    "watchdog.run": lambda t: t.internals.provisioner.watchdog.run(),
    "watchdog.watch": lambda t: t.internals.provisioner.watchdog.watch(every=60),
    "watchdog.close": lambda t: t.internals.provisioner.watchdog.close(),
    "secrets.finish_rotations": lambda t: t.secrets.finish_rotations(),
    "directory.tenant": lambda t: t.internals.directory.tenant("acme"),
    "directory.open": lambda t: t.internals.directory.open(),
    "directory.close": lambda t: t.internals.directory.close(),
    "sampler.run_every": lambda t: t.internals.sampler.run_every(60),
    "quotas.close": lambda t: t.quotas.close(),
    "metrics.active_tenants": lambda t: t.metrics.active_tenants(),
    "directory.flush": lambda t: t.internals.directory.flush(),
    "router.close": lambda t: t.internals.router.close(timeout=1),
    "servers.connect_admin": lambda t: t.internals.servers["default"].connect_admin(),
    "control.connect": lambda t: entered(t.internals.control.connect()),
    "control.transaction": lambda t: entered(t.internals.control.transaction()),
    "control.upgrade": lambda t: t.internals.control.upgrade(),
    "control.close": lambda t: t.internals.control.close(),
    "events.drain": lambda t: t.events.drain(),
    "events.cancel": lambda t: t.events.cancel(),
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def refusing(postgres: Postgres) -> AsyncIterator[Tenancy]:
    """An open ``Tenancy`` with the tenant acme for all ways in, since each leaves it as it was."""
    prefix = f"loops{postgres.worker}"
    async with lasting_control_database(postgres, prefix) as control_url:
        config = TenancyConfig(
            control_url=control_url,
            servers={"default": postgres.admin_url},
            metadata=Base.metadata,
            encryption_keys={"1": b"k" * 32},
            name_prefix=prefix,
        )
        async with Tenancy(config) as opened:
            await opened.tenants.create("acme")
            yield opened
    await postgres.drop_all(prefix)


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("name", WAYS_IN)
async def test_every_way_in_is_refused_elsewhere(refusing: Tenancy, name: str) -> None:
    """From another loop in another thread; the pooled connection is the same as before, and works."""
    tenancy = refusing
    await tenancy.internals.provisioner.end_excessive_sessions()  # keeps its connection, like the pool
    before = await pid_of(tenancy)
    entries = await tenancy.audit.events()
    assert type(await in_a_thread(WAYS_IN[name], tenancy)) is WrongEventLoopError
    assert await pid_of(tenancy) == before
    assert await tenancy.audit.events() == entries


async def test_what_is_answered_from_memory_is_refused_elsewhere(tenancy: Tenancy, acme: CreatedTenant) -> None:
    """Keys, leased quotas, rates, a router's parts, and what a part forgets; with a loop there or without."""
    await tenancy.quotas.set("acme", {"requests_per_second": 5})
    tenant = await tenancy.tenants.get("acme")
    lease = tenancy.quotas.leased(tenant, "api_calls", block=2)
    await lease.consume()
    held = lease.unspent
    assert held > 0
    request = ConnectionRequest("another process", "default", tenant.id, has_none=True)
    refused: dict[str, Callable[[], object]] = {
        "peek": lambda: tenancy.internals.directory.peek(acme.api_key),
        "peek_tenant": lambda: tenancy.internals.directory.peek_tenant("acme"),
        "invalidate": lambda: tenancy.internals.directory.invalidate(tenant.id),
        "revalidate": tenancy.internals.directory.revalidate,
        "quotas.invalidate": lambda: tenancy.quotas.invalidate(tenant.id),
        "give_up": lambda: tenancy.internals.router.give_up(request),
        "schema_changed": lambda: tenancy.internals.router.schema_changed(tenant.id),
        "try_consume": lease.try_consume,
        "rates": lambda: tenancy.internals.rates.acquire(tenant),
        "retire": lambda: tenancy.internals.router.retire(tenant.id),
    }
    for call in refused.values():
        with pytest.raises(WrongEventLoopError):
            await asyncio.to_thread(call)
    asynchronous: list[Use] = [
        lambda t: t.internals.directory.authenticate(acme.api_key),
        lambda _: lease.consume(),
        lambda _: lease.release(),
        lambda t: entered(t.internals.router.session(tenant)),
        lambda t: entered(t.internals.router.connection(tenant)),
        lambda t: entered(t.internals.router.lease(tenant)),
    ]
    before = await pid_of(tenancy)
    for use in asynchronous:
        assert type(await in_a_thread(use, tenancy)) is WrongEventLoopError
    assert (await pid_of(tenancy), lease.unspent) == (before, held)
    await lease.release()


# --- what was opened in its own loop --------------------------------------------------------------------------------


async def test_a_session_is_refused_elsewhere_and_goes_on_at_home(tenancy: Tenancy, acme: CreatedTenant) -> None:
    """Statements, the ends of its transaction, and its own end: what it has written is committed at home after all."""
    async with tenancy.session("acme") as session:
        pid = await session.scalar(text(PID))
        session.add(Note(body="written"))
        await session.flush()
        uses: list[Use] = [
            lambda _: session.scalar(text(PID)),
            lambda _: session.stream(select(Note)),
            lambda _: session.get(Note, 1, populate_existing=True),
            lambda _: session.commit(),
            lambda _: session.rollback(),
            lambda _: session.reset(),
            lambda _: session.invalidate(),
            lambda _: session.close(),
        ]
        for use in uses:
            assert type(await in_a_thread(use, tenancy)) is WrongEventLoopError
        assert await session.scalar(text(PID)) == pid
        await session.commit()
    assert await tenancy.fetch_value("SELECT count(*) FROM notes", tenant="acme") == 2
    assert await pid_of(tenancy) == pid


async def test_the_end_of_a_block_is_refused_elsewhere_and_happens_at_home(
    tenancy: Tenancy, acme: CreatedTenant
) -> None:
    """``async with`` that is left by hand in another loop: neither a lease nor a connection is lost."""
    tenant = await tenancy.tenants.get("acme")
    for scope in (
        tenancy.session("acme"),
        tenancy.internals.router.connection(tenant),
        tenancy.internals.router.lease(tenant),
    ):
        opened: Any = await scope.__aenter__()
        if hasattr(opened, "execute"):
            await opened.execute(text(PID))
        leave = partial(scope.__aexit__, None, None, None)
        assert type(await in_a_thread(lambda _, leave=leave: leave(), tenancy)) is WrongEventLoopError  # type: ignore[misc]
        assert tenancy.internals.router.statistics().leased == 1
        await leave()
        statistics = tenancy.internals.router.statistics()
        assert (statistics.leased, statistics.servers["default"].in_use) == (0, 0)


async def test_rows_of_a_stream_are_refused_elsewhere(tenancy: Tenancy, acme: CreatedTenant) -> None:
    """As soon as more are asked for than were read; at home it goes on."""
    async with tenancy.session("acme") as session:
        rows = await session.stream_scalars(text("SELECT generate_series(1, 2000)"))
        first = await rows.fetchmany(10)

        async def rest(_: Tenancy) -> None:
            async for _row in rows:
                pass

        assert type(await in_a_thread(rest, tenancy)) is WrongEventLoopError
        assert first == list(range(1, 11))
        assert await session.scalar(text(PID)) == await session.scalar(text(PID))


async def test_a_connection_is_refused_elsewhere_and_goes_on_at_home(tenancy: Tenancy, acme: CreatedTenant) -> None:
    """SQLAlchemy's, with and without a transaction, and asyncpg's own within it."""
    tenant = await tenancy.tenants.get("acme")
    before = await pid_of(tenancy)
    async with tenancy.internals.router.lease(tenant) as engine:
        for isolation in ("READ COMMITTED", "AUTOCOMMIT"):
            async with engine.execution_options(isolation_level=isolation).connect() as connection:
                for use in uses_of(engine, connection, (await connection.get_raw_connection()).driver_connection):
                    assert type(await in_a_thread(use, tenancy)) is WrongEventLoopError
                assert await connection.scalar(text(PID)) == before
                await connection.commit()
    assert await pid_of(tenancy) == before


def uses_of(engine: AsyncEngine, connection: AsyncConnection, driver: Any) -> list[Use]:
    return [
        lambda _: connection.scalar(text(PID)),
        lambda _: connection.invalidate(),
        lambda _: connection.close(),
        lambda _: driver.fetchval(PID),
        lambda _: driver.execute(PID),
        lambda _: driver.prepare(PID),
        lambda _: entered(driver.transaction()),
        lambda _: engine.dispose(),
        lambda _: entered(engine.connect()),
    ]


def test_another_loop_of_the_same_thread_is_refused(tenancy_config: TenancyConfig) -> None:
    """As in scripts that call ``asyncio.run`` while a loop of their own holds the ``Tenancy``."""
    mine, other = asyncio.new_event_loop(), asyncio.new_event_loop()
    tenancy = Tenancy(tenancy_config)
    try:
        mine.run_until_complete(tenancy.open(initialise=True))
        created = mine.run_until_complete(tenancy.tenants.create("acme"))
        pid = mine.run_until_complete(pid_of(tenancy))
        session: Any = mine.run_until_complete(tenancy.session("acme").__aenter__())
        mine.run_until_complete(session.execute(text(PID)))
        for use in (
            lambda: pid_of(tenancy),
            lambda: tenancy.internals.directory.authenticate(created.api_key),
            lambda: session.execute(text(PID)),
            session.commit,
            tenancy.open,
            tenancy.close,
        ):
            with pytest.raises(WrongEventLoopError):
                other.run_until_complete(use())
        mine.run_until_complete(session.close())
        assert mine.run_until_complete(pid_of(tenancy)) == pid
    finally:
        mine.run_until_complete(tenancy.close(timeout=1))
        mine.run_until_complete(asyncio.sleep(0.01))
        other.close()
        mine.close()


# --- after a fork ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protected", [True, False])
async def test_a_fork_leaves_the_parent_s_connections_alone(
    tenancy: Tenancy, tenancy_config: TenancyConfig, postgres: Postgres, protected: bool
) -> None:
    """However the child ends. It may open the same object for itself, and it keeps no session of a parent that ended.

    Without the protection the parent loses sessions, or nothing wakes its loop any more.
    """
    await tenancy.tenants.create("acme" if not protected else "globex")
    urls = {
        "TENANCY_CONTROL_URL": tenancy_config.control_url + "?application_name=tenancy-forks",
        "TENANCY_SERVERS": f"default={postgres.admin_url}?application_name=tenancy-forks",
    }
    outcome: tuple[int | None, bytes] = (0, b"")
    log = b""
    # what breaks without the protection depends on who wakes first, the parent or the child
    for _ in range(1 if protected else 5):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-W", "ignore::DeprecationWarning", "-m", "tests.support.forked", postgres.admin_url),
            *([] if protected else ["off"]),
            cwd=ROOT,
            env=environment(**{**variables(tenancy_config), **urls}),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        wrong, log = await asyncio.wait_for(process.communicate(), 120)
        outcome = (process.returncode, wrong)
        if outcome != (0, b""):
            break
    assert (outcome == (0, b"")) is protected, (outcome[1] + log).decode()


# --- opening and closing --------------------------------------------------------------------------------------------


def test_one_loop_after_the_other(tenancy_config: TenancyConfig, empty_url: str) -> None:
    """``asyncio.run`` as often as one likes, as long as it is closed in between; also after a failure to open."""
    tenancy = Tenancy(tenancy_config.replace(control_url=empty_url))
    received: list[str] = []

    async def listen(event: TenantUpdated) -> None:
        received.append(event.slug)

    tenancy.events.subscribe(TenantUpdated, listen)

    async def main(slug: str) -> str:
        async with tenancy:
            await asyncio.gather(tenancy.open(), tenancy.open())
            assert tenancy.loop is asyncio.get_running_loop()
            await tenancy.tenants.create(slug)
            await tenancy.tenants.update(slug, metadata={"x": 1})
            return str(await tenancy.fetch_value("SELECT current_user::text", tenant=slug))

    with pytest.raises(Exception, match="tenancy init"):
        asyncio.run(tenancy.open())
    asyncio.run(initialised(tenancy))
    assert len({asyncio.run(main("acme")), asyncio.run(main("globex"))}) == 2
    assert received == ["acme", "globex"]
    with pytest.raises(NotOpenError):
        _ = tenancy.loop


async def initialised(tenancy: Tenancy) -> None:
    await tenancy.open(initialise=True)
    await tenancy.close()


async def test_of_many_threads_that_open_at_once_one_gets_it(tenancy_config: TenancyConfig) -> None:
    """The others are refused at once, and nothing is opened twice."""
    await initialised(Tenancy(tenancy_config))
    tenancy = Tenancy(tenancy_config)
    begin, refused = threading.Barrier(4), threading.Semaphore(0)
    outcomes: list[str] = []

    async def main() -> None:
        begin.wait(10)
        try:
            await tenancy.open()
        except WrongEventLoopError:
            outcomes.append("refused")
            refused.release()
            return
        outcomes.append("opened")
        for _ in range(3):
            assert await asyncio.to_thread(refused.acquire, timeout=20)
        await tenancy.close()

    await asyncio.gather(*(asyncio.to_thread(asyncio.run, main()) for _ in range(4)))
    assert sorted(outcomes) == ["opened", "refused", "refused", "refused"]
    assert not tenancy.is_open


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("again", ["open", "close"])
def test_what_belonged_to_a_closed_loop_is_given_up(
    tenancy_config: TenancyConfig, caplog: pytest.LogCaptureFixture, again: str
) -> None:
    """Nothing hangs: the next loop that opens it starts afresh, with a warning that says what was wrong."""
    tenancy = Tenancy(tenancy_config)

    async def careless() -> int:
        await tenancy.__aenter__()
        await tenancy.tenants.create("acme")
        return await pid_of(tenancy)

    asyncio.run(initialised(tenancy))
    pid = asyncio.run(careless())
    caplog.clear()

    async def careful() -> None:
        with pytest.raises(WrongEventLoopError):
            await pid_of(tenancy)
        async with asyncio.timeout(HANGS):
            if again == "close":
                await tenancy.close()
                assert not tenancy.is_open
            async with tenancy:
                assert await pid_of(tenancy) != pid
            assert not tenancy.is_open

    with caplog.at_level(logging.WARNING, "tenancy_orm"):
        asyncio.run(careful())
    assert [record.message[:39] for record in caplog.records if "closed" in record.message] == [
        "the event loop of an open Tenancy was c"
    ]


# --- remedies -------------------------------------------------------------------------------------------------------


async def test_a_worker_thread_has_the_loop_do_it(tenancy: Tenancy, acme: CreatedTenant) -> None:
    """What the error says: in a thread of ``tenancy.run``, which has the tenant bound, and in anyio's threads."""
    pid = await pid_of(tenancy)

    def by_asyncio() -> int:
        with pytest.raises(WrongEventLoopError):
            asyncio.run(tenancy.fetch_value(PID))
        return int(asyncio.run_coroutine_threadsafe(tenancy.fetch_value(PID), tenancy.loop).result(10))

    def by_anyio() -> int:
        return int(anyio.from_thread.run(tenancy.fetch_value, PID))

    assert await tenancy.run("acme", by_asyncio) == pid
    async with tenancy.scope("acme"):
        assert await anyio.to_thread.run_sync(by_anyio) == pid


@contextlib.asynccontextmanager
async def served(app: FastAPI, key: str) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://x", headers={"X-API-Key": key}) as client:
        yield client


async def test_a_plain_def_endpoint_breaks_nothing(tenancy: Tenancy, acme: CreatedTenant) -> None:
    """Starlette runs it in a thread. Two hundred at once, while the loop uses the tenant's connections."""
    app = FastAPI()
    app.add_middleware(TenancyMiddleware, tenancy=tenancy)

    @app.get("/wrong")
    def wrong() -> str:
        try:
            return str(asyncio.run(tenancy.fetch_value(PID)))
        except WrongEventLoopError as exc:
            return type(exc).__name__

    @app.get("/right")
    def right() -> int:
        return int(anyio.from_thread.run(tenancy.fetch_value, PID))

    async def at_home() -> int:
        async with tenancy.session("acme") as session:
            assert len((await session.scalars(select(Note))).all()) == 1
            return int((await session.scalar(text(PID))) or 0)

    # as many connections as there may be, idle in the pool
    pids = set(await asyncio.gather(*(at_home() for _ in range(50))))
    async with served(app, acme.api_key) as client:
        answers, later = await asyncio.gather(
            asyncio.gather(*(client.get("/wrong") for _ in range(200))),
            asyncio.gather(*(at_home() for _ in range(200))),
        )
        assert {answer.json() for answer in answers} == {"WrongEventLoopError"}
        assert set(later) <= pids
        assert {(await client.get("/right")).json() for _ in range(5)} <= pids
    assert tenancy.internals.router.statistics().servers["default"].idle == len(pids)


# --- the check itself -----------------------------------------------------------------------------------------------


async def test_a_home_is_the_running_loop_in_its_thread() -> None:
    """Made outside of a loop, it is the first that asks; without a loop there is no home."""
    home = HomeLoop()
    home.check()
    home.check_thread()
    with pytest.raises(WrongEventLoopError):
        await asyncio.to_thread(home.check)
    with pytest.raises(WrongEventLoopError):
        await asyncio.to_thread(home.check_thread)
    unsettled = await asyncio.to_thread(HomeLoop)
    with pytest.raises(WrongEventLoopError):
        await asyncio.to_thread(unsettled.check)
    unsettled.check()
    assert unsettled.loop is asyncio.get_running_loop()
    assert not unsettled.is_closed
