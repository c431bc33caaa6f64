"""A server in simulated time: requests of tenants that compete for the slots of a real ``Budget``."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from tenancy_orm.routing.budget import Budget
from tenancy_orm.routing.queue import Queue, Refusal, Turn
from tenancy_orm.routing.shares import Account, Share

LOGIN_SECONDS, CLOSE_SECONDS = 0.004, 0.001


@dataclass
class Load:
    """One tenant: how many of its requests come per second, how long each keeps a connection, and its weight.

    ``clients`` instead of ``rate``: so many send the next request as soon as they have an answer. ``exact`` requests
    take ``seconds``, others that in the mean.
    """

    seconds: float
    rate: float = 0.0
    clients: int = 0
    weight: float = 1.0
    exact: bool = False
    most: int | None = None  # connections
    deadline: float = math.inf
    waits: list[float] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    used: float = 0.0


class Simulation:
    """A server with ``slots`` slots. The clients, and what is measured, begin at ``begin``."""

    def __init__(
        self,
        loads: list[Load],
        *,
        slots: int,
        make: type[Budget[Any]] = Budget,
        queue: Callable[[], Queue[Any]] = Queue,
        begin: float = 0.0,
        seed: int = 1,
    ) -> None:
        self.now = 0.0
        self.begin = begin
        self.chance = random.Random(seed)
        self.events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self.order = itertools.count()
        self.budget = make(slots, slots, self._evict, clock=lambda: self.now)
        self.budget._waiting = queue()
        self.loads = loads
        self.shares = [
            self.budget.share(UUID(int=number), weight=load.weight, limit=load.most)
            for number, load in enumerate(loads)
        ]

    def run(self, seconds: float) -> None:
        """Serve until then."""
        for number, load in enumerate(self.loads):
            for _ in range(load.clients):
                self._at(self.begin + self.chance.random() * 0.01, self.ask, number)
            if load.rate:
                self._at(self.chance.expovariate(load.rate), self._arrive, number)
        self._at(0.1, self._look)
        while self.events[0][0] < seconds:
            self.now, _, call, args = heapq.heappop(self.events)
            call(*args)

    def ask(self, number: int) -> None:
        """A request of a tenant comes."""
        share, budget, load = self.shares[number], self.budget, self.loads[number]
        budget.touch(share)
        if budget.take(share, self.now) is not None:
            self.use(number, self.now)
        elif budget.reserve(share):
            self._at(LOGIN_SECONDS, self._opened, number, self.now)
        else:
            request = _Request(self, number)
            if (refusal := budget.wait(share, request, deadline=self.now + load.deadline)) is not None:
                load.refusals.append(refusal)

    def use(self, number: int, asked: float) -> None:
        """A request has a connection."""
        load = self.loads[number]
        seconds = load.seconds if load.exact else self.chance.expovariate(1 / load.seconds)
        if self.now >= self.begin:
            load.waits.append(self.now - asked + seconds)
        self._at(seconds, self._give_back, number, seconds)

    def _give_back(self, number: int, seconds: float) -> None:
        load = self.loads[number]
        load.used += seconds
        self.budget.put(self.shares[number], "c", self.now)
        if load.clients:
            self.ask(number)

    def _opened(self, number: int, asked: float) -> None:
        self.budget.opened(LOGIN_SECONDS)
        self.use(number, asked)

    def _arrive(self, number: int) -> None:
        self._at(self.chance.expovariate(self.loads[number].rate), self._arrive, number)
        self.ask(number)

    def _look(self) -> None:
        for share, _, refusal in self.budget.look():
            self.loads[self.shares.index(share)].refusals.append(refusal)
        self._at(0.1, self._look)

    def _evict(self, share: Share[str], item: str) -> None:
        self.budget.discard(share)
        self._at(CLOSE_SECONDS, self.budget.closed, share)

    def _at(self, delay: float, call: Callable[..., None], *args: Any) -> None:
        heapq.heappush(self.events, (self.now + delay, next(self.order), call, args))


class _Request:
    """A waiter."""

    def __init__(self, simulation: Simulation, number: int) -> None:
        self._simulation = simulation
        self._number = number
        self._asked = simulation.now

    def done(self) -> bool:
        return False

    def set_result(self, item: str | None, /) -> None:
        simulation = self._simulation
        if item is None:
            simulation._at(LOGIN_SECONDS, simulation._opened, self._number, self._asked)
        else:
            simulation.use(self._number, self._asked)

    def set_exception(self, error: BaseException, /) -> None:
        raise AssertionError(error)


# --- without fairness -----------------------------------------------------------------------------------------------


class FewestInUse(Queue[Any]):
    """Serves the tenant with the fewest connections in use, whatever its weight, and for however long it had them."""

    def first(
        self, now: float, *, limit: int, busy: int, most: float | None = None, returning: Account | None = None
    ) -> Turn[Any] | None:
        able = (share for share in self if share.account.room and share.account is not returning)
        share = min(able, key=lambda share: share.busy, default=None)
        return None if share is None else Turn(share, False, 0.0)

    def keeps(self, account: Account, other: Turn[Any], now: float, *, limit: int, busy: int) -> bool:
        return account.busy - 1 < other.share.busy


class FirstCome(Queue[Any]):
    """Serves who waits longest, whichever tenant's it is: no fairness."""

    def first(
        self, now: float, *, limit: int, busy: int, most: float | None = None, returning: Account | None = None
    ) -> Turn[Any] | None:
        able = (share for share in self if share.account.room and share.account is not returning)
        share = min(able, key=self.since, default=None)
        return None if share is None else Turn(share, False, self.since(share))

    def keeps(self, account: Account, other: Turn[Any], now: float, *, limit: int, busy: int) -> bool:
        return min(self.since(share) for share in self if share.account is account) <= other.time


class Unprotected(Budget[Any]):
    """Closes any idle connection for any waiter."""

    def _due(self, unit: float, most: int) -> int:
        return sum(map(self._wanted, self._waiting))

    def _keeps_free_slots(self, now: float) -> bool:
        return False
