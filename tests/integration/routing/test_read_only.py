"""``session(read_only=True)``: one round trip for a query, and PostgreSQL refuses what writes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import asyncpg
import pytest
from sqlalchemy import insert, select, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.config import ServerAddresses
from tenancy_orm.errors import ConfigurationError, ReadOnlyError
from tenancy_orm.postgres.sqlalchemy_versions import await_
from tenancy_orm.routing.reading import SET_MODE, controls_transaction, is_plain
from tests.support.models import Note, Tag
from tests.support.pgbouncer import pgbouncer
from tests.support.postgres import Postgres
from tests.support.processes import opened

T = TypeVar("T")
READ_ONLY = "25006"


@dataclass
class Side:
    """One of the two drivers. What a test does is the same function of a ``Session`` for both."""

    tenancy: Tenancy
    driver: str

    async def use(self, body: Callable[[Session], T], **options: Any) -> T:
        """Call ``body`` with a session of acme's, read-only if not said otherwise."""
        options.setdefault("read_only", True)
        if self.driver == "asyncpg":
            async with self.tenancy.session("acme", **options) as session:
                done: T = await session.run_sync(body)
                return done

        def work() -> T:
            with self.tenancy.sync.session("acme", **options) as session:
                return body(session)

        return await asyncio.to_thread(work)

    async def with_functions(self, postgres: Postgres) -> str:
        """Make the functions that ``ATTEMPTS`` call; returns the name of acme's database."""
        placement = (await self.tenancy.tenants.get("acme")).placement
        assert placement is not None
        async with postgres.connect(placement.database) as connection:
            await connection.execute(FUNCTIONS)
        return placement.database

    async def bodies(self) -> list[str]:
        return await self.use(lambda session: list(session.scalars(select(Note.body).order_by(Note.id))))


@pytest.fixture(params=["asyncpg", "psycopg"])
async def side(request: pytest.FixtureRequest, tenancy: Tenancy) -> Side:
    await tenancy.tenants.create("acme")
    async with tenancy.transaction("acme") as session:
        session.add(Note(body="kept", tags=[Tag(name="x")]))
    return Side(tenancy, request.param)


def value(session: Session, statement: str) -> Any:
    return session.scalar(text(statement))


def commit(session: Session, statement: str) -> None:
    session.execute(text(statement))
    session.commit()


def refused(session: Session, statement: Any, sqlstate: str | None = READ_ONLY) -> None:
    """A statement fails with an error of PostgreSQL's, and the session can be used again after a rollback."""
    with pytest.raises(DBAPIError) as caught:
        session.execute(text(statement) if isinstance(statement, str) else statement)
    assert sqlstate is None or getattr(caught.value.orig, "sqlstate", None) == sqlstate
    session.rollback()


async def test_reading(side: Side) -> None:
    def body(session: Session) -> None:
        note = session.scalars(select(Note)).one()
        assert note.body == "kept"
        assert [tag.name for tag in note.tags] == ["x"]
        assert not value(session, "SELECT pg_current_xact_id_if_assigned() IS NOT NULL")
        session.commit()
        refused(session, "INSERT INTO notes (body) VALUES ('x')")
        refused(session, insert(Note).values(body="x"))
        refused(session, "SELECT 1 FROM notes FOR UPDATE")
        refused(session, "CREATE TABLE x ()")
        refused(session, "DO $$ BEGIN INSERT INTO notes (body) VALUES ('x'); END $$")

    await side.use(body)
    await side.use(partial(commit, statement="INSERT INTO notes (body) VALUES ('y')"), read_only=False)
    assert await side.bodies() == ["kept", "y"]


