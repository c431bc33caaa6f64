"""What a budget counts for one tenant: its account, the share of each of its pools, and who waits."""

from __future__ import annotations

import math
from collections import deque
from typing import Generic, Protocol, TypeVar
from uuid import UUID

T = TypeVar("T")
_T_contra = TypeVar("_T_contra", contravariant=True)


class Waiter(Protocol[_T_contra]):
    """A request that waits for a connection: an ``asyncio.Future``, or an object with these methods."""

    def done(self) -> bool:
        """Whether the waiter is served, or no longer waits."""

    def set_result(self, item: _T_contra, /) -> None:
        """Serve the waiter: with a connection, or with None for a reserved slot to open one in."""

    def set_exception(self, error: BaseException, /) -> None:
        """End the wait by an error."""


class Account:
    """The slots of one tenant, over all its pools.

    There are several while its engine is being replaced, and where asynchronous and synchronous code use it. ``open``
    counts the slots, ``idle`` and ``closing`` those of idle connections and of those that are being closed, and
    ``limit`` is how many it may have. ``ceiling`` is how many it may have until the next ``retry``: PostgreSQL refused
    one more, or another process asked for one. Where it is None, ``limit`` alone counts. Until ``promised`` (seconds of
    the clock of ``put``) the next connection that is returned is for another process.

    ``slug`` and ``tier`` are for errors, ``weight`` is the tier's. ``seconds`` counts the time for which it has had
    connections, see ``used``. ``queues`` counts its pools that wait, and ``queued`` their requests; ``served`` has when
    requests that waited were served, and how many connections it had then.
    """

    __slots__ = (
        "__weakref__",
        "ceiling",
        "closing",
        "idle",
        "limit",
        "open",
        "promised",
        "queued",
        "queues",
        "seconds",
        "served",
        "slug",
        "tenant_id",
        "tier",
        "weight",
    )

    def __init__(self, tenant_id: UUID, limit: int, weight: float = 1.0) -> None:
        self.tenant_id = tenant_id
        self.slug = self.tier = ""
        self.open = 0
        self.idle = 0
        self.closing = 0
        self.limit = limit
        self.ceiling: int | None = None
        self.promised = -math.inf
        self.weight = weight
        self.seconds = 0.0
        self.queues = 0
        self.queued = 0
        self.served: deque[tuple[float, int]] | None = None

    @property
    def room(self) -> int:
        """How many more slots it may have."""
        limit = self.limit if self.ceiling is None else min(self.limit, self.ceiling)
        return max(0, limit - self.open)

    @property
    def busy(self) -> int:
        """How many connections are being opened, reset or in use."""
        return self.open - self.idle - self.closing

    def used(self, now: float) -> float:
        """For how many seconds it has had connections until ``now``, over all connections.

        ``seconds`` is less each connection's start, so that nothing need be counted while it is in use.
        """
        return self.seconds + self.busy * now


class Share(Generic[T]):
    """One pool's part of a budget. Only the budget changes it.

    ``busy`` counts connections being opened, reset or in use; ``idle`` has the idle ones, each with the time it was
    returned, the latest last; ``score`` is the binary logarithm of the aged count of checkouts.
    """

    __slots__ = ("account", "busy", "idle", "score")

    def __init__(self, account: Account) -> None:
        self.account = account
        self.busy = 0
        self.idle: list[tuple[float, T]] = []
        self.score = -math.inf


__all__ = ["Account", "Share", "Waiter"]
