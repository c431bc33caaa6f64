"""A tenant's connection: the class that asyncpg instantiates, and the ones that SQLAlchemy wraps it in."""

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

# DISCARD ALL without DEALLOCATE ALL: the driver and SQLAlchemy go on to use their prepared statements.
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
        """Refuse an operation on a closed connection, as asyncpg does before each one, or where ``check_use`` does."""
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
        """Close the socket at once, as in asyncpg.

        Raises:
            WrongEventLoopError: this is another event loop or thread.
        """
        self._home.check()
        super().terminate()


class PreparedStatement(prepared_stmt.PreparedStatement):  # type: ignore[misc]
    """A prepared statement; each use makes the checks of its connection."""

    __slots__ = ()

    def _check_conn_validity(self, meth_name: str) -> None:
        super()._check_conn_validity(meth_name)
        self._connection._check_open()


# how often ``drain`` lets the event loop run: twice for each message, and for the end of the stream
_TURNS = 6


class _StreamCursor(AsyncAdapt_asyncpg_ss_cursor):
    """A server-side cursor; each fetch checks the bound tenant and its admission again."""

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
    """A tenant's DBAPI connection, as SQLAlchemy uses it.

    ``finalizer`` represents the slot: the code that detaches it closes the connection and frees the slot. ``poller``
    polls the socket.
    """

    _ss_cursor_cls = _StreamCursor
    _connection: DriverConnection

    __slots__ = ("__weakref__", "finalizer", "poller", "route")

    route: TenantRoute
    poller: select.poll
    finalizer: weakref.finalize[Any, TenantConnection]

    def cursor(self, server_side: bool = False) -> Any:
        """Return a cursor; refused if another tenant is bound, the admission has ended, or the loop is another."""
        self.route.check_bound()
        return super().cursor(server_side)

    def commit(self) -> None:
        """Commit; refused like ``cursor``, before anything is sent."""
        self.route.check_bound()
        super().commit()  # type: ignore[no-untyped-call]

    def rollback(self) -> None:
        """Roll back; refused in another event loop, before anything is sent."""
        driver_connection = self._connection
        if driver_connection.is_closed():
            # PostgreSQL has rolled back already, and the error that ended the connection must not be replaced
            self._transaction = None
            return
        driver_connection.rolling_back = True
        try:
            super().rollback()  # type: ignore[no-untyped-call]
        finally:
            driver_connection.rolling_back = False

    @property
    def usable(self) -> bool:
        """Whether the connection can be reused, as far as is known: its socket and no transaction are open."""
        driver_connection = self._connection
        # if a BEGIN was refused (no lock available, for example), asyncpg considers the transaction open for ever
        return (
            not driver_connection.is_closed()
            and not driver_connection.is_in_transaction()
            and driver_connection._top_xact is None
        )

    @property
    def has_unread_data(self) -> bool:
        """Whether the server has sent data that is not read yet: very likely, that it has ended the connection.

        One system call, without a round trip.
        """
        return bool(self.poller.poll(0))

    async def drain(self) -> None:
        """Let the event loop read what the server has sent: a few turns, since the end of the stream comes last."""
        for _ in range(_TURNS):
            await asyncio.sleep(0)
            if self._connection.is_closed() or not self.has_unread_data:
                return


class _CoreConnection(Connection):
    """SQLAlchemy's ``Connection``. Returning or dropping the driver's connection is refused in another event loop."""

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
    """A tenant's engine; its connections are refused in another event loop."""

    _connection_cls = _CoreConnection


class _TenantOptionEngine(OptionEngine):
    """What ``TenantEngine.execution_options`` returns."""

    _connection_cls = _CoreConnection


TenantEngine._option_cls = _TenantOptionEngine


class TenantExecutionContext(PGExecutionContext_asyncpg):
    """Stores on the tenant's pool, not on the dialect, when prepared statements became stale.

    On the shared dialect, a change to one tenant's schema would make all tenants' connections prepare everything again.
    """

    def handle_dbapi_exception(self, e: BaseException) -> None:
        """Store the time of a schema change if PostgreSQL's error is about one."""
        dbapi = self.dialect.loaded_dbapi
        if isinstance(e, dbapi.InvalidCachedStatementError | dbapi.InternalServerError):
            pool: Any = self.root_connection.engine.pool
            pool.schema_changed_at = time.time()

    def pre_exec(self) -> None:
        """Set on the cursor how old a prepared statement may be."""
        # of another class while the dialect is being initialised
        pool: Any = self.root_connection.engine.pool
        if self.isddl:
            pool.schema_changed_at = time.time()
        cursor: Any = self.cursor
        cursor._invalidate_schema_cache_asof = getattr(pool, "schema_changed_at", 0.0)


__all__ = ["DriverConnection", "TenantConnection", "TenantEngine", "TenantExecutionContext"]
