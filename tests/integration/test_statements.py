"""``tenancy.fetch_all``, ``fetch_one``, ``fetch_value`` and ``execute``: one statement, in one round trip."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from ipaddress import ip_address, ip_network
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
from sqlalchemy import Engine, event, insert, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError, ResourceClosedError, StatementError
from sqlalchemy.pool import Pool

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.errors import CrossTenantError, NoTenantError, ReadOnlyError, TenantSuspendedError
from tests.support.models import Note
from tests.support.postgres import Postgres
from tests.support.proxy import Proxy, proxied
from tests.support.waiting import until

READ_ONLY = "25006"


@dataclass
class Side:
    """``tenancy`` or ``tenancy.sync``, by the same names; ``tenancy`` is always the asynchronous one."""

    tenancy: Tenancy
    driver: str

    def __getattr__(self, name: str) -> Callable[..., Coroutine[Any, Any, Any]]:
        if self.driver == "asyncpg":
            found: Callable[..., Coroutine[Any, Any, Any]] = getattr(self.tenancy, name)
            return found

        async def call(*args: Any, **options: Any) -> Any:
            return await asyncio.to_thread(getattr(self.tenancy.sync, name), *args, **options)

        return call


@pytest.fixture(params=["asyncpg", "psycopg"])
async def side(request: pytest.FixtureRequest, tenancy: Tenancy) -> Side:
    await tenancy.tenants.create("acme")
    return Side(tenancy, request.param)


@asynccontextmanager
async def through_proxy(config: TenancyConfig, postgres: Postgres) -> AsyncIterator[tuple[Tenancy, Proxy]]:
    """A ``Tenancy`` with the tenant acme. The proxy is between it and the server."""
    async with proxied(postgres.admin_url) as proxy:
        tenancy = Tenancy(config.replace(servers={"default": proxy.url(postgres.admin_url)}))
        await tenancy.open(initialise=True)
        try:
            await tenancy.tenants.create("acme")
            yield tenancy, proxy
        finally:
            await tenancy.close()


def code(error: DBAPIError) -> object:
    return getattr(error.orig, "sqlstate", None)


async def test_what_is_fetched_and_executed(side: Side) -> None:
    """Rows are SQLAlchemy's; parameters have names; statements of Core and ORM work too."""
    assert await side.execute("INSERT INTO notes (body) VALUES (:a), (:b)", {"a": "x", "b": "y"}, tenant="acme") == 2
    rows = await side.fetch_all("SELECT id, body FROM notes WHERE body <> :no ORDER BY id", {"no": ""}, tenant="acme")
    assert rows == [(1, "x"), (2, "y")]
    assert rows[0].body == "x" and rows[0]._mapping["id"] == 1 and rows[0]._asdict() == {"id": 1, "body": "x"}
    assert await side.fetch_one("SELECT body FROM notes ORDER BY id DESC", tenant="acme") == ("y",)
    assert await side.fetch_one("SELECT body FROM notes WHERE id = :id OR id = :id", {"id": 9}, tenant="acme") is None
    assert await side.fetch_value("SELECT body FROM notes ORDER BY id", tenant="acme") == "x"
    assert await side.fetch_value("SELECT body FROM notes WHERE false", tenant="acme") is None
    assert await side.fetch_value("SELECT NULL", tenant="acme") is None
    assert [one.body for (one,) in await side.fetch_all(select(Note).order_by(Note.id), tenant="acme")] == ["x", "y"]
    assert await side.fetch_value(select(Note.body).where(Note.id == 2), tenant="acme") == "y"
    assert await side.execute(insert(Note), {"body": "z"}, tenant="acme") == 1
    assert await side.execute("UPDATE notes SET body = 'w' RETURNING id", tenant="acme") == 3
    assert await side.execute("WITH gone AS (DELETE FROM notes RETURNING 1) SELECT 1 FROM gone", tenant="acme") == 3
    assert await side.execute("DO $$ BEGIN END $$", tenant="acme") == -1
    assert await side.fetch_value("SHOW transaction_read_only", tenant="acme") == "on"
    twice = await side.fetch_one("SELECT 1 AS a, 2 AS a, 3 AS b", tenant="acme")
    assert twice == (1, 2, 3) and twice.b == 3 and twice.a == 2


