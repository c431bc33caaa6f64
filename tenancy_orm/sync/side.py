"""The part of an open ``Tenancy`` that belongs to its event loop, for other threads."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from functools import partial
from uuid import UUID
from weakref import WeakKeyDictionary

from ..authentication.directory import Directory
from ..routing import Router
from ..routing.connection import TenantEngine
from ..routing.connector import Connector
from ..routing.engines import Entry
from ..routing.replicas import ReplicaDemand, ReplicaEngine, ReplicaReads
from ..routing.route import TenantRoute
from ..routing.sessions import acquire, detours, release, replica_reads
from ..scopes import check_session, peek, resolve
from ..tenant import Placement, Tenant, TenantRef
from .hops import Hops
from .pool import ThreadPool
from .server import ThreadServer


class ThreadSide:
    """Looks tenants up and leases their engines in the event loop; names of methods that run there end in ``_here``.

    Args:
        hops: Puts them there.
        directory: Looks tenants up.
        router: Has the engines.
    """

    def __init__(self, hops: Hops, directory: Directory, router: Router) -> None:
        self.hops = hops
        self.directory = directory
        self.router = router
        self._servers: MutableMapping[Connector, ThreadServer] = WeakKeyDictionary()

    def tenant(self, ref: TenantRef | None) -> Tenant:
        """Return the tenant that is named, or the bound one.

        Raises:
            TenancyError: as ``scopes.resolve``.
        """
        found = self.hops.run(peek, self.directory, ref)
        return self.hops.run_async(resolve, self.directory, ref) if found is None else found

    def lease(self, ref: TenantRef | None, *, operator: bool) -> tuple[Entry, TenantEngine]:
        """Return a tenant's engine, with a lease that ``release`` must end.

        Raises:
            TenancyError: as ``Tenancy.session``, on entering it.
        """
        leased = self.hops.run(self._lease_cached_here, ref, operator, undo=self._undo_here)
        return self.hops.run_async(self._lease_here, ref, operator, undo=self._undo_here) if leased is None else leased

    def release(self, entry: Entry) -> None:
        """End a lease."""
        self.hops.post(release, self.router, entry)

    def replica_reads(self, entry: Entry, demand: ReplicaDemand) -> ReplicaReads | None:
        """Return what chooses replicas for a session; None where the tenant's server has none."""
        return self.hops.run(replica_reads, self.router, demand, entry)

    def replica_engine(self, reads: ReplicaReads, primary: TenantEngine, isolation_level: str | None) -> ReplicaEngine:
        """Return the engine of a session that reads on replicas."""
        return ReplicaEngine(
            primary,
            reads,
            choose=partial(self.hops.run_async, self._choose_here, reads),
            isolation_level=isolation_level,
        )

    async def _choose_here(self, reads: ReplicaReads) -> TenantEngine:
        return (await reads.choose()).for_threads(self._make_engine)

    async def _follow_here(
        self, route: TenantRoute, look_again: bool
    ) -> tuple[TenantEngine, Callable[[], None]] | None:
        entry = await detours(self.router).find(route, look_again=look_again)
        if entry is None:
            return None
        return entry.for_threads(self._make_engine), partial(release, self.router, entry)

    def _lease_cached_here(self, ref: TenantRef | None, operator: bool) -> tuple[Entry, TenantEngine] | None:
        tenant = peek(self.directory, ref)
        return None if tenant is None else self._engine_here(tenant, operator)

    async def _lease_here(self, ref: TenantRef | None, operator: bool) -> tuple[Entry, TenantEngine]:
        return self._engine_here(await resolve(self.directory, ref), operator)

    def _engine_here(self, tenant: Tenant, operator: bool) -> tuple[Entry, TenantEngine]:
        check_session(tenant, operator=operator)
        entry = acquire(self.router, tenant)
        try:
            return entry, entry.for_threads(self._make_engine)
        except BaseException:
            release(self.router, entry)
            raise

    def _undo_here(self, leased: tuple[Entry, TenantEngine] | None) -> None:
        if leased is not None:
            release(self.router, leased[0])

    def _make_engine(
        self, connector: Connector, *, tenant_id: UUID, slug: str, tier: str, placement: Placement
    ) -> TenantEngine:
        server = self._servers.get(connector)
        if server is None:
            server = self._servers[connector] = ThreadServer(connector)
        pool = ThreadPool(connector, server, self.hops, tenant_id=tenant_id, slug=slug, tier=tier, placement=placement)
        pool.follow = self._follow_here
        return TenantEngine(
            pool,
            server.dialect,
            connector.server.tenant_url(placement).set(drivername="postgresql+psycopg"),
            query_cache_size=0,
            # its keys have the dialect
            execution_options={"compiled_cache": connector.compiled_cache},
        )


__all__ = ["ThreadSide"]
