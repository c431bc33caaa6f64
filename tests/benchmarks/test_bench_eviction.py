"""Whose idle connection to close: the budget's choice against the least recently used, simulated on its own code.

Run by ``make bench ARGS='-k eviction'``.
"""

from __future__ import annotations

import bisect
import itertools
import random
from collections import OrderedDict
from uuid import UUID

from tenancy_orm.routing.budget import Budget, Share

TENANTS, SLOTS, REQUESTS = 300, 50, 60_000


def requests(seed: int, *, shift: int = 0) -> list[int]:
    """Tenants by zipf(1.1); every ``shift`` requests the popular ones are others."""
    chance = random.Random(seed)
    totals = list(itertools.accumulate(1 / (rank + 1) ** 1.1 for rank in range(TENANTS)))
    ranks = list(range(TENANTS))
    drawn = []
    for number in range(REQUESTS):
        if shift and number % shift == 0:
            chance.shuffle(ranks)
        drawn.append(ranks[bisect.bisect(totals, chance.random() * totals[-1])])
    return drawn


class _Cancelled:
    def done(self) -> bool:
        return True

    def set_result(self, item: object, /) -> None:
        raise AssertionError

    def set_exception(self, error: BaseException, /) -> None:
        raise AssertionError


def misses_of_the_budget(drawn: list[int]) -> float:
    closing: list[Share[str]] = []

    def evict(share: Share[str], item: str) -> None:
        budget.discard(share)
        closing.append(share)

    budget: Budget[str] = Budget(SLOTS, SLOTS, evict)
    shares = [budget.share(UUID(int=number)) for number in range(TENANTS)]
    missed = 0
    for number, tenant in enumerate(drawn):
        share = shares[tenant]
        budget.touch(share)
        if budget.take(share) is None:
            missed += number > len(drawn) // 5
            if not budget.reserve(share):
                waiter = _Cancelled()
                budget.wait(share, waiter)
                budget.withdraw(share, waiter)
                budget.closed(closing.pop())
                assert budget.reserve(share)
            budget.opened()
        budget.put(share, "connection", float(number))
    return missed / (len(drawn) * 0.8)


def misses_of_lru(drawn: list[int]) -> float:
    kept: OrderedDict[int, None] = OrderedDict()
    missed = 0
    for number, tenant in enumerate(drawn):
        if tenant not in kept:
            missed += number > len(drawn) // 5
            if len(kept) >= SLOTS:
                kept.popitem(last=False)
        kept[tenant] = None
        kept.move_to_end(tenant)
    return missed / (len(drawn) * 0.8)


def test_bench_eviction() -> None:
    """Misses, with the same tenants popular all along, and with others every 12,000 requests."""
    for what, drawn in (("steady", requests(1)), ("shifting", requests(1, shift=12_000))):
        print(
            f"\neviction, zipf(1.1), {TENANTS} tenants, {SLOTS} connections, {what}: least recently used misses "
            f"{misses_of_lru(drawn):.1%}, the budget {misses_of_the_budget(drawn):.1%}",
            end="",
        )
    print()
