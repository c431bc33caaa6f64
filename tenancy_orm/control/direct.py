"""One statement on asyncpg's own connection, out of SQLAlchemy's pool: for what requests wait for.

SQLAlchemy's ``execute`` compiles a statement, runs in a greenlet and builds a result, which together take several times
as long as a small query itself.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any, cast

import asyncpg
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import AsyncAdaptedQueuePool
from sqlalchemy.pool.base import _ConnectionRecord
from sqlalchemy.util import greenlet_spawn


class ControlRow(asyncpg.Record):  # type: ignore[misc]
    """A row; its columns are attributes, as those of SQLAlchemy's rows. JSON is text.

    By key a column takes a tenth of the time.
    """

    def __getattr__(self, name: str) -> Any:
        """Return the column of that name."""
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class DirectPool(AsyncAdaptedQueuePool):
    """SQLAlchemy's pool, of which a connection can also be had without the proxy that SQLAlchemy makes for each use.

    Until it is returned, it counts as checked out like any other.
    """

    # what it logs is SQLAlchemy's
    _sqla_logger_namespace = "sqlalchemy.pool.DirectPool"

    async def check_out(self) -> _ConnectionRecord:
        """Take a connection: an idle one at once, or one that is opened or waited for. ``check_in`` must follow.

        Raises:
            asyncpg.PostgresError, asyncpg.InterfaceError, OSError: it cannot be opened.
            sqlalchemy.exc.TimeoutError: none became free in time.
        """
        if self.checkedin():
            record = cast("_ConnectionRecord", self._pool.get(False))
            if not record._is_hard_or_soft_invalidated():
                return record
            self._do_return_conn(record)
        try:
            return await greenlet_spawn(self._get)
        except self._dialect.loaded_dbapi.Error as exc:  # type: ignore[attr-defined]
            # the adapter's error, which SQLAlchemy's own ``connect`` would wrap
            raise exc.__cause__ or ConnectionError(str(exc)) from exc

    async def check_in(self, record: _ConnectionRecord) -> None:
        """Return a connection; one beyond the size of the pool is closed."""
        if self.checkedin() < self.size():
            self._do_return_conn(record)
        else:
            # in a task of its own: whoever is cancelled leaves no socket open
            await asyncio.shield(asyncio.create_task(greenlet_spawn(self._do_return_conn, record)))

    async def check_in_after(self, record: _ConnectionRecord, error: BaseException, *, lost: bool) -> None:
        """Return a connection after ``error``; it is closed where its state is not known.

        Args:
            record: The connection.
            error: What its statement has raised.
            lost: Whether the error means that the server, or the connection, is not available.
        """
        connection: Any = record.driver_connection
        if connection.is_closed() and self._invalidate_time < record.starttime:
            # a restart has ended the others too
            self._invalidate_time = time.time()
        if connection.is_closed() or lost or not isinstance(error, asyncpg.PostgresError):
            record.invalidate(error)
        await self.check_in(record)

    def _get(self) -> _ConnectionRecord:
        record = cast("_ConnectionRecord", self._do_get())
        try:
            record.get_connection()
        except BaseException as exc:
            record.invalidate(exc)
            self._do_return_conn(record)
            raise
        return record


async def rows_of(record: _ConnectionRecord, query: str, args: tuple[Any, ...]) -> list[ControlRow]:
    """Return the rows of one statement, which asyncpg prepares once for each connection."""
    connection: Any = record.driver_connection
    rows: list[ControlRow] = await connection.fetch(query, *args, record_class=ControlRow)
    return rows


def pool_of(engine: AsyncEngine) -> DirectPool:
    """Return the engine's pool; ``engine.dispose()`` replaces it."""
    return cast("DirectPool", engine.sync_engine.pool)


__all__ = ["ControlRow", "DirectPool", "pool_of", "rows_of"]