# What code in a read-only session may try, so as to write in it, or to leave its connection in another mode.
ATTEMPTS = [
    "SET default_transaction_read_only = off",
    "SET SESSION CHARACTERISTICS AS TRANSACTION READ WRITE",
    "SELECT set_config('default_transaction_read_only', 'off', false)",
    "SELECT set_config('transaction_read_only', 'off', false)",
    "SET TRANSACTION READ WRITE",
    "SET transaction_read_only = off",
    "BEGIN READ WRITE",
    "start transaction read write",
    "/* a comment */ COMMIT",
    "/* a comment /* in another */ */ COMMIT",
    "-- a comment\nCOMMIT AND CHAIN",
    "ROLLBACK",
    "ROLLBACK AND CHAIN",
    "END",
    "ABORT",
    "PREPARE TRANSACTION 'x'",
    "RESET ALL",
    "DISCARD ALL",
    "SELECT writing()",
    "CALL escaping(0)",
    """DO $$ BEGIN PERFORM set_config('default_transaction_read_only', 'off', false); COMMIT;
    INSERT INTO notes (body) VALUES ('by DO'); COMMIT; END $$""",
]
FUNCTIONS = """
CREATE FUNCTION writing() RETURNS int LANGUAGE plpgsql AS $$ BEGIN
    PERFORM set_config('default_transaction_read_only', 'off', false);
    INSERT INTO notes (body) VALUES ('by a function'); RETURN 1;
END $$;
CREATE PROCEDURE escaping(INOUT n int) LANGUAGE plpgsql AS $$ BEGIN
    COMMIT; SET TRANSACTION READ WRITE; INSERT INTO notes (body) VALUES ('by a procedure'); COMMIT;
END $$;
"""


async def test_the_attempts_work_where_a_session_is_read_only_by_its_default_alone(
    side: Side, postgres: Postgres
) -> None:
    """Without what follows: a procedure writes, and so does a transaction that has had no query yet."""
    database = await side.with_functions(postgres)
    async with postgres.connect(database) as connection:
        await connection.execute("SET default_transaction_read_only = on")
        with pytest.raises(asyncpg.ReadOnlySQLTransactionError):
            await connection.execute("INSERT INTO notes (body) VALUES ('x')")
        await connection.fetch("CALL escaping(0)")
        await connection.execute("BEGIN READ ONLY")
        await connection.execute("SET TRANSACTION READ WRITE")
        await connection.execute("INSERT INTO notes (body) VALUES ('x')")
        await connection.execute("COMMIT")
    assert await side.bodies() == ["kept", "by a procedure", "x"]


async def test_no_statement_makes_a_read_only_session_write(side: Side, postgres: Postgres) -> None:
    """Not itself, not the next statements of the session, and not those of the next session."""
    await side.with_functions(postgres)

    def attempt(session: Session, statement: str, *, after_query: bool, commit: bool, many: bool = False) -> None:
        if after_query:
            assert value(session, "SELECT 1") == 1
        try:
            session.execute(text(statement), [{}, {}] if many else {})
        except (DBAPIError, ReadOnlyError):
            session.rollback()
        if commit:
            session.commit()
        refused(session, "INSERT INTO notes (body) VALUES ('x')")
        refused(session, "DO $$ BEGIN INSERT INTO notes (body) VALUES ('x'); END $$")
        assert value(session, "SELECT count(*) FROM notes") == 1
        session.commit()

    for statement in ATTEMPTS:
        for after_query, commit in ((False, False), (False, True), (True, True)):
            await side.use(partial(attempt, statement=statement, after_query=after_query, commit=commit))
            await side.use(lambda session: refused(session, "INSERT INTO notes (body) VALUES ('x')"))
        await side.use(partial(attempt, statement=statement, after_query=False, commit=False, many=True))
    assert await side.bodies() == ["kept"]


