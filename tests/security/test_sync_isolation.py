"""The layers of isolation hold for asynchronous and for synchronous code alike: each test runs over both."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.context import bind
from tenancy_orm.errors import (
    AdmissionEndedError,
    CheckoutTimeoutError,
    ConnectionLimitError,
    CrossTenantError,
    LoginRefusedError,
    MarkerMismatchError,
    NotOpenError,
    ServerUnavailableError,
    TenantMaintenanceError,
    TenantNotFoundError,
    TenantSuspendedError,
)
from tenancy_orm.events import CheckoutTimedOut, ConnectionEvicted, IsolationIncident
from tenancy_orm.servers.settings import PINNED
from tenancy_orm.tenant import Tenant
from tests.support.models import Note
from tests.support.postgres import Postgres
from tests.support.proxy import Proxy, proxied
from tests.support.waiting import until

T = TypeVar("T")

_SETTINGS = "SELECT name, setting FROM pg_settings WHERE lower(name) = ANY (:names) ORDER BY name"


@dataclass
class Side:
    """A ``Tenancy``, used by asynchronous or by synchronous code."""

    tenancy: Tenancy
    is_sync: bool

    async def value(self, sql: str, parameters: dict[str, Any] | None = None, **options: Any) -> Any:
        """One value of a tenant."""
        if self.is_sync:
            return await asyncio.to_thread(self.tenancy.sync.fetch_value, sql, parameters, **options)
        return await self.tenancy.fetch_value(sql, parameters, **options)

    async def rows(self, sql: str, parameters: dict[str, Any] | None = None, **options: Any) -> list[Any]:
        """All rows of a tenant."""
        if self.is_sync:
            return await asyncio.to_thread(self.tenancy.sync.fetch_all, sql, parameters, **options)
        return await self.tenancy.fetch_all(sql, parameters, **options)

    @asynccontextmanager
    async def session(self, *args: Any, **options: Any) -> AsyncIterator[Work]:
        """A session; each piece of work on it may be done in another thread."""
        if not self.is_sync:
            async with self.tenancy.session(*args, **options) as session:
                yield session.run_sync
            return
        opened = await asyncio.to_thread(self.tenancy.sync.session, *args, **options)
        inner = await asyncio.to_thread(opened.__enter__)

        async def work(function: Callable[[Session], Any]) -> Any:
            return await asyncio.to_thread(function, inner)

        try:
            yield work
        finally:
            await asyncio.to_thread(opened.__exit__, None, None, None)


Work = Callable[[Callable[[Session], Any]], Any]


def value(sql: str) -> Callable[[Session], Any]:
    """Work: run a statement."""
    return lambda session: session.scalar(text(sql))


@pytest.fixture
async def proxy(postgres: Postgres) -> AsyncIterator[Proxy]:
    """The way to tenants' databases."""
    async with proxied(postgres.admin_url) as opened:
        yield opened


@pytest.fixture
def tenancy_config(tenancy_config: TenancyConfig, postgres: Postgres, proxy: Proxy) -> TenancyConfig:
    """Two connections for a tenant, which are waited for a short while."""
    return tenancy_config.replace(
        servers={"default": proxy.url(postgres.admin_url)},
        pool={"max_connections": 3, "max_connections_per_tenant": 2, "checkout_timeout": 0.3, "connect_timeout": 5},
    )


@pytest.fixture(params=["asynchronous", "synchronous"])
async def side(request: pytest.FixtureRequest, tenancy: Tenancy) -> Side:
    """Two tenants."""
    for slug in ("acme", "globex"):
        await tenancy.tenants.create(slug)
    return Side(tenancy, request.param == "synchronous")


async def test_a_session_is_its_tenants_alone(side: Side) -> None:
    """By name, by status, by binding, by object: what is refused, and by which error."""
    tenancy = side.tenancy
    incidents: list[IsolationIncident] = []
    tenancy.events.subscribe(IsolationIncident, incidents.append)
    with pytest.raises(TenantNotFoundError):
        await side.value("SELECT 1", tenant="nobody")
    async with side.session("globex") as globex, side.session("acme") as acme:
        note = await globex(_flushed)
        with pytest.raises(CrossTenantError, match="adding a Note"):
            await acme(lambda session: session.add(note))
        with pytest.raises(CrossTenantError, match="merging a Note"):
            await acme(lambda session: session.merge(note))
        await acme(lambda session: session.rollback())
        async with tenancy.scope("acme"):
            with pytest.raises(CrossTenantError):
                await side.value("SELECT 1", tenant="globex")
            # one that was opened before, and what is below it
            for use in (value("SELECT 1"), _raw, lambda session: session.commit()):
                with pytest.raises(CrossTenantError, match="using a connection"):
                    await globex(use)
            assert await acme(value("SELECT count(*) FROM notes")) == 0
        await globex(lambda session: session.rollback())
        ended = globex
    with pytest.raises(NotOpenError):
        await ended(value("SELECT 1"))
    assert {incident.kind for incident in incidents} == {"CrossTenantError"}
    await tenancy.tenants.suspend("acme", reason="x")
    with pytest.raises(TenantSuspendedError):
        await side.value("SELECT 1", tenant="acme")
    await tenancy.tenants.activate("acme")
    await tenancy.tenants.start_maintenance("acme")
    with pytest.raises(TenantMaintenanceError):
        await side.value("SELECT 1", tenant="acme")
    assert await side.value("SELECT 1", tenant="acme", operator=True) == 1


