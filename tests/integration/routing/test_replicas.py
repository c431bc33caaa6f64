"""``session(read_only=True, replica=True)``: on two servers with streaming replication."""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar
from wsgiref.util import setup_testing_defaults

import pytest
from sqlalchemy import insert, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.asgi import TenancyMiddleware
from tenancy_orm.config import PoolConfig, ServerAddresses, Tier
from tenancy_orm.errors import ConfigurationError, LoginRefusedError, MarkerMismatchError, ReadOnlyError
from tenancy_orm.events import Event, IsolationIncident, ReplicaLost, ReplicaPassedOver, ReplicaRestored
from tenancy_orm.postgres.connections import Connection
from tenancy_orm.wsgi import TenancyWSGIMiddleware
from tests.support.asgi import request as asgi_request
from tests.support.models import Note
from tests.support.postgres import ENDED
from tests.support.replication import Standby, TestServer, primary_server, standby_of
from tests.support.waiting import HANGS, until

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

T = TypeVar("T")
WHERE = text("SELECT pg_is_in_recovery()")


@pytest.fixture(scope="module")
def primary() -> Iterator[TestServer]:
    """A primary of this module's own."""
    with primary_server() as server:
        yield server


@pytest.fixture(scope="module")
def standby(primary: TestServer) -> Iterator[Standby]:
    """A standby that follows it."""
    with standby_of(primary) as server:
        yield server


class Application:
    """A process of an application with the tenant acme, which uses one of the two drivers."""

    def __init__(self, tenancy: Tenancy, driver: str) -> None:
        self.tenancy = tenancy
        self.driver = driver
        self.emitted: list[Event] = []
        tenancy.events.subscribe(Event, self.emitted.append)

    async def use(self, body: Callable[[Session], T], *, tenant: str | None = "acme", **options: Any) -> T:
        """Call ``body`` with a session, on a replica if not said otherwise."""
        options = {"read_only": True, "replica": True, **options}
        if self.driver == "asyncpg":
            async with self.tenancy.session(tenant, **options) as session:
                done: T = await session.run_sync(body)
                return done

        def work() -> T:
            with self.tenancy.sync.session(tenant, **options) as session:
                return body(session)

        return await asyncio.to_thread(work)

    async def write(self, note: str, *, tenant: str | None = "acme") -> None:
        def body(session: Session) -> None:
            session.add(Note(body=note))
            session.commit()

        await self.use(body, tenant=tenant, read_only=False, replica=False)

    async def notes(self, **options: Any) -> list[str]:
        return await self.use(lambda session: list(session.scalars(select(Note.body).order_by(Note.id))), **options)

    async def on_replica(self, **options: Any) -> bool:
        """Whether a read is served by the replica."""
        return bool(await self.use(lambda session: session.scalar(WHERE), **options))

    @property
    def reasons(self) -> list[str]:
        """Why reads went to the primary so far."""
        return [event.reason for event in self.emitted if isinstance(event, ReplicaPassedOver)]


@asynccontextmanager
async def opened(config: TenancyConfig, primary: TestServer, *standbys: Standby) -> AsyncIterator[Tenancy]:
    addresses = ServerAddresses(
        admin=primary.url(), replicas=[f"postgresql://127.0.0.1:{standby.port}" for standby in standbys]
    )
    tenancy = Tenancy(config.replace(servers={"default": addresses}))
    await tenancy.open(initialise=True)
    try:
        yield tenancy
    finally:
        await tenancy.close()


@pytest.fixture(params=["asyncpg", "psycopg"])
async def app(
    request: pytest.FixtureRequest, tenancy_config: TenancyConfig, primary: TestServer, standby: Standby
) -> AsyncIterator[Application]:
    async with opened(tenancy_config, primary, standby) as tenancy:
        await tenancy.tenants.create("acme")
        made = Application(tenancy, request.param)
        await made.write("kept")
        await until(made.on_replica)
        made.emitted.clear()
        yield made


@pytest.fixture
def paused(app: Application, standby: Standby) -> Iterator[None]:
    """The replica replays nothing during the test."""
    standby.catch_up()
    standby.pause_replay()
    yield
    standby.resume_replay()


