"""The log of answers with 5xx: while a server is down, each request is one, so that not each is a line."""

from __future__ import annotations

import asyncio
import logging
import time
from contextvars import Context
from dataclasses import dataclass
from typing import Final

logger = logging.getLogger("tenancy_orm.asgi")

SECONDS: Final = 1.0
"""How often there is a line about a tenant and a kind of answer at most."""


@dataclass(eq=False, slots=True)
class _Window:
    status: int
    began: float
    more: int = 0
    error: Exception | None = None


class RefusalLog:
    """Logs the first answer of a kind to a tenant at once, and how many more there were once a second."""

    def __init__(self) -> None:
        self._windows: dict[tuple[str, str], _Window] = {}

    def add(self, kind: str, status: int, error: Exception, tenant: str = "") -> None:
        """Log an answer, or count it.

        Args:
            kind: The problem's code.
            status: Its status.
            error: What was answered.
            tenant: The slug of the request's tenant; empty where it has none.
        """
        key = (kind, tenant)
        window = self._windows.get(key)
        # one that is older was begun in an event loop that has ended
        if window is None or time.monotonic() - window.began > 2 * SECONDS:
            if window is not None:
                self._report(window)
            logger.warning("answered %d: %s", status, error)
            self._begin(key, status)
        else:
            window.more += 1
            window.error = error

    def _begin(self, key: tuple[str, str], status: int) -> None:
        window = self._windows[key] = _Window(status, time.monotonic())
        # without the tenant of the request that is answered
        asyncio.get_running_loop().call_later(SECONDS, self._end, key, window, context=Context())

    def _end(self, key: tuple[str, str], window: _Window) -> None:
        if self._windows.get(key) is not window:
            return
        del self._windows[key]
        self._report(window)
        if window.more:
            self._begin(key, window.status)

    def _report(self, window: _Window) -> None:
        if window.more:
            logger.warning(
                "answered %d to %d more requests in %g s: %s", window.status, window.more, SECONDS, window.error
            )


__all__ = ["SECONDS", "RefusalLog"]