async def test_what_is_refused(side: Side) -> None:
    """A write of a query, by PostgreSQL; what is wrong has the errors that a session's statement has."""
    await side.execute("INSERT INTO notes (id, body) VALUES (1, 'kept')", tenant="acme")
    for fetch in (side.fetch_all, side.fetch_one, side.fetch_value):
        for statement in (
            "INSERT INTO notes (body) VALUES ('x') RETURNING id",
            "WITH gone AS (DELETE FROM notes RETURNING id) SELECT * FROM gone",
            "SELECT nextval('notes_id_seq')",
            "SELECT 1 FROM notes FOR UPDATE",
            "DO $$ BEGIN DELETE FROM notes; END $$",
            "TRUNCATE notes",
            insert(Note).values(body="x").returning(Note.id),
        ):
            with pytest.raises(DBAPIError) as caught:
                await fetch(statement, tenant="acme")
            assert code(caught.value) == READ_ONLY
        with pytest.raises(ReadOnlyError):
            await fetch("COMMIT", tenant="acme")
        with pytest.raises(ResourceClosedError):
            await fetch("SET LOCAL work_mem = '1MB'", tenant="acme")
        with pytest.raises(StatementError, match="'id'"):
            await fetch("SELECT :id", {"other": 1}, tenant="acme")
        with pytest.raises(DBAPIError) as caught:
            await fetch("SELECT 1/:zero", {"zero": 0}, tenant="acme")
        assert code(caught.value) == "22012"
    with pytest.raises(IntegrityError) as duplicate:
        await side.execute("INSERT INTO notes (id, body) VALUES (:id, 'x')", {"id": 1}, tenant="acme")
    assert duplicate.value.params in ((1,), {"id": 1}) and "INSERT INTO notes" in str(duplicate.value.statement)
    with pytest.raises(NoTenantError):
        await side.fetch_value("SELECT 1")
    await side.tenancy.tenants.create("globex")
    async with side.tenancy.scope("globex"):
        with pytest.raises(CrossTenantError):
            await side.fetch_value("SELECT 1", tenant="acme")
        assert await side.fetch_value("SELECT count(*) FROM notes") == 0
    assert await side.fetch_all("SELECT body FROM notes", tenant="acme") == [("kept",)]
    await side.tenancy.tenants.suspend("acme", reason="unpaid")
    with pytest.raises(TenantSuspendedError):
        await side.fetch_value("SELECT 1", tenant="acme")


VALUES = """
SELECT 1::smallint, 2::int, 3::bigint, 1.5::numeric, 1.50::numeric(10, 2), 1.5::float4, 2.5::float8, true, 'x'::text,
    'y'::varchar, 'z '::char(2), '\\x00ff'::bytea, '{"a": [1, null]}'::json, '{"a": [1, null]}'::jsonb,
    'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11'::uuid, date '2024-02-29', time '12:30', timetz '12:30+02',
    timestamp '2024-02-29 12:30', timestamptz '2024-02-29 12:30+02', interval '1 day 2 hours', ARRAY[1, 2, NULL],
    ARRAY[['a'], ['b']], ARRAY['{"a": 1}'::jsonb], int4range(1, 5), '{[1,3)}'::int4multirange, inet '10.0.0.1',
    cidr '10.0.0.0/8', macaddr '08:00:2b:01:02:03', B'101', '(1,2)'::point, 'happy'::feeling,
    ARRAY['happy'::feeling], ROW(1, 'x'), ROW(1, 'x')::pair, 5::grade, 'en'::regconfig, 'a & b'::tsquery, NULL::int,
    '12.34'::money, 1::oid, 'notes'::regclass
"""