async def test_a_read_goes_to_a_replica_that_is_fresh_enough(app: Application, standby: Standby) -> None:
    """And to the primary otherwise, which is counted and reported."""
    assert await app.on_replica() and await app.notes() == ["kept"]
    assert not await app.on_replica(replica=False)
    known = app.tenancy.internals.router.statistics().replicas["default/1"]
    assert known.reads >= 2 and known.staleness is not None and known.reason is None and known.connections.open == 1
    standby.catch_up()
    standby.pause_replay()
    try:
        await app.write("new")
        async with app.tenancy.scope("acme"):  # somebody else, who has written nothing
            wide, narrow = {"tenant": None, "max_staleness": 60.0}, {"tenant": None, "max_staleness": 0.3}
            await until(lambda: is_false(app.on_replica(**narrow)))
            assert await app.notes(**narrow) == ["kept", "new"]
            assert await app.on_replica(**wide) and await app.notes(**wide) == ["kept"]
        [*_, passed] = [event for event in app.emitted if isinstance(event, ReplicaPassedOver)]
        assert (passed.slug, passed.server, passed.reason) == ("acme", "default", "stale")
        assert passed.staleness is not None and passed.staleness > 0.3
        assert app.tenancy.internals.router.statistics().passed_over["default"]["stale"] == app.reasons.count("stale")
    finally:
        standby.resume_replay()
    await until(lambda: app.on_replica(max_staleness=0.3))


