"""``Detours``: where a session goes on that was opened before its tenant's database was exchanged for another one.

While a database is exchanged, nobody can log in to it. A session that needs a connection then waits, and gets one to
the new database: also one that was opened before. A transaction never changes its database; it ends in the old one.

A process learns of the exchange by a notification. Where it has missed it, the refused login makes it look again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from uuid import UUID

from ..errors import ControlUnavailableError, NotOpenError, TenantNotFoundError, TenantPausedError
from ..tenant import Tenant
from .engines import EngineCache, Entry
from .route import TenantRoute

_LOOK_SECONDS = 0.5  # how often a tenant that is paused is looked up again, in case the notification was missed


class Detours:
    """Finds the database that a tenant has now.

    Args:
        cache: Has the engines.
        seconds: How long a session waits for the end of an exchange.
    """

    def __init__(self, cache: EngineCache, *, seconds: float) -> None:
        self._cache = cache
        self._seconds = seconds
        self._look_up: Callable[[UUID], Awaitable[Tenant]] | None = None
        self._look_again: Callable[[UUID], None] = lambda tenant_id: None
        self._changed: dict[UUID, asyncio.Event] = {}  # of tenants with sessions that wait
        self._looked: dict[UUID, float] = {}  # when those were last looked up again

    def use(self, look_up: Callable[[UUID], Awaitable[Tenant]], look_again: Callable[[UUID], None]) -> None:
        """Look tenants up by ``look_up``; ``look_again`` makes the next look-up read the control database."""
        self._look_up, self._look_again = look_up, look_again

    def pause(self, tenant_id: UUID) -> None:
        """Note that the tenant's sessions are to wait."""
        self._changed.setdefault(tenant_id, asyncio.Event())

    def look(self, tenant_id: UUID) -> None:
        """Have those who wait look the tenant up: something about it has changed."""
        if (event := self._changed.pop(tenant_id, None)) is not None:
            event.set()

    async def find(self, route: TenantRoute, *, look_again: bool = False) -> Entry | None:
        """Wait while the tenant is paused, and return its engine, which ``release`` must follow.

        Args:
            route: That of a pool of the tenant.
            look_again: Whether to read the control database first.

        Returns None where the tenant was not paused and its database is the route's.

        Raises:
            TenantPausedError: it is paused for too long.
        """
        if self._look_up is None:
            return None
        if look_again:
            self._look_again(route.tenant_id)
        waited, until = False, time.monotonic() + self._seconds
        try:
            while (tenant := await self._look_up(route.tenant_id)).paused:
                waited = True
                await self._wait(tenant, until)
        except (TenantNotFoundError, ControlUnavailableError, NotOpenError):
            return None
        finally:
            if not waited:
                self._looked.pop(route.tenant_id, None)
        now, was = tenant.placement, route.placement
        if now is None or (not waited and (now.server, now.database) == (was.server, was.database)):
            return None
        return self._cache.acquire(tenant)

    def release(self, entry: Entry) -> None:
        """End a lease of ``find``."""
        self._cache.release(entry)

    async def _wait(self, tenant: Tenant, until: float) -> None:
        now = time.monotonic()
        if now >= until:
            raise TenantPausedError(tenant.slug)
        event = self._changed.setdefault(tenant.id, asyncio.Event())
        try:
            async with asyncio.timeout(min(_LOOK_SECONDS, until - now)):
                await event.wait()
        except TimeoutError:
            # one of those who wait does it for all
            if time.monotonic() - self._looked.get(tenant.id, 0.0) >= _LOOK_SECONDS:
                self._looked[tenant.id] = time.monotonic()
                self._look_again(tenant.id)


__all__ = ["Detours"]