async def test_values_are_those_of_a_session(side: Side, postgres: Postgres) -> None:
    """Of many types, as results and as parameters."""
    placement = (await side.tenancy.tenants.get("acme")).placement
    assert placement is not None
    async with postgres.connect(placement.database) as admin:
        await admin.execute(
            "CREATE TYPE feeling AS ENUM ('happy'); CREATE TYPE pair AS (a int, b text); CREATE DOMAIN grade AS int"
        )
    values = VALUES.replace("'en'", "'english'").replace(":", "\\:")

    def in_session() -> Any:
        with side.tenancy.sync.session("acme") as session:
            return session.execute(text(values)).one()

    if side.driver == "asyncpg":
        async with side.tenancy.session("acme") as session:
            expected = (await session.execute(text(values))).one()
    else:
        expected = await asyncio.to_thread(in_session)
    for found in ((await side.fetch_all(values, tenant="acme"))[0], await side.fetch_one(values, tenant="acme")):
        assert list(map(type, found)) == list(map(type, expected))
        assert tuple(map(repr, found)) == tuple(map(repr, expected))
    parameters = {
        "int": ("int", 1),
        "numeric": ("numeric", Decimal("1.50")),
        "text": ("text", "x"),
        "bytes": ("bytea", b"\0x"),
        "json": ("jsonb", json.dumps({"a": [1, None]})),
        "uuid": ("uuid", uuid4()),
        "date": ("date", date(2024, 2, 29)),
        "time": ("time", time(12, 30)),
        "stamp": ("timestamptz", datetime(2024, 2, 29, 12, tzinfo=UTC)),
        "interval": ("interval", timedelta(days=1, hours=2)),
        "array": ("int[]", [1, 2, None]),
        "inet": ("inet", ip_address("10.0.0.1")),
        "cidr": ("cidr", ip_network("10.0.0.0/8")),
        "feeling": ("feeling", "happy"),
        "nothing": ("int", None),
    }
    for name, (kind, value) in parameters.items():
        found = await side.fetch_value(f"SELECT CAST(:{name} AS {kind})", {name: value}, tenant="acme")
        assert found == ({"a": [1, None]} if name == "json" else value)


async def test_each_is_one_round_trip(tenancy_config: TenancyConfig, postgres: Postgres) -> None:
    """Once it is prepared, and while nobody listens: a question and an answer.

    A query after a write has to change the connection's mode.
    """
    async with through_proxy(tenancy_config, postgres) as (tenancy, proxy):
        insertion = "INSERT INTO notes (body) VALUES ('x')"

        async def read_session() -> None:
            async with tenancy.session("acme", read_only=True) as session:
                await session.scalar(text("SELECT count(*) FROM notes"))
                await session.commit()

        async def write_session() -> None:
            async with tenancy.session("acme") as session:
                await session.execute(text(insertion))
                await session.commit()

        placement = (await tenancy.tenants.get("acme")).placement
        assert placement is not None

        async def pieces(call: Callable[[], Coroutine[Any, Any, Any]]) -> int:
            # not those of what counts and prolongs the connections, in the background
            before = proxy.forwarded_of(placement.role)
            await call()
            return proxy.forwarded_of(placement.role) - before

        def fetch() -> Coroutine[Any, Any, Any]:
            return tenancy.fetch_one("SELECT count(*) FROM notes", tenant="acme")

        def execute() -> Coroutine[Any, Any, Any]:
            return tenancy.execute(insertion, tenant="acme")

        received: list[object] = []

        def listener(*_: object) -> None:
            received.append(None)

        event.listen(Engine, "commit", listener)
        try:
            await execute()
        finally:
            # for somebody who has listened, and does no more, nobody pays
            event.remove(Engine, "commit", listener)
        assert received
        for call in (fetch, execute, read_session, write_session, execute):
            await call()
        assert [await pieces(call) for call in (execute, execute)] == [2, 2]
        await fetch()
        assert [await pieces(call) for call in (fetch, read_session, fetch)] == [2, 2, 2]
        # a write's transaction begins with its mode, in the message that begins it anyway
        assert [await pieces(call) for call in (write_session, fetch, write_session, read_session)] == [6, 2, 6, 2]
        assert [await pieces(call) for call in (execute, fetch)] == [4, 4]


