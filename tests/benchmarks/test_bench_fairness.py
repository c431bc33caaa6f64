"""What a tenant that saturates its server costs its neighbours, by the order in which waiters are served.

Run by ``make bench ARGS='-k fairness'``. The first benchmark simulates a server on the budget's own code, so that the
orders are compared with the same requests; the second is on PostgreSQL.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from tenancy_orm.routing.budget import Budget
from tenancy_orm.routing.queue import Queue, Turn
from tenancy_orm.routing.shares import Account, Share

LOGIN, CLOSE = 0.004, 0.001  # seconds


class FewestInUse(Queue[str]):
    """Serves the tenant with the fewest connections in use, whatever its weight, and for however long it had them."""

    def first(self, now: float, *, limit: int, busy: int, returning: Account | None = None) -> Turn[str] | None:
        able = (share for share in self if share.account.room and share.account is not returning)
        share = min(able, key=lambda share: share.busy, default=None)
        return None if share is None else Turn(share, False, 0.0)

    def keeps(self, account: Account, other: Turn[str], now: float, *, limit: int, busy: int) -> bool:
        return account.busy - 1 < other.share.busy


class FirstCome(Queue[str]):
    """Serves who waits longest, whichever tenant's it is: no fairness."""

    def first(self, now: float, *, limit: int, busy: int, returning: Account | None = None) -> Turn[str] | None:
        able = (share for share in self if share.account.room and share.account is not returning)
        share = min(able, key=self.since, default=None)
        return None if share is None else Turn(share, False, self.since(share))

    def keeps(self, account: Account, other: Turn[str], now: float, *, limit: int, busy: int) -> bool:
        return min(self.since(share) for share in self if share.account is account) <= other.time


class Unprotected(Budget[str]):
    """Closes any idle connection for any waiter."""

    def _due(self, unit: float) -> int:
        return sum(map(self._wanted, self._waiting))

    def _is_kept_from(self, account: Account, now: float) -> bool:
        return False


@dataclass
class Load:
    """One tenant: how many of its requests come per second, how long each keeps a connection, and its weight.

    ``clients`` instead of ``rate``: so many send the next request as soon as they have an answer.
    """

    seconds: float
    rate: float = 0.0
    clients: int = 0
    weight: float = 1.0
    waits: list[float] = field(default_factory=list)
    used: float = 0.0


class Simulation:
    """A server with ``slots`` slots, and requests that come as the loads say."""

    def __init__(
        self,
        loads: list[Load],
        *,
        slots: int,
        per_tenant: int,
        make: type[Budget[str]],
        queue: Callable[[], Queue[str]],
        begin: float = 0.0,
    ) -> None:
        self.now = 0.0
        self.begin = begin  # of the clients, and of what is measured
        self.chance = random.Random(1)
        self.events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self.order = itertools.count()
        self.budget = make(slots, per_tenant, self.evict, clock=lambda: self.now)
        self.budget._waiting = queue()
        self.loads = loads
        self.shares = [self.budget.share(UUID(int=number), weight=load.weight) for number, load in enumerate(loads)]

    def at(self, delay: float, call: Callable[..., None], *args: Any) -> None:
        heapq.heappush(self.events, (self.now + delay, next(self.order), call, args))

    def evict(self, share: Share[str], item: str) -> None:
        self.budget.discard(share)
        self.at(CLOSE, self.budget.closed, share)

    def run(self, seconds: float) -> None:
        for number, load in enumerate(self.loads):
            for _ in range(load.clients):
                self.at(self.begin + self.chance.random() * 0.01, self.ask, number)
            if load.rate:
                self.at(self.chance.expovariate(load.rate), self.arrive, number)
        self.at(0.1, self.look)
        while self.events[0][0] < seconds:
            self.now, _, call, args = heapq.heappop(self.events)
            call(*args)

    def look(self) -> None:
        self.budget.look()
        self.at(0.1, self.look)

    def arrive(self, number: int) -> None:
        self.at(self.chance.expovariate(self.loads[number].rate), self.arrive, number)
        self.ask(number)

    def ask(self, number: int) -> None:
        share, budget, asked = self.shares[number], self.budget, self.now
        budget.touch(share)
        if budget.take(share, self.now) is not None:
            self.use(number, asked)
        elif budget.reserve(share):
            self.at(LOGIN, self.opened, number, asked)
        else:
            budget.wait(share, _Arrival(self, number, asked))

    def opened(self, number: int, asked: float) -> None:
        self.budget.opened()
        self.use(number, asked)

    def use(self, number: int, asked: float) -> None:
        load = self.loads[number]
        seconds = self.chance.expovariate(1 / load.seconds)
        load.used += seconds
        self.at(seconds, self.give_back, number, asked)

    def give_back(self, number: int, asked: float) -> None:
        load = self.loads[number]
        if self.now >= self.begin:
            load.waits.append(self.now - asked)
        self.budget.put(self.shares[number], "c", self.now)
        if load.clients:
            self.ask(number)


