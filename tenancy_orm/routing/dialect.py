"""The dialect that all tenants of one server share, and what it asks the server once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import asyncpg
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from ..errors import ConfigurationError, ServerUnavailableError
from ..postgres import connections
from ..postgres.connections import Connection
from ..postgres.failures import SERVER_FAILURES
from .connection import TenantExecutionContext
from .servers import CLOSE_SECONDS, Server, clear_tracebacks
from .settings import default_schema

Spawn: TypeAlias = "Callable[[Coroutine[Any, Any, Any]], asyncio.Task[Any]]"

_REFUSED = ("22", "42")  # no such value, no such setting, no right to it
_SET = (
    "SELECT pg_catalog.set_config(s.name, s.value, true) "
    "FROM ROWS FROM (pg_catalog.unnest($1::pg_catalog.text[]), pg_catalog.unnest($2::pg_catalog.text[])) "
    "AS s (name, value)"
)


class _SeedPool(NullPool):
    """For the one connect that initialises the dialect: listeners of the application are none of its business."""

    _sa_propagate_class_events = False


class SharedDialect:
    """SQLAlchemy's dialect for the tenants of one server.

    A dialect asks its first connection for the isolation level, the default schema and how literals are escaped, and
    takes the answers for those of every later one. A tenant's role may set all of these for itself. So the
    administrator's connection is asked, once, and under the settings that tenants' connections start with.

    Args:
        server: The server.
        spawn: Runs a coroutine in a task that outlives its caller.
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
        """Return when the server's settings are known, which a tenant's login needs. However many ask, one reads.

        Raises:
            ServerUnavailableError: the server does not admit the administrator. The next call tries again.
            ConfigurationError: it refuses one of ``sessions.settings``.
        """
        if self._initialising is None or self._initialising.done():
            self._reading = self._spawn(self._read())
            self._initialising = self._spawn(self._initialise(self._reading))
            for task in (self._reading, self._initialising):
                # whoever waits has the error; nobody may be left to wait
                task.add_done_callback(_retrieve)
        assert self._reading is not None  # noqa: S101 - for the type checker: made together with the other
        await asyncio.shield(self._reading)

    async def finish(self) -> None:
        """Return when the dialect is initialised.

        Raises:
            ServerUnavailableError, ConfigurationError: as ``begin``.
        """
        if not self.ready and self._initialising is not None:
            await asyncio.shield(self._initialising)

    async def _read(self) -> Connection:
        with self._as_unavailable():
            connection: Connection = await self._server.connect_admin()
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

        In a transaction, so that nothing of it stays behind on a connection of a pooler's.
        """
        settings = self._server.session_settings
        isolation: Any = settings["default_transaction_isolation"].replace(" ", "_")
        await connection.transaction(isolation=isolation).start()
        await self._set(connection, settings)

    async def _initialise_dialect(self, connection: Connection) -> None:
        """Let the dialect ask. The transaction ends with the connection."""
        self._seed_connection = connection
        try:
            (await self._seed_engine.raw_connection()).detach()
        finally:
            self._seed_connection = None
        # where tenants' tables are: the database that was asked need not have that schema
        self.dialect.default_schema_name = default_schema(self._server.session_settings["search_path"])

    async def _set(self, connection: Connection, settings: Mapping[str, str]) -> None:
        try:
            await connection.execute(_SET, list(settings), list(settings.values()))
        except asyncpg.PostgresError as exc:
            if not self._server.further_settings or not (exc.sqlstate or "").startswith(_REFUSED):
                raise
            raise ConfigurationError(
                f"server {self._server.name!r} refuses a value of sessions.settings ({exc.sqlstate}): "
                + ", ".join(self._server.further_settings)
            ) from exc

    async def _return_seed_connection(self) -> Connection | None:
        return self._seed_connection

    @contextmanager
    def _as_unavailable(self) -> Iterator[None]:
        """What an administrative connection meets is no refusal of a tenant."""
        try:
            yield
        except (*SERVER_FAILURES, DBAPIError) as exc:
            cause = exc.orig if isinstance(exc, DBAPIError) else exc
            sqlstate = getattr(cause, "sqlstate", None)
            raise ServerUnavailableError(server=self._server.name, sqlstate=sqlstate) from clear_tracebacks(exc)


def _retrieve(task: asyncio.Task[Any]) -> None:
    if not task.cancelled():
        task.exception()


__all__ = ["SharedDialect"]
