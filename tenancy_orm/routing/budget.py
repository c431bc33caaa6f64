"""How many connections one process may open to one server, and which waiter gets the next one.

State only: no I/O, no event loop. A *slot* is taken before a connection is opened, and freed when its socket
is really closed, so the server never sees more connections than the limit. The limit may change at any time. Methods
never wait, and all run in one thread, so there is no lock.

Which waiting tenant gets the next slot, and whether a tenant keeps one that it returns, is decided in ``queue``.

To make room, the idle connection of the tenant with the fewest recent checkouts per open connection is closed. A
checkout loses half its weight every ``HALF_LIFE`` checkouts per slot. Least recently used is much worse: with 300
tenants of zipf(1.1) on 50 connections it misses 32 % of the time, this 23 % (see
tests/benchmarks/test_bench_eviction.py). A tenant that has its part of the slots already, where tenants that have used
theirs lately count as those that wait, does not make others log in again: for it, only what was idle for
``KEEP_SECONDS`` is closed, and what is above another's part.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar, get_args
from uuid import UUID
from weakref import WeakValueDictionary

from .queue import Entry, Queue, Refusal
from .shares import Account, Share, Waiter

T = TypeVar("T")

HALF_LIFE = 64
"""Checkouts per slot after which an old checkout counts half."""

KEEP_SECONDS = 1.0
"""For how long an idle connection is not closed for a tenant that has its part of the slots, or more."""


WaitingFor = Literal["server", "tenant", "login", "postgresql"]
"""What a request waits for: a slot of the server; a connection of its own tenant, which has all that it may have; that
fewer connections are being opened at once; or PostgreSQL, which accepts no further connection (53300)."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A tenant that waits now, for what, and how many of its requests; the first one since ``seconds`` ago.

    ``busy`` counts its connections in use or being opened in this process.
    """

    tenant_id: UUID
    slug: str
    tier: str
    weight: float
    waiting_for: WaitingFor
    requests: int
    seconds: float
    busy: int


@dataclass(frozen=True, slots=True)
class BudgetStatistics:
    """Connections to one server. ``limit`` and ``open`` count slots; ``open`` is the sum of the next four.

    ``guaranteed`` is the part of the server's cap that the process keeps while it cannot reach the control database,
    and ``borrowed`` how many it has beyond that now.

    ``waiting`` counts requests without a connection, and ``evictions`` the idle connections closed so far to make room
    for another tenant's, or for the same tenant's synchronous code.

    ``waiting_for`` counts the requests that wait by what they wait for. ``waited`` is how many got a connection so far
    after they had waited, ``waited_seconds`` for how long in total. ``refused`` counts those that were refused at once,
    and ``timed_out`` those that waited in vain.
    """

    limit: int
    open: int
    idle: int
    in_use: int
    opening: int
    closing: int
    waiting: int
    evictions: int
    waiting_for: Mapping[WaitingFor, int] = field(default_factory=lambda: dict.fromkeys(get_args(WaitingFor), 0))
    waited: int = 0
    waited_seconds: float = 0.0
    refused: int = 0
    timed_out: int = 0
    guaranteed: int = 0
    borrowed: int = 0


class Budget(Generic[T]):
    """The slots of one server.

    Args:
        limit: How many slots there are.
        per_tenant: How many of them one tenant may hold.
        evict: Called with a share and one of its connections, to close that connection and make room. It must call
            ``discard`` at once, and ``closed`` later.
        max_opening: In how many slots connections may be opened at once; None is in all.
        max_waiting: How many requests of one tenant may wait; None is any number.
        clock: Tells the time, in seconds.
    """

    on_full: Callable[[], None] | None = None
    """Called when somebody waits and every slot is taken."""

    reachable: int = 0
    """How many slots there may be in a moment: no request is refused that could be served with as many."""

    def __init__(
        self,
        limit: int,
        per_tenant: int,
        evict: Callable[[Share[T], T], None],
        *,
        max_opening: int | None = None,
        max_waiting: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limit = limit
        self.per_tenant = per_tenant
        self.max_opening = max_opening
        self.open = 0
        self.idle = 0
        self.opening = 0
        self.closing = 0
        self.evictions = 0
        self.refused = 0
        self.timed_out = 0
        self._evict = evict
        self._accounts: WeakValueDictionary[UUID, Account] = WeakValueDictionary()
        self._now = clock
        self._max_waiting = max_waiting
        self._waiting: Queue[T] = Queue()
        self._idle_shares: dict[Share[T], None] = {}  # the shares that have idle connections
        self._deprived: dict[Account, float] = {}  # since when tenants have none that others took them from
        self._clock = 0.0  # in half-lives

    def share(
        self, tenant_id: UUID, *, limit: int | None = None, weight: float = 1.0, slug: str = "", tier: str = ""
    ) -> Share[T]:
        """Return a share for a new pool of this tenant.

        Args:
            tenant_id: The tenant.
            limit: How many slots it may hold, if that is fewer than ``per_tenant``.
            weight: How much of the slots it gets where there are too few, relative to others.
            slug: Its slug, for errors and figures.
            tier: The name of its tier, also for ``reweigh``.
        """
        allowed = self.per_tenant if limit is None else min(limit, self.per_tenant)
        account = self._accounts.get(tenant_id)
        if account is None:
            account = self._accounts[tenant_id] = Account(tenant_id, allowed, weight)
        elif account.weight != weight:
            self._waiting.reweigh(account, weight, self._now())
        account.limit = allowed
        account.slug, account.tier = slug, tier
        return Share(account)

    def account(self, tenant_id: UUID) -> Account | None:
        """Return a tenant's account, or None if it has no pool."""
        return self._accounts.get(tenant_id)

    def statistics(self) -> BudgetStatistics:
        """Return the current counts."""
        waiting_for: dict[WaitingFor, int] = dict.fromkeys(get_args(WaitingFor), 0)
        for share in list(self._waiting):
            waiting_for[self.reason(share.account)] += self._waiting.length(share)
        return BudgetStatistics(
            limit=self.limit,
            open=self.open,
            idle=self.idle,
            in_use=self.open - self.idle - self.opening - self.closing,
            opening=self.opening,
            closing=self.closing,
            waiting=len(self._waiting),
            evictions=self.evictions,
            waiting_for=waiting_for,
            waited=self._waiting.waited,
            waited_seconds=self._waiting.waited_seconds,
            refused=self.refused,
            timed_out=self.timed_out,
        )

    def reweigh(self, weights: Mapping[str, float]) -> None:
        """Give the tenants of each tier another weight; 1.0 where the tier has none."""
        now = self._now()
        for account in list(self._accounts.values()):
            weight = weights.get(account.tier, 1.0)
            if account.weight != weight:
                self._waiting.reweigh(account, weight, now)

    def waiting(self) -> list[Waiting]:
        """Return which tenants wait, the one that waits longest first."""
        now = self._now()
        found: dict[Account, float] = {}
        for share in self._waiting:
            since = self._waiting.since(share)
            found[share.account] = min(since, found.get(share.account, since))
        return [
            Waiting(
                tenant_id=account.tenant_id,
                slug=account.slug,
                tier=account.tier,
                weight=account.weight,
                waiting_for=self.reason(account),
                requests=account.queued,
                seconds=now - since,
                busy=account.busy,
            )
            for account, since in sorted(found.items(), key=lambda item: item[1])
        ]

    @property
    def has_waiters(self) -> bool:
        """Whether somebody waits."""
        return bool(self._waiting)

    def reason(self, account: Account) -> WaitingFor:
        """Return what a tenant without a free connection waits for."""
        if account.ceiling is not None and account.ceiling <= account.open:
            return "postgresql"
        if account.open >= account.limit:
            return "tenant"
        if self.open < self.limit and not self._can_open:
            return "login"
        return "server"

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
    def wanted(self) -> int:
        """How many slots its waiters could use, if there were as many."""
        return sum(map(self._wanted, self._waiting))

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

    def take(
        self, share: Share[T], now: float | None = None, *, prefer: Callable[[T], bool] | None = None
    ) -> tuple[float, T] | None:
        """Take the idle connection that was returned last, or None; it counts as in use from ``now`` on.

        Args:
            share: The tenant's.
            now: The time, in seconds of any clock.
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
        account = share.account
        account.idle -= 1
        account.seconds -= self._now() if now is None else now
        share.busy += 1
        if account.queues:
            self._waiting.held += 1
        return entry

    def reserve(self, share: Share[T]) -> bool:
        """Reserve a slot to open a connection in, if one is free. ``opened`` or ``failed`` must follow.

        No waiter is overtaken: while a slot may be reserved, only tenants at their own limit are waiting, and tenants
        with their part of the slots while a few are kept for those that have lost their last connection.
        """
        if not self._can_open or not share.account.room:
            return False
        if self._deprived:
            now, account = self._now(), share.account
            if self._keeps_free_slots(now) and account.busy + 1 > max(1.0, self._unit_with_idle(now) * account.weight):
                return False
        self._reserve(share)
        return True

    def wait(
        self, share: Share[T], waiter: Waiter[T | None], *, deadline: float = math.inf, first: bool = False
    ) -> Refusal | None:
        """Add a waiter to the queue, and close another tenant's idle connection if that makes room.

        Args:
            share: The tenant's.
            waiter: The waiter.
            deadline: Until when it would wait (seconds of the budget's clock).
            first: Whether it is the next one of its tenant, since it had its turn and PostgreSQL refused it.

        Returns:
            None; or why it is not added: it could not be served before its deadline, or too many wait.
        """
        now, account = self._now(), share.account
        if not first:
            refusal = self._refusal(account, now, deadline)
            if refusal is not None:
                self.refused += 1
                return refusal
        self._waiting.add(share, Entry(waiter, now, deadline), first=first)
        self._serve_waiters()
        if self.on_full is not None and self.open >= self.limit:
            self.on_full()
        return None

    def withdraw(self, share: Share[T], waiter: Waiter[T | None]) -> None:
        """Remove a waiter from the queue. If it was served already, the caller must return what it got."""
        self._waiting.remove(share, waiter)

    def dismiss(self) -> list[tuple[Share[T], Waiter[T | None]]]:
        """Return everybody who waits, to be told that it is in vain; they do not wait any more."""
        return self._waiting.dismiss()

    def look(self) -> list[tuple[Share[T], Waiter[T | None], Refusal]]:
        """Close what has been idle for ``KEEP_SECONDS`` for those that wait; to be called while some do.

        Returns:
            The waiters that cannot be served before their deadlines; they do not wait any more.
        """
        self._serve_waiters()
        found = self._waiting.hopeless(self._now(), limit=self._soon)
        self.refused += len(found)
        return found

    def _refusal(self, account: Account, now: float, deadline: float) -> Refusal | None:
        if self._max_waiting is not None and account.queued >= self._max_waiting:
            return Refusal("queue", 0.0, 1.0, max(0.0, deadline - now))
        return self._waiting.refusal(
            account, ahead=account.queued, now=now, deadline=deadline, limit=self._soon, busy=self._busy
        )

    def opened(self, seconds: float | None = None) -> None:
        """Record that a connection was opened in a reserved slot, in so many ``seconds``; it is in use."""
        self.opening -= 1
        if seconds is not None:
            self._waiting.measure_login(seconds)
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
        self._vacate(share)
        if refused:
            share.account.ceiling = share.account.open - 1
        self._release(share)

    def retry(self, account: Account) -> None:
        """Let one waiter of a refused tenant try to open a connection; the others follow once it is ``accepted``."""
        if account.ceiling is None:
            return
        waits = account.queues > 0
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
        if self._waiting:
            waits = share in self._waiting
            serves_own = waits and self._serves_own(share, now)
            self._waiting.forgive(account, now)
            if waits:
                if not serves_own:
                    self.evictions += 1
                    self._evict(share, item)
                    return True
                if (waiter := self._waiting.pop(share, now, busy=account.busy)) is not None:
                    waiter.set_result(item)
                    return True
        share.busy -= 1
        share.idle.append((now, item))
        self._idle_shares[share] = None
        self.idle += 1
        account.seconds += now
        account.idle += 1
        if self._waiting:
            self._waiting.held -= account.queues > 0
            self._serve_waiters()
        return True

    def discard(self, share: Share[T]) -> None:
        """Record that a connection in use is being closed. ``closed`` must follow."""
        self._vacate(share)
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
        return self._make_room()

    # --- inner ------------------------------------------------------------------------------------------------------

    @property
    def _can_open(self) -> bool:
        """Whether one more connection may be opened now."""
        return self.open < self.limit and (self.max_opening is None or self.opening < self.max_opening)

    @property
    def _soon(self) -> int:
        return max(self.limit, self.reachable)

    @property
    def _busy(self) -> int:
        return self.open - self.idle - self.closing

    def _reserve(self, share: Share[T]) -> None:
        self.open += 1
        self.opening += 1
        account = share.account
        account.open += 1
        account.seconds -= self._now()
        share.busy += 1
        if account.queues:
            self._waiting.held += 1
        if self._deprived:
            self._deprived.pop(account, None)

    def _vacate(self, share: Share[T]) -> None:
        """End the use of a connection or slot that is not given back idle."""
        share.busy -= 1
        share.account.seconds += self._now()
        if share.account.queues:
            self._waiting.held -= 1

    def _release(self, share: Share[T]) -> None:
        self.open -= 1
        share.account.open -= 1
        if self._waiting:
            self._serve_waiters()

    def _serve_waiters(self) -> None:
        """Give free slots to waiters, and begin to close idle connections for the remaining ones."""
        now = self._now()
        waiting = self._waiting
        while waiting and self._can_open:
            kept = self._keeps_free_slots(now)
            turn = waiting.first(
                now,
                limit=self.limit,
                busy=self._busy,
                most=self._unit_with_idle(now) if kept else None,
            )
            if turn is None:
                break
            waiter = waiting.pop(turn.share, now, busy=turn.share.account.busy + 1)
            if waiter is not None:
                self._reserve(turn.share)
                waiter.set_result(None)
        if not self._idle_shares:
            return
        for share in {other for idle in self._idle_shares if idle.account.queues for other in waiting.of(idle.account)}:
            if not share.account.room:
                self._make_room_of_own(share)
        self._make_room_for_waiters(now)

    def _make_room_for_waiters(self, now: float) -> None:
        """Close idle connections: the least valuable one for a tenant with less than its part, else only spare ones."""
        most = self.idle + self._coming_free
        wanted = self._wanted_in_all(most) - self._coming_free
        if wanted <= 0:
            return
        unit = self._unit_with_idle(now)
        due = min(wanted, self._due(unit, most) - self._coming_free)
        while wanted > 0 and self._idle_shares:
            if due > 0:
                self._make_room()
            elif not self._make_room(lambda share: self._is_spare(share, unit, now)):
                return
            due -= 1
            wanted -= 1

    def _wanted_in_all(self, most: int) -> int:
        """How many slots the waiters could use, up to ``most``: counting hundreds of tenants takes time."""
        wanted = 0
        for share in self._waiting:
            if wanted >= most:
                break
            wanted += self._wanted(share)
        return wanted

    def _unit_with_idle(self, now: float) -> float:
        """How many slots there are for weight 1, where tenants that have used theirs lately count as those that wait.

        Those that wait have a quarter of the slots in any case: idle connections are not worth all.
        """
        waiting = self._waiting
        lately = {share.account for share in self._idle_shares if share.idle[-1][0] > now - KEEP_SECONDS}
        lately |= self._deprived.keys()
        weight, held = waiting.weight, waiting.held
        for account in lately:
            if not account.queues:
                weight += account.weight
                held += account.busy
        unit = (self.limit - self._busy + held) / weight if weight else 0.0
        return max(unit, self.limit / 4 / waiting.weight) if waiting.weight else unit

    def _deprive(self, account: Account, *, since: float) -> None:
        """Record that a tenant loses its last connection, which it has not used ``since`` then."""
        now = self._now()
        if since <= now - KEEP_SECONDS:
            return
        self._deprived.pop(account, None)
        self._deprived[account] = now
        if len(self._deprived) > self.limit:
            del self._deprived[next(iter(self._deprived))]

    def _keeps_free_slots(self, now: float) -> bool:
        """Whether what is free is kept for tenants that have lost their last connection, from those with their parts.

        A quarter of the slots at most is kept, and for ``KEEP_SECONDS``. Otherwise a tenant that saturates would get
        one slot after the other, whenever a tenant for which one is made free is served in another way.
        """
        while self._deprived:
            account, since = next(iter(self._deprived.items()))
            if since > now - KEEP_SECONDS:
                break
            del self._deprived[account]
        return bool(self._deprived) and self.limit - self.open <= min(len(self._deprived), self.limit // 4)

    def _due(self, unit: float, most: int) -> int:
        """How many slots the waiters want within their parts, up to ``most``."""
        due = 0
        wanted: dict[Account, int] = {}
        for share in self._waiting:
            if due >= most:
                break
            account = share.account
            before = wanted.get(account, 0)
            after = wanted[account] = before + self._wanted(share)
            part = max(0, int(max(1.0, unit * account.weight)) - account.busy)
            due += min(after, part) - min(before, part)
        return due

    def _is_spare(self, share: Share[T], unit: float, now: float) -> bool:
        """Whether an idle connection may be closed for a tenant that has its part, or more."""
        account = share.account
        return share.idle[0][0] <= now - KEEP_SECONDS or account.open - account.closing > max(
            1.0, unit * account.weight
        )

    def _make_room_of_own(self, share: Share[T]) -> None:
        """Close idle connections in a tenant's other pools, since it may have no more slots for this one."""
        account = share.account
        wanted = self._waiting.length(share) - account.closing
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
        return min(self._waiting.length(share), share.account.room)

    def _serves_own(self, share: Share[T], now: float) -> bool:
        """Whether a connection that this share returns serves its own waiter, or is closed to serve another's.

        Another pool of the same tenant needs no further slot. But it needs a login, so that does not happen again and
        again between two that have some.
        """
        waiting, account = self._waiting, share.account
        other = waiting.first(now, limit=self.limit, busy=self._busy, returning=account)
        waiting.advance(account, other, now)
        if other is not None and not waiting.keeps(account, other, now, limit=self.limit, busy=self._busy):
            # or the slots that are free or being freed are enough for the others
            return sum(self._wanted(one) for one in waiting if one is not share) <= self._coming_free
        if account.queues == 1:
            return True

        def key(one: Share[T]) -> tuple[int, bool]:
            held = one.busy - (one is share)
            return (held, one is not share and held > 0)

        fairest = min((one for one in waiting if one.account is account), key=key)
        return fairest is share or account.closing > 0

    def _take_oldest(self, share: Share[T]) -> T:
        _, item = share.idle.pop(0)
        if not share.idle:
            del self._idle_shares[share]
        self.idle -= 1
        share.account.idle -= 1
        share.account.seconds -= self._now()
        share.busy += 1
        if share.account.queues:
            self._waiting.held += 1
        return item

    def _make_room(self, admits: Callable[[Share[T]], bool] | None = None) -> bool:
        """Close the least valuable connection, of the shares that ``admits`` admits; False if there is none."""
        found = self._idle_shares if admits is None else filter(admits, self._idle_shares)
        share = min(found, key=lambda share: share.score - math.log2(len(share.idle) + share.busy), default=None)
        if share is None:
            return False
        self.evictions += 1
        if share.account.open - share.account.closing == 1:
            self._deprive(share.account, since=share.idle[0][0])
        self._evict(share, self._take_oldest(share))
        return True


__all__ = [
    "HALF_LIFE",
    "KEEP_SECONDS",
    "Account",
    "Budget",
    "BudgetStatistics",
    "Share",
    "Waiter",
    "Waiting",
    "WaitingFor",
]
