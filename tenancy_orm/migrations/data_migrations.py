"""Data migrations: what a revision does to the rows of large tables, in batches, after its DDL is committed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from alembic.runtime.migration import RevisionStep
from sqlalchemy import Connection as SyncConnection
from sqlalchemy import Executable

from ..errors import ConfigurationError, MigrationError
from ..postgres.quoting import quote_identifier, quote_qualified
from ..tenant import Tenant
from .plan import MigrationStep

Statement = str | Executable
BatchFunction = Callable[["Batch"], "Statement | Iterable[Statement] | None"]

_LARGEST = 1_000_000


@dataclass(frozen=True, slots=True)
class Batch:
    """Some rows of a table, next to each other in the order of its key.

    Attributes:
        rows: A condition of SQL that is true for these rows: ``f"UPDATE notes SET ... WHERE {batch.rows}"``, or
            ``sqlalchemy.text(batch.rows)``. It has no parameters, and names the columns with the table's name.
        connection: The connection, in the transaction of this batch, for what must read rows first. Leave the
            transaction to the package.
        tenant: The tenant; None for a template.
        count: How many rows.
    """

    rows: str
    connection: SyncConnection = field(repr=False)
    tenant: Tenant | None
    count: int
    _make: Callable[[str], str] = field(repr=False)

    def rows_of(self, alias: str) -> str:
        """Return the condition for a statement that calls the table by another name."""
        return self._make(quote_identifier(alias))


class DataMigration:
    """What ``data_migration`` makes of a function.

    Attributes:
        name: Its name, unique in its revision.
    """

    def __init__(
        self,
        function: BatchFunction,
        *,
        name: str,
        table: str,
        schema: str | None,
        key: Sequence[str] | None,
        where: str | None,
        batch_size: int,
        max_batch_size: int,
    ) -> None:
        self.name = name
        self.table = table
        self.schema = schema
        self.key = key
        self.where = where
        self.batch_size = batch_size
        self.max_batch_size = max_batch_size
        self.function = function
        self.reversal: BatchFunction | None = None

    def __repr__(self) -> str:
        """Return its name and table."""
        return f"DataMigration({self.name!r}, table={self.table!r})"

    @property
    def quoted(self) -> str:
        """The table, quoted."""
        return quote_qualified(self.schema, self.table)

    def reverse(self, function: BatchFunction) -> BatchFunction:
        """Register what a downgrade does to the same rows, before the DDL of ``downgrade()``."""
        self.reversal = function
        return function


def data_migration(
    *,
    table: str,
    key: str | Sequence[str] | None = None,
    where: str | None = None,
    schema: str | None = None,
    batch_size: int = 1_000,
    max_batch_size: int = 20_000,
    name: str | None = None,
) -> Callable[[BatchFunction], DataMigration]:
    """Make a data migration of a function in a revision's module.

    ```python
    @data_migration(table="notes", where="words IS NULL")
    def count_words(batch: Batch) -> str:
        return f"UPDATE notes SET words = array_length(string_to_array(body, ' '), 1) WHERE {batch.rows}"
    ```

    It runs after the DDL of its revision's ``upgrade()`` is committed, and before the next revision. Each batch is a
    transaction, and so is the note of how far it has come: a process that is killed anywhere repeats no batch and skips
    none. Several in one module run in the order in which they are written.

    The function returns a statement, text or SQLAlchemy's, or several; or it uses ``batch.connection`` and returns
    None.

    Args:
        table: The table.
        key: The columns that order the batches, of a unique index on NOT NULL columns; the primary key where None.
        where: A condition of SQL for the rows that still have to be migrated; it is part of ``batch.rows``, and the
            function must make it false. The table is then gone through again until nothing is left, also of what old
            code has written since.
        schema: The table's schema.
        batch_size: How many rows the first batch has; the size follows how long batches take.
        max_batch_size: How many rows a batch has at most.
        name: Its name, where the function's is not unique in the module.

    Raises:
        ConfigurationError: a size is not from 1 to 1,000,000, or ``key`` is empty.
    """
    columns = (key,) if isinstance(key, str) else None if key is None else tuple(key)
    if columns is not None and not columns:
        raise ConfigurationError(f"the data migration of {table!r} has no column as its key")
    if not 1 <= batch_size <= _LARGEST or not 1 <= max_batch_size <= _LARGEST:
        raise ConfigurationError(f"the data migration of {table!r} needs sizes of 1 to {_LARGEST} rows")

    def make(function: BatchFunction) -> DataMigration:
        if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
            raise ConfigurationError(f"the data migration {function.__name__!r} must be a plain function, not async")
        return DataMigration(
            function,
            name=name or function.__name__,
            table=table,
            schema=schema,
            key=columns,
            where=where,
            batch_size=min(batch_size, max_batch_size),
            max_batch_size=max_batch_size,
        )

    return make


def data_migrations_of(module: ModuleType | None) -> tuple[DataMigration, ...]:
    """Return the data migrations of a revision's module, in the order in which they are written.

    Raises:
        MigrationError: two have one name.
    """
    found: dict[str, DataMigration] = {}
    for value in vars(module).values() if module is not None else ():
        if isinstance(value, DataMigration) and found.setdefault(value.name, value) is not value:
            raise MigrationError(f"two data migrations of one revision have the name {value.name!r}; give a name")
    return tuple(found.values())


def of_step(step: MigrationStep) -> tuple[DataMigration, ...]:
    """Return the data migrations of a step's revision; none of one that only takes it out of the version table."""
    if not isinstance(step, RevisionStep) or getattr(step, "runs_nothing", False):
        return ()
    return data_migrations_of(step.revision.module)


def mention_data_migrations(migration_context: Any) -> None:
    """Have a script of SQL say where data migrations would run: it does not have them."""

    def mention(ctx: Any, step: Any, heads: set[Any], run_args: Any) -> None:
        for one in () if step.is_stamp else data_migrations_of(step.up_revision.module):
            if step.is_upgrade or one.reversal is not None:
                ctx.impl.static_output(f"-- not in this script: data migration {step.up_revision_id}:{one.name}")

    migration_context.on_version_apply_callbacks = (*migration_context.on_version_apply_callbacks, mention)


def is_downgrade(step: MigrationStep) -> bool:
    """Whether a step undoes its revision."""
    return isinstance(step, RevisionStep) and not step.is_upgrade


def parts(steps: Sequence[MigrationStep]) -> list[tuple[MigrationStep, ...]]:
    """Split a path where data migrations run: after a step that has some, or before it where it undoes its revision."""
    found: list[list[MigrationStep]] = [[]]
    for step in steps:
        has_data = bool(of_step(step))
        if has_data and is_downgrade(step) and found[-1]:
            found.append([])
        found[-1].append(step)
        if has_data and not is_downgrade(step):
            found.append([])
    return [tuple(part) for part in found if part]


def statements_of(returned: Any) -> Iterable[Statement]:
    """Return the statements of what a function has returned.

    Raises:
        MigrationError: it returned something else.
    """
    if returned is None:
        return
    given = (returned,) if isinstance(returned, str | Executable) else returned
    if not isinstance(given, Iterable):
        raise MigrationError(f"it returned {type(returned).__name__}, which is neither a statement nor several")
    for statement in given:
        if not isinstance(statement, str | Executable):
            raise MigrationError(f"it gave {type(statement).__name__}, which is not a statement")
        yield statement


__all__ = [
    "Batch",
    "BatchFunction",
    "DataMigration",
    "Statement",
    "data_migration",
    "data_migrations_of",
    "is_downgrade",
    "mention_data_migrations",
    "of_step",
    "parts",
    "statements_of",
]
