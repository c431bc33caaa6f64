"""Migrations of the control database leave Alembic in this process as they found it, after a success and a failure."""

from __future__ import annotations

import asyncio
import contextlib
import io
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import alembic.context
import alembic.op
import asyncpg
import pytest
from alembic.config import Config
from alembic.operations import Operations
from alembic.runtime.environment import EnvironmentContext
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from tenancy_orm.control import database as control_database
from tenancy_orm.control.database import ControlDatabase
from tenancy_orm.errors import ControlSchemaError, ControlUnavailableError
from tenancy_orm.migrations import local
from tests.support.alembic_proxies import assert_nothing_is_active, run_plain_alembic, uninstall
from tests.support.postgres import Postgres


@pytest.fixture(params=["plain", "context-local"])
def proxies(request: pytest.FixtureRequest) -> Iterator[str]:
    """Alembic as it is, and as the first fleet run makes it."""
    uninstall()
    if request.param == "context-local":
        local.install()
    yield request.param
    local.install()


@contextlib.asynccontextmanager
async def control(url: str) -> AsyncIterator[ControlDatabase]:
    database = ControlDatabase(url)
    try:
        yield database
    finally:
        await database.close()


async def test_alembic_is_as_before_after_a_failed_upgrade(proxies: str, empty_url: str, tmp_path: Path) -> None:
    before = run_plain_alembic(tmp_path / "own")
    connection = await asyncpg.connect(empty_url)
    await connection.execute("CREATE SCHEMA tenancy; CREATE TYPE tenancy.tenants AS (unexpected integer)")
    async with control(empty_url) as database:
        with pytest.raises(Exception, match="already exists"):
            await database.upgrade()
        assert_nothing_is_active()
        assert run_plain_alembic(tmp_path / "own") == before
        await connection.execute("DROP TYPE tenancy.tenants")
        await connection.close()
        await database.upgrade()
        assert_nothing_is_active()
        assert run_plain_alembic(tmp_path / "own") == before


async def test_an_environment_that_is_active_stays_active(proxies: str, empty_url: str, tmp_path: Path) -> None:
    """A revision or env.py of the application that opens a ``Tenancy`` goes on with its own ``op``."""
    (tmp_path / "versions").mkdir()
    buffer = io.StringIO()
    options = {"as_sql": True, "output_buffer": buffer}
    own = MigrationContext.configure(dialect_name="postgresql", opts=options)
    with EnvironmentContext(Config(), ScriptDirectory(tmp_path)) as environment, Operations.context(own):
        async with control(empty_url) as database:
            await database.upgrade()
        module: Any = alembic.context
        assert module.config is environment.config
        alembic.op.drop_table("own")
    assert buffer.getvalue() == "DROP TABLE own;\n\n"
    assert_nothing_is_active()


async def test_an_upgrade_lets_others_through_while_it_waits_for_a_lock(
    empty_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backup holds a lock on every table, and whoever comes after a waiting ALTER TABLE waits behind it."""
    monkeypatch.setattr(control_database, "_LOCK_TIMEOUT", "50ms")
    monkeypatch.setattr(control_database, "_LOCK_PAUSE", 0.05)
    async with control(empty_url) as database, contextlib.AsyncExitStack() as stack:
        await database.upgrade("0012_key_checks")
        backup, application = [await asyncpg.connect(empty_url) for _ in range(2)]
        for connection in (backup, application):
            stack.push_async_callback(connection.close)
        async with backup.transaction():
            await backup.fetchval("SELECT count(*) FROM tenancy.audit_log")
            with monkeypatch.context() as impatient:
                impatient.setattr(control_database, "_LOCK_SECONDS", 0.0)
                with pytest.raises(ControlUnavailableError, match="a backup or a long query"):
                    await database.upgrade()
            upgrading = asyncio.create_task(database.upgrade())
            for _ in range(5):
                for statement in ("UPDATE tenancy.tenants SET reason = ''", "SELECT FROM tenancy.audit_log"):
                    await application.execute(statement, timeout=5)
                await asyncio.sleep(0.05)
            assert not upgrading.done()
        await upgrading
        await database.open()


async def test_a_schema_of_a_later_version_is_left_alone(empty_url: str) -> None:
    """During a rolling deploy a process of the former version may start after the upgrade; it says what to install."""
    async with control(empty_url) as database:
        await database.upgrade()
        async with database.transaction() as connection:
            await connection.exec_driver_sql("UPDATE tenancy.alembic_version SET version_num = '9999_later'")
        for call in (database.open, database.upgrade):
            with pytest.raises(ControlSchemaError, match=r"at revision 9999_later.*install that version"):
                await call()


async def test_two_control_databases_can_be_upgraded_at_once(proxies: str, postgres: Postgres) -> None:
    """``alembic.op`` is one object in a process: the revisions of one would reach the other."""
    names = [postgres.new_name() for _ in range(3)]
    urls = [await postgres.create_database(name) for name in names]
    try:
        async with contextlib.AsyncExitStack() as stack:
            databases = [await stack.enter_async_context(control(url)) for url in urls]
            await asyncio.gather(*(database.upgrade() for database in databases))
        tables = set()
        for url in urls:
            connection = await asyncpg.connect(url)
            query = "SELECT count(*) FROM pg_class WHERE relnamespace = 'tenancy'::regnamespace AND relkind = 'r'"
            tables.add(await connection.fetchval(query))
            await connection.close()
        assert len(tables) == 1
        assert_nothing_is_active()
    finally:
        for name in names:
            await postgres.drop_database(name)
