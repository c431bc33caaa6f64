"""The directory's tenants: found by slug, id or domain, without a query where they are cached."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from threading import get_ident
from uuid import UUID

from ..context import as_reference, refuse_other_tenant
from ..control.lookup import check_name
from ..errors import ControlUnavailableError, TenantNotFoundError
from ..loops import HomeLoop
from ..tenant import Status, Tenant
from .directory_cache import DirectoryCache
from .lookups import EVERYTHING, DirectoryLookups


class TenantDirectory:
    """Looks tenants up, in the cache and in the control database; see ``Directory``.

    Args:
        home: The event loop that it belongs to.
        cache: What is known.
        lookups: Queries the control database.
        clock: The directory's.
    """

    def __init__(
        self, home: HomeLoop, cache: DirectoryCache, lookups: DirectoryLookups, *, clock: Callable[[], float]
    ) -> None:
        self._home = home
        self._cache = cache
        self._lookups = lookups
        self._clock = clock
        self._entry = cache.tenant_entry
        self.before_use: Callable[[Tenant], Awaitable[None] | None] = lambda tenant: None
        """See ``Directory.before_use``."""
        self.judge: Callable[[Tenant], str | None] | None = None
        """See ``Directory.judge_by``."""

    def judged(self, tenant: Tenant) -> Tenant:
        """Return a tenant that was looked up with the reason for which this process does not serve its revision."""
        refusal = None if self.judge is None else self.judge(tenant)
        return tenant if refusal is None else replace(tenant, revision_refusal=refusal)

    def peek(self, ref: str | UUID | Tenant) -> Tenant | None:
        """See ``Directory.peek_tenant``."""
        if get_ident() != self._home.thread:
            self._home.check()
        refuse_other_tenant(ref)
        entry = self._entry(as_reference(ref))
        if entry is None:
            return None
        now = self._clock()
        if now >= entry.fresh_until:
            return None
        entry.used = now
        # the name may belong to another tenant since the binding
        refuse_other_tenant(entry.tenant)
        return entry.tenant

    async def get(self, ref: str | UUID | Tenant) -> Tenant:
        """See ``Directory.tenant``."""
        self._home.check()
        found = self.peek(ref)
        if found is not None:
            return found
        wanted = as_reference(ref)
        if isinstance(wanted, str):
            check_name(wanted)
        if self._cache.is_unknown_tenant(wanted):
            raise TenantNotFoundError(wanted)
        try:
            found = await self._look_up(wanted)
        except ControlUnavailableError:
            entry = self._entry(wanted)
            if entry is None or self._clock() >= entry.stale_until:
                raise
            entry.used = self._clock()
            found = entry.tenant
        refuse_other_tenant(found)
        return found

    def fresh_until(self, tenant: Tenant) -> float | None:
        """Until when ``tenant`` needs no look-up, by the directory's clock; None where that is not what is cached."""
        entry = self._entry(tenant.id)
        return None if entry is None or entry.tenant is not tenant else entry.fresh_until

    async def _look_up(self, wanted: UUID | str, *, wait: bool = True) -> Tenant:
        found, invalidated = await self._lookups.tenant(wanted)
        tenant, read_at = found or (None, 0.0)
        if tenant is None or tenant.status is Status.PURGED:
            self._cache.invalidate_name(wanted)
            if not invalidated:
                self._cache.store_unknown_tenant(wanted)
            raise TenantNotFoundError(wanted)
        if wait and (waiting := self.before_use(tenant)) is not None:
            await waiting
            # what was invalidated in between is not in ``invalidated``
            return await self._look_up(wanted, wait=False)
        tenant = self.judged(tenant)
        if invalidated.isdisjoint((EVERYTHING, tenant.id)):
            self._cache.store_tenant(tenant, read_at)
        return tenant
