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
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from tenancy_orm import Tenancy
from tenancy_orm.errors import ReadOnlyError
from tests.support.models import Note, Tag
from tests.support.postgres import Postgres

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


def refused(session: Session, statement: Any, sqlstate: str = READ_ONLY) -> None:
    """A statement fails with an error of PostgreSQL's, and the session can be used again after a rollback."""
    with pytest.raises(DBAPIError) as caught:
        session.execute(text(statement) if isinstance(statement, str) else statement)
    assert getattr(caught.value.orig, "sqlstate", None) == sqlstate
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

    def attempt(session: Session, statement: str, *, after_query: bool, commit: bool) -> None:
        if after_query:
            assert value(session, "SELECT 1") == 1
        try:
            session.execute(text(statement))
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
