"""The dialect that all tenants of one server share, initialised once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import asyncpg
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from ..errors import ConfigurationError
from ..postgres import connections
from ..postgres.connections import Connection
from ..postgres.failures import SERVER_FAILURES
from ..postgres.login import clear_tracebacks
from ..servers.server import CLOSE_SECONDS, Server
from ..servers.settings import default_schema
from .connection import TenantExecutionContext

Spawn: TypeAlias = "Callable[[Coroutine[Any, Any, Any]], asyncio.Task[Any]]"

_REFUSED = ("22", "42")  # no such value, no such setting, no right to it
_SET = (
    "SELECT pg_catalog.set_config(s.name, s.value, true) "
    "FROM ROWS FROM (pg_catalog.unnest($1::pg_catalog.text[]), pg_catalog.unnest($2::pg_catalog.text[])) "
    "AS s (name, value)"
)


class _SeedPool(NullPool):
    """For the one connection that initialises the dialect; it ignores the application's listeners on ``Pool``."""

    _sa_propagate_class_events = False


class SharedDialect:
    """SQLAlchemy's dialect for the tenants of one server.

    A dialect reads the isolation level, the default schema and how literals are escaped from its first connection, and
    assumes them for every later one. A tenant's role may set all of these for itself. So this dialect reads them once,
    from an administrative connection under the settings that tenants' connections start with.

    Args:
        server: The server.
        spawn: Runs a coroutine in a task that a cancellation of the caller does not end.
    """

    def __init__(self, server: Server, spawn: Spawn) -> None:
        self._server = server
        self._spawn = spawn
        self._seed_engine = create_async_engine(
            "postgresql+asyncpg://", poolclass=_SeedPool, async_creator=self._return_seed_connection
        )
        self.dialect = self._seed_engine.sync_engine.dialect
        self.dialect.execution_ctx_cls = TenantExecutionContext
        self.on_connect = self.dialect.on_connect()
        self.ready = False
        self._seed_connection: Connection | None = None
        self._reading: asyncio.Task[Connection] | None = None
        self._initialising: asyncio.Task[None] | None = None

    async def begin(self) -> None:
        """Wait until the server's settings are known, which a tenant's login needs. Concurrent calls share one read.

        Raises:
            ServerUnavailableError: the administrator cannot log in. The next call tries again.
            ConfigurationError: the server refuses one of ``sessions.settings``.
        """
        if self._initialising is None or self._initialising.done():
            self._reading = self._spawn(self._read())
            self._initialising = self._spawn(self._initialise(self._reading))
            for task in (self._reading, self._initialising):
                # the waiting callers get the error; there may be none left
                task.add_done_callback(_retrieve)
        assert self._reading is not None  # noqa: S101 - for the type checker: made together with the other
        await asyncio.shield(self._reading)

    async def finish(self) -> None:
        """Wait until the dialect is initialised.

        Raises:
            ServerUnavailableError, ConfigurationError: as ``begin``.
        """
        if not self.ready and self._initialising is not None:
            await asyncio.shield(self._initialising)

    async def _read(self) -> Connection:
        with self._as_unavailable():
            connection: Connection = await self._server.connect_as_tenants_do()
            try:
                async with asyncio.timeout(self._server.connect_timeout):
                    await self._server.read_settings(connection)
                    await self._apply_settings(connection)
            except BaseException:
                connection.terminate()
                raise
            return connection

    async def _initialise(self, reading: asyncio.Task[Connection]) -> None:
        connection = await reading
        try:
            with self._as_unavailable():
                async with asyncio.timeout(self._server.connect_timeout):
                    await self._initialise_dialect(connection)
        except BaseException:
            connection.terminate()
            raise
        self.ready = True
        await connections.close(connection, timeout=CLOSE_SECONDS)

    async def _apply_settings(self, connection: Connection) -> None:
        """Give the connection the settings that tenants' connections start with.

        They are set in a transaction, so that none stays on a pooler's server connection.
        """
        settings = self._server.session_settings
        isolation: Any = settings["default_transaction_isolation"].replace(" ", "_")
        await connection.transaction(isolation=isolation).start()
        await self._set(connection, settings)

    async def _initialise_dialect(self, connection: Connection) -> None:
        """Let the dialect read what it needs. The transaction ends with the connection."""
        self._seed_connection = connection
        try:
            (await self._seed_engine.raw_connection()).detach()
        finally:
            self._seed_connection = None
        # the schema of tenants' tables: the administrator's database need not have it
        self.dialect.default_schema_name = default_schema(self._server.session_settings["search_path"])

    async def _set(self, connection: Connection, settings: Mapping[str, str]) -> None:
        try:
            await connection.execute(_SET, list(settings), list(settings.values()))
        except asyncpg.PostgresError as exc:
            if not self._server.traffic.further_settings or not (exc.sqlstate or "").startswith(_REFUSED):
                raise
            raise ConfigurationError(
                f"server {self._server.name!r} refuses a value of sessions.settings ({exc.sqlstate}): "
                + ", ".join(self._server.traffic.further_settings)
            ) from exc

    async def _return_seed_connection(self) -> Connection | None:
        return self._seed_connection

    @contextmanager
    def _as_unavailable(self) -> Iterator[None]:
        """Raise ``ServerUnavailableError`` for a failure of the administrative connection: no tenant was refused."""
        try:
            yield
        except (*SERVER_FAILURES, DBAPIError) as exc:
            cause = exc.orig if isinstance(exc, DBAPIError) else exc
            raise self._server.unavailable(cause or exc) from clear_tracebacks(exc)


def _retrieve(task: asyncio.Task[Any]) -> None:
    if not task.cancelled():
        task.exception()


__all__ = ["SharedDialect"]
