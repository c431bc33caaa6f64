"""A breaker for each server: while the server does not answer, its tenants get an error at once, and wait for nothing.

A failure opens no breaker, since a tenant could cause it: a slow statement, a lock on its own database. A failure makes
the breaker ask the server itself, by a probe that no tenant can delay. Where the probe fails too, the breaker opens.
Then one probe at a time is made, with pauses that grow, until one succeeds.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable
from contextvars import Context
from enum import StrEnum
from typing import Final

from ..config.sections import BreakerConfig
from ..errors import ServerUnavailableError
from ..postgres.login import reason_of

logger = logging.getLogger("tenancy_orm.servers")

_FIRST_PAUSE: Final = 0.1
_BELIEVED_SECONDS: Final = 1.0  # for how long a probe that has succeeded makes another one unnecessary

# The server says of itself, at a login, that it serves nobody now (it starts, or stops). No tenant can make it say so.
# What a server that stops says to a login under way (57P01) is said as well where a tenant's role ends that login.
_AWAY: Final = "57P03"
# Refusals that say that it does answer: of a role, a right or a database; it is full.
_ANSWERED: Final = ("28", "3D", "42", "53", "22")


class BreakerState(StrEnum):
    """What a breaker knows of its server."""

    CLOSED = "closed"
    """The server answers, as far as is known."""
    OPEN = "open"
    """It does not. Between two probes."""
    PROBING = "probing"
    """It did not, and is being asked again."""


class Breaker:
    """Whether a server answers. It belongs to one event loop.

    Args:
        server: The server's name.
        config: When it opens, and how often a server that is down is asked.
        probe: Asks the server, in bounded time; raises an ``OSError`` where it does not answer.
        address: The server's address, for errors.
        is_replica: Whether it is a standby: then nobody is refused while it does not answer.
    """

    def __init__(
        self,
        server: str,
        config: BreakerConfig,
        probe: Callable[[], Awaitable[None]],
        *,
        address: str,
        is_replica: bool = False,
    ) -> None:
        self.config = config
        self.is_open = False
        """Whether connections are refused."""
        self.reason = ""
        """Why, by the last probe."""
        self.opened_at = 0.0
        """Since when, by ``time.monotonic()``."""
        self._server = server
        self._probe = probe
        self._address = address
        self._kind, self._consequence = (
            ("replica", "reads go elsewhere") if is_replica else ("server", "its tenants are refused")
        )
        self._closed = False
        self._probing: asyncio.Task[None] | None = None
        self._asks = False
        self._believed_until = 0.0
        self._next_probe = 0.0
        self._sqlstate: str | None = None
        self._callbacks: list[Callable[[Breaker], None]] = []

    def __repr__(self) -> str:
        """Return the server's name and the state."""
        return f"Breaker({self._server!r}, {self.state.value})"

    @property
    def state(self) -> BreakerState:
        """What is known of the server."""
        if not self.is_open:
            return BreakerState.CLOSED
        return BreakerState.PROBING if self._asks else BreakerState.OPEN

    @property
    def retry_after(self) -> float:
        """Seconds after which another attempt makes sense: until a probe that begins next has been answered."""
        return max(self._next_probe - time.monotonic(), 0.0) + 1.0

    def on_change(self, callback: Callable[[Breaker], None]) -> None:
        """Call ``callback`` when the breaker has opened or closed, in the loop."""
        self._callbacks.append(callback)

    def check(self, *, tenant: str | None = None) -> None:
        """Return while the breaker is closed.

        Args:
            tenant: The slug of the tenant that a connection is for, for the error.

        Raises:
            ServerUnavailableError: it is open.
        """
        if self.is_open:
            raise self.error(tenant=tenant)

    def error(self, *, tenant: str | None = None) -> ServerUnavailableError:
        """Return the error of what the open breaker refuses."""
        return ServerUnavailableError(
            server=self._server,
            tenant=tenant,
            sqlstate=self._sqlstate,
            address=self._address,
            reason=f"{self.reason}; it is asked again every few seconds",
            retry_after=self.retry_after,
        )

    def failed(self, error: BaseException) -> None:
        """Take note that a login has failed; where that can mean that the server is down, ask it."""
        sqlstate = getattr(error, "sqlstate", None) or ""
        if sqlstate.startswith(_ANSWERED):
            return
        if sqlstate == _AWAY:
            self._sqlstate = sqlstate
            self._ask(known=getattr(error, "reason", None) or reason_of(error))
        else:
            self.suspect()

    def suspect(self) -> None:
        """Ask the server whether it answers, unless it has just answered or is being asked."""
        self._ask()

    async def close(self) -> None:
        """Ask no more, and refuse nothing: sessions may be open on a server that was replaced or removed."""
        self._closed, self.is_open = True, False
        task, self._probing = self._probing, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def _ask(self, *, known: str | None = None) -> None:
        if not self.config.enabled or self._closed or self._probing is not None:
            return
        if known is not None:
            self._open(known)
        # without the tenant of whoever has met the failure
        self._probing = asyncio.get_running_loop().create_task(self._run(), context=Context())

    async def _run(self) -> None:
        pause = _FIRST_PAUSE
        if self.is_open:
            await self._pause(pause)
        else:
            await asyncio.sleep(max(self._believed_until - time.monotonic(), 0.0))
        try:
            while True:
                self._asks = True
                try:
                    await self._probe()
                except Exception as exc:  # noqa: BLE001 - ending here would leave the breaker open for ever
                    self._asks = False
                    self._open(reason_of(exc))
                else:
                    break
                pause = min(2 * pause, self.config.longest_pause)
                await self._pause(pause)
        finally:
            self._asks = False
            self._probing = None
        self._believed_until = time.monotonic() + _BELIEVED_SECONDS
        self._close()

    async def _pause(self, seconds: float) -> None:
        seconds *= random.uniform(0.5, 1.0)
        self._next_probe = time.monotonic() + seconds
        await asyncio.sleep(seconds)

    def _open(self, reason: str) -> None:
        self.reason = reason
        if self.is_open:
            return
        self.is_open = True
        self.opened_at = time.monotonic()
        logger.warning(
            "%s %s does not answer (%s): %s until it does", self._kind, self._server, reason, self._consequence
        )
        self._changed()

    def _close(self) -> None:
        if not self.is_open:
            return
        self.is_open = False
        self._sqlstate = None
        seconds = time.monotonic() - self.opened_at
        logger.warning("%s %s answers again, after %.1f s", self._kind, self._server, seconds)
        self._changed()

    def _changed(self) -> None:
        for callback in self._callbacks:
            try:
                callback(self)
            except Exception:
                logger.exception("a callback for the breaker of server %s failed", self._server)


__all__ = ["Breaker", "BreakerState"]