async def test_the_next_session_writes_whatever_the_one_before_did(side: Side, postgres: Postgres) -> None:
    """In a transaction, in AUTOCOMMIT, after a COMMIT by SQL, and by the driver itself."""
    await side.with_functions(postgres)

    def read(session: Session, statement: str) -> None:
        assert value(session, "SELECT 1") == 1
        try:
            session.execute(text(statement))
            session.commit()
        except (DBAPIError, ReadOnlyError):
            session.rollback()

    def write(session: Session) -> None:
        session.execute(text("INSERT INTO notes (body) VALUES ('w')"))
        session.commit()

    def write_after_commit(session: Session) -> None:
        session.execute(text("SELECT 1"))
        session.execute(text("COMMIT"))
        session.execute(text("INSERT INTO notes (body) VALUES ('w')"))
        session.execute(text("COMMIT"))

    def raw(session: Session) -> None:
        connection: Any = session.connection().connection
        if side.driver == "psycopg":
            connection.driver_connection.execute("INSERT INTO notes (body) VALUES ('w')")
            connection.driver_connection.commit()
        else:
            connection.dbapi_connection.run_async(
                lambda driver: driver.copy_records_to_table("notes", records=[("w",)], columns=["body"])
            )

    def raw_transaction(session: Session) -> None:
        connection: Any = session.connection().connection
        if side.driver == "psycopg":
            with connection.driver_connection.transaction():
                connection.driver_connection.execute("INSERT INTO notes (body) VALUES ('w')")
            return

        async def insert_one(driver: Any) -> None:
            async with driver.transaction():
                await driver.execute("INSERT INTO notes (body) VALUES ($1)", "w")

        connection.dbapi_connection.run_async(insert_one)

    written = 0
    for statement in ["SELECT 1", *ATTEMPTS]:
        for body, options in (
            (write, {}),
            (write, {"isolation_level": "AUTOCOMMIT"}),
            (write, {"isolation_level": "SERIALIZABLE"}),
            (write_after_commit, {}),
            (raw, {}),
            (raw_transaction, {}),
        ):
            await side.use(partial(read, statement=statement))
            await side.use(body, read_only=False, **options)
            written += 1
    assert await side.bodies() == ["kept", *["w"] * written]
    # and where a session that may write has left its connection read-only
    for body, options in ((write, {}), (write, {"isolation_level": "AUTOCOMMIT"}), (raw, {})):
        await side.use(partial(commit, statement="SET default_transaction_read_only = on"), read_only=False)
        await side.use(body, read_only=False, **options)
    assert len(await side.bodies()) == 1 + written + 3


async def test_changed_objects_are_refused_before_anything_is_sent(side: Side) -> None:
    """At the flush, which a query begins too; an object that is only read is none."""

    def body(session: Session) -> None:
        note = session.scalars(select(Note)).one()
        note.body = "kept"  # which it was
        assert session.scalars(select(Note.body)).all() == ["kept"]
        note.body = "changed"
        with pytest.raises(ReadOnlyError, match="'acme'"):
            session.commit()
        session.rollback()
        with pytest.raises(DBAPIError, match="read-only"):
            session.bulk_insert_mappings(Note, [{"body": "bulk"}])
        session.rollback()
        with pytest.raises(DBAPIError, match="read-only"):
            session.execute(insert(Note), [{"body": "a"}, {"body": "b"}])

    await side.use(body)
    assert await side.bodies() == ["kept"]


async def test_new_and_deleted_objects_are_refused_at_once(side: Side) -> None:
    """With and without a flush after it. Objects that have a row come back to be read, by adding and merging."""

    def body(session: Session) -> None:
        note = session.scalars(select(Note)).one()
        for refused in (
            partial(session.add, Note(body="new")),
            partial(session.add_all, [Note(body="new")]),
            partial(session.merge, Note(id=note.id + 1, body="new")),
        ):
            with pytest.raises(ReadOnlyError, match="a Note is to be added, but the session is read-only"):
                refused()
        with pytest.raises(ReadOnlyError, match="a Note is to be deleted"):
            session.delete(note)
        if hasattr(session, "delete_all"):
            with pytest.raises(ReadOnlyError, match="a Note is to be deleted"):
                session.delete_all([note])
        session.expunge(note)
        session.add(note)
        session.expunge(note)
        assert session.merge(note) is session.merge(Note(id=note.id, body="kept"), load=True)
        assert session.merge(note, load=False).body == "kept"

    await side.use(body)
    assert await side.bodies() == ["kept"]


