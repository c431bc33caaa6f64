"""``tenancy.query_all``: one statement on many tenants, read-only by PostgreSQL, bounded, and with partial failures."""

from __future__ import annotations

import asyncio
import logging
import pickle
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import pytest
import pytest_asyncio
from sqlalchemy import func, insert, select, text

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.errors import (
    ConfigurationError,
    CrossTenantError,
    FleetQueryError,
    NotOpenError,
    TenantNotFoundError,
)
from tenancy_orm.queries import Query
from tests.support.models import Note
from tests.support.waiting import HANGS, until

SLUGS = ("acme", "globex", "initech")


@dataclass(frozen=True)
class Fleet:
    """An open ``Tenancy`` with three tenants, each with as many notes as its place in the list."""

    tenancy: Tenancy

    async def notes(self, slug: str = "acme") -> int:
        """How many notes a tenant has."""
        return int(await self.tenancy.fetch_value("SELECT count(*) FROM notes", tenant=slug))

    async def as_owner(self, slug: str, *statements: str) -> None:
        """Run statements in a tenant's database as the owner of its tables."""
        tenant = await self.tenancy.tenants.get(slug)
        assert tenant.placement is not None
        provisioner = self.tenancy.internals.provisioner
        connection = await provisioner.connect_admin("default", tenant.placement.database, role=provisioner.names.owner)
        try:
            for statement in statements:
                await connection.execute(statement.replace("ROLE", tenant.placement.role))
        finally:
            await connection.close()


@pytest_asyncio.fixture
async def fleet(tenancy: Tenancy) -> AsyncIterator[Fleet]:
    """Three tenants with one, two and three notes."""
    for number, slug in enumerate(SLUGS, start=1):
        await tenancy.tenants.create(slug, tier="pro" if slug == "globex" else "free")
        for _ in range(number):
            await tenancy.execute("INSERT INTO notes (body) VALUES (:body)", {"body": slug}, tenant=slug)
    yield Fleet(tenancy)


async def answers(tenancy: Tenancy, *args: Any, **options: Any) -> dict[str, Any]:
    """The rows by slug, or the failure."""
    return {
        tenant.slug: rows.error or [tuple(row) for row in rows]
        async for tenant, rows in tenancy.query_all(*args, yield_errors=True, **options)
    }


async def test_every_kind_of_statement_is_answered_by_every_tenant(fleet: Fleet) -> None:
    """Text with parameters, Core, ORM entities, SHOW and EXPLAIN; by name, tier and status."""
    tenancy = fleet.tenancy
    counts = {"acme": [(1,)], "globex": [(2,)], "initech": [(3,)]}
    assert await answers(tenancy, "SELECT count(*) FROM notes") == counts
    assert await answers(tenancy, select(func.count()).select_from(Note)) == counts
    found = await answers(tenancy, "SELECT body FROM notes WHERE body = :body", {"body": "acme"})
    assert found == {"acme": [("acme",)], "globex": [], "initech": []}
    async for tenant, rows in tenancy.query_all(select(Note).order_by(Note.id)):
        assert {note.body for (note,) in rows} == {tenant.slug}
        assert rows.columns == ("Note",)
        assert not rows.truncated
    assert await answers(tenancy, "SHOW transaction_read_only") == {slug: [("on",)] for slug in SLUGS}
    assert len(await answers(tenancy, "EXPLAIN SELECT 1")) == 3
    assert (await answers(tenancy, "SELECT 1", tier="pro")).keys() == {"globex"}
    acme = await tenancy.tenants.get("acme")
    assert (await answers(tenancy, "SELECT 1", tenants=[acme, "initech", acme.id])).keys() == {"acme", "initech"}
    await tenancy.tenants.start_maintenance("globex")
    assert (await answers(tenancy, "SELECT 1")).keys() == {"acme", "initech"}
    assert (await answers(tenancy, "SELECT 1", status="maintenance")).keys() == {"globex"}
    await tenancy.tenants.suspend("initech")
    failed = await answers(tenancy, "SELECT 1", tenants=["initech"])
    assert "suspended" in failed["initech"].message
    assert await answers(tenancy, "SELECT 1", tier="enterprise") == {}


