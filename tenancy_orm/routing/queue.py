"""Who waits for a connection to one server, in which order they are served, and how long that takes at least.

A tenant with less than its *part* of the slots goes before one with its part or more. The parts are what the tenants
that do not wait leave, divided by the weights of their tiers, and at least one slot.

Otherwise the order is fair by connection time: a tenant's *virtual time* is the seconds for which it has had
connections, divided by its weight, and the waiting tenant with the least is served first. A tenant that begins to wait
starts at the virtual time of those that are being served, so that it has no credit for having been idle; and it is
never more than ``MOST_DEBT`` ahead, so that what it has used is forgotten.

Within a tenant, requests are served in order.

State only, like the budget.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Generic, Literal, NamedTuple, TypeVar

from .shares import Account, Share, Waiter

T = TypeVar("T")

MOST_DEBT: Final = 1.0
"""How far a tenant's virtual time may be ahead, in seconds of one connection at weight 1."""

_LOGIN_SECONDS = 0.005  # until one was measured
_LONGEST_LOGIN_SECONDS = 0.05  # what a login counts at most
_REMEMBERED = 128  # services, for an estimate
_LEAST_ROUNDS = 8  # for an estimate
_LEAST_RETRY_SECONDS, _MOST_RETRY_SECONDS = 1.0, 60.0

Reason = Literal["deadline", "queue"]


