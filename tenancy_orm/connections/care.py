"""What one of the processes does for all: count the connections of others, and take from a lost process what it had."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Coroutine, Mapping
from contextvars import Context
from typing import Any
from uuid import UUID

from sqlalchemy.exc import DBAPIError

from ..control.database import ControlDatabase
from ..deadlines import clock
from ..errors import TenancyError
from ..events import ConnectionLeaseReclaimed, EventBus
from ..postgres.failures import SERVER_FAILURES
from ..postgres.locks import try_lock
from ..servers.server import Server
from . import rows, usage
from .rows import LEASE_SECONDS, LeaseRow, ServerLeases

logger = logging.getLogger("tenancy_orm.connections")

COUNT_SECONDS = 30.0
"""How often the connections of others are counted on each server, by one of the processes."""

RECOUNT_SECONDS = 2.0
"""How often they are counted while the server accepts fewer connections than the cap says."""

SET_SECONDS = 2.0
"""How far the control database's clock moves against this machine's when it was set: less makes no lease expire that is
renewed."""

FAILURES = (TenancyError, DBAPIError, *SERVER_FAILURES)
"""What work on a server, or in the control database, fails with."""


class Care:
    """Work on the servers, in tasks of its own: none of it delays the renewal of the leases.

    Args:
        control: The open control database.
        servers: The servers by name.
        events: Receives reclaims.
        stem: What the names of tenants' roles begin with.
        changed: Called when a cap, or what others have, has changed.
    """

    def __init__(
        self,
        control: ControlDatabase,
        servers: Mapping[str, Server],
        events: EventBus,
        stem: str,
        changed: Callable[[], None],
    ) -> None:
        self._control = control
        self._servers = servers
        self._events = events
        self._stem = stem
        self._changed = changed
        self._tasks: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._looked_at: dict[UUID, float] = {}  # lost processes that live, by when that was seen
        # how far the control database's clock is ahead of this machine's, at least and at most
        self._ahead = (math.inf, -math.inf)
        self._judges_from = 0.0  # when each process has renewed its leases by that clock, or is lost

    def start(self, kind: str, server: str, work: Coroutine[Any, Any, None]) -> None:
        """Start a task, unless one of this kind runs for this server. A failure is logged: the work is tried again."""
        running = self._tasks.get((kind, server))
        if running is not None and not running.done():
            work.close()
            return
        self._tasks[kind, server] = asyncio.get_running_loop().create_task(
            self._run(kind, server, work), context=Context()
        )

    async def close(self) -> None:
        """End the tasks."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def look_after(self, leases: ServerLeases, process: UUID, *, began: float, recount: bool) -> None:
        """Begin what has to be done for a server.

        Args:
            leases: Its leases.
            process: The id of this process.
            began: When they were asked for, in seconds of ``clock``.
            recount: Whether the server accepts fewer connections than its cap says.
        """
        server = self._servers.get(leases.server)
        if server is None:
            return
        now = clock()
        judges = self._trusts(leases.now - now, leases.now - began, now)
        for row in leases.leases:
            if not judges or not row.is_expired or row.process == process:
                continue
            seen = now - self._looked_at.get(row.process, -LEASE_SECONDS) < LEASE_SECONDS
            if not seen or row.granted > row.guaranteed:
                self.start("reclaim", leases.server, self._reclaim(leases.server, row))
                break
        every = RECOUNT_SECONDS if recount else COUNT_SECONDS
        if leases.counted_ago > every and not server.is_pooled:
            known = {rows.tag_of(row.process): row.granted for row in leases.leases}
            self.start("count", leases.server, self._count(leases.server, known, every=every))

    def _trusts(self, least: float, most: float, now: float) -> bool:
        """Whether a lease has expired since nobody renewed it, and not since the control database's clock was set.

        A slow answer leaves open when the clock was read, so only answers that exclude each other show that it was set.
        """
        known_least, known_most = self._ahead
        if least > known_most + SET_SECONDS or most < known_least - SET_SECONDS:
            self._judges_from = now + LEASE_SECONDS
            self._ahead = (least, most)
        else:
            self._ahead = (max(least, known_least), min(most, known_most))
        return now >= self._judges_from

    async def _run(self, kind: str, server: str, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except FAILURES as exc:
            logger.debug("%s of connections to server %s has failed: %s", kind, server, type(exc).__name__)

    async def _count(self, server: str, known: Mapping[str, int], *, every: float) -> None:
        async with self._control.connect() as control:
            if not await rows.claim_count(control, server, every=every):
                return
        async with usage.administration(self._servers[server]) as connection:
            counted = await usage.count(connection, self._stem)
        async with self._control.connect() as control:
            # read after the count: what a process has that has opened in between is none of others. And what one had
            # that was closed in between is none either.
            granted, elsewhere = await rows.read_granted(control, server)
            others = counted.others({**known, **granted}, elsewhere=elsewhere)
            await rows.save_count(control, server, accepted=counted.accepted, others=others)
        self._changed()

    async def _reclaim(self, server: str, row: LeaseRow) -> None:
        """Take from a lost process what it may not use any more, and make sure that it does not."""
        address = self._servers[server]
        async with usage.administration(address) as connection:
            if not await try_lock(connection, usage.presence_key(row.process)):
                # it lives, and keeps its guaranteed part
                kept = min(row.granted, row.guaranteed)
                if not address.is_pooled:
                    await usage.end_tagged(connection, rows.tag_of(row.process), keep=kept, timeout=LEASE_SECONDS)
                async with self._control.connect() as control:
                    await rows.keep_guaranteed(control, server, row.process)
                self._looked_at[row.process] = clock()
                return
            async with self._control.connect() as control:
                if not await rows.begin_end(control, server, row.process):
                    return
            if not address.is_pooled:
                await usage.end_tagged(connection, rows.tag_of(row.process), timeout=rows.ENDING_SECONDS / 2)
            async with self._control.transaction() as control:
                await rows.lock_cap(control, server)
                await rows.remove(control, server, row.process)
                left = (await rows.read(control, [server]))[server]
                waiting = [lease.process for lease in left.leases if lease.granted < lease.wanted]
                if waiting:
                    await rows.call(control, server, waiting)
        self._looked_at.pop(row.process, None)
        logger.warning(
            "process %d on %s did not renew its lease of connections to server %s; its %d are free again",
            row.pid,
            row.host,
            server,
            row.granted,
        )
        self._events.emit(ConnectionLeaseReclaimed(server=server, host=row.host, pid=row.pid, connections=row.granted))
        self._changed()


__all__ = ["COUNT_SECONDS", "FAILURES", "RECOUNT_SECONDS", "Care"]