ATTACKS = {
    "a write": "INSERT INTO notes (body) VALUES ('x') RETURNING id",
    "a write in a query": "WITH made AS (INSERT INTO notes (body) VALUES ('x') RETURNING id) SELECT * FROM made",
    "its own transaction mode": "SELECT set_config('transaction_read_only', 'off', true), evil()",
    "its session's mode": "SELECT set_config('default_transaction_read_only', 'off', false), evil()",
    "a function": "SELECT evil()",
    "a function that changes the mode": "SELECT evil_mode()",
    "a function with a subtransaction": "SELECT evil_subtransaction()",
    "a procedure that commits": "CALL evil_commit(0)",
    "a sequence": "SELECT nextval('notes_id_seq')",
    "explained": "EXPLAIN ANALYZE INSERT INTO notes (body) VALUES ('x')",
    "a second statement": "SELECT 1; INSERT INTO notes (body) VALUES ('x')",
    "a commit first": "COMMIT; INSERT INTO notes (body) VALUES ('x')",
    "a commit alone": "COMMIT",
    "set transaction": "SET TRANSACTION READ WRITE",
    "a block": "DO $$ BEGIN COMMIT; INSERT INTO notes (body) VALUES ('x'); END $$",
    "a drop": "SELECT 1; DROP TABLE notes",
}
FUNCTIONS = (
    (
        "CREATE FUNCTION evil() RETURNS int LANGUAGE sql AS "
        "$$ INSERT INTO public.notes (body) VALUES ('x') RETURNING id $$"
    ),
    (
        "CREATE FUNCTION evil_mode() RETURNS int LANGUAGE plpgsql AS $$ BEGIN "
        "SET TRANSACTION READ WRITE; RETURN public.evil(); END $$"
    ),
    (
        "CREATE FUNCTION evil_subtransaction() RETURNS int LANGUAGE plpgsql AS $$ BEGIN BEGIN "
        "PERFORM set_config('transaction_read_only', 'off', true); RETURN public.evil(); "
        "EXCEPTION WHEN division_by_zero THEN NULL; END; RETURN 0; END $$"
    ),
    (
        "CREATE PROCEDURE evil_commit(INOUT n int) LANGUAGE plpgsql AS $$ BEGIN "
        "COMMIT; INSERT INTO public.notes (body) VALUES ('x'); END $$"
    ),
    'GRANT USAGE ON SCHEMA public TO "ROLE"',
)


async def test_a_query_cannot_write_whatever_it_says(fleet: Fleet) -> None:
    """PostgreSQL refuses, or the statement is not executed; nothing is left on the connection either."""
    tenancy = fleet.tenancy
    await fleet.as_owner("acme", *FUNCTIONS)
    # the attacks, where nothing keeps the transaction read-only: in an ordinary session each of these writes
    for statement in (ATTACKS["a write in a query"], ATTACKS["its own transaction mode"], ATTACKS["a function"]):
        before = await fleet.notes()
        async with tenancy.transaction("acme") as session:
            await session.execute(text(statement))
        assert await fleet.notes() == before + 1
    async with tenancy.session("acme") as session:
        connection: Any = (await (await session.connection()).get_raw_connection()).driver_connection
        await connection.execute("ROLLBACK; BEGIN READ ONLY; COMMIT; INSERT INTO notes (body) VALUES ('x')")
        await session.invalidate()
    # ... a transaction that was begun read-only is made read-write by its first statement
    async with tenancy.session("acme") as session:
        await session.connection(execution_options={"postgresql_readonly": True})
        await session.execute(text(ATTACKS["set transaction"]))
        await session.execute(text("INSERT INTO notes (body) VALUES ('x')"))
        await session.commit()
    before = await fleet.notes()
    for name, statement in ATTACKS.items():
        found = await answers(tenancy, statement, tenants=["acme"])
        error = found["acme"]
        assert not isinstance(error, list), name
        assert error.sqlstate in {"25006", "25001", "2D000", "42601", None}, (name, error)
        assert (error.sqlstate is not None) or "was not executed" in error.message, (name, error)
    assert await fleet.notes() == before
    async with tenancy.session("acme") as session:
        assert await session.scalar(text("SHOW transaction_read_only")) == "off"
    # the role is the tenant's own
    assert await answers(tenancy, "SELECT current_user = session_user, current_user::text LIKE '%\\_t\\_%'") == {
        slug: [(True, True)] for slug in SLUGS
    }


