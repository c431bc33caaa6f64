"""Rows that the walk puts into a tenant's own database, and what tells whether somebody has changed them."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID, uuid4

from sqlalchemy import CheckConstraint, Column, MetaData, Table, insert
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession

from ..postgres.quoting import quote_qualified
from ..tenant import Tenant
from ._matrix_values import Owned, singular

if TYPE_CHECKING:
    from ..tenancy import Tenancy

_LITERAL = re.compile(r"'((?:[^']|'')*)'")
# above what sequences of new tables have given out, within a 32-bit integer
_FIRST_NUMBER: Final = 1_000_000_000
_VERSION_TABLE: Final = "alembic_version"


class Rows:
    """A tenant's rows.

    Args:
        tenancy: The open ``Tenancy``.
        tenant: The tenant.
        owned: Where what is planted is kept.
    """

    def __init__(self, tenancy: Tenancy, tenant: Tenant, owned: Owned) -> None:
        self._tenancy = tenancy
        self._tenant = tenant
        self._owned = owned
        self._planted: list[tuple[Table, dict[str, Any]]] = []
        self._tables: list[Table] = []
        self.refused: dict[str, str] = {}
        """Tables that took no row, and why."""

    async def plant(self) -> None:
        """Insert a row into each table of the application's metadata, with values that only this tenant has."""
        metadata = await self._metadata()
        self._tables = metadata.sorted_tables
        async with self._tenancy.transaction(self._tenant) as session:
            for table in self._tables:
                if table.name != _VERSION_TABLE:
                    await self._plant(session, table)

    async def restore(self) -> None:
        """Insert what was planted and is there no more."""
        async with self._tenancy.transaction(self._tenant) as session:
            for table, values in self._planted:
                with suppress(SQLAlchemyError):
                    async with session.begin_nested():
                        await session.execute(insert(table).values(values))

    async def digest(self) -> Mapping[str, str]:
        """Return a digest of each table: it differs where any row does."""
        names = await self._tenancy.fetch_all(
            "SELECT schemaname, tablename FROM pg_tables WHERE schemaname NOT IN ('pg_catalog', 'information_schema') "
            "AND has_table_privilege(format('%I.%I', schemaname, tablename), 'SELECT') ORDER BY 1, 2",
            tenant=self._tenant,
        )
        if not names:
            return {}
        # each row is hashed first: the texts of all rows may be more than one value holds
        parts = [
            f"(SELECT count(*) || ':' || coalesce(sum(hashtextextended(t::text, 0)), 0) "  # noqa: S608 - quoted
            f"FROM {quote_qualified(schema, name)} AS t)"
            for schema, name in names
        ]
        async with self._tenancy.session(self._tenant) as session:
            connection = await session.connection()
            row = (await connection.exec_driver_sql(f"SELECT {', '.join(parts)}")).one()
        return {name: str(value) for (_, name), value in zip(names, row, strict=True)}

    def document(self, noun: str) -> dict[str, Any] | None:
        """Return a new row of the table that a noun in a path names, as a JSON object; None where there is none."""
        table = next((one for one in self._tables if singular(one.name) == singular(noun)), None)
        if table is None:
            return None
        found: dict[str, Any] = {}
        for column in table.columns:
            with suppress(_UnknownTypeError):
                value = None if column.primary_key else self._value(column, table, needed_only=False)
                if value is not None:
                    found[column.name] = value.value if isinstance(value, Enum) else value
        return {name: value for name, value in found.items() if not isinstance(value, bytes)}

    # --- planting -----------------------------------------------------------------------------------------------------

    async def _metadata(self) -> MetaData:
        configured = self._tenancy.config.metadata
        if configured is not None:
            return configured
        reflected = MetaData()
        async with self._tenancy.session(self._tenant) as session:
            connection = await session.connection()
            await connection.run_sync(reflected.reflect)
        return reflected

    async def _plant(self, session: AsyncSession, table: Table) -> None:
        problem: Exception | None = None
        for needed_only in (False, True):
            try:
                values = {
                    column.key: value
                    for column in table.columns
                    if (value := self._value(column, table, needed_only=needed_only)) is not None
                }
                async with session.begin_nested():
                    statement = insert(table).values(values).returning(*table.columns)
                    row = (await session.execute(statement)).mappings().one()
            except (SQLAlchemyError, _UnknownTypeError) as error:
                problem = getattr(error, "orig", None) or error
                continue
            self._keep(table, values, row)
            return
        self.refused[table.name] = " ".join(str(problem).split("\n")[0].split())

    def _keep(self, table: Table, values: dict[str, Any], row: Mapping[Any, Any]) -> None:
        stored = {column.key: row[column] for column in table.columns if column.computed is None}
        self._planted.append((table, stored | values))
        for column in table.columns:
            value = row[column]
            self._owned.known.add(table.name, column.name, value)
            if column.primary_key and len(table.primary_key.columns) == 1:
                self._owned.known.add(table.name, "id", value)
            if not column.foreign_keys:
                self._owned.claim(value, f"{table.name}.{column.name}")

    def _value(self, column: Column[Any], table: Table, *, needed_only: bool) -> Any:
        if column.computed is not None or (column.identity is not None and column.identity.always):
            return None
        if (parent := self._parent(column)) is not None:
            return parent
        if column.foreign_keys and column.nullable:
            return None
        has_default = column.default is not None or column.server_default is not None
        if not column.primary_key and (has_default or (needed_only and column.nullable)):
            return None
        if column.primary_key and has_default and not _is_number(column):
            return None
        try:
            return self._made(column, table)
        except _UnknownTypeError:
            if column.nullable or has_default:
                return None
            raise

    def _parent(self, column: Column[Any]) -> Any:
        for key in column.foreign_keys:
            with suppress(SQLAlchemyError):
                for table, values in reversed(self._planted):
                    if table is key.column.table or table.key == key.column.table.key:
                        return values.get(key.column.key)
        return None

    def _made(self, column: Column[Any], table: Table) -> Any:
        try:
            kind = column.type.python_type
        except NotImplementedError:
            raise _UnknownTypeError(f"no value is known for {column.name}, a {column.type!r}") from None
        enums = getattr(column.type, "enums", None)
        if enums:
            enum_class = getattr(column.type, "enum_class", None)
            return next(iter(enum_class)) if enum_class is not None else enums[0]
        if issubclass(kind, str):
            return _admitted(column, table) or self._owned.text(
                column.name, length=getattr(column.type, "length", None)
            )
        if issubclass(kind, dict):
            return {"text": self._owned.text()}
        if issubclass(kind, list):
            item = getattr(column.type, "item_type", None)
            is_text = item is not None and issubclass(item.python_type, str)
            return [self._owned.text()] if is_text else []
        if issubclass(kind, int) and not issubclass(kind, bool) and _is_number(column):
            key = column.primary_key
            small = type(column.type).__name__.lower().startswith("small")
            return _FIRST_NUMBER + secrets.randbelow(899_000_000) if key and not small else 1 + secrets.randbelow(9_000)
        now = datetime.now(UTC)
        is_aware = getattr(column.type, "timezone", False)
        made: dict[type, Any] = {
            bool: False,
            UUID: uuid4(),
            datetime: now if is_aware else now.replace(tzinfo=None),
            date: now.date(),
            time: now.time(),
            timedelta: timedelta(hours=1),
            float: 1.0,
            Decimal: Decimal(1),
            bytes: self._owned.text().encode(),
        }
        for known, value in made.items():
            if issubclass(kind, known):
                return value
        if issubclass(kind, Enum):
            return next(iter(kind))
        raise _UnknownTypeError(f"no value is known for {column.name}, a {column.type!r}")


class _UnknownTypeError(Exception):
    """A column is of a type that no value is known for."""


def _is_number(column: Column[Any]) -> bool:
    try:
        return issubclass(column.type.python_type, int)
    except NotImplementedError:
        return False


def _admitted(column: Column[Any], table: Table) -> str | None:
    """Return a text that the table's checks admit in a column: the first one that they list."""
    for constraint in table.constraints:
        if isinstance(constraint, CheckConstraint):
            condition = str(constraint.sqltext)
            if re.search(rf"\b{re.escape(column.name)}\b", condition) and (found := _LITERAL.search(condition)):
                return found[1].replace("''", "'")
    return None
