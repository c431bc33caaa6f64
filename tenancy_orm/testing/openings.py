"""The application's ``Tenancy`` in the event loops of the tests: one at a time, as the tests run.

A ``Tenancy`` belongs to one event loop. A test run has many: one for each test by default, others that last for a
module or for the run, and one in a thread for tests without any. What is open in a loop that will run again is parked
while another one runs.
"""

from __future__ import annotations

import asyncio

from ..lifetime import Parked
from ..tenancy import Tenancy


class Openings:
    """Opens one ``Tenancy`` in each event loop that uses it."""

    def __init__(self, tenancy: Tenancy) -> None:
        self.tenancy = tenancy
        self._lifetime = tenancy._lifetime
        self._current: asyncio.AbstractEventLoop | None = None
        self._parked: dict[asyncio.AbstractEventLoop, Parked] = {}

    async def enter(self) -> None:
        """Have it open in the running loop.

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
            await self.tenancy.__aenter__()

    async def leave(self) -> None:
        """Close what is open in the running loop, which will not run any more."""
        loop = asyncio.get_running_loop()
        if self._current is not loop:
            if loop not in self._parked:
                return
            self._park()
            self._lifetime.resume(self._parked.pop(loop))
        self._current = None
        if self.tenancy.is_open:
            await self.tenancy.close()

    def _park(self) -> None:
        if self._current is not None:
            self._parked[self._current] = self._lifetime.park()
            self._current = None


__all__ = ["Openings"]
