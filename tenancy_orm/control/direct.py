"""One statement on asyncpg's own connection, out of SQLAlchemy's pool: for what requests wait for.

SQLAlchemy's ``execute`` compiles a statement, runs in a greenlet and builds a result, which together take several times
as long as a small query itself.
"""

from __future__ import annotations

import asyncio
from typing import Any

import asyncpg
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import PoolProxiedConnection
from sqlalchemy.util import greenlet_spawn


class ControlRow(asyncpg.Record):  # type: ignore[misc]
    """A row; its columns are attributes, as those of SQLAlchemy's rows. JSON is text."""

    def __getattr__(self, name: str) -> Any:
        """Return the column of that name."""
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


async def check_out(engine: AsyncEngine) -> PoolProxiedConnection:
    """Take a connection out of the engine's pool.

    Raises:
        asyncpg.PostgresError, asyncpg.InterfaceError, OSError: it cannot be opened.
        sqlalchemy.exc.TimeoutError: none became free in time.
    """
    try:
        return await greenlet_spawn(engine.sync_engine.pool.connect)
    except engine.dialect.loaded_dbapi.Error as exc:
        # the adapter's error, which SQLAlchemy's own ``connect`` would wrap
        raise exc.__cause__ or ConnectionError(str(exc)) from exc


async def rows_of(pooled: PoolProxiedConnection, query: str, args: tuple[Any, ...]) -> list[ControlRow]:
    """Return the rows of one statement, which asyncpg prepares once for each connection."""
    connection: Any = pooled.driver_connection
    rows: list[ControlRow] = await connection.fetch(query, *args, record_class=ControlRow)
    return rows


async def give_back(engine: AsyncEngine, pooled: PoolProxiedConnection) -> None:
    """Return a connection to the pool, which closes those that it has opened beyond its size."""
    pool: Any = engine.sync_engine.pool
    if pool.checkedin() >= pool.size():
        # in a task of its own: whoever is cancelled leaves no socket open
        await asyncio.shield(asyncio.create_task(greenlet_spawn(pooled.close)))
    else:
        pooled.close()


async def give_back_after(
    engine: AsyncEngine, pooled: PoolProxiedConnection, error: BaseException, *, lost: bool
) -> None:
    """Return a connection to the pool after ``error``, or close it where its state is not known.

    Args:
        engine: The engine.
        pooled: The connection.
        error: What its statement has raised.
        lost: Whether the error means that the server, or the connection, is not available.
    """
    connection: Any = pooled.driver_connection
    if connection.is_closed():
        # a restart has ended the others too
        engine.sync_engine.pool._invalidate(pooled, error)
    elif lost or not isinstance(error, asyncpg.PostgresError):
        pooled.invalidate(error)
    else:
        await give_back(engine, pooled)


__all__ = ["ControlRow", "check_out", "give_back", "give_back_after", "rows_of"]
