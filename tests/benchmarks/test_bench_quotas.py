"""Quotas: counting exactly and leased, against the bare UPDATE; holds, and the request rate.

Run by ``make bench ARGS='-k quotas'``. Every ratio is of two things measured in the same run.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import asyncpg

from tenancy_orm.config import Limit, Tier
from tenancy_orm.errors import QuotaExceededError
from tenancy_orm.quotas.rates import Rates
from tests.benchmarks.test_bench_session import report, turns
from tests.support.quotas import line, quota_plane, say, start_worker

TIERS = {
    "free": Tier(
        "free",
        {"calls": Limit(10**12, "day"), "few": Limit(1), "jobs": Limit(5, "concurrent"), "race": Limit(2_000)},
        requests_per_second=10**9,
    )
}


async def per_await(call: Callable[[], Awaitable[object]], *, count: int, rounds: int = 3) -> float:
    """Seconds of one awaited call: the best of some rounds."""
    best = float("inf")
    for _ in range(rounds):
        started = time.perf_counter()
        for _ in range(count):
            await call()
        best = min(best, time.perf_counter() - started)
    return best / count


def per_call(call: Callable[[], object], *, count: int = 100_000, rounds: int = 5) -> float:
    """Seconds of one call: the best of some rounds."""
    best = float("inf")
    for _ in range(rounds):
        started = time.perf_counter()
        for _ in range(count):
            call()
        best = min(best, time.perf_counter() - started)
    return best / count


async def test_bench_consume(control_url: str) -> None:
    """Exact is one statement; leased is a subtraction."""
    async with quota_plane(control_url, tiers=TIERS) as plane:
        tenant = await plane.tenant()
        async with _bare_update(control_url) as update:
            plain, exact = await turns(update, lambda: plane.quotas.consume(tenant, "calls"), count=1_000)
        bare = plain.typical
        keyed = await per_await(lambda: plane.quotas.consume(tenant, "calls", key=str(time.time_ns())), count=300)
        await plane.quotas.consume(tenant, "few")

        async def refused() -> None:
            with contextlib.suppress(QuotaExceededError):
                await plane.quotas.consume(tenant, "few")

        over = await per_await(refused, count=300)
        share = plane.quotas.leased(tenant, "calls", block=10_000)
        leased = await per_await(share.consume, count=100_000)
        looked_up = await per_await(lambda: plane.quotas.leased(tenant, "calls").consume(), count=100_000)
        small = plane.quotas.leased((await plane.tenant("globex")).id, "calls", block=100)
        hundred = await per_await(small.consume, count=10_000)

        async def hold() -> None:
            async with plane.quotas.hold(tenant, "jobs"):
                pass

        held = await per_await(hold, count=200)
        rates = Rates(plane.config.tiers)
        rate = per_call(lambda: rates.acquire(tenant)) - per_call(lambda: None)
    report("consume, exact, against the bare UPDATE, prepared (goal: at most 1.5)", plain, exact)
    print()
    print(f"consume, exact, idempotency key              {keyed * 1e6:9.2f} us   {keyed / bare:.1f} x")
    print(f"consume, refused at the limit                {over * 1e6:9.2f} us   {over / bare:.1f} x")
    print(f"consume, leased, blocks of 10,000            {leased * 1e6:9.2f} us   goal: under 5 us")
    print(f"consume, leased, looked up each time         {looked_up * 1e6:9.2f} us")
    print(f"consume, leased, blocks of 100               {hundred * 1e6:9.2f} us   a hundredth of the question with it")
    print(f"hold and let go                              {held * 1e6:9.2f} us")
    print(f"request rate (acquire)                       {rate * 1e6:9.2f} us")


async def test_bench_consume_by_four_processes(control_url: str) -> None:
    """One row, four processes: calls per second, exact and leased, up to the limit."""
    async with quota_plane(control_url, tiers=TIERS) as plane:
        for mode, slug, arguments in (("consume", "acme", ()), ("lease", "globex", (100,))):
            tenant = await plane.tenant(slug)
            workers = [await start_worker(mode, control_url, tenant.id, "race", *arguments) for _ in range(4)]
            assert [await line(worker) for worker in workers] == ["ready"] * 4
            started = time.perf_counter()
            for worker in workers:
                await say(worker)
            done = sum([int(await line(worker, timeout=300)) for worker in workers])
            seconds = time.perf_counter() - started
            for worker in workers:
                await worker.wait()
            print(f"\n{mode:8} by 4 processes: {done} of 2000 in {seconds:.2f} s, {done / seconds:,.0f} a second")


@contextlib.asynccontextmanager
async def _bare_update(url: str) -> AsyncIterator[Callable[[], Awaitable[object]]]:
    connection = await asyncpg.connect(url)
    try:
        await connection.execute("CREATE TABLE counter (id int PRIMARY KEY, used bigint) WITH (fillfactor = 50)")
        await connection.execute("INSERT INTO counter VALUES (1, 0)")
        query = await connection.prepare(
            "UPDATE counter SET used = used + 1 WHERE id = $1 AND used < $2 RETURNING used"
        )
        yield lambda: query.fetchval(1, 10**12)
    finally:
        await connection.close()