def _flushed(session: Session) -> Note:
    session.add(note := Note(body="of globex"))
    session.flush()
    session.expunge(note)
    return note


def _raw(session: Session) -> None:
    raw: Any = session.connection().connection.dbapi_connection
    cursor = raw.cursor()
    cursor.execute("SELECT 1")


async def test_a_revoked_key_ends_what_was_admitted_with_it(side: Side) -> None:
    """Also a session that is open: its next statement, its commit, and the next session."""
    issued = await side.tenancy.keys.issue("acme")
    credential = await side.tenancy.internals.directory.authenticate(issued.text)
    with bind(credential.tenant):
        async with side.session() as work:
            await work(lambda session: session.add(Note(body="x")))
            await work(lambda session: session.flush())
            await side.tenancy.keys.revoke(issued.key_id)
            await until(lambda: _has_ended(credential.tenant))
            for use in (value("SELECT 1"), lambda session: session.commit()):
                with pytest.raises(AdmissionEndedError):
                    await work(use)
        with pytest.raises(AdmissionEndedError):
            await side.value("SELECT 1")
    assert await side.value("SELECT count(*) FROM notes", tenant="acme") == 0


@pytest.mark.parametrize("autocommit", ["none", "driver", "option"])
async def test_a_session_that_is_closed_under_another_binding_gives_its_slot_back(side: Side, autocommit: str) -> None:
    """Whatever has to be put right on its connection first."""

    def begin(session: Session) -> None:
        options = {"isolation_level": "AUTOCOMMIT"} if autocommit == "option" else {}
        raw: Any = session.connection(execution_options=options).connection.dbapi_connection
        if autocommit == "driver":
            session.commit()
            raw.autocommit = True
        session.scalar(text("SELECT 1"))

    async with side.session("globex") as globex:
        await globex(begin)
        async with side.tenancy.scope("acme"):
            await globex(lambda session: session.close())
    statistics = side.tenancy.internals.router.statistics
    await until(lambda: statistics().servers["default"].open == statistics().servers["default"].idle)


@pytest.mark.parametrize("side", ["synchronous"], indirect=True)
async def test_a_roll_back_lets_no_other_thread_use_the_connection(side: Side) -> None:
    """While one thread ends the transaction, which any may do, another one that is bound elsewhere is refused."""
    reached, go_on = threading.Event(), threading.Event()

    def roll_back(session: Session) -> None:
        raw: Any = session.connection().connection.dbapi_connection
        inner = raw._rollback_gen

        def slow() -> Any:
            reached.set()
            go_on.wait(10)
            return inner()

        raw._rollback_gen = slow
        session.rollback()

    def use(raw: Any) -> None:
        with side.tenancy.sync.scope("acme"), pytest.raises(CrossTenantError):
            raw.wait(iter(()))

    async with side.session("globex") as globex:
        raw = await globex(lambda session: session.connection().connection.dbapi_connection)
        rolling = asyncio.create_task(globex(roll_back))
        await asyncio.to_thread(reached.wait, 10)
        try:
            await asyncio.to_thread(use, raw)
        finally:
            go_on.set()
            await rolling


def _has_ended(tenant: Tenant) -> bool:
    assert tenant.admission is not None
    try:
        tenant.admission.check()
    except AdmissionEndedError:
        return True
    return False


