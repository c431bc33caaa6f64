"""The state of SQLAlchemy's adapter of asyncpg, which its versions keep in different ways."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy
import typer
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from tenancy_orm.cli.runtime import exit_on_error
from tenancy_orm.housekeeping import _Run
from tenancy_orm.postgres.errors import postgres_error
from tenancy_orm.postgres.login import reason_of
from tenancy_orm.postgres.sqlalchemy_versions import SQLALCHEMY_2_0, await_, forget_transaction, has_begun, roll_back
from tests.support.postgres import Postgres
from tests.support.waiting import until


def test_the_version_is_known() -> None:
    """By its number, and by what the version has."""
    assert ("2.0" if SQLALCHEMY_2_0 else "2.1") == sqlalchemy.__version__[:3]
    assert hasattr(Session, "merge_all") is not SQLALCHEMY_2_0


async def test_a_transaction_begins_and_ends(postgres: Postgres) -> None:
    """It has begun when PostgreSQL knows of it; a BEGIN that fails begins none."""
    engine = create_async_engine(postgres.url(driver="asyncpg"), poolclass=NullPool)
    async with engine.connect() as connection, postgres.connect() as other:
        adapted: Any = (await connection.get_raw_connection()).dbapi_connection
        driver = adapted._connection
        assert not has_begun(adapted)
        process = (await connection.exec_driver_sql("SELECT pg_backend_pid()")).scalar_one()
        assert has_begun(adapted) and driver.is_in_transaction()

        await roll_back(adapted)
        assert not has_begun(adapted) and not driver.is_in_transaction()
        await connection.run_sync(lambda _: await_(roll_back_again(adapted)))
        assert not has_begun(adapted) and not driver.is_in_transaction()

        await connection.exec_driver_sql("SELECT 1")
        await other.execute("SELECT pg_terminate_backend($1)", process)
        await until(driver.is_closed)
        with pytest.raises(DBAPIError):
            await connection.exec_driver_sql("SELECT 1")
        assert not has_begun(adapted)

    async with engine.connect() as connection:
        adapted = (await connection.get_raw_connection()).dbapi_connection
        await connection.exec_driver_sql("SELECT 1")
        forget_transaction(adapted)
        assert not has_begun(adapted)
    await engine.dispose()


async def test_a_reason_quotes_no_row(postgres: Postgres, capsys: pytest.CaptureFixture[str]) -> None:
    """The text of a driver's error does in 2.0: in PostgreSQL's DETAIL."""
    engine = create_async_engine(postgres.url(driver="asyncpg"), poolclass=NullPool)
    async with engine.connect() as connection:
        await connection.exec_driver_sql("CREATE TEMPORARY TABLE people (email text CONSTRAINT once UNIQUE)")
        insert = "INSERT INTO people VALUES ('ada@example')"
        await connection.exec_driver_sql(insert)
        with pytest.raises(IntegrityError) as caught:
            await connection.exec_driver_sql(insert)
    await engine.dispose()
    error = caught.value
    assert ("ada@example" in str(error.orig)) is SQLALCHEMY_2_0

    reason = 'duplicate key value violates unique constraint "once" (23505)'
    assert reason_of(error) == reason

    def fail() -> None:
        raise error

    with pytest.raises(typer.Exit):
        exit_on_error(fail)
    assert " ".join(capsys.readouterr().err.split()).endswith(reason)

    run: Any = _Run(None, None)  # type: ignore[arg-type]

    async def chore(error: Exception) -> None:
        raise error

    await run.do("prune", chore(error))
    assert run.errors == [f"prune: {reason}"]
    # as a chore on a server fails, without SQLAlchemy around it
    own = postgres_error(error)
    assert own is not None
    assert "ada@example" in str(own)
    await run.do("prune", chore(own))
    assert run.errors == [f"prune: {reason}"] * 2


async def roll_back_again(adapted: Any) -> None:
    """Begin a transaction, and roll it back."""
    await adapted._start_transaction()
    assert has_begun(adapted)
    await roll_back(adapted)
