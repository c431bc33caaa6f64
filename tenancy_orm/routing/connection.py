"""A tenant's connection, as asyncpg makes it and as SQLAlchemy sees it."""

from __future__ import annotations

import asyncio
import select
import time
import weakref
from collections.abc import Callable
from typing import Any

import asyncpg
from asyncpg import prepared_stmt
from sqlalchemy.dialects.postgresql.asyncpg import (
    AsyncAdapt_asyncpg_connection,
    AsyncAdapt_asyncpg_ss_cursor,
    PGExecutionContext_asyncpg,
)
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.engine.base import OptionEngine

from ..loops import HomeLoop
from .route import TenantRoute

# What DISCARD ALL does, but for DEALLOCATE ALL: the driver and SQLAlchemy go on to use what they have prepared.
_RESET = (
    "CLOSE ALL; RESET ROLE; SET SESSION AUTHORIZATION DEFAULT; RESET ALL; UNLISTEN *; "
    "SELECT pg_catalog.pg_advisory_unlock_all(); DISCARD TEMP; DISCARD SEQUENCES"
)


class DriverConnection(asyncpg.Connection):  # type: ignore[misc]
    """The connection class that asyncpg is given; its ``reset`` cleans as ``DISCARD ALL`` does.

    An application can reach it by ``get_raw_connection``. So it calls ``check_use``, which the connector sets, before
    each operation, except for those that end a transaction.
    """

    __slots__ = ("_home", "check_use", "rolling_back")

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._home = HomeLoop()
        self.check_use: Callable[[], None] | None = None
        self.rolling_back = False

    def get_reset_query(self) -> str:
        """The statements that ``reset`` runs."""
        return _RESET

    def _check_open(self) -> None:
        """What asyncpg asks before each operation."""
        super()._check_open()
        if self.check_use is None or self.rolling_back:
            self._home.check()
        else:
            self.check_use()

    async def _prepare(self, *args: Any, **options: Any) -> Any:
        statement = await super()._prepare(*args, **options)
        statement.__class__ = PreparedStatement
        return statement

    async def close(self, *, timeout: float | None = None) -> None:
        """Close, as in asyncpg.

        Raises:
            WrongEventLoopError: this is another event loop or thread.
        """
        self._home.check()
        await super().close(timeout=timeout)

    def terminate(self) -> None:
        """Cut the connection, as in asyncpg.

        Raises:
            WrongEventLoopError: this is another event loop or thread.
        """
        self._home.check()
        super().terminate()


class PreparedStatement(prepared_stmt.PreparedStatement):  # type: ignore[misc]
    """A prepared statement, which asks what its connection asks."""

    __slots__ = ()

    def _check_conn_validity(self, meth_name: str) -> None:
        super()._check_conn_validity(meth_name)
        self._connection._check_open()


# two turns of the loop for each of: the message, the end of the stream
_TURNS = 6


class _StreamCursor(AsyncAdapt_asyncpg_ss_cursor):
    """A server-side cursor: each time it asks for rows, the bound tenant and its admission are checked again."""

    __slots__ = ()

    _adapt_connection: TenantConnection

    def fetchone(self) -> Any:
        self._adapt_connection.route.check_bound()
        return super().fetchone()  # type: ignore[no-untyped-call]

    def fetchmany(self, size: int | None = None) -> Any:
        self._adapt_connection.route.check_bound()
        return super().fetchmany(size)  # type: ignore[no-untyped-call]

    def fetchall(self) -> Any:
        self._adapt_connection.route.check_bound()
        return super().fetchall()  # type: ignore[no-untyped-call]


