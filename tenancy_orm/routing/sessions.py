"""From a tenant to a session, a connection or an engine on its own database."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from threading import get_ident
from types import TracebackType
from typing import Any
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

from ..config import TenancyConfig
from ..context import refuse_other_tenant
from ..errors import ConfigurationError, UnknownServerError
from ..events import EventBus
from ..secrets.keyring import Keyring
from ..secrets.sealed import SealedPasswords
from ..tenant import Tenant
from .budget import BudgetStatistics
from .connector import Connector
from .engines import EngineCache, Entry, Lease
from .guard import TenantSession
from .servers import Server

CLOSE_SECONDS = 10.0
"""How long ``Router.close`` waits for connections in use to be returned, by default."""


@dataclass(frozen=True, slots=True)
class RoutingStatistics:
    """What a process holds: ``engines`` kept, how many of them ``leased``, and connections by server."""

    engines: int
    leased: int
    servers: Mapping[str, BudgetStatistics]


class Router:
    """Tenant to engine to connection to session. It never looks at the status: whoever calls has.

    Args:
        config: Limits and timeouts.
        servers: The servers by name.
        keyring: Opens the tenants' passwords.
        installation: The id of this installation.
        events: Where openings, evictions and incidents are told.
        passwords: The sealed passwords of the registry, for when PostgreSQL refuses the one it has.
    """

    def __init__(
        self,
        config: TenancyConfig,
        servers: Mapping[str, Server],
        keyring: Keyring,
        installation: UUID,
        events: EventBus,
        passwords: SealedPasswords | None = None,
    ) -> None:
        self._connectors = {
            name: Connector(
                server,
                config=config,
                keyring=keyring,
                installation=installation,
                events=events,
                passwords=passwords,
            )
            for name, server in servers.items()
        }
        self._cache = EngineCache(self._connector, max_engines=config.pool.max_engines, events=events)

    def session(self, tenant: Tenant, **options: Any) -> SessionContext:
        """Open a session on a tenant's database: ``async with router.session(tenant) as session``.

        Args:
            tenant: Whose database.
            options: As ``AsyncSession``; ``expire_on_commit`` is False unless given. ``sync_session_class`` must be a
                ``TenantSession``.

        Raises:
            RoutingError: (on entering) the tenant has no database, or its server is not configured.
            ConfigurationError: (on entering) ``options`` would take the session off the tenant's engine or its guard.
            CheckoutTimeoutError: (at the first statement) no connection became free in time.
            ServerUnavailableError: (at the first statement) the tenant's server does not answer.
            MarkerMismatchError: (at the first statement) the database is not that tenant's.
        """
        refuse_other_tenant(tenant)
        return SessionContext(self._cache, tenant, options)

    def connection(self, tenant: Tenant) -> ConnectionContext:
        """Check out a connection, without a session: ``async with router.connection(tenant) as connection``.

        Raises:
            TenancyError: as ``session``, all on entering.
        """
        refuse_other_tenant(tenant)
        return ConnectionContext(self._cache, tenant)

    def lease(self, tenant: Tenant) -> Lease:
        """Hold a tenant's engine: ``async with router.lease(tenant) as engine``. Sessions made from it have no guard.

        Raises:
            RoutingError: the tenant has no database, or its server is not configured.
        """
        refuse_other_tenant(tenant)
        return self._cache.lease(tenant)

    def retire(self, tenant_id: UUID) -> None:
        """Forget a tenant's engine, since its status, placement or password may have changed.

        Sessions that are open keep theirs; their connections are closed when they are returned.
        """
        self._cache.retire(tenant_id)

    def statistics(self) -> RoutingStatistics:
        """Count engines and connections."""
        return RoutingStatistics(
            engines=len(self._cache),
            leased=self._cache.leased,
            servers={name: connector.budget.statistics() for name, connector in self._connectors.items()},
        )

    async def close(self, *, timeout: float = CLOSE_SECONDS) -> None:
        """Close every connection: idle ones now, busy ones when they are returned, or cut after ``timeout`` seconds."""
        self._cache.close()
        await asyncio.gather(*(connector.shut_down(timeout) for connector in self._connectors.values()))

    def _connector(self, server: str) -> Connector:
        try:
            return self._connectors[server]
        except KeyError:
            raise UnknownServerError(server) from None


class SessionContext:
    """``async with router.session(tenant)``: a lease, and an ``AsyncSession`` within."""

    __slots__ = ("_cache", "_entry", "_options", "_session", "_tenant")

    def __init__(self, cache: EngineCache, tenant: Tenant, options: dict[str, Any]) -> None:
        self._cache = cache
        self._tenant = tenant
        self._options = options
        self._entry: Entry | None = None
        self._session: AsyncSession | None = None

    async def __aenter__(self) -> AsyncSession:
        entry = self._cache.acquire(self._tenant)
        try:
            self._session = _open_session(entry, self._options) if self._options else _open_plain_session(entry)
        except BaseException:
            self._cache.release(entry)
            raise
        self._entry = entry
        return self._session

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        session, entry = self._session, self._entry
        if session is None or entry is None:
            return
        inner = session.sync_session
        busy = inner.in_transaction()
        if busy or get_ident() != self._cache.home.thread:
            self._cache.home.check()
        self._session = self._entry = None
        try:
            # Without a transaction there is no I/O, so no greenlet is needed. And in no case a task of its own, by
            # which AsyncSession outlasts a cancellation: where a roll-back is cancelled, the connector closes the
            # connection.
            if busy:
                await session.close()
            else:
                inner.close()
        finally:
            inner.ended = True  # type: ignore[attr-defined]
            self._cache.release(entry)


def _open_plain_session(entry: Entry) -> AsyncSession:
    return AsyncSession(
        entry.engine,
        sync_session_class=TenantSession,
        expire_on_commit=False,
        tenant=entry.owner,
        on_refusal=entry.report_refusal,
    )


def _open_session(entry: Entry, options: dict[str, Any]) -> AsyncSession:
    session_class = options.pop("sync_session_class", TenantSession)
    if not (isinstance(session_class, type) and issubclass(session_class, TenantSession)):
        raise ConfigurationError("sync_session_class must be a subclass of tenancy_orm.routing.TenantSession")
    for name in ("bind", "tenant", "on_refusal"):
        if name in options:
            raise ConfigurationError(f"a tenant's session takes no {name!r}: it is bound to the tenant's own engine")
    options.setdefault("expire_on_commit", False)
    return AsyncSession(
        entry.engine,
        sync_session_class=session_class,
        tenant=entry.owner,
        on_refusal=entry.report_refusal,
        **options,
    )


class ConnectionContext:
    """``async with router.connection(tenant)``: a lease, and an ``AsyncConnection`` within."""

    __slots__ = ("_cache", "_connection", "_entry", "_tenant")

    def __init__(self, cache: EngineCache, tenant: Tenant) -> None:
        self._cache = cache
        self._tenant = tenant
        self._entry: Entry | None = None
        self._connection: AsyncConnection | None = None

    async def __aenter__(self) -> AsyncConnection:
        entry = self._cache.acquire(self._tenant)
        try:
            self._connection = await entry.engine.connect().start()
        except BaseException:
            self._cache.release(entry)
            raise
        self._entry = entry
        return self._connection

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._cache.home.check()
        connection, entry = self._connection, self._entry
        self._connection = self._entry = None
        if connection is None or entry is None:
            return
        try:
            await connection.__aexit__(kind, error, traceback)
        finally:
            self._cache.release(entry)


__all__ = ["CLOSE_SECONDS", "ConnectionContext", "Router", "RoutingStatistics", "SessionContext"]
