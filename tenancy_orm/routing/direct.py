"""One textual statement on a tenant's connection, without a session and without a transaction around it.

It takes the way of a session: the tenant's pool and budget, the marker, the check of the binding, the statements that a
connection has prepared. What it leaves out is SQLAlchemy's ``Connection``, so it is not for what an application listens
to, nor for anything but a single statement that PostgreSQL plans.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import asyncpg
from sqlalchemy import Row, text
from sqlalchemy.engine import result_tuple
from sqlalchemy.engine.interfaces import Dialect
from sqlalchemy.exc import DBAPIError, ResourceClosedError

from ..postgres.errors import READ_ONLY_SQL_TRANSACTION, sqlstate_of
from ..postgres.failures import SERVER_FAILURES
from ..tenant import Tenant
from .connection import TenantConnection, TenantEngine
from .engines import Entry
from .reading import is_plain
from .replicas import ELSEWHERE, ReplicaDemand, refuse_text
from .sessions import Router, acquire, release, replica_reads

if TYPE_CHECKING:
    AnyRow: TypeAlias = Row[*tuple[Any, ...]]
else:
    AnyRow = Row  # SQLAlchemy 2.0's takes one argument

_ROW_COUNT = re.compile(r"(?:SELECT|UPDATE|DELETE|INSERT \d+) (\d+)")


class TextStatement:
    """Textual SQL, as PostgreSQL takes it.

    Args:
        sql: It, with ``:name`` parameters.
        dialect: SQLAlchemy's for the server.
    """

    __slots__ = ("_columns", "_make_row", "is_plain", "names", "operation")

    def __init__(self, sql: str, dialect: Dialect) -> None:
        compiled: Any = text(sql).compile(dialect=dialect)
        self.operation = str(compiled)
        self.names: tuple[str, ...] = tuple(compiled.positiontup or ())
        self.is_plain = is_plain(self.operation)
        self._columns: tuple[str, ...] = ()
        self._make_row: Callable[[Iterable[Any]], AnyRow] = result_tuple(())

    def values(self, parameters: Mapping[str, Any]) -> list[Any] | None:
        """Return the parameters by position, or None if one is missing."""
        try:
            return [parameters[name] for name in self.names]
        except KeyError:
            return None

    def rows(self, attributes: Sequence[Any], records: Iterable[Any]) -> list[AnyRow]:
        """Return rows as SQLAlchemy does.

        Raises:
            ResourceClosedError: the statement returns none, as SQLAlchemy says it.
        """
        if not attributes:
            raise ResourceClosedError("This result object does not return rows. It has been closed automatically.")
        columns = tuple(attribute.name for attribute in attributes)
        if columns != self._columns:
            self._columns, self._make_row = columns, result_tuple(columns)
        make = self._make_row
        return [make(tuple(record)) for record in records]


class Answer:
    """What PostgreSQL has answered.

    Args:
        statement: The statement.
        attributes: What it says of the columns.
        records: The rows, as asyncpg returns them.
        status: Its command tag.
    """

    __slots__ = ("_attributes", "_records", "_statement", "_status")

    def __init__(
        self, statement: TextStatement, attributes: Sequence[Any], records: Sequence[Any], status: str | None
    ) -> None:
        self._statement = statement
        self._attributes = attributes
        self._records = records
        self._status = status

    @property
    def rows(self) -> list[AnyRow]:
        """The rows, as SQLAlchemy returns them.

        Raises:
            ResourceClosedError: the statement returns none.
        """
        return self._statement.rows(self._attributes, self._records)

    @property
    def value(self) -> Any:
        """The first column of the first row, or None.

        Raises:
            ResourceClosedError: the statement returns none.
        """
        if self._attributes and self._records:
            return self._records[0][0]
        return self.rows or None

    @property
    def row_count(self) -> int:
        """How many rows it concerned; -1 where SQLAlchemy would not say."""
        found = _ROW_COUNT.match(self._status or "")
        return int(found[1]) if found else -1


async def run_alone(
    router: Router,
    tenant: Tenant,
    sql: str,
    parameters: Mapping[str, Any],
    *,
    writing: bool,
    demand: ReplicaDemand | None = None,
    first_row: bool = False,
) -> Answer | None:
    """Run one textual statement in one round trip.

    Args:
        router: The router.
        tenant: The tenant.
        sql: The statement, with ``:name`` parameters.
        parameters: Their values.
        writing: Whether it may write: PostgreSQL commits it at its end.
        demand: What a read asks of a replica; None for the primary. It is repeated elsewhere where a replica has ended
            it, or is gone: nothing was returned yet.
        first_row: Whether its first row is enough.

    Returns:
        What PostgreSQL has answered; None where nothing was sent, since it needs a session.

    Raises:
        TenancyError: as a session's first statement.
        DBAPIError: as a session's. Then nothing was written, unless the connection was lost.
    """
    entry = acquire(router, tenant)
    reads = None if demand is None else replica_reads(router, demand, entry)
    try:
        if reads is None:
            return await _run_on(entry, sql, parameters, writing=writing, first_row=first_row)
        refuse_text(tenant.slug, sql)
        while True:
            chosen = await reads.choose()
            try:
                return await _run_on(chosen, sql, parameters, writing=False, first_row=first_row)
            except ELSEWHERE as exc:
                if not reads.failed(exc):
                    raise
            except DBAPIError as exc:
                if not reads.ended_by(exc):
                    raise
    finally:
        if reads is not None:
            reads.close()
        release(router, entry)


async def _run_on(
    entry: Entry, sql: str, parameters: Mapping[str, Any], *, writing: bool, first_row: bool
) -> Answer | None:
    pool, connector = entry.pool, entry.connector
    if (
        not pool.is_direct
        or pool.route.is_changing
        or cast("TenantEngine", entry.engine.sync_engine).has_listeners
        or connector.server.is_pooled
    ):
        return None
    statement = connector.texts.get(sql) if connector.texts else None
    if statement is None:
        statement = connector.texts[sql] = TextStatement(sql, connector.dialect)
    values = statement.values(parameters)
    if values is None or not statement.is_plain:
        return None
    return await _run(entry, statement, values, writing=writing, first_row=first_row)


async def _run(
    entry: Entry, statement: TextStatement, values: list[Any], *, writing: bool, first_row: bool
) -> Answer | None:
    asked = entry.pool
    pool, record = await asked.get(reading=not writing)
    connection = cast("TenantConnection", record.dbapi_connection)
    broken = True
    try:
        if connection._connection.native_mode is None or (
            pool is not asked and (not pool.is_direct or pool.route.is_changing)
        ):
            broken = False
            return None
        if connection._connection.has_other_mode and not await _set_mode(connection, statement, values):
            broken = False
            return None
        connection.alone = True
        answer = await _send_again_if_outdated(connection, statement, values, writing=writing, first_row=first_row)
        broken = False
        return answer
    except DBAPIError as exc:
        # as the dialect's ``is_disconnect`` does: the connection may lead to what is not the primary any more
        sqlstate = sqlstate_of(exc)
        broken = sqlstate == READ_ONLY_SQL_TRANSACTION and pool.connector.outage.write_refused(connection)
        exc.connection_invalidated = exc.connection_invalidated or broken
        if exc.connection_invalidated:
            pool.connector.outage.lost(exc.orig)
        raise
    except Exception:
        # an answer was read to its end, or the connection is closed: the pool sees which
        broken = False
        raise
    finally:
        if writing:
            # an error need not mean that nothing was committed
            pool.route.note_write()
        pool.give_back(record, broken=broken)


async def _send_again_if_outdated(
    connection: TenantConnection, statement: TextStatement, values: list[Any], *, writing: bool, first_row: bool
) -> Answer:
    was_prepared = connection.has_prepared(statement.operation)
    try:
        return await _send(connection, statement, values, first_row)
    except DBAPIError as exc:
        if not _is_outdated(connection, exc, was_prepared, writing):
            raise
        error: Any = exc.orig
    await connection.begin_again(error)
    answer = await _send(connection, statement, values, first_row)
    connection.has_repeated()
    return answer


async def _set_mode(connection: TenantConnection, statement: TextStatement, values: list[Any]) -> bool:
    """Return whether the connection keeps the mode: what answers may be something else than PostgreSQL."""
    try:
        await connection._connection.set_mode()
        return connection._connection.native_mode is not None
    except SERVER_FAILURES as exc:
        failed = exc
    raise _translated(connection, statement, values, failed)


async def _send(connection: TenantConnection, statement: TextStatement, values: list[Any], first_row: bool) -> Answer:
    try:
        prepared, attributes = await connection._prepare(statement.operation, connection.route.schema_valid_since())  # type: ignore[no-untyped-call]
        if first_row:
            record = await prepared.fetchrow(*values)
            records = [] if record is None else [record]
        else:
            records = await prepared.fetch(*values)
        return Answer(statement, attributes, records, prepared.get_statusmsg())
    except SERVER_FAILURES as exc:
        failed = exc
    raise _translated(connection, statement, values, failed)


def _translated(
    connection: TenantConnection, statement: TextStatement, values: list[Any], error: Exception
) -> BaseException:
    """Return the error that SQLAlchemy would raise for one of asyncpg's."""
    dbapi: Any = connection.dbapi
    try:
        connection._handle_exception(error)
    except dbapi.Error as exc:
        translated: BaseException = exc
    except Exception as exc:  # noqa: BLE001 - what SQLAlchemy does not translate, it raises as it is
        return exc
    if isinstance(translated, dbapi.InvalidCachedStatementError | dbapi.InternalServerError):
        connection.route.outdated_before(time.time())
    wrapped: BaseException = DBAPIError.instance(
        statement.operation,
        tuple(values),
        translated,
        dbapi.Error,
        connection_invalidated=connection.is_closed,
        ismulti=False,
    )
    wrapped.__cause__ = translated
    return wrapped


def _is_outdated(connection: TenantConnection, error: DBAPIError, was_prepared: bool, writing: bool) -> bool:
    """Whether a statement was refused since the schema has changed, and has done nothing.

    PostgreSQL undoes a statement that ends with an error. One that asyncpg raises, since it cannot read the rows, may
    follow a statement that was committed.
    """
    cause: Any = error.orig
    if writing and isinstance(cause.__cause__, asyncpg.OutdatedSchemaCacheError):
        return False
    return connection.is_outdated(cause, was_prepared)


__all__ = ["Answer", "AnyRow", "TextStatement", "run_alone"]