async def test_a_write_is_committed_tenant_by_tenant(fleet: Fleet) -> None:
    """All or nothing for each; the others keep what they have."""
    tenancy = fleet.tenancy
    await fleet.as_owner("globex", "ALTER TABLE notes ADD CHECK (body <> 'new')")
    statement = "INSERT INTO notes (body) VALUES ('other'), ('new') RETURNING body"
    with pytest.raises(FleetQueryError) as caught:
        async for _, rows in tenancy.query_all(statement, write=True):
            assert [row.body for row in rows] == ["other", "new"]
            assert rows.rowcount == 2
    assert [(one.slug, one.sqlstate) for one in caught.value.failures] == [("globex", "23514")]
    assert caught.value.total == 3
    assert "new" not in caught.value.failures[0].message.replace("new row", "")
    assert pickle.loads(pickle.dumps(caught.value)).failures == caught.value.failures  # noqa: S301
    assert [await fleet.notes(slug) for slug in SLUGS] == [3, 2, 5]
    async for _, rows in tenancy.query_all("UPDATE notes SET body = 'same'", write=True, tenants=["acme"]):
        assert (len(rows), rows.rowcount) == (0, 3)
    async for _, rows in tenancy.query_all(insert(Note).values(body="core"), write=True, tenants=["acme"]):
        assert rows.rowcount == 1
    assert await fleet.notes() == 4
    found = await answers(tenancy, "DELETE FROM notes; SELECT 1", write=True, tenants=["acme"])
    assert found["acme"].sqlstate == "42601"
    assert await fleet.notes() == 4


