"""The cache of tenants' engines: created on first use, leased while in use, dropped when unused for long."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from threading import get_ident
from types import TracebackType
from typing import Protocol, TypeAlias, cast
from uuid import UUID

from sqlalchemy.engine import Engine
from sqlalchemy.ext.asyncio import AsyncEngine

from ..errors import CrossTenantError, NotOpenError, RoutingError
from ..events import EngineEvicted, EventBus
from ..loops import HomeLoop
from ..registry.lifecycle import check_usable
from ..tenant import Placement, Tenant
from .connection import TenantEngine
from .connector import Connector
from .guard import Owner
from .pool import TenantPool, Warmth
from .routed_pool import RoutedPool


class MakeThreadEngine(Protocol):
    """Makes an engine for synchronous code: its pool is a ``RoutedPool``."""

    def __call__(
        self, connector: Connector, *, tenant_id: UUID, slug: str, tier: str, placement: Placement
    ) -> TenantEngine:
        """Make one for a tenant."""


MakePool: TypeAlias = Callable[[Connector, Tenant, Placement], TenantPool]


def make_tenant_pool(connector: Connector, tenant: Tenant, placement: Placement) -> TenantPool:
    """Make a tenant's pool."""
    return TenantPool(connector, tenant_id=tenant.id, slug=tenant.slug, tier=tenant.tier, placement=placement)


class Entry:
    """One tenant's engine, and how many leases it has.

    A ``retired`` engine gets no new lease, but serves those that it has. ``threads`` is the engine of synchronous code,
    where some has used this tenant.
    """

    __slots__ = (
        "_tier",
        "_variants",
        "connector",
        "engine",
        "leases",
        "owner",
        "placement",
        "retired",
        "tenant",
        "threads",
    )

    def __init__(
        self, tenant: Tenant, placement: Placement, connector: Connector, make_pool: MakePool = make_tenant_pool
    ) -> None:
        self.owner: Owner = (tenant.id, tenant.slug)
        self.tenant = tenant
        self.placement = placement
        self.connector = connector
        self.leases = 0
        self.retired = False
        self.threads: TenantEngine | None = None
        self._tier = tenant.tier
        self._variants: dict[tuple[bool, str | None], AsyncEngine] | None = None
        pool = make_pool(connector, tenant, placement)
        # no compiled cache of its own and no listeners: they would be most of an engine's memory
        self.engine = AsyncEngine(
            TenantEngine(
                pool,
                connector.dialect,
                connector.server.tenant_url(placement),
                query_cache_size=0,
                execution_options={"compiled_cache": connector.compiled_cache},
            )
        )

    @property
    def pool(self) -> TenantPool:
        """The engine's pool; ``engine.dispose()`` replaces it."""
        pool = self.engine.sync_engine.pool
        assert isinstance(pool, TenantPool)  # noqa: S101 - for the type checker: nothing else makes pools here
        return pool

    def variant(self, *, reading: bool, isolation_level: str | None) -> AsyncEngine:
        """Return the engine for read-only sessions, or for an isolation level; on the same pool.

        Raises:
            ConfigurationError: there is no such isolation level.
        """
        if not reading and isolation_level is None:
            return self.engine
        if self._variants is None:
            self._variants = {}
        found = self._variants.get((reading, isolation_level))
        if found is None:
            inner = cast("TenantEngine", self.engine.sync_engine)
            found = self._variants[reading, isolation_level] = AsyncEngine(
                inner.variant(reading=reading, isolation_level=isolation_level)
            )
        return found

    def for_threads(self, make: MakeThreadEngine) -> TenantEngine:
        """Return the engine of synchronous code, which the first call makes. Both are retired together."""
        if self.threads is None:
            self.pool.admit_threads()
            tenant_id, slug = self.owner
            self.threads = make(
                self.connector, tenant_id=tenant_id, slug=slug, tier=self._tier, placement=self.placement
            )
            if self.retired:
                self._thread_pool(self.threads).retire()
            elif self.tenant.paused:
                self._thread_pool(self.threads).detour = True
        return self.threads

    def retire(self) -> None:
        """Close idle connections now, and busy ones when they are returned."""
        self.retired = True
        self.pool.retire()
        if self.threads is not None:
            self._thread_pool(self.threads).retire()

    def _thread_pool(self, engine: Engine) -> RoutedPool:
        pool = engine.pool
        assert isinstance(pool, RoutedPool)  # noqa: S101 - for the type checker: nothing else makes pools here
        return pool

    def report_refusal(self, error: CrossTenantError) -> None:
        """Report that a session's guard has refused something."""
        self.pool.route.report_incident(error)

    def matches(self, tenant: Tenant) -> bool:
        """Whether the engine was made for the tenant's present placement, password and slug."""
        mine, other = self.placement, tenant.placement
        return (mine is other or mine == other) and self.owner[1] == tenant.slug