class _Arrival:
    def __init__(self, simulation: Simulation, number: int, asked: float) -> None:
        self.simulation, self.number, self.asked = simulation, number, asked

    def done(self) -> bool:
        return False

    def set_result(self, item: str | None, /) -> None:
        if item is None:
            self.simulation.at(LOGIN, self.simulation.opened, self.number, self.asked)
        else:
            self.simulation.use(self.number, self.asked)


ORDERS: dict[str, tuple[type[Budget[str]], Callable[[], Queue[str]]]] = {
    "first come, first served": (Unprotected, FirstCome),
    "fewest in use": (Unprotected, FewestInUse),
    "fair": (Budget, Queue),
}


def quantile(values: list[float], part: float) -> float:
    return sorted(values)[int(len(values) * part)] * 1_000


def neighbours(count: int, rate: float) -> list[Load]:
    return [Load(0.002, rate=rate) for _ in range(count)]


def test_bench_fairness_simulated() -> None:
    """The neighbours' p99 where one tenant, or several, saturate 20 slots, and the shares of two that do."""
    cases: dict[str, tuple[list[Load], int]] = {
        "nobody": ([], 20),
        "200 clients of 10 ms, at most 5": ([Load(0.010, clients=200)], 5),
        "200 clients of 10 ms, any number": ([Load(0.010, clients=200)], 20),
        "200 clients of 1 s, any number": ([Load(1.0, clients=200)], 20),
        "5 with 50 clients of 50 ms, at most 5": ([Load(0.050, clients=50) for _ in range(5)], 5),
    }
    for count, rate in ((10, 20.0), (30, 5.0)):
        print(f"\n{count} neighbours with {rate:g} requests/s of 2 ms on 20 slots: p99 in ms, requests/s of the others")
        for what, (saturating, most) in cases.items():
            line = f"  {what:40}"
            for name, (make, queue) in ORDERS.items():
                quiet = neighbours(count, rate)
                loud = [Load(one.seconds, clients=one.clients) for one in saturating]
                Simulation(quiet + loud, slots=20, per_tenant=most, make=make, queue=queue, begin=5.0).run(20.0)
                waits = [wait for load in quiet for wait in load.waits]
                done = sum(len(load.waits) for load in loud) / 15
                line += f" | {name}: {quantile(waits, 0.5):.1f} {quantile(waits, 0.99):.0f} ms, {done:.0f}/s"
            print(line)
    print("connection time of tenants with 20 clients each on 4 slots, by weight and length of a request")
    for loads in (
        [Load(0.5, clients=20), Load(0.005, clients=20)],
        [Load(0.5, clients=20)] + [Load(0.005, clients=20) for _ in range(7)],
        [Load(0.02, clients=20, weight=weight) for weight in (1, 1, 2, 4)],
        [Load(0.02, clients=20, weight=weight) for weight in (1, 1, 1, 1, 1, 1, 2, 4)],
        [Load(0.02, clients=1, weight=weight) for weight in (1, 1, 1, 1, 1, 1, 2, 4)],
    ):
        for name, (make, queue) in ORDERS.items():
            for load in loads:
                load.used, load.waits = 0.0, []
            Simulation(loads, slots=4, per_tenant=4, make=make, queue=queue).run(60.0)
            total = sum(load.used for load in loads)
            parts = " ".join(f"{load.used / total:.0%}" for load in loads)
            print(f"  {name:25} {parts}  ({sum(len(load.waits) for load in loads) / 60:.0f}/s)")
