"""Invalidations from the control database: one connection that LISTENs, watched and renewed.

The registry's triggers NOTIFY the channel ``tenancy`` with ``{"t": tenant id, "k": key id or null, "c": kind}`` when a
transaction commits. What is missed while the connection is lost is made up for by looking everything up again once it
is back; until then what is remembered lives by its TTL alone.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from collections.abc import Callable
from contextvars import Context
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import asyncpg

from ..events import EventBus, ListenerLost, ListenerRestored
from ..postgres.failures import SERVER_FAILURES

logger = logging.getLogger("tenancy_orm.listener")

CHANNEL = "tenancy"

_FIRST_PAUSE = 0.1
_LONGEST_PAUSE = 5.0


@dataclass(frozen=True, slots=True)
class Change:
    """What a notification says: a key changed where ``key_id`` is set, else a tenant; anything may have if none is."""

    tenant_id: UUID | None
    key_id: str | None
    kind: str

    @classmethod
    def parse(cls, payload: str) -> Change:
        """Read a payload. One that is not understood stands for a change of anything, which is always safe."""
        try:
            fields = json.loads(payload)
            tenant_id, key_id = fields["t"], fields["k"]
            return cls(UUID(tenant_id) if tenant_id else None, str(key_id) if key_id else None, str(fields["c"]))
        except (ValueError, KeyError, TypeError, AttributeError):
            logger.warning("a notification on channel %r is malformed; everything is looked up again", CHANNEL)
            return cls(None, None, "malformed")


class Listener:
    """Keeps one connection listening.

    Args:
        dsn: The control database, reached directly: a pooler in transaction mode drops LISTEN.
        on_change: Called with every change, in the event loop.
        on_connected: Called whenever the connection was made, after LISTEN: what was missed before is unknown.
        events: Receives ``ListenerLost`` and ``ListenerRestored``.
        probe_interval: Every how many seconds a silent connection is asked whether it lives.
        timeout: Seconds for a connect, and for the answer to a probe.
    """

    def __init__(
        self,
        dsn: str,
        *,
        on_change: Callable[[Change], None],
        on_connected: Callable[[], None],
        events: EventBus,
        probe_interval: float = 5.0,
        timeout: float = 5.0,
    ) -> None:
        self._dsn = dsn
        self._on_change = on_change
        self._on_connected = on_connected
        self._events = events
        self._probe_interval = probe_interval
        self._timeout = timeout
        self._task: asyncio.Task[None] | None = None
        self._attempted = asyncio.Event()
        self._lost_at: float | None = None
        self.connected = False
        """Whether changes arrive now, as far as is known."""

    def __repr__(self) -> str:
        """Tell whether it is connected; the DSN holds a password."""
        return f"<Listener {'connected' if self.connected else 'not connected'}>"

    async def open(self) -> None:
        """Start, and wait until the first attempt to connect has succeeded or failed; it goes on trying either way."""
        if self._task is None:
            self._attempted.clear()
            self._task = asyncio.get_running_loop().create_task(self._run(), context=Context())
            await self._attempted.wait()

    async def close(self) -> None:
        """Stop, and close the connection."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _run(self) -> None:
        pause = _FIRST_PAUSE
        while True:
            began = time.monotonic()
            reason = await self._connect_and_watch()
            self._report_lost(reason)
            if time.monotonic() - began > _LONGEST_PAUSE:
                pause = _FIRST_PAUSE
            # jitter, so that the processes of a fleet do not all come back in the same instant
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(pause * 2, _LONGEST_PAUSE)

    async def _connect_and_watch(self) -> str:
        """Listen until the connection is lost, and say why it was."""
        connection: asyncpg.Connection[Any] | None = None
        lost = asyncio.Event()
        try:
            connection = await self._connect(lost)
            return await self._watch(connection, lost)
        except SERVER_FAILURES as exc:
            # the class alone: a message may quote the address
            return type(exc).__name__
        finally:
            self.connected = False
            if connection is not None:
                # without a goodbye: the other side may be gone, and owes us nothing
                connection.terminate()

    async def _connect(self, lost: asyncio.Event) -> asyncpg.Connection[Any]:
        connection: asyncpg.Connection[Any] = await asyncpg.connect(
            self._dsn,
            timeout=self._timeout,
            command_timeout=self._timeout,
            server_settings={"application_name": "tenancy-listener"},
        )
        try:
            connection.add_termination_listener(lambda _: lost.set())
            await connection.add_listener(CHANNEL, self._received)
        except BaseException:
            connection.terminate()
            raise
        return connection

    async def _watch(self, connection: asyncpg.Connection[Any], lost: asyncio.Event) -> str:
        # after LISTEN: whatever commits from here on is heard, whatever came before is looked up again
        self._on_connected()
        self.connected = True
        self._report_restored()
        self._attempted.set()
        while True:
            try:
                async with asyncio.timeout(self._probe_interval):
                    await lost.wait()
                return "terminated"
            except TimeoutError:
                await connection.fetchval("SELECT 1", timeout=self._timeout)

    def _received(self, connection: object, pid: int, channel: str, payload: object) -> None:
        self._on_change(Change.parse(str(payload)))

    def _report_lost(self, reason: str) -> None:
        self._attempted.set()
        if self._lost_at is not None:
            return
        self._lost_at = time.monotonic()
        logger.warning("the listener for invalidations is lost (%s); the directory lives by its TTL", reason)
        self._events.emit(ListenerLost(reason=reason))

    def _report_restored(self) -> None:
        if self._lost_at is None:
            return
        seconds, self._lost_at = time.monotonic() - self._lost_at, None
        logger.info("the listener for invalidations is back after %.1f s", seconds)
        self._events.emit(ListenerRestored(seconds=seconds))