class Site:
    """The application behind its middleware: it writes by POST and reads by GET."""

    def __init__(self, app: Application, key: str, **options: Any) -> None:
        self.app = app
        self.key = key
        kind: Any = TenancyMiddleware if app.driver == "asyncpg" else TenancyWSGIMiddleware
        serve = self._asgi if app.driver == "asyncpg" else self._wsgi
        self.served = kind(serve, tenancy=app.tenancy, **options)

    async def _asgi(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] == "POST":
            await self.app.write("posted", tenant=None)
        await JSONResponse(await self.app.notes(tenant=None, max_staleness=60.0))(scope, receive, send)

    def _wsgi(self, environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        sync = self.app.tenancy.sync
        if environ["REQUEST_METHOD"] == "POST":
            sync.execute("INSERT INTO notes (body) VALUES ('posted')")
        with sync.session(read_only=True, replica=True, max_staleness=60.0) as session:
            notes = list(session.scalars(select(Note.body).order_by(Note.id)))
        start_response("200 OK", [("content-type", "application/json")])
        return [json.dumps(notes).encode()]

    async def call(self, method: str, *headers: tuple[str, str]) -> tuple[list[str], dict[str, str]]:
        """The notes that a request sees, and the headers of its answer."""
        sent = [("x-api-key", self.key), *headers]
        if self.app.driver == "asyncpg":
            answer = await asgi_request(self.served, headers=sent, method=method)
            return answer.json(), {name.decode().lower(): value.decode() for name, value in answer.headers}
        environ: dict[str, Any] = {"REQUEST_METHOD": method}
        environ |= {f"HTTP_{name.upper().replace('-', '_')}": value for name, value in sent}
        setup_testing_defaults(environ)
        got: dict[str, str] = {}

        def start_response(status: str, given: list[tuple[str, str]], *_: object) -> Any:
            got.update({name.lower(): value for name, value in given})

        parts = await asyncio.to_thread(lambda: b"".join(self.served(environ, start_response)))
        return json.loads(parts), got


async def test_a_client_reads_what_it_has_written(
    app: Application, tenancy_config: TenancyConfig, primary: TestServer, standby: Standby
) -> None:
    """In the request itself, and in its next one, in another process, by a header or a cookie."""
    issued = await app.tenancy.keys.issue("acme", name="client")
    options = {"consistency_header": "X-Consistency", "consistency_cookie": "consistency"}
    plain, site = Site(app, issued.text), Site(app, issued.text, **options)
    async with opened(tenancy_config, primary, standby) as elsewhere:
        other = Application(elsewhere, app.driver)
        other_site = Site(other, issued.text, **options)
        await until(other.on_replica)
        standby.catch_up()
        standby.pause_replay()
        try:
            assert (await plain.call("GET"))[0] == ["kept"]
            notes, headers = await plain.call("POST")
            assert notes == ["kept", "posted"] and not {"x-consistency", "set-cookie"} & set(headers)
            notes, headers = await site.call("POST")
            assert notes == ["kept", "posted", "posted"]
            token, cookie = headers["x-consistency"], headers["set-cookie"]
            assert cookie.startswith("consistency=") and "Max-Age=305; HttpOnly; SameSite=Lax" in cookie
            # why: without a token the other process reads what the replica has
            notes, headers = await other_site.call("GET")
            assert notes == ["kept"] and "x-consistency" not in headers
            for header in (("X-Consistency", token), ("Cookie", f"a=b; {cookie.partition(';')[0]}")):
                assert (await other_site.call("GET", header))[0] == ["kept", "posted", "posted"]
            assert other.reasons[-2:] == ["written", "written"]
        finally:
            standby.resume_replay()
        standby.catch_up()

        async def is_read_there() -> bool:
            before = len(other.reasons)
            assert (await other_site.call("GET", ("X-Consistency", token)))[0] == ["kept", "posted", "posted"]
            return len(other.reasons) == before

        await until(is_read_there)
    for name in ("", "a b", "\N{LATIN SMALL LETTER A WITH DIAERESIS}"):
        with pytest.raises(ConfigurationError, match="consistency_header must be the name of a header"):
            TenancyMiddleware(site.served, tenancy=app.tenancy, consistency_header=name)


@pytest.mark.usefixtures("paused")
async def test_what_was_written_is_read(app: Application) -> None:
    """By the request or job that has written it, by code without one, and by whoever has a token of it."""
    options = {"tenant": None, "max_staleness": 60.0}
    async with app.tenancy.scope("acme"):
        assert await app.on_replica(**options)
        await app.write("mine", tenant=None)
        assert await app.notes(**options) == ["kept", "mine"]
        async with app.tenancy.session() as session:
            # each statement is a transaction
            await session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
            await session.execute(insert(Note).values(body="at once"))
            assert await app.notes(**options) == ["kept", "mine", "at once"]
    assert app.reasons == ["written"] * 2
    token = await app.tenancy.consistency_token("acme")
    async with app.tenancy.scope("acme"):
        # why: somebody else's read with this bound does not see it
        assert await app.notes(**options) == ["kept"]
        assert await app.notes(**options, after=token) == ["kept", "mine", "at once"]
    # the program sees what its blocks have written
    assert await app.notes(max_staleness=60.0) == ["kept", "mine", "at once"]
    await app.write("unbound")
    assert await app.notes(max_staleness=60.0) == ["kept", "mine", "at once", "unbound"]
    assert set(app.reasons) == {"written"}


async def test_what_a_session_of_a_replaced_server_writes_is_read(
    app: Application, primary: TestServer, standby: Standby
) -> None:
    """It was opened before the server's row was changed, and commits after that."""
    tenancy, options = app.tenancy, {"max_staleness": math.inf}
    async with tenancy.session("acme") as session:
        session.add(Note(body="across"))
        await session.flush()
        before = tenancy.internals.servers["default"]
        replicas = [f"postgresql://127.0.0.1:{standby.port}?connect_timeout=9"]
        await tenancy.servers.update("default", addresses=ServerAddresses(admin=primary.url(), replicas=replicas))
        await until(lambda: tenancy.internals.servers["default"] is not before)
        primary.query("SELECT pg_switch_wal()")  # so that the session's INSERT is sent to the replica
        await until(lambda: app.on_replica(**options))
        standby.pause_replay()
        try:
            await session.commit()
            assert await app.notes(**options) == ["kept", "across"]
        finally:
            standby.resume_replay()


async def test_no_read_is_staler_than_its_bound(
    tenancy_config: TenancyConfig, primary: TestServer, standby: Standby
) -> None:
    """Whatever replay does: a reader counts what was committed before the bound, and a writer all of its own."""
    bound = 0.3
    committed: list[float] = []
    seen: Counter[str] = Counter()

    async with opened(tenancy_config, primary, standby) as tenancy:
        await tenancy.tenants.create("acme")
        app = Application(tenancy, "asyncpg")
        await until(app.on_replica)
        count = "SELECT pg_is_in_recovery(), (SELECT count(*) FROM notes)"

        async def write(ends: float) -> None:
            async with tenancy.scope("acme"):
                while time.monotonic() < ends:
                    await tenancy.execute("INSERT INTO notes (body) VALUES ('x')")
                    committed.append(time.monotonic())
                    row = await tenancy.fetch_one(count, replica=True, max_staleness=math.inf)
                    assert row is not None and row[1] == len(committed)

        async def read(ends: float, max_staleness: float, kind: str) -> None:
            while time.monotonic() < ends:
                asked = time.monotonic()
                async with tenancy.scope("acme"):
                    row = await tenancy.fetch_one(count, replica=True, max_staleness=max_staleness)
                assert row is not None
                stale = row[1] < bisect_right(committed, asked - bound)
                seen[f"{kind} {'stale' if stale else 'fresh'} {'replica' if row[0] else 'primary'}"] += 1

        async def disturb(ends: float) -> None:
            while time.monotonic() < ends:
                await asyncio.to_thread(standby.pause_replay)
                await asyncio.sleep(random.uniform(0, 3 * bound))
                await asyncio.to_thread(standby.resume_replay)
                await asyncio.sleep(random.uniform(0, bound))

        ends = time.monotonic() + 3.0
        await asyncio.gather(
            write(ends), read(ends, bound, "bounded"), read(ends, math.inf, "unbounded"), disturb(ends)
        )
    # why: without a bound there are reads that are staler
    assert seen["unbounded stale replica"] > 0
    assert seen["bounded fresh replica"] > 0 and seen["bounded fresh primary"] > 0
    assert seen["bounded stale replica"] == seen["bounded stale primary"] == 0, seen


async def test_a_token_is_its_tenants_alone(app: Application, standby: Standby) -> None:
    """A forged one, another tenant's and one of another installation cost the primary, and nothing else."""
    await app.tenancy.tenants.create("beta")
    token, foreign = [await app.tenancy.consistency_token(slug) for slug in ("acme", "beta")]
    assert len(token) == 76
    await until(lambda: app.on_replica(after=token))
    app.emitted.clear()
    forged = [foreign, token[:-4] + "AAA=", "A" * 76, "x", "\N{SNOWMAN}", "A" * 100_000]
    for bad in forged:
        assert not await app.on_replica(after=bad)
    assert app.reasons == ["token"] * len(forged)
    tokens = app.tenancy.internals.router._tokens
    assert tokens is not None
    marked = tokens.read((await app.tenancy.tenants.get("acme")).id, token)
    assert marked is not None
    # one that is much older than the bound is of no concern, wherever the replica is
    assert marked.concerns(5.0) and not replace(marked, issued_at=marked.issued_at - 400).concerns(5.0)
    # and a position that the replica reaches only now is looked up there
    standby.catch_up()
    standby.pause_replay()
    await app.write("later")
    later = await app.tenancy.consistency_token("acme")
    async with app.tenancy.scope("acme"):
        assert not await app.on_replica(tenant=None, max_staleness=60.0, after=later)
        standby.resume_replay()
        standby.catch_up()
        assert await app.on_replica(tenant=None, max_staleness=60.0, after=later)


async def test_what_writes_or_locks_is_not_sent_to_a_replica(app: Application) -> None:
    """What can be seen is refused with what to do; what a function does, by PostgreSQL. On the primary as well."""

    def add(session: Session) -> None:
        session.add(Note(body="x"))
        session.flush()

    def add_and_read(session: Session) -> None:
        session.add(Note(body="x"))
        session.scalars(select(Note))

    seen: list[tuple[str, Callable[[Session], object]]] = [
        ("writes", lambda session: session.execute(insert(Note).values(body="x"))),
        ("locks rows", lambda session: session.scalars(select(Note).with_for_update())),
        ("locks rows", lambda session: session.connection().execute(select(Note.id).with_for_update(read=True))),
        ("read-only", add),
        ("read-only", add_and_read),
        ("locks rows", lambda session: session.execute(text("SELECT 1 FROM notes FOR NO KEY UPDATE"))),
        ("locks rows", lambda session: session.scalars(select(select(Note.id).with_for_update().subquery()))),
        ("writes", lambda session: session.execute(text("/* a */ INSERT INTO notes (body) VALUES ('x')"))),
        ("schema", lambda session: session.execute(text("CREATE TABLE x (n integer)"))),
    ]
    places: list[dict[str, Any]] = [{}, {"after": "forged"}]
    for options in places:
        for what, body in seen:
            with pytest.raises(ReadOnlyError, match=what):
                await app.use(body, **options)
        with pytest.raises(DBAPIError) as caught:
            await app.use(partial(Session.execute, statement=text("SELECT nextval('notes_id_seq')")), **options)
        assert getattr(caught.value.orig, "sqlstate", None) == "25006"
        for what, statement in (
            ("writes", "DELETE FROM notes RETURNING id"),
            ("locks", "SELECT 1 FROM notes FOR SHARE"),
        ):
            reads = app.tenancy.internals.router.statistics().replicas["default/1"].reads
            with pytest.raises(ReadOnlyError, match=what):
                await app.tenancy.fetch_all(statement, tenant="acme", replica=True, **options)
            assert app.tenancy.internals.router.statistics().replicas["default/1"].reads == reads
    assert await app.notes(replica=False) == ["kept"]
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("read_only=True", {"read_only": False}),
        ("max_staleness", {"max_staleness": 0}),
        ("SERIALIZABLE", {"isolation_level": "SERIALIZABLE"}),
    ]
    for refused, options in wrong:
        with pytest.raises(ConfigurationError, match=refused):
            await app.use(lambda session: session.scalar(WHERE), **options)
    assert await app.on_replica(isolation_level="REPEATABLE READ")


