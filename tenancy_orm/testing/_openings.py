"""The application's ``Tenancy`` in the event loops of the tests: one at a time, as the tests run.

A ``Tenancy`` belongs to one event loop. A test run has many: one for each test by default, others that last for a
module or for the run, and one in a thread for tests without any. What is open in a loop that will run again is parked
while another one runs.
"""

from __future__ import annotations

import asyncio
from uuid import UUID

from ..events import EventBus
from ..lifetime import Parked
from ..tenancy import Tenancy
from ..tenant import Tenant
from ._rollback import Pinned


class Openings:
    """Opens one ``Tenancy`` in each event loop that uses it."""

    def __init__(self, tenancy: Tenancy) -> None:
        self.tenancy = tenancy
        self._lifetime = tenancy._lifetime
        self._current: asyncio.AbstractEventLoop | None = None
        self._parked: dict[asyncio.AbstractEventLoop, Parked] = {}
        self._brief = False
        self._pinned: dict[asyncio.AbstractEventLoop, dict[UUID, Pinned]] = {}

    def is_brief(self, events: EventBus) -> bool:
        """Whether what is being opened now is closed after one test."""
        return self._brief and events is self.tenancy.events

    async def enter(self, *, brief: bool = False) -> None:
        """Have it open in the running loop.

        Args:
            brief: Whether the loop ends with the test.

        Raises:
            TenancyError: it cannot be opened.
        """
        loop = asyncio.get_running_loop()
        if self._current is not loop:
            self._park()
            if (parked := self._parked.pop(loop, None)) is not None:
                self._lifetime.resume(parked)
            self._current = loop
        if not self.tenancy.is_open:
            self._brief = brief
            try:
                await self.tenancy.__aenter__()
            finally:
                self._brief = False

    async def leave(self) -> None:
        """Close what is open in the running loop, which will not run any more."""
        loop = asyncio.get_running_loop()
        if self._current is not loop:
            if loop not in self._parked:
                return
            self._park()
            self._lifetime.resume(self._parked.pop(loop))
        self._current = None
        for pinned in self._pinned.pop(loop, {}).values():
            await pinned.close()
        if self.tenancy.is_open:
            await self.tenancy.close()

    def pinned(self, tenant: Tenant) -> Pinned:
        """The one connection of a tenant in the running loop; not open before it is used."""
        own = self._pinned.setdefault(asyncio.get_running_loop(), {})
        if tenant.id not in own:
            own[tenant.id] = Pinned(self.tenancy.internals.router, tenant)
        return own[tenant.id]

    async def unpin(self, tenant: Tenant) -> None:
        """Close it, and give the tenant its usual pool again."""
        pinned = self._pinned.get(asyncio.get_running_loop(), {}).pop(tenant.id, None)
        if pinned is not None:
            await pinned.close()

    def _park(self) -> None:
        if self._current is not None:
            self._parked[self._current] = self._lifetime.park()
            self._current = None


__all__ = ["Openings"]
