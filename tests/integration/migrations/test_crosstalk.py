"""Many migrations in one process reach only their own databases."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from tenancy_orm.migrations import local
from tests.support.alembic_proxies import forget_active, uninstall
from tests.support.postgres import Postgres

TENANTS = 16
ROWS = 5

# A plain Alembic environment, as `alembic init` makes it, on the connection it is given.
ENV = """
from alembic import context
context.configure(connection=context.config.attributes["connection"])
with context.begin_transaction():
    context.run_migrations()
"""

REVISION = f"""
import sqlalchemy as sa
from alembic import context, op
from alembic.op import execute

revision = "0001"
down_revision = None

def upgrade():
    op.create_table("notes", sa.Column("database", sa.Text), sa.Column("n", sa.Integer))
    for n in range({ROWS}):
        name = context.config.attributes["name"]
        execute(f"INSERT INTO notes VALUES ('{{name}}', {{n}})")
    with op.batch_alter_table("notes") as batch:
        batch.add_column(sa.Column("checked", sa.Boolean))
    assert op.get_bind() is op.get_context().connection
"""


@pytest.fixture
def scripts(tmp_path: Path) -> Path:
    (tmp_path / "versions").mkdir()
    (tmp_path / "env.py").write_text(ENV)
    (tmp_path / "versions" / "0001.py").write_text(REVISION)
    return tmp_path


@pytest.fixture
async def databases(postgres: Postgres) -> AsyncIterator[list[str]]:
    names = [postgres.new_name("crosstalk") for _ in range(TENANTS)]
    for name in names:
        await postgres.create_database(name)
    yield names
    for name in names:
        await postgres.drop_database(name)


@pytest.fixture(autouse=True)
def reinstalled() -> Iterator[None]:
    yield
    local.install()


def migrate(connection: sa.Connection, scripts: Path, name: str) -> None:
    config = Config(attributes={"connection": connection, "name": name})
    config.set_main_option("script_location", str(scripts))
    config.set_main_option("path_separator", "os")
    command.upgrade(config, "head")


async def migrate_in_task(postgres: Postgres, scripts: Path, name: str) -> None:
    engine = create_async_engine(postgres.url(name, driver="asyncpg"), poolclass=NullPool)
    async with engine.connect() as connection:
        await connection.run_sync(migrate, scripts, name)
        await connection.commit()


def migrate_in_thread(postgres: Postgres, scripts: Path, name: str) -> None:
    engine = sa.create_engine(postgres.url(name, driver="psycopg"), poolclass=sa.NullPool)
    with engine.connect() as connection:
        migrate(connection, scripts, name)
        connection.commit()


async def rows(postgres: Postgres, name: str) -> list[tuple[str, int]]:
    async with postgres.connect(name) as connection:
        if await connection.fetchval("SELECT to_regclass('notes')") is None:
            return []
        return [tuple(row) for row in await connection.fetch("SELECT database, n FROM notes ORDER BY n")]


async def all_rows(postgres: Postgres, names: list[str]) -> list[list[tuple[str, int]]]:
    return [await rows(postgres, name) for name in names]


def right(names: list[str]) -> list[list[tuple[str, int]]]:
    return [[(name, n) for n in range(ROWS)] for name in names]


async def test_without_the_patch_tasks_write_into_each_others_databases(
    postgres: Postgres, scripts: Path, databases: list[str]
) -> None:
    uninstall()
    await asyncio.gather(*(migrate_in_task(postgres, scripts, name) for name in databases), return_exceptions=True)
    assert await all_rows(postgres, databases) != right(databases)
    forget_active()


async def test_tasks_write_into_their_own_databases(postgres: Postgres, scripts: Path, databases: list[str]) -> None:
    local.install()
    await asyncio.gather(*(migrate_in_task(postgres, scripts, name) for name in databases))
    assert await all_rows(postgres, databases) == right(databases)


async def test_threads_write_into_their_own_databases(postgres: Postgres, scripts: Path, databases: list[str]) -> None:
    local.install()

    def everything() -> None:
        with ThreadPoolExecutor(TENANTS) as executor:
            list(executor.map(lambda name: migrate_in_thread(postgres, scripts, name), databases))

    await asyncio.to_thread(everything)
    assert await all_rows(postgres, databases) == right(databases)