async def test_each_tenant_is_alone_on_a_replica(app: Application, primary: TestServer, standby: Standby) -> None:
    """Its role is let into its own database, and each connection checks the marker."""
    created = await app.tenancy.tenants.create("beta")
    acme = await app.tenancy.tenants.get("acme")
    assert acme.placement is not None and created.tenant.placement is not None
    await until(lambda: app.on_replica(tenant="beta"))
    server = app.tenancy.internals.servers["default"].replicas[0]
    keyring = app.tenancy.internals.router._connector("default")._keyring
    with pytest.raises(LoginRefusedError) as caught:
        await server.connect_tenant(
            replace(acme.placement, database=created.tenant.placement.database),
            keyring.open_password(acme.id, acme.placement.sealed_password),
        )
    assert caught.value.sqlstate == "42501"
    marker = f"'tenancy:{app.tenancy.internals.control.installation}:{acme.id}'"
    primary.query(f'COMMENT ON DATABASE "{created.tenant.placement.database}" IS {marker}')
    standby.catch_up()
    app.tenancy.internals.router.retire(created.tenant.id)
    app.emitted.clear()
    with pytest.raises(MarkerMismatchError):
        await app.on_replica(tenant="beta")
    incidents = [event for event in app.emitted if isinstance(event, IsolationIncident)]
    assert len(incidents) == 2  # of the replica, and of the primary that was tried next