class TenantConnection(AsyncAdapt_asyncpg_connection):
    """A tenant's connection as SQLAlchemy sees it.

    ``finalizer`` is the token of the slot: whoever detaches it closes the connection and gives the slot back.
    ``poller`` watches its socket.
    """

    _ss_cursor_cls = _StreamCursor
    _connection: DriverConnection

    __slots__ = ("__weakref__", "finalizer", "poller", "route")

    route: TenantRoute
    poller: select.poll
    finalizer: weakref.finalize[Any, TenantConnection]

    def cursor(self, server_side: bool = False) -> Any:
        """Begin a statement, unless another tenant is bound, the request's admission has ended, or in another loop."""
        self.route.check_bound()
        return super().cursor(server_side)

    def commit(self) -> None:
        """Commit, unless ``cursor`` would refuse: before anything is sent."""
        self.route.check_bound()
        super().commit()  # type: ignore[no-untyped-call]

    def rollback(self) -> None:
        """Roll back, unless this is another event loop: before anything is sent."""
        driver_connection = self._connection
        if driver_connection.is_closed():
            # PostgreSQL has rolled back already: whoever ended it has an error of its own, which this must not replace
            self._transaction = None
            return
        driver_connection.rolling_back = True
        try:
            super().rollback()  # type: ignore[no-untyped-call]
        finally:
            driver_connection.rolling_back = False

    @property
    def usable(self) -> bool:
        """Whether the next statement can work, as far as is known: an open socket, no transaction left behind."""
        driver_connection = self._connection
        # where a BEGIN was refused, for want of a lock, say, asyncpg takes the transaction for open for good
        return (
            not driver_connection.is_closed()
            and not driver_connection.is_in_transaction()
            and driver_connection._top_xact is None
        )

    @property
    def has_unread_data(self) -> bool:
        """Whether the server has said something that was not read yet: its farewell, very likely.

        One system call, without a round trip.
        """
        return bool(self.poller.poll(0))

    async def drain(self) -> None:
        """Let the loop read what the server has said: a few turns, since the end comes after the last words."""
        for _ in range(_TURNS):
            await asyncio.sleep(0)
            if self._connection.is_closed() or not self.has_unread_data:
                return


class _CoreConnection(Connection):
    """SQLAlchemy's connection. What gives the driver's back, or drops it, is refused in another event loop."""

    def close(self) -> None:
        self._check_loop()
        super().close()

    def invalidate(self, exception: BaseException | None = None) -> None:
        self._check_loop()
        super().invalidate(exception)

    def detach(self) -> None:
        self._check_loop()
        super().detach()

    def _check_loop(self) -> None:
        pool: Any = self.engine.pool
        pool.connector.home.check()


class TenantEngine(Engine):
    """A tenant's engine; its connections stay in their event loop."""

    _connection_cls = _CoreConnection


class _TenantOptionEngine(OptionEngine):
    """What ``execution_options`` makes of it."""

    _connection_cls = _CoreConnection


TenantEngine._option_cls = _TenantOptionEngine


class TenantExecutionContext(PGExecutionContext_asyncpg):
    """Keeps on the tenant's pool what SQLAlchemy keeps on the dialect: when prepared statements became stale.

    On the shared dialect, a change to one tenant's schema would make all tenants' connections prepare everything again.
    """

    def handle_dbapi_exception(self, e: BaseException) -> None:
        """Note that the schema has changed where PostgreSQL says so."""
        dbapi = self.dialect.loaded_dbapi
        if isinstance(e, dbapi.InvalidCachedStatementError | dbapi.InternalServerError):
            pool: Any = self.root_connection.engine.pool
            pool.schema_changed_at = time.time()

    def pre_exec(self) -> None:
        """Tell the cursor how old a prepared statement may be."""
        # of another class while the dialect initialises itself
        pool: Any = self.root_connection.engine.pool
        if self.isddl:
            pool.schema_changed_at = time.time()
        cursor: Any = self.cursor
        cursor._invalidate_schema_cache_asof = getattr(pool, "schema_changed_at", 0.0)


__all__ = ["DriverConnection", "TenantConnection", "TenantEngine", "TenantExecutionContext"]