async def test_a_change_that_is_left_behind_is_an_error_of_the_read_only_session(side: Side) -> None:
    """Not of one that writes, of one that has failed, or of what the application has discarded itself."""

    def change(session: Session, discard: str | None = None) -> None:
        note = session.scalars(select(Note)).one()
        note.body = "changed"
        if discard == "fail":
            raise LookupError
        if discard is not None:
            getattr(session, discard)()

    def merge(session: Session) -> None:
        session.merge(Note(id=session.scalars(select(Note.id)).one(), body="changed"))

    for body in (change, merge):
        with pytest.raises(ReadOnlyError, match="'acme': a Note is to be written"):
            await side.use(body)
    with pytest.raises(ReadOnlyError):
        await side.use(change, isolation_level="REPEATABLE READ")
    for discard in ("rollback", "close", "expunge_all"):
        await side.use(partial(change, discard=discard))
    with pytest.raises(LookupError):
        await side.use(partial(change, discard="fail"))
    await side.use(change, read_only=False)
    assert await side.bodies() == ["kept"]


async def test_snapshots(side: Side) -> None:
    """Each query sees what is committed by then; with an isolation level that keeps it, all see the same."""
    loop = asyncio.get_running_loop()

    def twice(session: Session) -> tuple[int, int]:
        def count() -> int:
            found: int = value(session, "SELECT count(*) FROM notes")
            return found

        first = count()
        other = side.tenancy.execute("INSERT INTO notes (body) VALUES ('y')", tenant="acme")
        if side.driver == "asyncpg":
            await_(other)
        else:
            asyncio.run_coroutine_threadsafe(other, loop).result(30)
        return first, count()

    assert await side.use(twice) == (1, 2)
    for level in ("REPEATABLE READ", "SERIALIZABLE"):
        first, second = await side.use(twice, isolation_level=level)
        assert first == second
        await side.use(lambda session: refused(session, "INSERT INTO notes (body) VALUES ('x')"), isolation_level=level)
    first, second = await side.use(twice, isolation_level="READ COMMITTED")
    assert second == first + 1
    with pytest.raises(ConfigurationError, match="'serialisable' is not an isolation level; they are READ COMMITTED"):
        await side.use(twice, isolation_level="serialisable")


async def test_what_needs_a_transaction_has_one(side: Side) -> None:
    """Streams, savepoints, settings and locks for a transaction: they last until the session's commit or rollback."""

    def body(session: Session) -> None:
        rows = session.execute(text("SELECT generate_series(1, 1000)"), execution_options={"yield_per": 100})
        assert len(rows.scalars().all()) == 1000
        session.commit()
        session.execute(text("SET LOCAL work_mem = '1234kB'"))
        assert value(session, "SHOW work_mem") == "1234kB"
        with session.begin_nested():
            assert value(session, "SELECT 1") == 1
        nested = session.begin_nested()
        nested.rollback()
        assert value(session, "SELECT current_setting('work_mem')") == "1234kB"
        refused(session, "INSERT INTO notes (body) VALUES ('x')")
        assert value(session, "SHOW work_mem") != "1234kB"
        session.execute(text("SET work_mem = '2345kB'"))
        session.rollback()
        assert value(session, "SELECT current_setting('work_mem')") != "2345kB"
        refused(session, "CREATE TEMP TABLE t (a int)")
        refused(session, "SELECT nextval('notes_id_seq')")
        session.execute(text("LISTEN word"))
        session.commit()
        assert value(session, "SELECT pg_listening_channels()") == "word"
        session.execute(text("UNLISTEN *"))
        session.commit()
        with session.begin_nested():
            pass

    await side.use(body)
    if side.driver == "asyncpg":
        async with side.tenancy.session("acme", read_only=True) as session:
            found = [note.body async for note in await session.stream_scalars(select(Note))]
            assert found == ["kept"]
            assert [tag.name for tag in await (await session.scalars(select(Note))).one().awaitable_attrs.tags] == ["x"]