async def test_a_suspended_tenant_leaves_the_replica(app: Application, standby: Standby) -> None:
    """A connection that was open there ends, whoever has opened it: a standby does not replay that."""
    acme = await app.tenancy.tenants.get("acme")
    assert acme.placement is not None
    server = app.tenancy.internals.servers["default"].replicas[0]
    keyring = app.tenancy.internals.router._connector("default")._keyring
    password = keyring.open_password(acme.id, acme.placement.sealed_password)
    connection: Connection = await server.connect_tenant(acme.placement, password)
    assert await connection.fetchval("SELECT count(*) FROM notes") == 1
    await app.tenancy.tenants.suspend("acme", reason="unpaid")
    with pytest.raises(ENDED):
        await connection.fetchval("SELECT count(*) FROM notes")
    with pytest.raises(LoginRefusedError):
        await server.connect_tenant(acme.placement, password)


@pytest.mark.parametrize("pool", [PoolConfig(max_connections=1), PoolConfig(max_connections_per_tenant=1)])
async def test_a_busy_replica_lets_nobody_wait(
    tenancy_config: TenancyConfig, primary: TestServer, standby: Standby, pool: PoolConfig
) -> None:
    """Its connections are its own budget; where all are in use, the primary serves."""
    config = tenancy_config.replace(pool=pool)
    async with opened(config, primary, standby) as tenancy:
        await tenancy.tenants.create("acme")
        app = Application(tenancy, "asyncpg")
        await until(app.on_replica)
        async with tenancy.session("acme", read_only=True, replica=True) as session:
            assert await session.scalar(WHERE)
            assert not await app.on_replica()
        assert await app.on_replica()
        assert app.reasons[-1] == "busy"