class EngineCache:
    """Engines by tenant: at most ``max_engines``, or as many as are leased.

    Args:
        connector: Returns the connector of a server by its name.
        max_engines: How many engines are kept.
        events: Receives evictions.
    """

    def __init__(self, connector: Callable[[str], Connector], *, max_engines: int, events: EventBus) -> None:
        self.max_engines = max_engines
        self._connector = connector
        self._events = events
        self._entries: dict[UUID, Entry] = {}
        self._unleased: OrderedDict[UUID, Entry] = OrderedDict()  # the most recently used last
        self._closed = False
        self._make_pool: dict[UUID, MakePool] = {}
        self.home = HomeLoop()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def leased(self) -> int:
        """How many engines are leased."""
        return len(self._entries) - len(self._unleased)

    def acquire(self, tenant: Tenant) -> Entry:
        """Return the tenant's engine with one more lease, which ``release`` must end.

        Nothing is awaited here, so concurrent calls get the same engine.

        Raises:
            WrongEventLoopError: this is another event loop or thread.
            NotOpenError: the cache is closed.
            RoutingError: the tenant has no database, or its server is not configured.
        """
        if get_ident() != self.home.thread:
            self.home.check()
        entry = self._entries.get(tenant.id)
        if entry is None or not entry.matches(tenant):
            entry = self._make(tenant)
        elif not entry.leases:
            del self._unleased[tenant.id]
        entry.leases += 1
        return entry

    def release(self, entry: Entry) -> None:
        """End a lease."""
        entry.leases -= 1
        if entry.leases == 0 and not entry.retired:
            self._unleased[entry.owner[0]] = entry
            if len(self._entries) > self.max_engines:
                self._trim()

    async def warm(self, tenant: Tenant, *, ask: bool = True) -> Warmth:
        """Open a tenant's first connection before it is needed, where that takes nothing from anybody.

        No connection and no engine is dropped for it, nobody waits for what it takes, and afterwards at least half of
        the process's connections to the server are still to be opened.

        Args:
            tenant: The tenant.
            ask: Whether to ask for a larger lease where this process's is spent, which takes a while.

        Raises:
            TenancyError: as ``acquire``, and as a session's first statement.
        """
        if tenant.id not in self._entries and len(self._entries) >= self.max_engines:
            return "full"
        entry = self.acquire(tenant)
        try:
            return await entry.pool.warm(ask=ask)
        finally:
            self.release(entry)

    def lease(self, tenant: Tenant) -> Lease:
        """Lease the tenant's engine for the body of ``async with``.

        Raises:
            RoutingError: as ``acquire``.
        """
        return Lease(self, tenant)

    def retire(self, tenant_id: UUID) -> None:
        """Drop a tenant's engine: its idle connections are closed now, busy ones when they are returned.

        Raises:
            WrongEventLoopError: this is another event loop or thread.
        """
        self.home.check()
        entry = self._entries.pop(tenant_id, None)
        if entry is not None:
            self._unleased.pop(tenant_id, None)
            entry.retire()

    def retire_server(self, connector: Connector) -> None:
        """Drop the engines of all tenants of a server, as ``retire`` does.

        Raises:
            WrongEventLoopError: this is another event loop or thread.
        """
        self.home.check()
        for tenant_id in [tenant_id for tenant_id, entry in self._entries.items() if entry.connector is connector]:
            self.retire(tenant_id)

    def use_pool(self, tenant_id: UUID, make_pool: MakePool | None) -> None:
        """Make a tenant's pools by another function from now on; by the usual one where it is None.

        Raises:
            WrongEventLoopError: this is another event loop or thread.
        """
        self.retire(tenant_id)
        if make_pool is None:
            self._make_pool.pop(tenant_id, None)
        else:
            self._make_pool[tenant_id] = make_pool

    def has_own_pool(self, tenant_id: UUID) -> bool:
        """Whether a tenant's pools are made by another function."""
        return tenant_id in self._make_pool

    def schema_changed(self, tenant_id: UUID | None, *, changing_seconds: float = 0.0) -> None:
        """Have a tenant's connections, or all, prepare their statements again; see ``TenantRoute.schema_changed``.

        Raises:
            WrongEventLoopError: this is another event loop or thread.
        """
        self.home.check()
        for entry in self._entries.values() if tenant_id is None else filter(None, [self._entries.get(tenant_id)]):
            entry.pool.route.schema_changed(changing_seconds=changing_seconds)

    def close(self) -> None:
        """Retire every engine, and refuse further leases.

        Raises:
            WrongEventLoopError: this is another event loop or thread.
        """
        self.home.check()
        self._closed = True
        for tenant_id in list(self._entries):
            self.retire(tenant_id)

    def _make(self, tenant: Tenant) -> Entry:
        if self._closed:
            raise NotOpenError("the router is closed; open another Tenancy")
        if tenant.placement is None:
            check_usable(tenant)
            raise RoutingError(f"tenant {tenant.slug!r} has no database")
        make_pool = self._make_pool.get(tenant.id, make_tenant_pool)
        entry = Entry(tenant, tenant.placement, self._connector(tenant.placement.server), make_pool)
        # of a database that is being exchanged, sessions wait for a connection
        entry.pool.detour = tenant.paused
        # the placement, the password or the slug has changed
        self.retire(tenant.id)
        self._entries[tenant.id] = entry
        if len(self._entries) > self.max_engines:
            self._trim()
        return entry

    def _trim(self) -> None:
        while len(self._entries) > self.max_engines and self._unleased:
            entry = next(iter(self._unleased.values()))
            tenant_id, slug = entry.owner
            self.retire(tenant_id)
            if self._events.has_subscribers(EngineEvicted):
                self._events.emit(EngineEvicted(tenant_id=tenant_id, slug=slug, server=entry.placement.server))


class Lease:
    """``async with cache.lease(tenant) as engine``."""

    __slots__ = ("_cache", "_entry", "_tenant")

    def __init__(self, cache: EngineCache, tenant: Tenant) -> None:
        self._cache = cache
        self._tenant = tenant
        self._entry: Entry | None = None

    async def __aenter__(self) -> AsyncEngine:
        self._entry = self._cache.acquire(self._tenant)
        return self._entry.engine

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._cache.home.check()
        entry, self._entry = self._entry, None
        if entry is not None:
            self._cache.release(entry)


__all__ = ["EngineCache", "Entry", "Lease", "MakePool", "MakeThreadEngine", "make_tenant_pool"]
