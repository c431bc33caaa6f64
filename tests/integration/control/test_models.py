"""The control database's tables as the code knows them, against those that its migrations make."""

from __future__ import annotations

from typing import Any

import pytest
from alembic import command
from sqlalchemy import Connection, inspect
from sqlalchemy.dialects import postgresql

from tenancy_orm.control.database import _alembic_config
from tenancy_orm.control.models import SCHEMA, metadata
from tests.support.quotas import quota_plane

# of the migrations' own use: no code reads or writes them through a Table
ONLY_IN_THE_DATABASE = {"alembic_version", "status_transitions"}


def described(connection: Connection) -> dict[str, dict[str, tuple[str, bool]]]:
    """Columns of every table of the schema, partitions left out: type and whether they may be null."""
    inspector = inspect(connection)
    partitions = set(
        connection.exec_driver_sql(
            "SELECT relname FROM pg_class WHERE relispartition AND relkind = 'r' AND relname LIKE 'audit_log%'"
        ).scalars()
    )
    return {
        name: {
            column["name"]: _kind(column["type"], column["nullable"]) for column in inspector.get_columns(name, SCHEMA)
        }
        for name in inspector.get_table_names(SCHEMA)
        if name not in partitions
    }


def _kind(kind: Any, nullable: bool) -> tuple[str, bool]:
    return kind.compile(dialect=postgresql.dialect()), nullable  # type: ignore[no-untyped-call]


async def test_tables_are_those_of_the_migrations(empty_url: str) -> None:
    """Each column with its type, and whether it may be null."""
    async with quota_plane(empty_url) as plane, plane.control.engine.connect() as connection:
        found = await connection.run_sync(described)
    known = {
        table.name: {column.name: _kind(column.type, bool(column.nullable)) for column in table.columns}
        for table in metadata.tables.values()
    }
    assert {name: columns for name, columns in found.items() if name not in ONLY_IN_THE_DATABASE} == known


@pytest.mark.parametrize("revision", ["0002_audit", "0001_registry"])
async def test_the_audit_log_and_quotas_can_be_taken_down_again(empty_url: str, revision: str) -> None:
    """Down to the registry, and up again."""
    async with quota_plane(empty_url) as plane:
        await plane.append()
        async with plane.control.engine.connect() as connection:
            await connection.run_sync(lambda connection: command.downgrade(_alembic_config(connection), revision))
            await connection.commit()
        rows = await plane.sql("SELECT to_regclass('tenancy.usage')::text, to_regclass('tenancy.audit_log')::text")
        assert rows[0][0] is None and (rows[0][1] is None) == (revision == "0001_registry")
        await plane.control.upgrade()
        await plane.append()
        assert (await plane.audit.verify()).ok
