"""SQLAlchemy connections on asyncpg's, with one dialect for all databases of a server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any

from sqlalchemy import Engine, event
from sqlalchemy.dialects.postgresql.asyncpg import PGDialect_asyncpg
from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from sqlalchemy.pool import NullPool

from ..postgres.connections import Connection
from .execution import may_need_care, refuse_input_for_psql, returns_no_rows, run_alone, run_script
from .extensions import skip_existing_extension
from .statements import statements

_schema_changed: ContextVar[float] = ContextVar("tenancy_orm.migrations.schema_changed", default=0.0)


class FleetDialect(PGDialect_asyncpg):
    """The asyncpg dialect, shared by connections to many databases at once.

    After DDL, all connections of a dialect prepare their statements again; here only those of the task that ran it do.
    """

    supports_statement_cache = True

    def do_execute(self, cursor: Any, statement: str, parameters: Any, context: Any = None) -> None:
        """Execute; a text without parameters may hold several statements, as with psycopg."""
        found = statements(statement) if not parameters and may_need_care(statement) else ()
        refuse_input_for_psql(found)
        if len(found) < 2:
            if parameters or cursor.server_side or not returns_no_rows(statement):
                cursor.execute(statement, parameters)
            else:
                run_alone(cursor, statement)
        else:
            run_script(cursor, statement, found)
            self._invalidate_schema_cache_asof = time.time()

    def do_execute_no_params(self, cursor: Any, statement: str, context: Any = None) -> None:
        """Execute, as ``do_execute``."""
        self.do_execute(cursor, statement, None, context)

    def do_close(self, dbapi_connection: Any) -> None:
        """Leave the connection open: the code that opened it closes it, within a time limit."""

    def do_terminate(self, dbapi_connection: Any) -> None:
        """Leave the connection open, as ``do_close``."""

    @property  # type: ignore[override]
    def _invalidate_schema_cache_asof(self) -> float:
        return _schema_changed.get()

    @_invalidate_schema_cache_asof.setter
    def _invalidate_schema_cache_asof(self, when: float) -> None:
        _schema_changed.set(when)


_new_dialect: Any = FleetDialect  # SQLAlchemy's dialects are untyped


class ConnectionAdapter:
    """Makes SQLAlchemy connections from asyncpg's, for databases of one server; the dialect is initialised once."""

    def __init__(self) -> None:
        self._dialect: Any = _new_dialect(dbapi=_new_dialect.import_dbapi())
        self._initialised = False
        self._initialising = asyncio.Lock()

    @asynccontextmanager
    async def adapt(self, connection: Connection, url: URL) -> AsyncIterator[AsyncConnection]:
        """Yield a SQLAlchemy connection on ``connection``, which stays open.

        Its errors do not contain parameters: these are tenants' data.
        """
        engine = self._engine(connection, url)
        async with engine.connect() as adapted:
            if not self._initialised:
                await self._initialise(adapted)
            yield adapted

    def _engine(self, connection: Connection, url: URL) -> AsyncEngine:
        dialect = self._dialect

        async def give() -> Connection:
            return connection

        def connect() -> Any:
            return dialect.connect(async_creator_fn=give)

        pool = NullPool(connect, dialect=dialect)
        on_connect = dialect.on_connect()
        event.listen(pool, "connect", lambda adapted, record: on_connect(adapted))
        engine = Engine(pool, dialect, url, hide_parameters=True)
        event.listen(engine, "before_cursor_execute", skip_existing_extension, retval=True)
        return AsyncEngine(engine)

    async def _initialise(self, adapted: AsyncConnection) -> None:
        async with self._initialising:
            if not self._initialised:
                await adapted.run_sync(self._dialect.initialize)
                await adapted.rollback()
                self._initialised = True
