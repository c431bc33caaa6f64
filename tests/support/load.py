"""Open-loop load on many tenants' databases, from several processes, and a sampler of the server's sessions.

``python -m tests.support.load work ORDER`` prints "ready", reads the time to begin from its standard input, sends each
request when it is due, whether or not those before are answered, and prints the latencies. ``sample URL`` counts the
sessions of tenants until its standard input ends, and prints the most.
"""

from __future__ import annotations

import asyncio
import bisect
import itertools
import json
import random
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
from sqlalchemy import NullPool, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from tenancy_orm import Tenancy, TenancyConfig
from tests.support.models import Base

SAMPLE_SECONDS = 0.01
_SESSIONS = "SELECT count(*) FROM pg_stat_activity WHERE usename ~ '_t_[0-9a-f]{32}$'"
_QUERY = text("SELECT body FROM notes ORDER BY id LIMIT 1")

Ask = Callable[[int], Awaitable[Any]]


def schedule(
    shape: str, *, tenants: int, databases: int, rate: float, seconds: float, seed: int
) -> list[tuple[float, int]]:
    """When requests are due, in seconds from the beginning, and the number of the database that each asks.

    Args:
        shape: ``zipf-0.9`` and the like; ``scan``: zipf(1.1) and beside it every database in turn; ``burst``: zipf(1.1)
            with five times the rate in the middle fifth.
        tenants: How many tenants the requests are drawn from, the most popular first.
        databases: How many databases there are. Tenants share them: rank modulo ``databases``.
        rate: Requests a second.
        seconds: For how long.
        seed: Of the random numbers.
    """
    chance = random.Random(seed)
    exponent = float(shape.partition("-")[2] or 1.1)
    totals = list(itertools.accumulate(1 / (rank + 1) ** exponent for rank in range(tenants)))
    due: list[tuple[float, int]] = []
    at, scanned = 0.0, itertools.count(seed)
    while True:
        now = rate * 5 if shape == "burst" and 0.4 <= at / seconds < 0.6 else rate
        at += chance.expovariate(now)
        if at >= seconds:
            return due
        if shape == "scan" and chance.random() < 0.3:
            due.append((at, next(scanned) % databases))
        else:
            due.append((at, bisect.bisect(totals, chance.random() * totals[-1]) % databases))


@asynccontextmanager
async def contender(order: dict[str, Any]) -> AsyncIterator[Ask]:
    """What answers a request for the database of a number."""
    logins = order["logins"]
    if order["contender"] == "package":
        config = TenancyConfig.from_env(metadata=Base.metadata)
        async with Tenancy(config) as tenancy:

            async def ask(number: int) -> Any:
                async with tenancy.session(logins[number]["slug"]) as session:
                    return await session.scalar(_QUERY)

            yield ask
        return
    engines: dict[int, AsyncEngine] = {}
    pooled = order["contender"] == "pgbouncer"

    def engine_of(number: int) -> AsyncEngine:
        if number not in engines:
            login = logins[number]
            url: URL = make_url(order["address"]).set(
                drivername="postgresql+asyncpg",
                username=login["role"],
                password=login["password"],
                database=login["database"],
            )
            caches = {"statement_cache_size": 0, "prepared_statement_cache_size": 0} if pooled else {}
            kind: dict[str, Any] = {"poolclass": NullPool}
            if order["contender"] == "unlimited":
                kind = {"pool_size": 20, "max_overflow": -1}
            engines[number] = create_async_engine(url, connect_args=caches, **kind)
        return engines[number]

    async def ask_plainly(number: int) -> Any:
        async with AsyncSession(engine_of(number)) as session:
            return await session.scalar(_QUERY)

    yield ask_plainly
    await asyncio.gather(*(engine.dispose() for engine in engines.values()))


async def work(order: dict[str, Any]) -> None:
    """Send the requests of one process, and print how late each was answered and what failed."""
    due = schedule(**order["schedule"])
    latencies: list[float] = []
    failures: list[str] = []
    async with contender(order) as ask:
        for number in range(min(3, len(order["logins"]))):
            await ask(number)
        print("ready", flush=True)
        begin = float(await asyncio.to_thread(sys.stdin.readline))

        async def one(at: float, number: int) -> None:
            try:
                await ask(number)
            except Exception as exc:  # noqa: BLE001 - it is what the benchmark counts
                failures.append(type(exc).__name__)
            else:
                latencies.append(time.monotonic() - begin - at)

        async with asyncio.TaskGroup() as group:
            for at, number in due:
                wait = begin + at - time.monotonic()
                if wait > 0:
                    await asyncio.sleep(wait)
                group.create_task(one(at, number))
        print(json.dumps({"latencies": latencies, "failures": failures}), flush=True)


async def sample(url: str) -> None:
    """Print the most sessions of tenants that the server had at once."""
    connection = await asyncpg.connect(url)
    most, ended = 0, asyncio.create_task(asyncio.to_thread(sys.stdin.read))
    print("ready", flush=True)
    while not ended.done():
        most = max(most, await connection.fetchval(_SESSIONS))
        await asyncio.sleep(SAMPLE_SECONDS)
    print(json.dumps(most), flush=True)
    await connection.close()


if __name__ == "__main__":
    if sys.argv[1] == "work":
        asyncio.run(work(json.loads(Path(sys.argv[2]).read_text("utf-8"))))
    else:
        asyncio.run(sample(sys.argv[2]))
