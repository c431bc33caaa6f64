"""What a tenant that saturates its server costs its neighbours, by the order in which waiters are served.

Run by ``make bench ARGS='-k fairness'``. The first benchmark simulates a server on the budget's own code, so that the
orders are compared with the same requests; the second is on PostgreSQL.
"""

from __future__ import annotations

from collections.abc import Callable

from tenancy_orm.routing.budget import Budget
from tenancy_orm.routing.queue import Queue, Turn
from tenancy_orm.routing.shares import Account
from tests.support.contention import Load, Simulation


class FewestInUse(Queue[str]):
    """Serves the tenant with the fewest connections in use, whatever its weight, and for however long it had them."""

    def first(
        self, now: float, *, limit: int, busy: int, most: float | None = None, returning: Account | None = None
    ) -> Turn[str] | None:
        able = (share for share in self if share.account.room and share.account is not returning)
        share = min(able, key=lambda share: share.busy, default=None)
        return None if share is None else Turn(share, False, 0.0)

    def keeps(self, account: Account, other: Turn[str], now: float, *, limit: int, busy: int) -> bool:
        return account.busy - 1 < other.share.busy


class FirstCome(Queue[str]):
    """Serves who waits longest, whichever tenant's it is: no fairness."""

    def first(
        self, now: float, *, limit: int, busy: int, most: float | None = None, returning: Account | None = None
    ) -> Turn[str] | None:
        able = (share for share in self if share.account.room and share.account is not returning)
        share = min(able, key=self.since, default=None)
        return None if share is None else Turn(share, False, self.since(share))

    def keeps(self, account: Account, other: Turn[str], now: float, *, limit: int, busy: int) -> bool:
        return min(self.since(share) for share in self if share.account is account) <= other.time


class Unprotected(Budget[str]):
    """Closes any idle connection for any waiter."""

    def _due(self, unit: float) -> int:
        return sum(map(self._wanted, self._waiting))

    def _keeps_free_slots(self, now: float) -> bool:
        return False


ORDERS: dict[str, tuple[type[Budget[str]], Callable[[], Queue[str]]]] = {
    "first come": (Unprotected, FirstCome),
    "fewest in use": (Unprotected, FewestInUse),
    "fair": (Budget, Queue),
}


def quantile(values: list[float], part: float) -> float:
    """In milliseconds."""
    return sorted(values)[int(len(values) * part)] * 1_000


def test_bench_fairness_simulated() -> None:
    """The neighbours' p99 where one tenant, or several, saturate 20 slots, and the shares of two that do."""
    cases: dict[str, Callable[[], list[Load]]] = {
        "nobody": list,
        "200 clients of 10 ms, at most 5": lambda: [Load(0.010, clients=200, most=5)],
        "200 clients of 10 ms, any number": lambda: [Load(0.010, clients=200)],
        "200 clients of 1 s, any number": lambda: [Load(1.0, clients=200)],
        "5 with 50 clients of 50 ms, at most 5": lambda: [Load(0.050, clients=50, most=5) for _ in range(5)],
    }
    for count, rate in ((10, 20.0), (30, 5.0)):
        print(
            f"\nfairness, simulated: {count} neighbours with {rate:g} requests/s of 2 ms on 20 slots, beside tenants "
            "that saturate: p99 of the neighbours, requests/s of the others"
        )
        for what, saturating in cases.items():
            line = f"  {what:40}"
            for name, (make, queue) in ORDERS.items():
                quiet, loud = [Load(0.002, rate=rate) for _ in range(count)], saturating()
                Simulation(quiet + loud, slots=20, make=make, queue=queue, begin=5.0).run(15.0)
                waits = [wait for load in quiet for wait in load.waits]
                done = sum(len(load.waits) for load in loud) / 10
                line += f" | {name} {quantile(waits, 0.99):.0f} ms, {done:.0f}/s"
            print(line)
    print("connection time of tenants with 20 clients each on 4 slots, by seconds of a request and weight")
    for given in (
        [(0.5, 1.0), (0.005, 1.0)],
        [(0.5, 1.0)] + [(0.005, 1.0)] * 7,
        [(0.02, 1.0), (0.02, 1.0), (0.02, 2.0), (0.02, 4.0)],
        [(0.02, 1.0)] * 6 + [(0.02, 2.0), (0.02, 4.0)],
    ):
        print(f"  {' '.join(f'{seconds:g}x{weight:g}' for seconds, weight in given)}")
        for name, (make, queue) in ORDERS.items():
            loads = [Load(seconds, clients=20, weight=weight) for seconds, weight in given]
            Simulation(loads, slots=4, make=make, queue=queue).run(30.0)
            total = sum(load.used for load in loads)
            parts = " ".join(f"{load.used / total:.0%}" for load in loads)
            print(f"    {name:15} {parts} ({sum(len(load.waits) for load in loads) / 30:.0f}/s)")