async def test_a_connection_that_is_reset_is_ready_to_read(tenancy_config: TenancyConfig, postgres: Postgres) -> None:
    """With ``pool.full_reset``, a read leaves it in the mode of a read, and a write in that of a write."""
    config = tenancy_config.replace(pool={"full_reset": True})
    async with opened(config, initialise=True) as tenancy:
        await tenancy.tenants.create("acme")
        for driver in ("asyncpg", "psycopg"):
            side = Side(tenancy, driver)
            for _ in range(2):
                await side.use(partial(value, statement="SELECT 1"))
                await side.use(lambda session: refused(session, "INSERT INTO notes (body) VALUES ('x')"))
                await side.use(partial(commit, statement="INSERT INTO notes (body) VALUES ('w')"), read_only=False)
                await tenancy.execute("INSERT INTO notes (body) VALUES ('w')", tenant="acme")
        assert await tenancy.fetch_value("SELECT count(*) FROM notes", tenant="acme") == 8


async def test_the_schema_may_change_between_two_queries(tenancy: Tenancy, postgres: Postgres) -> None:
    """A query that was prepared before is repeated. While a migration runs, each is prepared in a transaction."""
    acme = (await tenancy.tenants.create("acme")).tenant
    assert acme.placement is not None
    query = text("SELECT * FROM notes")
    async with tenancy.session(acme, read_only=True) as session, postgres.connect(acme.placement.database) as admin:
        driver: Any = (await (await session.connection()).get_raw_connection()).driver_connection
        await session.execute(query)
        await admin.execute("ALTER TABLE notes ADD more int")
        assert len((await session.execute(query)).keys()) == 4
        assert not driver.is_in_transaction()
        tenancy.internals.router.schema_changed(acme.id, changing=True)
        assert len((await session.execute(query)).keys()) == 4
        assert driver.is_in_transaction()
        await session.rollback()
        tenancy.internals.router.schema_changed(acme.id)
        assert await session.scalar(text("SHOW transaction_read_only")) == "on"


async def test_readers_prefer_a_connection_that_reads_already(tenancy: Tenancy) -> None:
    """And writers one that does not: of two idle ones, each keeps its own."""
    acme = (await tenancy.tenants.create("acme")).tenant
    pid = text("SELECT pg_backend_pid()")
    async with tenancy.session(acme) as writer, tenancy.session(acme, read_only=True) as reader:
        writing, reading = await writer.scalar(pid), await reader.scalar(pid)
    assert writing != reading
    for _ in range(2):
        assert await tenancy.fetch_value("SELECT pg_backend_pid()", tenant=acme) == reading
        async with tenancy.session(acme) as session:
            assert await session.scalar(pid) == writing


async def test_a_server_that_is_read_only_by_default_stays_so(
    tenancy_config: TenancyConfig, postgres: Postgres
) -> None:
    """As a managed server with a full disk is: no transaction is made writable that PostgreSQL begins read-only."""
    admin = make_url(postgres.admin_url)
    tenants = f"postgresql://{admin.host}:{admin.port}?default_transaction_read_only=on"
    addresses = ServerAddresses(admin=postgres.admin_url, tenants=tenants)
    async with opened(tenancy_config.replace(servers={"default": addresses}), initialise=True) as tenancy:
        await tenancy.tenants.create("acme")
        for driver in ("asyncpg", "psycopg"):
            side = Side(tenancy, driver)
            for read_only, level in ((True, None), (False, None), (False, "AUTOCOMMIT"), (False, "SERIALIZABLE")):
                for statement in ("SELECT 1", "INSERT INTO notes (body) VALUES ('x')"):
                    body = value if statement == "SELECT 1" else refused
                    await side.use(partial(body, statement=statement), read_only=read_only, isolation_level=level)
        with pytest.raises(DBAPIError, match="read-only"):
            await tenancy.execute("INSERT INTO notes (body) VALUES ('x')", tenant="acme")


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_behind_a_pooler_each_session_is_a_transaction(
    tenancy_config: TenancyConfig, postgres: Postgres, driver: str
) -> None:
    """Which gives a server connection to whoever comes next, so no setting may stay on it."""
    with pgbouncer(postgres) as bouncer:
        addresses = ServerAddresses(admin=postgres.admin_url, tenants=bouncer.address)
        async with opened(tenancy_config.replace(servers={"default": addresses}), initialise=True) as tenancy:
            await tenancy.tenants.create("acme")
            side = Side(tenancy, driver)
            for _ in range(3):
                await side.use(partial(value, statement="SELECT 1"))
                for statement in ("INSERT INTO notes (body) VALUES ('x')", "SET TRANSACTION READ WRITE"):
                    await side.use(partial(refused, statement=statement, sqlstate=None))
                await side.use(partial(commit, statement="INSERT INTO notes (body) VALUES ('w')"), read_only=False)
                assert await tenancy.execute("INSERT INTO notes (body) VALUES ('w')", tenant="acme") == 1
                with pytest.raises(DBAPIError, match="read-only"):
                    await tenancy.fetch_value("DELETE FROM notes RETURNING 1", tenant="acme")
            assert await tenancy.fetch_value("SHOW default_transaction_read_only", tenant="acme") == "off"
            assert len(await side.bodies()) == 6
            if driver == "asyncpg":
                await refused_outside_a_transaction(tenancy)
                assert len(await side.bodies()) == 6


