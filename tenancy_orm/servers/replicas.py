"""How stale a server's replicas are, and which of them can serve a read."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from bisect import bisect_right
from collections.abc import Callable
from contextvars import Context
from typing import Final

from ..errors import TenancyError
from ..events import EventBus, ReplicaLost, ReplicaRestored
from ..postgres import connections
from ..postgres.connections import Connection
from ..postgres.failures import SERVER_FAILURES
from ..postgres.login import clear_tracebacks, reason_of
from .positions import Position, Reading, read_position
from .server import CLOSE_SECONDS, Server

logger = logging.getLogger("tenancy_orm.servers")

LONGEST_SECONDS: Final = 1.0
"""How often primary and replicas are asked for their positions, at least."""

SHORTEST_SECONDS: Final = 0.05
"""How often at most, however small the bounds of the reads are; and how often in the first second."""

IDLE_SECONDS: Final = 30.0
"""How long they are asked after the last read that asked for a replica."""

FIRST_SECONDS: Final = 1.0
"""How long the first of those reads waits for the first answers."""

ANSWER_SECONDS: Final = 2.0
"""A replica that has not answered for this long is not read from."""

AGAIN_SECONDS: Final = 0.25
"""How long a read waits at most to learn whether a replica has what it must see."""

_SAMPLES = 512  # positions of the primary that are kept; older ones are thinned out


class Replica:
    """One replica, as it answered last.

    Attributes:
        server: Where to log in.
        reason: Why it cannot be read from; None where it can.
        position: What it has replayed, at least.
        fresh_at: It has all that was committed before this time of ``time.monotonic()``.
    """

    __slots__ = ("answered_at", "avoided_until", "fresh_at", "lost_at", "position", "reason", "server")

    def __init__(self, server: Server) -> None:
        self.server = server
        self.reason: str | None = "it was not asked yet"
        self.position: Position | None = None
        self.fresh_at = -math.inf
        self.answered_at = -math.inf
        self.avoided_until = -math.inf
        self.lost_at: float | None = None

    def __repr__(self) -> str:
        """Return its name and state."""
        return f"Replica({self.server.name!r}, {self.reason or 'in use'})"

    def has(self, position: Position) -> bool:
        """Whether it has replayed a position of its primary, which may be one of an earlier timeline."""
        mine = self.position
        return (
            mine is not None
            and mine.system == position.system
            and mine.timeline >= position.timeline
            and mine.lsn >= position.lsn
        )


class ReplicaMonitor:
    """Asks a server and its replicas for their positions, as long as somebody reads from replicas.

    The administrator's login asks, over one connection to each of them that is no part of a budget.

    Args:
        server: The primary.
        events: Receives what is lost and restored.
        on_lost: Called with a replica that must not be read from any more, also over open connections.
    """

    def __init__(self, server: Server, events: EventBus, on_lost: Callable[[Replica], None]) -> None:
        self.server = server
        self.replicas = tuple(Replica(replica) for replica in server.replicas)
        self._events = events
        self._on_lost = on_lost
        self._primary = _Asked(server)
        self._asked = {replica: _Asked(replica.server) for replica in self.replicas}
        # the primary's positions, and when each was asked for; both ascend
        self._times: list[float] = []
        self._lsns: list[int] = []
        self._known: Position | None = None  # the latest of them
        self._primary_failed = False
        self._following: asyncio.Task[None] | None = None
        self._first: asyncio.Event = asyncio.Event()
        self._bound = math.inf
        self._used_at = -math.inf
        self._turn = 0

    async def start(self, bound: float) -> None:
        """See to it that positions are asked for, often enough for a bound in seconds; await the first answers.

        Where they do not come soon, it returns without.
        """
        if not self.started(bound):
            try:
                async with asyncio.timeout(FIRST_SECONDS):
                    await self._first.wait()
            except TimeoutError:
                return

    def started(self, bound: float) -> bool:
        """As ``start``, but awaits nothing: returns whether there were answers since it was started."""
        self._used_at = time.monotonic()
        self._bound = min(self._bound, bound)
        if self._following is None:
            self._first.clear()
            self._following = asyncio.get_running_loop().create_task(self._follow(), context=Context())
        return self._first.is_set()

    def usable(self) -> list[Replica]:
        """The replicas that can be read from, however stale, each time another one first."""
        now = time.monotonic()
        found = [
            one
            for one in self.replicas
            if one.reason is None and now - one.answered_at <= self._patience and now >= one.avoided_until
        ]
        self._turn += 1
        start = self._turn % len(found) if found else 0
        return found[start:] + found[:start]

    async def ask_again(self, replica: Replica) -> None:
        """Learn what a replica has replayed by now, if it tells that soon."""
        await asyncio.wait([self._start(replica)], timeout=AGAIN_SECONDS)

    def avoid(self, replica: Replica) -> None:
        """Read nothing from a replica for a moment: a connection to it could not be opened."""
        replica.avoided_until = time.monotonic() + self._interval

    async def position(self) -> Position:
        """Ask the primary for its position: it has all that was committed before this call.

        Raises:
            ServerUnavailableError: it does not answer.
        """
        now = time.monotonic()
        self.started(math.inf)
        # a question that is under way may have been asked before
        for _ in range(2):
            asked = self._primary.start(self._learn_primary, self._patience)
            await asyncio.wait([asked])
            if self._known is not None and self._times and self._times[-1] >= now:
                return self._known
        raise self.server.unavailable(TimeoutError("it did not report how far it has written"))

    def stop(self) -> None:
        """Stop asking."""
        if self._following is not None:
            self._following.cancel()

    async def close(self) -> None:
        """Stop asking, and close the connections."""
        if (following := self._following) is not None:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)

    # --- asking -----------------------------------------------------------------------------------------------------

    @property
    def _interval(self) -> float:
        return max(SHORTEST_SECONDS, min(self._bound / 4, LONGEST_SECONDS))

    @property
    def _patience(self) -> float:
        return max(ANSWER_SECONDS, 2 * self._interval)

    async def _follow(self) -> None:
        started = time.monotonic()
        try:
            while (now := time.monotonic()) - self._used_at < IDLE_SECONDS:
                await self._ask_all()
                self._first.set()
                await asyncio.sleep(SHORTEST_SECONDS if now - started < FIRST_SECONDS else self._interval)
        finally:
            self._following = None
            self._bound = math.inf
            for asked in (self._primary, *self._asked.values()):
                asked.stop()
            await asyncio.gather(*(asked.closed() for asked in (self._primary, *self._asked.values())))

    async def _ask_all(self) -> None:
        """Ask the primary, then the replicas, which can have replayed its position by then."""
        primary = self._primary.start(self._learn_primary, self._patience)
        await asyncio.wait([primary], timeout=self._interval / 2)
        if self.replicas:
            await asyncio.wait([self._start(replica) for replica in self.replicas], timeout=self._interval / 2)

    def _start(self, replica: Replica) -> asyncio.Task[None]:
        def learn(asked_at: float, answer: Reading | BaseException) -> None:
            self._learn(replica, answer)

        return self._asked[replica].start(learn, self._patience)

    def _learn_primary(self, asked_at: float, answer: Reading | BaseException) -> None:
        if isinstance(answer, BaseException):
            if not self._primary_failed:
                logger.warning(
                    "server %s cannot be asked how far it has written, so its replicas count as staler by the second: "
                    "%s",
                    self.server.name,
                    reason_of(answer),
                )
            self._primary_failed = True
            return
        self._primary_failed = False
        position, known = answer.position, self._known
        if known is None or (position.system, position.timeline) != (known.system, known.timeline):
            # nothing is known of what replicas have of this history
            self._times.clear()
            self._lsns.clear()
            if known is not None:
                for replica in self.replicas:
                    replica.fresh_at = -math.inf
        elif self._lsns and position.lsn < self._lsns[-1]:
            # what was not flushed at a crash is lost
            cut = bisect_right(self._lsns, position.lsn)
            del self._times[cut:], self._lsns[cut:]
        self._known = position
        self._times.append(asked_at)
        self._lsns.append(position.lsn)
        if len(self._times) > _SAMPLES:
            half = _SAMPLES // 2
            self._times[:half] = self._times[:half:2]
            self._lsns[:half] = self._lsns[:half:2]

    def _learn(self, replica: Replica, answer: Reading | BaseException) -> None:
        if isinstance(answer, BaseException):
            self._lose(replica, reason_of(answer))
            return
        position, known, server = answer.position, self._known, replica.server
        refusal = None
        if not answer.recovering:
            refusal = "it was promoted, or never was a standby"
        elif known is not None and position.system != known.system:
            refusal = "it belongs to another cluster"
        elif known is not None and position.timeline != known.timeline:
            refusal = f"it follows timeline {position.timeline}, and not its primary's, {known.timeline}"
        if refusal is not None:
            self._lose(replica, refusal, close=True)
            return
        if answer.instance != server.instance:
            # another one, or started again: then it may have less than before
            server.instance = answer.instance
            replica.fresh_at = -math.inf
        replica.position = position
        replica.answered_at = time.monotonic()
        if known is None:
            return
        if (count := bisect_right(self._lsns, position.lsn)) > 0:
            replica.fresh_at = max(replica.fresh_at, self._times[count - 1])
        if replica.reason is not None:
            lost, replica.reason, replica.lost_at = replica.lost_at, None, None
            if lost is not None:
                logger.warning("replica %s is used again", server.name)
                self._events.emit(
                    ReplicaRestored(server=self.server.name, replica=server.name, seconds=replica.answered_at - lost)
                )

    def _lose(self, replica: Replica, reason: str, *, close: bool = False) -> None:
        replica.reason = reason
        if replica.lost_at is None:
            replica.lost_at = time.monotonic()
            logger.warning("replica %s is not used: %s", replica.server.name, reason)
            self._events.emit(ReplicaLost(server=self.server.name, replica=replica.server.name, reason=reason))
        if close and replica.server.instance is not None:
            replica.server.instance = None
            replica.fresh_at = -math.inf
            self._on_lost(replica)


class _Asked:
    """A connection that asks one server for its position, one question at a time."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._connection: Connection | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self, learn: Callable[[float, Reading | BaseException], None], timeout: float) -> asyncio.Task[None]:
        """Ask, unless an answer is awaited already; ``learn`` gets the time of the question, and the answer."""
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._ask(learn, timeout), context=Context())
        return self._task

    def stop(self) -> None:
        """Await no answer any more."""
        if self._task is not None:
            self._task.cancel()

    async def closed(self) -> None:
        """Close the connection, after ``stop``."""
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)
        connection, self._connection = self._connection, None
        if connection is not None:
            await connections.close(connection, timeout=CLOSE_SECONDS)

    async def _ask(self, learn: Callable[[float, Reading | BaseException], None], timeout: float) -> None:
        asked_at = time.monotonic()
        answer: Reading | BaseException
        try:
            async with asyncio.timeout(timeout):
                if self._connection is None or self._connection.is_closed():
                    self._connection = await self._server.connect_admin(purpose="tenancy-replicas")
                    asked_at = time.monotonic()
                answer = await read_position(self._connection)
                if answer.read_only and not self._server.is_replica:
                    # a standby, or a former primary: what it has written tells nothing of what the primary has, which
                    # another login may find
                    raise ConnectionError("it is read-only")
        except (*SERVER_FAILURES, TenancyError) as exc:
            answer = clear_tracebacks(exc)
            connection, self._connection = self._connection, None
            if connection is not None:
                connection.terminate()
        learn(asked_at, answer)


__all__ = ["Replica", "ReplicaMonitor"]