async def test_a_connection_leads_to_the_tenants_own_database(side: Side, postgres: Postgres) -> None:
    """It starts with the server's settings, whatever the role has set; and one with another marker is refused."""
    tenancy = side.tenancy
    placement = (await tenancy.tenants.get("acme")).placement
    assert placement is not None
    async with postgres.connect() as admin:
        for setting in ("search_path TO pg_temp", "statement_timeout TO '1ms'", "DateStyle TO 'German'"):
            await admin.execute(f'ALTER ROLE "{placement.role}" SET {setting}')
        of_globex = await side.rows(_SETTINGS, {"names": sorted(PINNED)}, tenant="globex")
        assert await side.rows(_SETTINGS, {"names": sorted(PINNED)}, tenant="acme") == of_globex
        other = Side(tenancy, not side.is_sync)
        assert await other.rows(_SETTINGS, {"names": sorted(PINNED)}, tenant="acme") == of_globex
        tag = tenancy.internals.leases.lease("default").tag
        assert await side.value("SHOW application_name", tenant="acme") == f"tenancy/{tag}"
        tenancy.internals.router.retire((await tenancy.tenants.get("acme")).id)
        incidents: list[IsolationIncident] = []
        tenancy.events.subscribe(IsolationIncident, incidents.append)
        await admin.execute(f"COMMENT ON DATABASE \"{placement.database}\" IS 'tenancy:another'")
        with pytest.raises(MarkerMismatchError, match="acme") as caught:
            await side.value("SELECT 1", tenant="acme")
        assert (caught.value.database, caught.value.found) == (placement.database, "tenancy:another")
        assert [incident.kind for incident in incidents] == ["MarkerMismatchError"]
    await until(lambda: not tenancy.internals.router.statistics().servers["default"].closing)
    assert tenancy.internals.router.statistics().servers["default"].in_use == 0


async def test_slots_are_waited_for_and_given_back(side: Side, postgres: Postgres) -> None:
    """At the tenant's limit, at the process's, and at PostgreSQL's; an idle connection of another tenant is closed."""
    tenancy = side.tenancy
    timed_out: list[CheckoutTimedOut] = []
    evicted: list[ConnectionEvicted] = []
    tenancy.events.subscribe(CheckoutTimedOut, timed_out.append)
    tenancy.events.subscribe(ConnectionEvicted, evicted.append)
    async with side.session("acme") as one, side.session("acme") as two, side.session("globex") as three:
        assert [await work(value("SELECT 1")) for work in (one, two)] == [1, 1]
        with pytest.raises(CheckoutTimeoutError) as caught:
            await side.value("SELECT 1", tenant="acme")
        assert (caught.value.limit, caught.value.setting) == (2, "pool.max_connections_per_tenant")
        assert await three(value("SELECT 1")) == 1
        with pytest.raises(CheckoutTimeoutError) as caught:
            await side.value("SELECT 1", tenant="globex")
        assert (caught.value.limit, caught.value.setting) == (3, "pool.max_connections")
    assert [event.slug for event in timed_out] == ["acme", "globex"]
    statistics = tenancy.internals.router.statistics
    await until(lambda: statistics().servers["default"].idle == 3)
    async with side.session("globex") as one, side.session("globex") as two:
        assert [await work(value("SELECT 1")) for work in (one, two)] == [1, 1]
    assert [event.slug for event in evicted] == ["acme"]
    acme = await tenancy.tenants.get("acme")
    assert acme.placement is not None
    tenancy.internals.router.retire(acme.id)
    async with postgres.connect() as admin:
        role = acme.placement.role
        await until(lambda: _has_none(admin, role))
        await admin.execute(f'ALTER ROLE "{role}" CONNECTION LIMIT 0')
        with pytest.raises(ConnectionLimitError):
            await side.value("SELECT 1", tenant="acme")
        await admin.execute(f'ALTER ROLE "{role}" CONNECTION LIMIT 5')
        assert await side.value("SELECT 1", tenant="acme") == 1
    counts = statistics().servers["default"]
    assert (counts.opening, counts.waiting) == (0, 0)


async def _has_none(admin: Any, role: str) -> bool:
    return not await admin.fetchval("SELECT count(*) FROM pg_stat_activity WHERE usename = $1", role)


async def test_failures_of_the_server_cost_no_slot(side: Side, postgres: Postgres, proxy: Proxy) -> None:
    """A connection that ended while it was idle, one that ends in use, another password, a server that is away."""
    tenancy = side.tenancy
    acme = await tenancy.tenants.get("acme")
    assert acme.placement is not None
    statistics = tenancy.internals.router.statistics
    terminate = "SELECT pg_terminate_backend($1, 5000)"
    async with postgres.connect() as admin:
        pid = await side.value("SELECT pg_backend_pid()", tenant="acme")
        await until(lambda: statistics().servers["default"].idle == 1)
        assert await side.value("SELECT pg_backend_pid()", tenant="acme") == pid
        assert await admin.fetchval(terminate, pid)
        assert await side.value("SELECT pg_backend_pid()", tenant="acme") != pid
        async with side.session("acme") as work:
            await admin.fetchval(terminate, await work(value("SELECT pg_backend_pid()")))
            with pytest.raises(DBAPIError) as lost:
                await work(value("SELECT 1"))
            assert lost.value.connection_invalidated
        assert await side.value("SELECT 1", tenant="acme") == 1

        await tenancy.secrets.rotate_password("acme")
        assert await side.value("SELECT 1", tenant="acme") == 1
        await admin.execute(f"ALTER ROLE \"{acme.placement.role}\" PASSWORD 'another'")
        tenancy.internals.router.retire(acme.id)
        with pytest.raises(LoginRefusedError) as refused:
            await side.value("SELECT 1", tenant="acme")
        assert refused.value.sqlstate == "28P01"
        assert refused.value.__cause__ is None or "another" not in repr(vars(refused.value.__cause__))
        await tenancy.secrets.rotate_password("acme")
        assert await side.value("SELECT 1", tenant="acme") == 1
    proxy.refuse()
    with pytest.raises((ServerUnavailableError, DBAPIError)):
        await side.value("SELECT 1", tenant="acme")
    with pytest.raises(ServerUnavailableError) as away:
        await side.value("SELECT 1", tenant="globex")
    assert (away.value.tenant, away.value.server) == ("globex", "default")
    proxy.restore()

    refusals: list[float | None] = []

    async def answers() -> bool:
        # refused at once until the server was asked again
        try:
            return bool(await side.value("SELECT 1", tenant="globex"))
        except ServerUnavailableError as exc:
            refusals.append(exc.retry_after)
            return False

    await until(answers)
    assert all(refusals)
    await until(lambda: statistics().servers["default"].open == statistics().servers["default"].idle)


