"""What a tenant that saturates its server costs its neighbours, by the order in which waiters are served.

Run by ``make bench ARGS='-k fairness'``. The first benchmark simulates a server on the budget's own code, so that the
orders are compared with the same requests; the second is on PostgreSQL.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable
from typing import Any

from sqlalchemy import text

from tenancy_orm.routing import Router
from tenancy_orm.routing.budget import Budget
from tenancy_orm.routing.queue import Queue
from tenancy_orm.tenant import Tenant
from tests.support import databases as support
from tests.support.contention import FewestInUse, FirstCome, Load, Simulation, Unprotected
from tests.support.postgres import Postgres

ORDERS: dict[str, tuple[type[Budget[Any]], Callable[[], Queue[Any]]]] = {
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
    for count, rate in ((10, 20.0), (15, 10.0), (30, 5.0)):
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


# --- on PostgreSQL --------------------------------------------------------------------------------------------------

SLOTS, NEIGHBOURS, RATE, SECONDS = 12, 8, 5.0, float(os.environ.get("BENCH_SECONDS", "4"))


async def _neighbour(router: Router, tenant: Tenant, seed: int, waits: list[float]) -> None:
    """Send requests at random times, and measure each from when it was due."""
    chance, loop = random.Random(seed), asyncio.get_running_loop()
    due, end, tasks = loop.time(), loop.time() + SECONDS, []

    async def request(due: float) -> None:
        async with router.session(tenant) as session:
            await session.scalar(text("SELECT 1"))
        waits.append(loop.time() - due)

    while (due := due + chance.expovariate(RATE)) < end:
        await asyncio.sleep(max(0.0, due - loop.time()))
        tasks.append(asyncio.create_task(request(due)))
    await asyncio.gather(*tasks)


async def _measure(router: Router, loud: Tenant, quiet: list[Tenant], clients: int) -> tuple[list[float], int]:
    """The neighbours' waits, and how many requests the one that saturates has made."""
    waits: list[float] = []
    done = 0

    async def client() -> None:
        nonlocal done
        while True:
            async with router.session(loud) as session:
                await session.execute(text("SELECT pg_sleep(0.05)"))
            done += 1

    for tenant in quiet:
        async with router.session(tenant) as session:
            await session.scalar(text("SELECT 1"))
    crowd = [asyncio.create_task(client()) for _ in range(clients)]
    await asyncio.gather(*(_neighbour(router, tenant, number, waits) for number, tenant in enumerate(quiet)))
    for task in crowd:
        task.cancel()
    await asyncio.gather(*crowd, return_exceptions=True)
    return waits, done


async def test_bench_fairness(postgres: Postgres, name_prefix: str) -> None:
    """The neighbours' p99 alone, beside a tenant with 200 clients, and the same without fairness."""
    config = support.configuration(postgres, name_prefix).replace(
        pool={"max_connections": SLOTS, "max_connections_per_tenant": SLOTS, "checkout_timeout": 60.0}
    )
    print(
        f"\nfairness on PostgreSQL, {SLOTS} connections, {NEIGHBOURS} neighbours with {RATE:g} requests/s each, beside "
        "a tenant with requests of 50 ms and any number of connections:"
    )
    async with support.databases(postgres, config) as made:
        loud, *quiet = await made.create_many(NEIGHBOURS + 1)
        for what, clients, order in (
            ("neighbours alone", 0, "fair"),
            ("beside 200 clients", 200, "fair"),
            ("... fewest in use", 200, "fewest in use"),
            ("... first come, first served", 200, "first come"),
        ):
            async with support.router(made, config) as router:
                await _measure(router, loud, quiet[:1], 0)
                budget = router._connectors["default"].budget
                kind, queue = ORDERS[order]
                budget.__class__, budget._waiting = kind, queue()
                waits, done = await _measure(router, loud, quiet, clients)
                print(
                    f"  {what:30} p50 {quantile(waits, 0.5):.1f} ms, p99 {quantile(waits, 0.99):.1f} ms; "
                    f"its own {done / SECONDS:.0f}/s"
                )