class Entry(NamedTuple, Generic[T]):
    """A waiter, since when it waits, and until when it would (seconds of the budget's clock)."""

    waiter: Waiter[T | None]
    since: float
    deadline: float


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request is refused without waiting: it would wait for ``seconds`` or longer, or the queue is full."""

    reason: Reason
    seconds: float
    retry_after: float
    left: float  # seconds until its deadline


class Turn(NamedTuple, Generic[T]):
    """The waiting share to serve next, whether its tenant has its part of the slots, and its virtual time."""

    share: Share[T]
    is_over: bool
    time: float


class Queue(Generic[T]):
    """The waiters of one budget."""

    def __init__(self) -> None:
        # in the order of their turns: a share joins at the end, and moves there again when it was served
        self._entries: dict[Share[T], deque[Entry[T]]] = {}
        self.weight = 0.0  # of the tenants that wait
        self.held = 0  # by them: the connections that are being opened, reset or in use
        self.waited = 0  # requests that were served so far
        self.waited_seconds = 0.0  # for how long they had waited
        self.login_seconds = _LOGIN_SECONDS
        self._time = 0.0  # the virtual time of the server
        self._served: deque[tuple[float, int]] = deque(maxlen=_REMEMBERED)

    def __bool__(self) -> bool:
        return bool(self._entries)

    def __len__(self) -> int:
        return sum(map(len, list(self._entries.values())))  # any thread may ask

    def __iter__(self) -> Iterator[Share[T]]:
        return iter(self._entries)

    def __contains__(self, share: Share[T]) -> bool:
        return share in self._entries

    def of(self, account: Account) -> list[Share[T]]:
        """The shares of a tenant that wait."""
        return [share for share in self._entries if share.account is account]

    def length(self, share: Share[T]) -> int:
        """How many requests of a share wait."""
        return len(self._entries.get(share, ()))

    def since(self, share: Share[T]) -> float:
        """Since when a share's first request waits."""
        return min(entry.since for entry in self._entries[share])

    # --- joining and leaving ----------------------------------------------------------------------------------------

    def add(self, share: Share[T], entry: Entry[T], *, first: bool = False) -> None:
        """Add a waiter behind the others of its share; ``first`` is in front of them."""
        queue = self._entries.get(share)
        if queue is None:
            queue = self._entries[share] = deque()
            self._join(share.account, entry.since)
        share.account.queued += 1
        if first:
            queue.appendleft(entry)
        else:
            queue.append(entry)

    def remove(self, share: Share[T], waiter: Waiter[T | None]) -> None:
        """Remove a waiter, if it waits."""
        queue = self._entries.get(share)
        if queue is None:
            return
        for position, entry in enumerate(queue):
            if entry.waiter is waiter:
                del queue[position]
                share.account.queued -= 1
                break
        if not queue:
            self._leave(share)

    def pop(self, share: Share[T], now: float, *, busy: int) -> Waiter[T | None] | None:
        """Take the first waiter of a share that still waits: a cancelled one may still be in the queue.

        Args:
            share: The share.
            now: The time.
            busy: How many connections its tenant has then, this one included.
        """
        queue = self._entries[share]
        account = share.account
        found = None
        while queue and found is None:
            waiter, since, _ = queue.popleft()
            account.queued -= 1
            if not waiter.done():
                found = waiter
                self.waited += 1
                self.waited_seconds += now - since
        if found is not None:
            self._served.append((now, 0))
            if account.served is None:
                account.served = deque(maxlen=_REMEMBERED)
            account.served.append((now, busy))
        # served in turn: it moves to the end
        del self._entries[share]
        self._entries[share] = queue
        if not queue:
            self._leave(share)
        return found

    def dismiss(self) -> list[tuple[Share[T], Waiter[T | None]]]:
        """Remove, and return, everybody who waits."""
        found = []
        for share, queue in list(self._entries.items()):
            found += [(share, entry.waiter) for entry in queue if not entry.waiter.done()]
            share.account.queued -= len(queue)
            queue.clear()
            self._leave(share)
        return found

    def reweigh(self, account: Account, weight: float, now: float) -> None:
        """Give a tenant another weight; its virtual time stays."""
        time = account.used(now) / account.weight
        if account.queues:
            self.weight += weight - account.weight
        account.weight = weight
        self._set_time(account, time, now)

    def forgive(self, account: Account, now: float) -> None:
        """Forget what a tenant has used too much, now that it returns a connection."""
        if account.used(now) / account.weight > self._time + MOST_DEBT:
            self._set_time(account, self._time + MOST_DEBT, now)

    def advance(self, account: Account, other: Turn[T] | None, now: float) -> None:
        """Record that one of two tenants is served, or the first one alone: who comes next has no credit against it."""
        time = account.used(now) / account.weight
        self._time = max(self._time, time if other is None else min(time, other.time))

    def _join(self, account: Account, now: float) -> None:
        account.queues += 1
        if account.queues == 1:
            self.weight += account.weight
            self.held += account.busy
            time = account.used(now) / account.weight
            self._set_time(account, min(max(time, self._time), self._time + MOST_DEBT), now)

    def _leave(self, share: Share[T]) -> None:
        del self._entries[share]
        account = share.account
        account.queues -= 1
        if not account.queues:
            account.served = None
            self.weight -= account.weight
            self.held -= account.busy
        if not self._entries:
            self.weight = 0.0  # without what adding and subtracting has left
            self._served.clear()

    def _set_time(self, account: Account, time: float, now: float) -> None:
        account.seconds = time * account.weight - account.busy * now

    # --- the order --------------------------------------------------------------------------------------------------

    def first(
        self, now: float, *, limit: int, busy: int, most: float | None = None, returning: Account | None = None
    ) -> Turn[T] | None:
        """Return who is served next, of those that may have a further slot.

        Args:
            now: The time.
            limit: How many slots there are.
            busy: How many of them are busy.
            most: How many a tenant of weight 1 may have, beyond its first one; None is any number.
            returning: The tenant that returns a connection, which is left out: ``keeps`` compares it.
        """
        found: Turn[T] | None = None
        holders: list[tuple[Share[T], int]] = []
        for share in self._entries:
            account = share.account
            if account is returning or not account.room:
                continue
            own = account.open - account.idle - account.closing
            if own:
                holders.append((share, own))
                continue
            time = account.seconds / account.weight
            if found is None or time < found.time:
                found = Turn(share, False, time)
        unit = self._unit(limit, busy)
        for share, own in holders:
            account = share.account
            if most is not None and own + 1 > max(1.0, most * account.weight):
                continue
            turn = Turn(share, own + 1 > max(1.0, unit * account.weight), account.used(now) / account.weight)
            if found is None or (turn.is_over, turn.time) < (found.is_over, found.time):
                found = turn
        if found is not None and found.time > self._time and returning is None:
            self._time = found.time
        return found

    def keeps(self, account: Account, other: Turn[T], now: float, *, limit: int, busy: int) -> bool:
        """Whether a waiting tenant that returns a connection gets it again, before the other tenant.

        It does as long as it has no more than its part. Where there are more tenants than slots they take turns; and
        since another tenant needs a login, it keeps the slot for as long as one takes.
        """
        part = self._unit(limit, busy) * account.weight
        own = account.busy - 1
        if own + 1 <= part:
            return True
        is_over = own + 1 > max(1.0, part)
        if is_over and not other.is_over:
            return False
        return account.used(now) / account.weight < other.time + self.login_seconds / account.weight

    def _unit(self, limit: int, busy: int) -> float:
        """How many slots there are for weight 1, of those that tenants which do not wait leave."""
        return (limit - busy + self.held) / self.weight if self.weight else 0.0

    def measure_login(self, seconds: float) -> None:
        """Record how long opening a connection took."""
        self.login_seconds += (min(seconds, _LONGEST_LOGIN_SECONDS) - self.login_seconds) / 8

    # --- who cannot be served in time ---------------------------------------------------------------------------------

    def refusal(
        self, account: Account, *, ahead: int, now: float, deadline: float, limit: int, busy: int
    ) -> Refusal | None:
        """Return why a request cannot be served before its deadline; None if it may be.

        Args:
            account: Its tenant.
            ahead: How many requests of its tenant are served before.
            now: The time.
            deadline: Until when it would wait.
            limit: How many slots there are.
            busy: How many of them are busy.
        """
        if now >= deadline:
            return Refusal("deadline", 0.0, _LEAST_RETRY_SECONDS, 0.0)
        seconds = self._least_wait(account, ahead, limit)
        if seconds <= deadline - now and len(self._entries) > limit:
            seconds = max(seconds, self._least_wait_of_turn(account, now, limit, busy, deadline - now))
        if seconds <= deadline - now:
            return None
        retry_after = min(max(seconds - (deadline - now), _LEAST_RETRY_SECONDS), _MOST_RETRY_SECONDS)
        return Refusal("deadline", seconds, retry_after, deadline - now)

    def _least_wait(self, account: Account, ahead: int, limit: int) -> float:
        """How long a request waits for those of its own tenant at least, if that tenant gets all slots it may have."""
        rounds = ahead // max(1, min(account.limit, limit))
        if not rounds or account.served is None:
            return 0.0
        slots = min(busy for _, busy in account.served)
        return rounds * (_round_seconds(account.served, max(1, slots)) or 0.0)

    def _least_wait_of_turn(self, account: Account, now: float, limit: int, busy: int, enough: float) -> float:
        """How long a tenant without a connection waits for its turn at least: one request of each tenant before it.

        Or 0, where that is ``enough`` or less.
        """
        if account.busy:
            return 0.0
        seconds = _round_seconds(self._served, max(1, busy)) or 0.0
        if seconds * (len(self._entries) // max(1, limit)) <= enough:
            return 0.0
        time = account.used(now) / account.weight
        before = 0
        for share in self._entries:
            other = share.account
            if other is account:
                break
            before += not other.busy and other.seconds / other.weight <= time
        return before // max(1, limit) * seconds

    def hopeless(self, now: float, *, limit: int) -> list[tuple[Share[T], Waiter[T | None], Refusal]]:
        """Remove, and return, the last waiters of each tenant that cannot be served before their deadlines."""
        found = []
        for share in list(self._entries):
            queue, account = self._entries[share], share.account
            while len(queue) > min(account.limit, limit):
                waiter, _, deadline = queue[-1]
                refusal = None
                if not waiter.done() and now < deadline:  # else it is about to withdraw
                    refusal = self.refusal(
                        account, ahead=account.queued - 1, now=now, deadline=deadline, limit=limit, busy=limit
                    )
                    if refusal is None:
                        break
                queue.pop()
                account.queued -= 1
                if refusal is not None:
                    found.append((share, waiter, refusal))
        return found


def _round_seconds(served: deque[tuple[float, int]], slots: int) -> float | None:
    """How long it takes until each of these slots has served one request more; None if that is not known.

    It is the lower quartile of recent rounds: a slow request delays one round for each slot, and so does not count.
    """
    times = [time for time, _ in served]
    rounds = sorted(later - earlier for earlier, later in zip(times, times[slots:], strict=False))
    return rounds[len(rounds) // 4] if len(rounds) >= _LEAST_ROUNDS else None


__all__ = ["MOST_DEBT", "Entry", "Queue", "Refusal", "Turn"]