async def test_a_process_gets_as_many_connections_to_a_replica_as_it_needs(
    tenancy_config: TenancyConfig, primary: TestServer, standby: Standby
) -> None:
    """More than its first part of them, while other processes leave some."""
    tiers = {"free": Tier("free", connection_limit=30)}
    config = tenancy_config.replace(pool=PoolConfig(max_connections_per_tenant=30), tiers=tiers)
    async with opened(config, primary, standby) as tenancy, AsyncExitStack() as stack:
        await tenancy.tenants.create("acme")
        await until(Application(tenancy, "asyncpg").on_replica)
        held = 0

        async def hold() -> None:
            nonlocal held
            async with AsyncExitStack() as entered:
                session = await entered.enter_async_context(tenancy.session("acme", read_only=True, replica=True))
                if await session.scalar(WHERE):
                    held += 1
                    stack.push_async_exit(entered.pop_all())

        async def many() -> bool:
            await hold()
            return held == 12

        await until(many)
        assert tenancy.internals.router.statistics().replicas["default/1"].connections.in_use == 12


async def test_processes_hand_connections_to_a_replica_over(
    tenancy_config: TenancyConfig, primary: TestServer, standby: Standby
) -> None:
    """Where PostgreSQL accepts no more of a tenant there, as on the primary; until then the primary serves."""
    config = tenancy_config.replace(tiers={"free": Tier("free", connection_limit=1)})
    async with opened(config, primary, standby) as tenancy, opened(config, primary, standby) as elsewhere:
        await tenancy.tenants.create("acme")
        app, other = Application(tenancy, "asyncpg"), Application(elsewhere, "asyncpg")
        for one in (app, other, app):
            # the other process has an idle connection, the only one that there may be
            await until(one.on_replica)


async def test_a_killed_replica_is_replaced_by_the_primary(app: Application, standby: Standby) -> None:
    """At once, also before anybody has noticed; an open session fails once, and goes on with the primary."""

    def kinds() -> list[type[Event]]:
        return [type(event) for event in app.emitted if isinstance(event, ReplicaLost | ReplicaRestored)]

    async with app.tenancy.session("acme", read_only=True, replica=True) as session:
        assert await session.scalar(WHERE)
        standby.kill()
        try:
            with pytest.raises(DBAPIError) as caught:
                async with asyncio.timeout(HANGS):
                    while True:  # its backends outlive the killed server for a moment
                        await session.scalar(WHERE)
            assert caught.value.connection_invalidated
            await session.rollback()
            assert await session.scalar(WHERE) is False
            assert not await app.on_replica() and await app.notes() == ["kept"]
            assert set(app.reasons) == {"unavailable"}
            # a replica that is back before it is asked once a second was not lost
            await until(lambda: kinds() == [ReplicaLost])
        finally:
            standby.start_again()
    await until(app.on_replica)
    assert kinds() == [ReplicaLost, ReplicaRestored]


async def test_replicas_come_and_go(tenancy_config: TenancyConfig, primary: TestServer, standby: Standby) -> None:
    """By the server's row, without a restart; several take turns; an open session goes on."""
    with standby_of(primary, name="second") as second:
        async with opened(tenancy_config, primary) as tenancy:
            await tenancy.tenants.create("acme")
            app = Application(tenancy, "asyncpg")
            assert not await app.on_replica() and app.reasons == []
            urls = [f"postgresql://127.0.0.1:{server.port}" for server in (standby, second)]
            await tenancy.servers.update("default", addresses=ServerAddresses(admin=primary.url(), replicas=urls))
            await until(app.on_replica)
            ports: set[int] = set()

            async def both() -> bool:
                ports.add(int(await app.use(lambda session: session.scalar(text("SHOW port")) or "")))
                return {standby.port, second.port} <= ports

            await until(both)
            async with tenancy.session("acme", read_only=True, replica=True) as session:
                assert await session.scalar(WHERE)
                await tenancy.servers.update("default", addresses=ServerAddresses(admin=primary.url()))
                await until(lambda: is_false(app.on_replica()))
                assert await session.scalar(WHERE)
                await session.rollback()
                assert await session.scalar(WHERE) is False
            await until(lambda: not tenancy.internals.router.statistics().replicas)
            # nobody asks the former replicas any more
            asks = (
                "SELECT count(*) FROM pg_stat_activity WHERE usename = 'postgres' AND application_name LIKE 'tenancy%'"
            )
            await until(lambda: standby.query(asks) == 0)


