"""env.py files as users of plain Alembic have them: Alembic's templates, its cookbook, and common variations."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

from alembic import command
from alembic.config import Config

TEMPLATES = ("generic", "async", "pyproject", "pyproject_async")

URL = "postgresql+asyncpg://nobody:hunter2@127.0.0.1:1/own"
"""A database that an env.py would connect to: nothing answers there."""

_TAIL = """

if context.is_offline_mode():
    run_migrations_offline()
else:
    run_migrations_online()
"""

COOKBOOK = f"""
from alembic import context
from sqlalchemy import engine_from_config, pool

config = context.config


def run_migrations_online():
    connectable = config.attributes.get("connection", None)
    if connectable is None:
        connectable = engine_from_config(config.get_section(config.config_ini_section), prefix="sqlalchemy.")
        with connectable.connect() as connection:
            context.configure(connection=connection, target_metadata=None, compare_type=False)
            with context.begin_transaction():
                context.run_migrations()
    else:
        context.configure(connection=connectable, target_metadata=None, compare_type=False)
        with context.begin_transaction():
            context.run_migrations()


def run_migrations_offline():
    context.configure(url=config.get_main_option("sqlalchemy.url"), literal_binds=True)
    with context.begin_transaction():
        context.run_migrations()
{_TAIL}"""

ASYNC_COOKBOOK = f"""
import asyncio

from alembic import context
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine


def do_run_migrations(connection):
    context.configure(connection=connection, target_metadata=None, compare_type=False)
    with context.begin_transaction():
        context.run_migrations()


async def run_async_migrations(connectable):
    async with connectable.begin() as connection:
        await connection.run_sync(do_run_migrations)
    await connectable.dispose()


def run_migrations_online():
    connectable = context.config.attributes.get("connection", None)
    if connectable is None:
        connectable = create_async_engine({URL!r})
    if isinstance(connectable, AsyncEngine):
        asyncio.run(run_async_migrations(connectable))
    else:
        do_run_migrations(connectable)


def run_migrations_offline():
    pass
{_TAIL}"""

ENGINE_OR_CONNECTION = f"""
from alembic import context
from sqlalchemy import create_engine


def run_migrations_online():
    connectable = context.config.attributes.get("connection", None) or create_engine({URL!r})
    with connectable.connect() as connection:
        context.configure(connection, target_metadata=None, compare_type=False)
        with context.begin_transaction():
            context.run_migrations()


def run_migrations_offline():
    pass
{_TAIL}"""

OWN_URL = f"""
import asyncio
from logging.config import fileConfig

from alembic import context
from sqlalchemy import pool
from sqlalchemy.ext.asyncio import async_engine_from_config

config = context.config
config.set_main_option("sqlalchemy.url", {URL!r})
fileConfig(config.config_file_name)


def do_run_migrations(connection):
    context.configure(connection=connection, target_metadata=None, compare_type=False)
    with context.begin_transaction():
        context.run_migrations()


async def run_migrations_online():
    configuration = config.get_section(config.config_ini_section)
    configuration["sqlalchemy.url"] = {URL!r}
    connectable = async_engine_from_config(configuration, prefix="sqlalchemy.", poolclass=pool.NullPool)
    async with connectable.connect() as connection:
        await connection.run_sync(do_run_migrations)
        await connection.commit()
    await connectable.dispose()


def run_migrations_offline():
    pass


if context.is_offline_mode():
    run_migrations_offline()
else:
    asyncio.run(run_migrations_online())
"""

PLAIN = {
    "cookbook": COOKBOOK,
    "async cookbook": ASYNC_COOKBOOK,
    "engine or connection": ENGINE_OR_CONNECTION,
    "own URL": OWN_URL,
}


def make_project(root: Path, template: str, *, directory: str = "alembic") -> Path:
    """Run ``alembic init -t template`` in ``root``, and return the directory of migrations."""
    root.mkdir(parents=True, exist_ok=True)
    config = Config(root / "alembic.ini", toml_file=root / "pyproject.toml")
    with contextlib.redirect_stdout(io.StringIO()):
        command.init(config, str(root / directory), template=template)
    return root / directory


def add_revision(directory: Path, upgrade: str = 'op.create_table("notes", sa.Column("id", sa.Integer))') -> None:
    """Write the revision 0001 into a directory of migrations."""
    (directory / "versions").mkdir(exist_ok=True)
    (directory / "versions" / "0001.py").write_text(
        f"import sqlalchemy as sa\nfrom alembic import op\n\nrevision = '0001'\ndown_revision = None\n\n\n"
        f"def upgrade():\n    {upgrade}\n\n\ndef downgrade():\n    op.drop_table('notes')\n"
    )
