"""How many connections one process may open to one server, and which waiter gets the next one.

State only: no I/O, no clock, no event loop. A *slot* is taken before a connection is opened, and freed when its socket
is really closed, so the server never sees more connections than the limit. The limit may change at any time. Methods
never wait, and all run in one thread, so there is no lock.

The next slot goes to the waiting tenant with the fewest connections in use; equals take turns, and within a tenant
waiters are served in order. To make room, the idle connection of the tenant with the fewest recent checkouts per open
connection is closed. A checkout loses half its weight every ``HALF_LIFE`` checkouts per slot. Least recently used is
much worse: with 300 tenants of zipf(1.1) on 50 connections it misses 32 % of the time, this 23 %
(see tests/benchmarks/test_bench_eviction.py).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar
from uuid import UUID
from weakref import WeakValueDictionary

T = TypeVar("T")
_T_contra = TypeVar("_T_contra", contravariant=True)

HALF_LIFE = 64
"""Checkouts per slot after which an old checkout counts half."""


class Waiter(Protocol[_T_contra]):
    """A request that waits for a connection: an ``asyncio.Future``, or an object with these methods."""

    def done(self) -> bool:
        """Whether the waiter is served, or no longer waits."""

    def set_result(self, item: _T_contra, /) -> None:
        """Serve the waiter: with a connection, or with None for a reserved slot to open one in."""


class Account:
    """The slots of one tenant, over all its pools.

    There are several while its engine is being replaced, and where asynchronous and synchronous code use it. ``open``
    counts the slots, ``idle`` and ``closing`` those of idle connections and of those that are being closed, and
    ``limit`` is how many it may have. ``ceiling`` is how many it may have until the next ``retry``: PostgreSQL refused
    one more, or another process asked for one. Where it is None, ``limit`` alone counts. Until ``promised`` (seconds of
    the clock of ``put``) the next connection that is returned is for another process.
    """

    __slots__ = ("__weakref__", "ceiling", "closing", "idle", "limit", "open", "promised")

    def __init__(self, limit: int) -> None:
        self.open = 0
        self.idle = 0
        self.closing = 0
        self.limit = limit
        self.ceiling: int | None = None
        self.promised = -math.inf

    @property
    def room(self) -> int:
        """How many more slots it may have."""
        limit = self.limit if self.ceiling is None else min(self.limit, self.ceiling)
        return max(0, limit - self.open)


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


@dataclass(frozen=True, slots=True)
class BudgetStatistics:
    """Connections to one server. ``limit`` and ``open`` count slots; ``open`` is the sum of the next four.

    ``waiting`` counts requests without a connection, and ``evictions`` the idle connections closed so far to make room
    for another tenant's, or for the same tenant's synchronous code.
    """

    limit: int
    open: int
    idle: int
    in_use: int
    opening: int
    closing: int
    waiting: int
    evictions: int


class Budget(Generic[T]):
    """The slots of one server.

    Args:
        limit: How many slots there are.
        per_tenant: How many of them one tenant may hold.
        evict: Called with a share and one of its connections, to close that connection and make room. It must call
            ``discard`` at once, and ``closed`` later.
        max_opening: In how many slots connections may be opened at once; None is in all.
    """

    def __init__(
        self, limit: int, per_tenant: int, evict: Callable[[Share[T], T], None], *, max_opening: int | None = None
    ) -> None:
        self.limit = limit
        self.per_tenant = per_tenant
        self.max_opening = max_opening
        self.open = 0
        self.idle = 0
        self.opening = 0
        self.closing = 0
        self.evictions = 0
        self._evict = evict
        self._accounts: WeakValueDictionary[UUID, Account] = WeakValueDictionary()
        # in the order of their turns: a share joins at the end, and moves there again when it was served
        self._waiting: dict[Share[T], deque[Waiter[T | None]]] = {}
        self._idle_shares: dict[Share[T], None] = {}  # the shares that have idle connections
        self._clock = 0.0  # in half-lives

    def share(self, tenant_id: UUID, *, limit: int | None = None) -> Share[T]:
        """Return a share for a new pool of this tenant.

        Args:
            tenant_id: The tenant.
            limit: How many slots it may hold, if that is fewer than ``per_tenant``.
        """
        allowed = self.per_tenant if limit is None else min(limit, self.per_tenant)
        account = self._accounts.get(tenant_id)
        if account is None:
            account = self._accounts[tenant_id] = Account(allowed)
        account.limit = allowed
        return Share(account)

    def account(self, tenant_id: UUID) -> Account | None:
        """Return a tenant's account, or None if it has no pool."""
        return self._accounts.get(tenant_id)

    def statistics(self) -> BudgetStatistics:
        """Return the current counts."""
        return BudgetStatistics(
            limit=self.limit,
            open=self.open,
            idle=self.idle,
            in_use=self.open - self.idle - self.opening - self.closing,
            opening=self.opening,
            closing=self.closing,
            waiting=sum(len(queue) for queue in self._waiting.values()),
            evictions=self.evictions,
        )

    # --- the limit --------------------------------------------------------------------------------------------------

    def resize(self, limit: int, *, max_opening: int | None = None) -> None:
        """Change how many slots there are, and in how many connections may be opened at once.

        If there are more than before, waiters get them at once. If there are fewer, idle connections above the new
        limit are closed at once, the least valuable ones first, and busy ones when they are returned.

        Args:
            limit: How many slots there are from now on; 0 or more.
            max_opening: In how many of them connections may be opened at once; None is in all.
        """
        self.limit = limit
        self.max_opening = max_opening
        self._serve_waiters()

    @property
    def excess(self) -> int:
        """How many connections above the limit are still open and are not being closed."""
        return max(0, self.open - self.closing - self.limit)

    # --- getting a connection ---------------------------------------------------------------------------------------

    def touch(self, share: Share[T]) -> None:
        """Count a checkout.

        The weight of new checkouts doubles every half-life, instead of halving that of all older ones; logarithms keep
        it from overflowing.
        """
        self._clock = now = self._clock + 1 / (HALF_LIFE * max(1, self.limit))
        score = share.score
        if score == -math.inf:
            share.score = now
        else:
            high, low = (score, now) if score > now else (now, score)
            share.score = high + math.log2(1.0 + 2.0 ** (low - high))

    def take(self, share: Share[T], prefer: Callable[[T], bool] | None = None) -> tuple[float, T] | None:
        """Take the idle connection that was returned last, or None; it counts as in use from now on.

        Args:
            share: The tenant's.
            prefer: Tells which ones to take rather than a later one, where there are several.
        """
        if not share.idle:
            return None
        last = len(share.idle) - 1
        if last and prefer is not None:
            last = next((index for index in range(last, -1, -1) if prefer(share.idle[index][1])), last)
        entry = share.idle.pop(last)
        if not share.idle:
            del self._idle_shares[share]
        self.idle -= 1
        share.account.idle -= 1
        share.busy += 1
        return entry

    def reserve(self, share: Share[T]) -> bool:
        """Reserve a slot to open a connection in, if one is free. ``opened`` or ``failed`` must follow.

        No waiter is overtaken: while a slot may be reserved, only tenants at their own limit are waiting.
        """
        if not self._can_open or not share.account.room:
            return False
        self._reserve(share)
        return True

    def wait(self, share: Share[T], waiter: Waiter[T | None], *, first: bool = False) -> None:
        """Add a waiter to the queue, and close another tenant's idle connection if that makes room.

        Args:
            share: The tenant's.
            waiter: The waiter.
            first: Whether it is the next one of its tenant, since it had its turn and PostgreSQL refused it.
        """
        queue = self._waiting.setdefault(share, deque())
        if first:
            queue.appendleft(waiter)
        else:
            queue.append(waiter)
        self._serve_waiters()

    def withdraw(self, share: Share[T], waiter: Waiter[T | None]) -> None:
        """Remove a waiter from the queue. If it was served already, the caller must return what it got."""
        queue = self._waiting.get(share)
        if queue is not None and waiter in queue:
            queue.remove(waiter)
            if not queue:
                del self._waiting[share]

    def opened(self) -> None:
        """Record that a connection was opened in a reserved slot; it is in use."""
        self.opening -= 1
        if self._waiting and self.max_opening is not None:
            self._serve_waiters()

    def failed(self, share: Share[T], *, refused: bool = False) -> None:
        """Free a reserved slot: opening failed, and no socket is left.

        Args:
            share: The tenant's.
            refused: Whether PostgreSQL accepts no further connection of this tenant. Then its waiters get no slot
                until ``retry``, or until one of its connections is closed.
        """
        self.opening -= 1
        share.busy -= 1
        if refused:
            share.account.ceiling = share.account.open - 1
        self._release(share)

    def retry(self, account: Account) -> None:
        """Let one waiter of a refused tenant try to open a connection; the others follow once it is ``accepted``."""
        if account.ceiling is None:
            return
        waits = any(share.account is account for share in self._waiting)
        account.ceiling = account.open + 1 if waits else None
        self._serve_waiters()

    def accepted(self, account: Account) -> None:
        """Record that PostgreSQL accepts connections of this tenant again."""
        account.ceiling = None
        self._serve_waiters()

    # --- returning it -----------------------------------------------------------------------------------------------

    def put(self, share: Share[T], item: T, now: float) -> bool:
        """Return a usable connection: give it to a waiter, or keep it idle from ``now`` on (seconds of any clock).

        It is closed if the limit has become smaller than the number of open connections.

        False: it is promised to another process. It still counts as in use, and the caller must ``discard`` it; its
        slot stays free until ``retry``.
        """
        account = share.account
        if now < account.promised:
            account.promised = -math.inf
            account.ceiling = account.open - 1
            return False
        if self.excess:
            self.evictions += 1
            self._evict(share, item)
            return True
        share.busy -= 1
        if share in self._waiting and self._serves_own(share) and (waiter := self._next(share)) is not None:
            share.busy += 1
            waiter.set_result(item)
            return True
        share.idle.append((now, item))
        self._idle_shares[share] = None
        self.idle += 1
        account.idle += 1
        if self._waiting:
            self._serve_waiters()
        return True

    def discard(self, share: Share[T]) -> None:
        """Record that a connection in use is being closed. ``closed`` must follow."""
        share.busy -= 1
        share.account.closing += 1
        self.closing += 1

    def closed(self, share: Share[T]) -> None:
        """Free the slot of a connection: its socket is closed."""
        self.closing -= 1
        share.account.closing -= 1
        self._release(share)

    def take_idle(self, share: Share[T]) -> list[T]:
        """Take every idle connection of a share; they count as in use until ``discard``."""
        return [self._take_oldest(share) for _ in range(len(share.idle))]

    def take_expired(self, before: float) -> list[tuple[Share[T], T]]:
        """Take every connection that was returned before this time; they count as in use until ``discard``."""
        found = []
        for share in list(self._idle_shares):
            while share.idle and share.idle[0][0] < before:
                found.append((share, self._take_oldest(share)))
        return found

    # --- for other processes ----------------------------------------------------------------------------------------

    def take_for_others(self, account: Account, *, keep: int) -> list[tuple[Share[T], T]]:
        """Take a tenant's idle connections, as long as it keeps ``keep`` open; in use until ``discard``."""
        found: list[tuple[Share[T], T]] = []
        for share in [share for share in self._idle_shares if share.account is account]:
            while share.idle and account.open - len(found) > keep:
                found.append((share, self._take_oldest(share)))
        return found

    def take_surplus(self, before: float, accounts: set[Account] | None) -> list[tuple[Share[T], T]]:
        """Take connections that were returned before this time; each tenant keeps one. None: of all tenants."""
        found: list[tuple[Share[T], T]] = []
        by_account: dict[Account, list[Share[T]]] = {}
        for share in self._idle_shares:
            by_account.setdefault(share.account, []).append(share)
        for account, shares in by_account.items():
            if accounts is not None and account not in accounts:
                continue
            taken = 0
            for share in shares:
                while share.idle and share.idle[0][0] < before and account.open - taken > 1:
                    found.append((share, self._take_oldest(share)))
                    taken += 1
        return found

    def make_room(self) -> bool:
        """Close the idle connection that is worth least, whichever tenant has it; False if none is idle."""
        if not self._idle_shares:
            return False
        self._make_room()
        return True

    # --- inner ------------------------------------------------------------------------------------------------------

    @property
    def _can_open(self) -> bool:
        """Whether one more connection may be opened now."""
        return self.open < self.limit and (self.max_opening is None or self.opening < self.max_opening)

    def _reserve(self, share: Share[T]) -> None:
        self.open += 1
        self.opening += 1
        share.account.open += 1
        share.busy += 1

    def _release(self, share: Share[T]) -> None:
        self.open -= 1
        share.account.open -= 1
        if self._waiting:
            self._serve_waiters()

    def _serve_waiters(self) -> None:
        """Give free slots to waiters, and begin to close idle connections for the remaining ones."""
        while self._can_open and (share := self._fairest()) is not None:
            waiter = self._next(share)
            if waiter is not None:
                self._reserve(share)
                waiter.set_result(None)
        for share in self._waiting:
            if share.account.idle and not share.account.room:
                self._make_room_of_own(share)
        wanted = sum(map(self._wanted, self._waiting)) - self._coming_free
        while wanted > 0 and self._idle_shares:
            self._make_room()
            wanted -= 1

    def _make_room_of_own(self, share: Share[T]) -> None:
        """Close idle connections in a tenant's other pools, since it may have no more slots for this one."""
        account = share.account
        wanted = len(self._waiting[share]) - account.closing
        for other in [other for other in self._idle_shares if other.account is account and other is not share]:
            while wanted > 0 and other.idle:
                self.evictions += 1
                self._evict(other, self._take_oldest(other))
                wanted -= 1

    @property
    def _coming_free(self) -> int:
        """How many slots are free, or will be once connections are closed; below 0 where the limit is exceeded."""
        return self.limit - self.open + self.closing

    def _wanted(self, share: Share[T]) -> int:
        """How many slots a waiting share could use."""
        return min(len(self._waiting[share]), share.account.room)

    def _fairest(self, *, returning: Share[T] | None = None) -> Share[T] | None:
        """The waiting share to serve next.

        The share that is ``returning`` a connection needs no further slot, and neither does another one of its tenant,
        which gets the slot. That costs a login, so it does not happen again and again between two that have some.
        """
        if returning is None:
            return min((s for s in self._waiting if s.account.room), key=lambda share: share.busy, default=None)
        own = returning.account
        able = (s for s in self._waiting if s.account is own or s.account.room)
        return min(
            able,
            key=lambda share: (share.busy, share.account is own and share is not returning and share.busy > 0),
            default=None,
        )

    def _serves_own(self, share: Share[T]) -> bool:
        """Whether a connection that this share returns serves its own waiter, or is closed to serve another's."""
        fairest = self._fairest(returning=share)
        if fairest is share or fairest is None:
            return True
        if fairest.account is share.account:
            return share.account.closing > 0
        # or the slots that are free or being freed are enough for the others
        return sum(self._wanted(other) for other in self._waiting if other is not share) <= self._coming_free

    def _next(self, share: Share[T]) -> Waiter[T | None] | None:
        """Take the first waiter of a share that still waits: a cancelled one may still be in the queue."""
        queue = self._waiting.pop(share)
        found = None
        while queue and found is None:
            waiter = queue.popleft()
            found = None if waiter.done() else waiter
        if queue:
            self._waiting[share] = queue
        return found

    def _take_oldest(self, share: Share[T]) -> T:
        _, item = share.idle.pop(0)
        if not share.idle:
            del self._idle_shares[share]
        self.idle -= 1
        share.account.idle -= 1
        share.busy += 1
        return item

    def _make_room(self) -> None:
        share = min(self._idle_shares, key=lambda share: share.score - math.log2(len(share.idle) + share.busy))
        self.evictions += 1
        self._evict(share, self._take_oldest(share))


__all__ = ["HALF_LIFE", "Account", "Budget", "BudgetStatistics", "Share", "Waiter"]