async def test_a_cancelled_statement_leaves_nothing(tenancy: Tenancy) -> None:
    """Its connection is closed, since its answer may still come; the next one is answered."""
    await tenancy.tenants.create("acme")
    budget = tenancy.internals.router.statistics
    for call in (tenancy.fetch_value, tenancy.execute):
        running = asyncio.create_task(call("SELECT pg_sleep(60)", tenant="acme"))
        await until(lambda: budget().servers["default"].in_use == 1)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert await tenancy.fetch_value("SELECT 1", tenant="acme") == 1
    await until(lambda: budget().servers["default"].in_use == 0)
    assert await asyncio.gather(*(tenancy.fetch_value(f"SELECT {n}", tenant="acme") for n in range(50))) == [*range(50)]


async def test_an_application_that_listens_receives_each(tenancy: Tenancy) -> None:
    """To checkouts, or to what is executed: then the statement takes SQLAlchemy's way."""
    acme = (await tenancy.tenants.create("acme")).tenant
    received: list[str] = []

    def checkout(*_: object) -> None:
        received.append("checkout")

    def executed(conn: Any, cursor: Any, statement: str, *_: object) -> None:
        received.append(statement)

    assert await tenancy.fetch_value("SELECT 1", tenant="acme") == 1
    event.listen(Pool, "checkout", checkout)
    try:
        assert await tenancy.fetch_value("SELECT 1", tenant="acme") == 1
    finally:
        event.remove(Pool, "checkout", checkout)
    async with tenancy.internals.router.lease(acme) as engine:
        event.listen(engine.sync_engine, "before_cursor_execute", executed)
        assert await tenancy.fetch_value("SELECT 2", tenant="acme") == 2
        assert await tenancy.execute("DELETE FROM notes", tenant="acme") == 0
    assert received == ["checkout", "SELECT 2", "DELETE FROM notes"]


@pytest.mark.parametrize("change", ["ALTER TABLE notes ALTER body TYPE text", "ALTER TABLE notes ADD more int"])
async def test_a_change_of_the_schema_harms_none(tenancy: Tenancy, postgres: Postgres, change: str) -> None:
    """What a connection has prepared is prepared again, and a statement that was refused for it is repeated once."""
    acme = (await tenancy.tenants.create("acme")).tenant
    assert acme.placement is not None
    await tenancy.execute("INSERT INTO notes (body) VALUES ('a')", tenant="acme")
    query, update = "SELECT * FROM notes", "UPDATE notes SET body = body || 'b' RETURNING *"
    await tenancy.fetch_all(query, tenant="acme")
    await tenancy.execute(update, tenant="acme")
    async with postgres.connect(acme.placement.database) as admin:
        prepared = await admin.prepare(query)
        await admin.execute(change)
        with pytest.raises(asyncpg.InvalidCachedStatementError):
            await prepared.fetch()
    assert len(await tenancy.fetch_all(query, tenant="acme")) == 1
    assert await tenancy.execute(update, tenant="acme") == 1
    assert await tenancy.fetch_value("SELECT body FROM notes", tenant="acme") == "abb"


async def test_a_write_is_not_repeated(tenancy_config: TenancyConfig, postgres: Postgres) -> None:
    """Where the connection is lost before the answer, it may be committed. The error says so, and nothing is sent."""
    async with through_proxy(tenancy_config, postgres) as (tenancy, proxy):
        insertion = "INSERT INTO notes (body) SELECT 'x' FROM pg_sleep(0.2)"
        await tenancy.execute(insertion, tenant="acme")
        running = asyncio.create_task(tenancy.execute(insertion, tenant="acme"))
        await until(lambda: tenancy.internals.router.statistics().servers["default"].in_use == 1)
        proxy.cut()
        with pytest.raises((DBAPIError, OSError)):
            await running
        assert 1 <= await tenancy.fetch_value("SELECT count(*) FROM notes", tenant="acme") <= 2
