"""What a test leaves behind, and how it should have ended that."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from uuid import UUID

from ..context import current_tenant_or_none, set_current
from ..errors import TenantNotFoundError
from ..events import EventBus, TenantCreated, TenantPurged
from ..tenancy import Tenancy
from ._lending import remove
from .errors import LeftoverWarning


class Watch:
    """Looks after a ``Tenancy`` during one test.

    Args:
        tenancy: The one that the test uses.
    """

    def __init__(self, tenancy: Tenancy) -> None:
        self._tenancy = tenancy
        self._created: dict[UUID, str] = {}
        self._leased = tenancy.internals.router._cache.leased
        self._followed: dict[EventBus, list[Callable[[], None]]] = {}
        self.is_over = False
        self.follow(tenancy.events)

    def follow(self, events: EventBus) -> None:
        """See which tenants a ``Tenancy`` creates: the test's own, or another one that the test opens."""
        if events not in self._followed and not self.is_over:
            self._followed[events] = [
                events.subscribe(TenantCreated, self._note_created),
                events.subscribe(TenantPurged, self._note_purged),
            ]

    def leased(self) -> list[str]:
        """Say which sessions are open, and which tenant is bound."""
        found = unbind()
        open_now = self._tenancy.internals.router._cache.leased - self._leased
        if open_now > 0:
            tenants = "a tenant" if open_now == 1 else f"{open_now} tenants"
            found.append(
                f"open sessions of {tenants}: leave the block of every `async with tenancy.session(...)`, and await or "
                "cancel the tasks that are in one"
            )
        return found

    async def remove_tenants(self) -> list[str]:
        """Remove the tenants that the test has created by itself and not purged, and say which these were."""
        self.is_over = True
        for end in (end for ends in self._followed.values() for end in ends):
            end()
        left, self._created = self._created, {}
        for tenant_id in left:
            with suppress(TenantNotFoundError):
                await remove(self._tenancy, tenant_id)
        if not left:
            return []
        named = ", ".join(sorted(left.values()))
        return [f"tenants {named}: create them by the fixture tenant_factory, or purge them"]

    def ignore(self, tenant_id: UUID) -> None:
        """Leave a tenant out: a fixture has created it."""
        self._created.pop(tenant_id, None)

    def _note_created(self, event: TenantCreated) -> None:
        self._created[event.tenant_id] = event.slug

    def _note_purged(self, event: TenantPurged) -> None:
        self._created.pop(event.tenant_id, None)


def unbind() -> list[str]:
    """Have no tenant bound in the caller's context, and say which one was."""
    bound = current_tenant_or_none()
    if bound is None:
        return []
    set_current(None)
    how = "by `async with tenancy.scope(...)`, or in a plain function by `with tenancy.sync.scope(...)`"
    return [f"tenant {bound.slug!r} bound: bind it {how}, and leave the block"]


def report(left: Iterable[str]) -> None:
    """Warn of what a test has left behind."""
    for one in left:
        warnings.warn(f"the test has left {one}", LeftoverWarning, stacklevel=2)


__all__ = ["Watch", "report", "unbind"]