async def test_a_promoted_replica_is_not_read_from(tenancy_config: TenancyConfig, primary: TestServer) -> None:
    """Neither over new connections nor over those that were open: what it gets from now on is not the primary's."""
    async with AsyncExitStack() as stack:
        promoted = stack.enter_context(standby_of(primary, name="promoted"))
        tenancy = await stack.enter_async_context(opened(tenancy_config, primary, promoted))
        await tenancy.tenants.create("acme")
        app = Application(tenancy, "asyncpg")
        await until(app.on_replica)
        promoted.promote()
        # why: the connection that is open there answers as before
        await until(lambda: is_lost(app))
        assert not await app.on_replica() and app.reasons[-1] == "unavailable"
        assert tenancy.internals.router.statistics().replicas["default/1"].connections.idle == 0
        with pytest.raises(Exception, match="no standby of the primary answers there"):
            tenancy.internals.servers["default"].replicas[0].standby_proof("acme")


async def test_a_read_that_replay_cancels_is_repeated(tenancy_config: TenancyConfig, primary: TestServer) -> None:
    """On the primary, by ``fetch_all`` and its siblings; a session fails with 40001, and goes on there."""
    async with AsyncExitStack() as stack:
        standby = stack.enter_context(standby_of(primary, settings={"max_standby_streaming_delay": "0"}))
        tenancy = await stack.enter_async_context(opened(tenancy_config, primary, standby))
        created = await tenancy.tenants.create("acme")
        app = Application(tenancy, "asyncpg")
        await until(app.on_replica)
        assert created.tenant.placement is not None
        database = created.tenant.placement.database

        async def conflict() -> None:
            """Let replay remove rows that a statement on the replica may still see."""
            running = (
                "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%pg_sleep(60)%' AND pid <> pg_backend_pid()"
            )
            await until(lambda: standby.query(running))
            primary.query("INSERT INTO notes (body) VALUES ('gone')", database=database)
            primary.query("DELETE FROM notes", database=database)
            primary.query("VACUUM notes", database=database)

        slow = "SELECT CASE WHEN pg_is_in_recovery() THEN pg_sleep(60) IS NULL END, (SELECT count(*) FROM notes)"
        for name, answer in (("fetch_all", [(None, 0)]), ("fetch_one", (None, 0)), ("fetch_value", None)):
            fetch = getattr(tenancy, name)
            await until(app.on_replica)
            fetching = asyncio.create_task(fetch(slow, tenant="acme", replica=True))
            await conflict()
            assert await fetching == answer
        assert app.reasons[-1] == "conflict"
        await until(app.on_replica)
        async with tenancy.session("acme", read_only=True, replica=True) as session:
            running = asyncio.create_task(session.execute(text(slow)))
            await conflict()
            with pytest.raises(DBAPIError) as caught:
                await running
            assert getattr(caught.value.orig, "sqlstate", None) == "40001"
            await session.rollback()
            assert await session.scalar(WHERE) is False


async def is_false(outcome: Any) -> bool:
    return not await outcome


async def is_lost(app: Application) -> bool:
    await app.on_replica()
    return any(isinstance(event, ReplicaLost) for event in app.emitted)


async def test_a_token_needs_no_replica(tenancy: Tenancy) -> None:
    """Other processes may have one. The connection that asks the primary stays, for the next token."""
    await tenancy.tenants.create("acme")
    token = await tenancy.consistency_token("acme")
    monitor = tenancy.internals.router._replicas["default"].monitor
    following = monitor._following
    assert following is not None
    await asyncio.wait([following], timeout=0.2)
    assert not following.done()
    assert await tenancy.consistency_token("acme") != token
    assert monitor._following is following
    assert await tenancy.fetch_value("SELECT 1", tenant="acme", replica=True, after=token) == 1