async def refused_outside_a_transaction(tenancy: Tenancy) -> None:
    """On asyncpg's own connection, where a pooler keeps no mode: each way to write without a transaction."""
    write = "INSERT INTO notes (body) VALUES ('x')"
    async with tenancy.session("acme", read_only=True) as session:
        driver: Any = (await (await session.connection()).get_raw_connection()).driver_connection
        attempts: tuple[Callable[[], Any], ...] = (
            lambda: driver.execute(write),
            lambda: driver.execute(f"BEGIN; {write}; COMMIT;"),
            lambda: driver.fetch(write),
            lambda: driver.executemany("INSERT INTO notes (body) VALUES ($1)", [("x",)]),
            lambda: driver.copy_records_to_table("notes", records=[("x",)], columns=["body"]),
            lambda: driver.copy_from_query(f"{write} RETURNING 1", output=print),
        )
        for attempt in attempts:
            with pytest.raises(ReadOnlyError, match="transaction"):
                await attempt()
        async with driver.transaction():
            assert await driver.fetchval("SELECT 1") == 1
        with pytest.raises(asyncpg.ReadOnlySQLTransactionError):
            async with driver.transaction():
                await driver.execute(write)


async def test_where_a_mode_is_not_kept_no_statement_is_sent_alone(side: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by a proxy in between, which may give each statement another session, and cannot be told from PostgreSQL."""
    monkeypatch.setitem(SET_MODE, "on", "SELECT 1")
    for _ in range(2):
        for _ in range(2):
            with pytest.raises(DBAPIError, match="read-only"):
                await side.tenancy.fetch_value("DELETE FROM notes RETURNING 1", tenant="acme")
            await side.use(partial(refused, statement="DELETE FROM notes RETURNING 1"))
        side.tenancy.internals.router.retire((await side.tenancy.tenants.get("acme")).id)
    assert await side.bodies() == ["kept"]


def test_which_statements_are_sent_alone() -> None:
    """Those that PostgreSQL plans. What cannot be told counts as one that ends a transaction."""
    for statement in (
        "SELECT 1",
        " \n(select 1)",
        "/* a */ -- b\n WITH x AS (SELECT 1) TABLE x",
        "((VALUES (1)))",
        "Delete from x",
    ):
        assert is_plain(statement) and not controls_transaction(statement), statement
    for statement in (
        "CALL x()",
        "DO $$$$",
        "EXPLAIN SELECT 1",
        "SAVEPOINT a",
        "ROLLBACK TO a",
        "rollback work to savepoint a",
    ):
        assert not is_plain(statement) and not controls_transaction(statement), statement
    for statement in (
        "/* /* */ SELECT 1 */ COMMIT",
        "-- SELECT\nCOMMIT",
        "rollback",
        "ROLLBACK WORK",
        "PREPARE/**/TRANSACTION 'a'",
        "",
        ";",
    ):
        assert not is_plain(statement) and controls_transaction(statement), statement
    assert not controls_transaction("PREPARE a AS SELECT 1")
