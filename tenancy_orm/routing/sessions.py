"""The router: sessions, connections and engines on a tenant's own database."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from threading import get_ident
from types import TracebackType
from typing import Any, cast
from uuid import UUID
from weakref import WeakSet

from sqlalchemy.engine import Engine
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from ..config import TenancyConfig
from ..connections import ConnectionLeases
from ..context import refuse_other_tenant, refuse_while_bound
from ..control.notifications import ConnectionRequest
from ..errors import ConfigurationError
from ..events import EventBus
from ..postgres.sqlalchemy_versions import await_, connections_in, has_begun
from ..secrets.keyring import Keyring
from ..secrets.sealed import SealedPasswords
from ..servers.server import Server
from ..tenant import Tenant
from .budget import BudgetStatistics, Waiting
from .connection import TenantConnection, TenantEngine
from .connector import ALONE, Connector, ConnectorServices
from .consistency import ConsistencyTokens, WriteNotes
from .detours import Detours
from .engines import EngineCache, Entry, Lease, MakePool
from .guard import TenantSession
from .pool import Warmth
from .replicas import ReplicaDemand, ReplicaEngine, ReplicaReads, ReplicaStatistics, ServerReplicas, check_demand
from .shortage import Ask

logger = logging.getLogger("tenancy_orm.routing")

CLOSE_SECONDS = 10.0
"""How long ``Router.close`` waits for connections in use to be returned, by default."""


@dataclass(frozen=True, slots=True)
class RoutingStatistics:
    """Counts of one process.

    Attributes:
        engines: How many are in the cache.
        leased: How many of them are leased.
        servers: Connections, by server.
        down: Those with an open breaker.
        replicas: Connections, reads and staleness, by replica (``eu/1``).
        passed_over: How many reads that asked for a replica went to the primary, by server and reason.
    """

    engines: int
    leased: int
    servers: Mapping[str, BudgetStatistics]
    down: tuple[str, ...] = ()
    replicas: Mapping[str, ReplicaStatistics] = field(default_factory=dict)
    passed_over: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


class Router:
    """Gives sessions, connections and engines for tenants. It does not check a tenant's status: the caller has.

    Args:
        config: Limits and timeouts.
        servers: The servers by name; ``server_changed`` has to be called when one is replaced or removed.
        keyring: Opens the tenants' sealed passwords.
        installation: The id of this installation.
        events: Receives openings, evictions and incidents.
        passwords: The sealed passwords of the registry, read again if PostgreSQL refuses the known one.
        ask: Asks the other processes for connections, if PostgreSQL accepts no further one of a tenant.
        is_listening: Whether such requests of other processes arrive here now.
        tokens: Reads the tokens by which a read asks to see earlier writes.
        leases: This process's parts of the servers' connections; None: it shares them with no other.

    The weights of the tiers are those of the configuration until ``reweigh``.
    """

    def __init__(
        self,
        config: TenancyConfig,
        servers: Mapping[str, Server],
        keyring: Keyring,
        installation: UUID,
        events: EventBus,
        passwords: SealedPasswords | None = None,
        *,
        ask: Ask | None = None,
        is_listening: Callable[[], bool] = lambda: True,
        tokens: ConsistencyTokens | None = None,
        leases: ConnectionLeases | None = None,
    ) -> None:
        self._servers = servers
        self._events = events
        self._tokens = tokens
        self._notes = WriteNotes()
        self._replicas: dict[str, ServerReplicas] = {}
        self._retired_replicas: WeakSet[ServerReplicas] = WeakSet()
        self._max_engines = config.pool.max_engines
        self._max_staleness = config.replicas.max_staleness
        self.reads_replicas = any(server.replicas for server in servers.values())
        """Whether any server has replicas, so that requests should note what they write."""
        self._connectors: dict[str, Connector] = {}
        # those of servers that were replaced, as long as somebody uses them
        self._retired: WeakSet[Connector] = WeakSet()
        self._services = ConnectorServices(
            config=config,
            keyring=keyring,
            installation=installation,
            events=events,
            passwords=passwords,
            ask=ask,
            is_listening=is_listening,
            leases=leases,
        )
        self._weights: Mapping[str, float] | None = None
        self._leases = leases
        self._alone = config.pool.max_connections or ALONE
        if contradictions := list(_contradictions(config)):
            logger.warning("%s", "; ".join(contradictions))
        self._migration_timeout = config.migration.timeout
        self._cache = EngineCache(self._connector, max_engines=config.pool.max_engines, events=events)
        self._detours = Detours(self._cache, seconds=config.pool.checkout_timeout)

    def session(
        self,
        tenant: Tenant,
        *,
        read_only: bool = False,
        isolation_level: str | None = None,
        replica: ReplicaDemand | None = None,
        **options: Any,
    ) -> SessionContext:
        """Open a session on a tenant's database: ``async with router.session(tenant) as session``.

        Args:
            tenant: The tenant.
            read_only: Whether PostgreSQL refuses what writes. Then a query is sent without a transaction around it.
            isolation_level: As SQLAlchemy names it; the server's default where None.
            replica: What the session asks of a replica, where it may read on one: it is read-only then.
            options: As ``AsyncSession``; ``expire_on_commit`` is False by default. ``sync_session_class`` must be a
                subclass of ``TenantSession``.

        Raises:
            RoutingError: (on entering) the tenant has no database, or its server is not configured.
            ConfigurationError: (on entering) ``options`` would bypass the tenant's engine or the guard, or there is no
                such isolation level.
            ReadOnlyError: (later) a read-only session is to add, delete or flush an object, or ends with a changed one.
            CheckoutTimeoutError: (at the first statement) no connection became free in time.
            ServerUnavailableError: (at the first statement) the tenant's server does not answer.
            MarkerMismatchError: (at the first statement) the database is not that tenant's.
        """
        refuse_other_tenant(tenant)
        return SessionContext(
            self,
            tenant,
            options,
            read_only=read_only or replica is not None,
            isolation_level=isolation_level,
            replica=replica,
        )

    async def consistency_token(self, tenant: Tenant) -> str:
        """Return a token with which later reads on replicas see what was committed before now; one round trip.

        Raises:
            ServerUnavailableError: the tenant's server does not answer.
            RoutingError: the tenant has no database, or its server is not configured.
            CrossTenantError: another tenant is bound.
        """
        refuse_other_tenant(tenant)
        assert self._tokens is not None  # noqa: S101 - for the type checker: an open ``Tenancy`` has them
        entry = self._cache.acquire(tenant)
        try:
            server = entry.connector.server
            replicas = self._replicas.get(server.name)
            if replicas is None:
                # no replica of this process's configuration; others may have one
                replicas = self._replicas[server.name] = self._replicas_of(server)
            return self._tokens.make(tenant.id, await replicas.monitor.position())
        finally:
            self._cache.release(entry)

    def connection(self, tenant: Tenant) -> ConnectionContext:
        """Check out a connection, without a session: ``async with router.connection(tenant) as connection``.

        Raises:
            TenancyError: as ``session``, all on entering.
        """
        refuse_other_tenant(tenant)
        return ConnectionContext(self._cache, tenant)

    def lease(self, tenant: Tenant) -> Lease:
        """Lease a tenant's engine: ``async with router.lease(tenant) as engine``. Sessions made from it have no guard.

        Raises:
            RoutingError: the tenant has no database, or its server is not configured.
        """
        refuse_other_tenant(tenant)
        return self._cache.lease(tenant)

    def retire(self, tenant_id: UUID) -> None:
        """Drop a tenant's engine from the cache, since its status, placement or password may have changed.

        Open sessions keep their engine; its connections are closed when they are returned.
        """
        self._cache.retire(tenant_id)
        for replicas in self._replicas.values():
            replicas.retire(tenant_id)
        self._detours.look(tenant_id)

    def pause(self, tenant_id: UUID) -> None:
        """Have a tenant's sessions wait for their next connection until its database has been exchanged for another.

        Raises:
            CrossTenantError: another tenant is bound.
        """
        refuse_other_tenant(tenant_id)
        self._detours.pause(tenant_id)
        self.retire(tenant_id)

    def use_pool(self, tenant_id: UUID, make_pool: MakePool | None = None) -> None:
        """Make a tenant's pools by another function, for tests; by the usual one again where it is None.

        The engine that the tenant has is dropped, as by ``retire``.

        Raises:
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("changing how a tenant's pool is made")
        self._cache.use_pool(tenant_id, make_pool)

    def schema_changed(self, tenant_id: UUID | None, changing: bool = False) -> None:
        """Have the open connections of a tenant prepare their statements again; those of all tenants where it is None.

        Args:
            tenant_id: The tenant.
            changing: Whether a migration has begun: until it has ended, every statement is prepared again.

        Raises:
            CrossTenantError: another tenant is bound.
        """
        if tenant_id is None:
            refuse_while_bound("preparing all statements again")
        else:
            refuse_other_tenant(tenant_id)
        changing_seconds = self._migration_timeout if changing else 0.0
        self._cache.schema_changed(tenant_id, changing_seconds=changing_seconds)
        for replicas in self._replicas.values():
            replicas.schema_changed(tenant_id, changing_seconds=changing_seconds)

    def reweigh(self, weights: Mapping[str, float]) -> None:
        """Share the connections by these weights of the tiers, which are in force, from now on.

        Raises:
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("changing the weights of tiers")
        self._weights = weights
        for connector in [*self._connectors.values(), *self._retired]:
            connector.reweigh(weights)

    def waiting(self) -> Mapping[str, Sequence[Waiting]]:
        """Return which tenants wait for a connection in this process, by server; who waits longest first.

        Raises:
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("listing the tenants that wait")
        return {name: connector.budget.waiting() for name, connector in list(self._connectors.items())}

    def give_up(self, request: ConnectionRequest) -> None:
        """Close connections for another process that asks for them; its own requests are ignored.

        Raises:
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("closing connections")
        self._cache.home.check()
        primary, _, _ = request.server.partition("/")
        connector = self._connectors.get(request.server)
        if connector is None and (replicas := self._replicas.get(primary)) is not None:
            connector = replicas.connector(request.server)
        if connector is not None:
            connector.shortages.give_up(request)

    def statistics(self) -> RoutingStatistics:
        """Count engines and connections."""
        return RoutingStatistics(
            engines=len(self._cache),
            leased=self._cache.leased,
            servers={
                name: self._unused(name) if (known := self._connectors.get(name)) is None else known.statistics()
                for name in self._servers
            },
            replicas={
                name: found for replicas in self._replicas.values() for name, found in replicas.statistics().items()
            },
            passed_over={name: dict(replicas.passed_over) for name, replicas in self._replicas.items()},
            down=tuple(name for name, known in self._connectors.items() if known.server.breaker.is_open),
        )

    @property
    def capacity(self) -> int:
        """How many connections this process may have to the server that allows it the fewest, if others need none."""
        if self._leases is None:
            return self._alone
        return min((self._leases.lease(name).most for name in self._servers), default=self._alone)

    def _unused(self, name: str) -> BudgetStatistics:
        if self._leases is None:
            return BudgetStatistics(self._alone, *(0,) * 7)
        lease = self._leases.lease(name)
        return BudgetStatistics(lease.allowed, *(0,) * 7, guaranteed=lease.guaranteed, borrowed=lease.borrowed)

    async def close(self, *, timeout: float = CLOSE_SECONDS) -> None:
        """Close every connection: idle ones now, busy ones when returned, the rest after ``timeout`` seconds."""
        self._cache.close()
        replicated = [*self._replicas.values(), *self._retired_replicas]
        connectors = [*self._connectors.values(), *self._retired]
        connectors += [connector for replicas in replicated for connector in replicas.close()]
        await asyncio.gather(
            *(connector.shut_down(timeout) for connector in connectors),
            *(replicas.monitor.close() for replicas in replicated),
        )

    def server_changed(self, name: str) -> None:
        """Use another connector from now on if the server of this name was replaced or removed.

        Open sessions keep theirs; its connections are closed when they are returned.
        """
        self.reads_replicas = any(server.replicas for server in self._servers.values())
        connector = self._connectors.get(name)
        if connector is not None and connector.server is not self._servers.get(name):
            if (replicas := self._replicas.pop(name, None)) is not None:
                replicas.close()
                self._retired_replicas.add(replicas)
            del self._connectors[name]
            self._retired.add(connector)
            self._cache.retire_server(connector)

    def _connector(self, name: str) -> Connector:
        connector = self._connectors.get(name)
        if connector is None:
            server = self._servers[name]
            connector = self._connectors[name] = self._connect_to(server)
            connector.detours = self._detours
            if server.replicas:
                self._replicas[name] = self._replicas_of(server)
                connector.on_write = self._notes.add
        return connector

    def _connect_to(self, server: Server) -> Connector:
        return Connector(server, self._services, weights=self._weights)

    def _replicas_of(self, server: Server) -> ServerReplicas:
        return ServerReplicas(
            server,
            self._connect_to,
            max_engines=self._max_engines,
            events=self._events,
            tokens=self._tokens,
            notes=self._notes,
        )


def acquire(router: Router, tenant: Tenant) -> Entry:
    """Return a tenant's engines with one more lease, which ``release`` must end: for synchronous code.

    Raises:
        RoutingError: the tenant has no database, or its server is not configured.
        CrossTenantError: another tenant is bound.
    """
    refuse_other_tenant(tenant)
    return router._cache.acquire(tenant)


async def warm(router: Router, tenant: Tenant, *, ask: bool = True) -> Warmth:
    """Open a tenant's first connection before it is needed, where that takes nothing from anybody.

    Args:
        router: Has the connections.
        tenant: The tenant.
        ask: Whether to ask for a larger lease where this process's is spent, which takes a while.

    Raises:
        TenancyError: as a session's first statement.
        CrossTenantError: another tenant is bound.
    """
    refuse_other_tenant(tenant)
    return await router._cache.warm(tenant, ask=ask)


def detours(router: Router) -> Detours:
    """Return what leads sessions to the database that their tenant has by now."""
    return router._detours


def release(router: Router, entry: Entry) -> None:
    """End a lease of ``acquire``."""
    router._cache.release(entry)


def replica_demand(
    router: Router,
    *,
    replica: bool,
    read_only: bool = True,
    max_staleness: float | None = None,
    after: str | None = None,
    isolation_level: str | None = None,
) -> ReplicaDemand | None:
    """Return what a read asks of a replica, with the configured bound where it has none; None without ``replica``.

    Raises:
        ConfigurationError: no replica can serve that.
    """
    if not replica:
        return None
    check_demand(read_only=read_only, max_staleness=max_staleness, isolation_level=isolation_level)
    return ReplicaDemand(router._max_staleness if max_staleness is None else max_staleness, after)


def replica_reads(router: Router, demand: ReplicaDemand, primary: Entry) -> ReplicaReads | None:
    """Return what chooses replicas for a session or a statement; None where the tenant's server has none.

    Args:
        router: The router.
        demand: What is asked of a replica.
        primary: The tenant's engine on the primary, which the caller has leased.
    """
    server = primary.connector.server
    if not server.replicas or router._cache.has_own_pool(primary.tenant.id):
        return None
    replicas = router._replicas.get(server.name)
    if replicas is None or replicas.server is not server:
        return None  # the server was replaced, and this session goes on with the former one
    return ReplicaReads(replicas, primary, demand)


def _contradictions(config: TenancyConfig) -> Iterator[str]:
    """Say where a tier allows fewer connections than the processes count on."""
    each, processes = config.pool.max_connections_per_tenant, config.quotas.rate_processes
    for tier in config.tiers.values():
        allowed = (
            f"tier {tier.name!r} allows {tier.connection_limit} connections per tenant, for all processes together"
        )
        if tier.connection_limit < each:
            yield (
                f"{allowed}, but pool.max_connections_per_tenant lets each process hold {each}, {processes * each} in "
                f"{processes}: no process opens more than {tier.connection_limit}"
            )
        elif tier.connection_limit < processes:
            yield (
                f"{allowed}, but there are {processes} (quotas.rate_processes): they have to hand connections over to "
                "each other"
            )


class SessionContext:
    """``async with router.session(tenant)``: a lease of the engine, and an ``AsyncSession`` on it."""

    __slots__ = (
        "_cache",
        "_entry",
        "_isolation_level",
        "_options",
        "_read_only",
        "_reading",
        "_replica",
        "_router",
        "_session",
        "_tenant",
    )

    def __init__(
        self,
        router: Router,
        tenant: Tenant,
        options: dict[str, Any],
        *,
        read_only: bool,
        isolation_level: str | None,
        replica: ReplicaDemand | None,
    ) -> None:
        self._router = router
        self._cache = router._cache
        self._tenant = tenant
        self._options = options
        self._read_only = read_only
        self._isolation_level = isolation_level
        self._entry: Entry | None = None
        self._session: AsyncSession | None = None
        self._reading: ReplicaReads | None = None
        self._replica = replica

    async def __aenter__(self) -> AsyncSession:
        entry = self._cache.acquire(self._tenant)
        try:
            engine = entry.variant(reading=self._read_only, isolation_level=self._isolation_level)
            if self._replica is not None and (reading := replica_reads(self._router, self._replica, entry)) is not None:
                self._reading = reading
                engine = AsyncEngine(_replica_engine(reading, engine.sync_engine, self._isolation_level))
            if self._options:
                self._session = _open_session(entry, engine, self._options, read_only=self._read_only)
            else:
                self._session = _open_plain_session(entry, engine, read_only=self._read_only)
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
            if kind is not None and self._cache.home.is_forked:
                return  # what ends a forked process, ``sys.exit`` for example, goes on; the session is the parent's
            self._cache.home.check()
        self._session = self._entry = None
        # closing forgets what was changed; an error of the body says more than this one
        unwritten = cast("TenantSession", inner).unwritten() if kind is None and self._read_only else None
        try:
            # Without a transaction there is no I/O, so no greenlet is needed. AsyncSession's context manager closes in
            # a task of its own, to survive a cancellation; here it need not: if a roll-back is cancelled, the connector
            # closes the connection.
            if busy and not (self._read_only and _has_nothing_to_end(entry, inner)):
                await session.close()
            else:
                inner.close()
        finally:
            inner.ended = True  # type: ignore[attr-defined]
            if self._reading is not None:
                self._reading.close()
            self._cache.release(entry)
        if unwritten is not None:
            raise unwritten


def _has_nothing_to_end(entry: Entry, session: Session) -> bool:
    """Whether closing a session sends nothing, as where a read-only one has sent its queries alone."""
    if cast("TenantEngine", entry.engine.sync_engine).has_listeners:
        return False
    connections = connections_in(session)
    if connections is None:
        return False
    for connection in connections:
        if connection.closed or connection.invalidated:
            return False
        driver: object = connection.connection.dbapi_connection
        if not isinstance(driver, TenantConnection) or has_begun(driver):
            return False
    return True


def _replica_engine(reads: ReplicaReads, primary: Engine, isolation_level: str | None) -> ReplicaEngine:
    return ReplicaEngine(
        primary,
        reads,
        choose=lambda: await_(reads.choose()).engine.sync_engine,
        isolation_level=isolation_level,
    )


def _open_plain_session(entry: Entry, engine: AsyncEngine, *, read_only: bool) -> AsyncSession:
    return AsyncSession(
        engine,
        sync_session_class=TenantSession,
        expire_on_commit=False,
        tenant=entry.owner,
        on_refusal=entry.report_refusal,
        read_only=read_only,
    )


def _open_session(entry: Entry, engine: AsyncEngine, options: dict[str, Any], *, read_only: bool) -> AsyncSession:
    asynchronous = options.pop("session_class", AsyncSession)
    if not (isinstance(asynchronous, type) and issubclass(asynchronous, AsyncSession)):
        raise ConfigurationError("session_class must be a subclass of sqlalchemy.ext.asyncio.AsyncSession")
    own: Any = asynchronous.sync_session_class
    session_class = session_class_in(options, "sync_session_class", default=_with_guard(own))
    return asynchronous(
        engine, sync_session_class=session_class, **checked_options(entry, options, read_only=read_only)
    )


def session_class_in(
    options: dict[str, Any], name: str, *, default: type[TenantSession] = TenantSession
) -> type[TenantSession]:
    """Take the class of the session out of the caller's options.

    Raises:
        ConfigurationError: it would bypass the guard.
    """
    session_class = options.pop(name, default)
    if not (isinstance(session_class, type) and issubclass(session_class, TenantSession)):
        raise ConfigurationError(f"{name} must be a subclass of tenancy_orm.routing.TenantSession")
    return session_class


def checked_options(entry: Entry, options: dict[str, Any], *, read_only: bool = False) -> dict[str, Any]:
    """Return the further arguments of a tenant's session.

    Raises:
        ConfigurationError: one would bypass the tenant's engine.
    """
    for name in ("bind", "tenant", "on_refusal"):
        if name in options:
            raise ConfigurationError(f"a tenant's session takes no {name!r}: it always uses the tenant's own engine")
    return {
        "expire_on_commit": False,
        **options,
        "tenant": entry.owner,
        "on_refusal": entry.report_refusal,
        "read_only": read_only,
    }


@lru_cache(maxsize=64)
def _with_guard(session_class: type[Any]) -> type[TenantSession]:
    """Return the class with the guard in front of what it does itself."""
    if issubclass(session_class, TenantSession):
        return session_class
    if session_class is Session:
        return TenantSession
    return type(f"Tenant{session_class.__name__}", (TenantSession, session_class), {"__module__": __name__})


class ConnectionContext:
    """``async with router.connection(tenant)``: a lease of the engine, and an ``AsyncConnection`` from it."""

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
        if kind is not None and self._cache.home.is_forked:
            return  # as a session
        self._cache.home.check()
        connection, entry = self._connection, self._entry
        self._connection = self._entry = None
        if connection is None or entry is None:
            return
        try:
            await connection.__aexit__(kind, error, traceback)
        finally:
            self._cache.release(entry)


__all__ = [
    "CLOSE_SECONDS",
    "ConnectionContext",
    "Router",
    "RoutingStatistics",
    "SessionContext",
    "acquire",
    "checked_options",
    "detours",
    "release",
    "replica_demand",
    "replica_reads",
    "session_class_in",
    "warm",
]