@pytest.mark.parametrize("turns", [0, 1, 2, 20])
async def test_a_connection_of_whose_end_only_the_message_came_is_not_used(
    side: Side, postgres: Postgres, proxy: Proxy, turns: int
) -> None:
    """The server's last message and the end of the stream may come apart; in between it is no idle connection."""
    statistics = side.tenancy.internals.router.statistics
    pid = await side.value("SELECT pg_backend_pid()", tenant="acme")
    await until(lambda: statistics().servers["default"].idle == 1)
    proxy.hold_ends()
    before = proxy.forwarded
    async with postgres.connect() as admin:
        await admin.execute(f"SELECT pg_terminate_backend({pid})")
    while proxy.forwarded == before:  # noqa: ASYNC110 - turn by turn
        await asyncio.sleep(0)
    for _ in range(turns):
        await asyncio.sleep(0)
    assert await side.value("SELECT pg_backend_pid()", tenant="acme") != pid
    proxy.restore()
    await until(lambda: statistics().servers["default"].open == statistics().servers["default"].idle == 1)


async def test_a_statement_that_a_migration_outdates_is_run_all_the_same(side: Side, postgres: Postgres) -> None:
    """PostgreSQL refuses one that was prepared before ("cached plan must not change result type")."""
    acme = await side.tenancy.tenants.get("acme")
    assert acme.placement is not None
    async with postgres.connect(acme.placement.database) as owner:
        for number in range(3):
            for _ in range(7):
                assert await side.rows("SELECT * FROM notes", tenant="acme") == []
            await owner.execute(f"ALTER TABLE notes ADD COLUMN more{number} int")
        assert await side.rows("SELECT * FROM notes", tenant="acme") == []


async def test_a_server_that_does_not_answer_is_not_waited_for_for_ever(
    tenancy_config: TenancyConfig, proxy: Proxy
) -> None:
    """``sessions.answer_timeout``: the connection is given up, and its slot is free again."""
    tenancy = Tenancy(tenancy_config.replace(sessions={"answer_timeout": 0.5}))
    await tenancy.open(initialise=True)
    try:
        await tenancy.tenants.create("acme")
        for side in (Side(tenancy, False), Side(tenancy, True)):
            async with side.session("acme") as work:
                assert await work(value("SELECT 1")) == 1
                proxy.swallow()
                with pytest.raises((DBAPIError, TimeoutError)):
                    await work(value("SELECT 1"))
                proxy.restore()
            assert await side.value("SELECT 1", tenant="acme") == 1
    finally:
        await tenancy.close()


async def test_a_reset_leaves_nothing_of_a_session(tenancy_config: TenancyConfig) -> None:
    """``pool.full_reset``: settings, temporary tables and locks of a session end with it."""
    tenancy = Tenancy(tenancy_config.replace(pool={"full_reset": True, "max_connections_per_tenant": 1}))
    await tenancy.open(initialise=True)
    try:
        await tenancy.tenants.create("acme")
        for side in (Side(tenancy, False), Side(tenancy, True)):
            async with side.session("acme") as work:
                pid = await work(value("SELECT pg_backend_pid()"))
                await work(lambda session: session.execute(text("SET timezone TO 'Asia/Tokyo'")))
                await work(lambda session: session.commit())
            assert await side.rows("SELECT pg_backend_pid(), current_setting('timezone')", tenant="acme") != [
                (pid, "Asia/Tokyo")
            ]
            async with side.session("acme") as work:
                assert await work(value("SELECT pg_backend_pid()")) == pid
                assert await work(lambda session: list(session.scalars(select(Note)))) == []
            # the slot is the other kind's now
    finally:
        await tenancy.close()