async def test_time_and_rows_are_bounded(fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    """For each tenant; a statement that lifts PostgreSQL's own bound gains nothing by it."""
    tenancy = fleet.tenancy
    for statement in ("SELECT pg_sleep(60)", "SELECT set_config('statement_timeout', '0', false), pg_sleep(60)"):
        found = await answers(tenancy, statement, timeout=0.2)
        assert {one.sqlstate for one in found.values()} == {"57014"}, found
    assert await tenancy.fetch_value("SHOW statement_timeout", tenant="acme") == "0"
    with caplog.at_level(logging.WARNING, "tenancy_orm.queries"):
        async for tenant, rows in tenancy.query_all("SELECT * FROM generate_series(1, 3000000) AS n", max_rows=1500):
            assert len(rows) == 1500 and rows.truncated and rows[-1].n == 1500, tenant
    assert "3 had more" in caplog.text
    async for tenant, rows in tenancy.query_all(select(Note), max_rows=2):
        assert (len(rows), rows.truncated) == (min(SLUGS.index(tenant.slug) + 1, 2), tenant.slug == "initech")
    async for _, rows in tenancy.query_all("SELECT 1 AS one, 2 AS two WHERE false"):
        assert (list(rows), rows.columns, rows.types) == ([], ("one", "two"), (23, 23))


async def test_a_commit_is_bounded_too(fleet: Fleet) -> None:
    """A deferred trigger runs in it, and may have lifted PostgreSQL's own bound."""
    await fleet.as_owner(
        "acme",
        "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN PERFORM set_config('statement_timeout', '0', true); PERFORM pg_sleep(60); RETURN NULL; END $$",
        "CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON notes DEFERRABLE INITIALLY DEFERRED "
        "FOR EACH ROW EXECUTE FUNCTION slow()",
    )
    async with asyncio.timeout(HANGS):
        found = await answers(fleet.tenancy, "INSERT INTO notes (body) VALUES ('x')", write=True, timeout=0.1)
    assert found.pop("acme").message.endswith("may be there")
    assert list(found.values()) == [[], []]


async def test_a_tenant_that_fails_does_not_end_the_others(fleet: Fleet) -> None:
    """The error at the end lists it, once all others were yielded."""
    tenancy = fleet.tenancy
    await fleet.as_owner("globex", "DROP TABLE notes CASCADE")
    seen = []
    with pytest.raises(FleetQueryError, match="1 of 3 tenants: globex: relation") as caught:
        async for tenant, _ in tenancy.query_all("SELECT count(*) FROM notes"):
            seen.append(tenant.slug)
    assert sorted(seen) == ["acme", "initech"]
    assert caught.value.failures[0].sqlstate == "42P01"
    mistakes: tuple[Callable[[], Any], ...] = (
        lambda: tenancy.query_all("SELECT 1", timeout=0),
        lambda: tenancy.query_all("SELECT 1", max_rows=0),
        lambda: tenancy.query_all("SELECT 1", concurrency=0),
        lambda: tenancy.query_all("SELECT 1", tenants="acme"),
        lambda: tenancy.query_all("SELECT 1", tenants=["acme"], tier="pro"),
        lambda: tenancy.query_all("SELECT 1", status="new"),
        lambda: tenancy.query_all(1),  # type: ignore[arg-type]
    )
    for mistaken in mistakes:
        with pytest.raises(ConfigurationError):
            mistaken()
    with pytest.raises(TenantNotFoundError):
        await anext(tenancy.query_all("SELECT 1", tenants=["acme", "nobody"]))
    # a mistake of the caller's is raised as it is, and at once
    with pytest.raises(Exception, match="body"):
        await anext(tenancy.query_all("SELECT :body"))


async def test_nothing_is_asked_while_a_tenant_is_bound(fleet: Fleet) -> None:
    """Neither by a new query, nor by one that was made before."""
    tenancy = fleet.tenancy
    made = tenancy.query_all("SELECT 1")
    async with tenancy.scope("acme"):
        with pytest.raises(CrossTenantError):
            tenancy.query_all("SELECT 1")
        with pytest.raises(CrossTenantError):
            await anext(made)
    async for tenant, _ in tenancy.query_all("SELECT 1"):
        # the body may bind one, for as long as it works with it
        await tenancy.run(tenant, asyncio.sleep, 0)
    with pytest.raises(NotOpenError):
        Tenancy(tenancy.config).query_all("SELECT 1")


async def test_leaving_early_cancels_the_rest_and_returns_connections(fleet: Fleet) -> None:
    """By break, by an error, and by a cancellation."""
    tenancy = fleet.tenancy
    acme = await tenancy.tenants.get("acme")
    assert acme.placement is not None
    statement = "SELECT pg_sleep(CASE WHEN current_database()::text = :own THEN 0 ELSE 60 END)"
    parameters = {"own": acme.placement.database}
    routing = tenancy.internals.router

    def idle() -> bool:
        used = routing.statistics()
        return used.leased == 0 and all(one.open == one.idle for one in used.servers.values())

    async for tenant, _ in tenancy.query_all(statement, parameters):
        assert tenant.slug == "acme"
        assert not idle()
        break
    await until(idle)
    async with tenancy.query_all(statement, parameters) as found:
        async for _ in found:
            break
    assert routing.statistics().leased == 0

    async def consume() -> None:
        async for _ in tenancy.query_all(statement, parameters):
            pass

    task = asyncio.create_task(consume())
    await until(lambda: not idle())
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(idle)
    await answers(tenancy, "SELECT 1")


async def test_half_of_the_connections_are_left_to_requests(tenancy_config: TenancyConfig) -> None:
    """However many tenants are asked at once, and however long they take."""
    config = tenancy_config.replace(pool={"max_connections": 4})
    async with Tenancy(config) as tenancy:
        for number in range(4):
            await tenancy.tenants.create(f"t{number}")
        servers = tenancy.internals.router.statistics
        running = asyncio.create_task(answers(tenancy, "SELECT pg_sleep(60)", concurrency=64))
        await until(lambda: servers().servers["default"].open >= 2)
        for number in range(4):
            assert await tenancy.fetch_value("SELECT 1", tenant=f"t{number}") == 1
        assert servers().leased == 2
        running.cancel()
        await asyncio.wait((running,))


async def test_a_server_that_is_down_is_given_up_after_two_tenants(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The remaining tenants fail at once, and are in the list."""
    asked = []

    async def down(self: Query, router: Any, tenant: Any) -> Any:
        asked.append(tenant.slug)
        raise ConnectionRefusedError("refused")

    monkeypatch.setattr(Query, "run", down)
    found = await answers(fleet.tenancy, "SELECT 1", concurrency=1)
    assert len(asked) == 2
    assert found.keys() == set(SLUGS)
