"""Ten thousand cancellations at random points: no foreign answer, no connection lost, nothing left checked out."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from contextlib import suppress

from sqlalchemy import text

from tenancy_orm import Tenancy
from tests.support.waiting import until

CANCELLATIONS = 10_000
TASKS = 120

BOTH = "SELECT current_database()::text, CAST(:number AS int)"


async def test_ten_thousand_cancellations_leave_nothing_behind(tenancy: Tenancy) -> None:
    """Of sessions, read-only ones, single reads and writes, amid what they await. Each tenant answers afterwards."""
    slugs = [f"t{number}" for number in range(6)]
    databases = {}
    for slug in slugs:
        placement = (await tenancy.tenants.create(slug)).tenant.placement
        assert placement is not None
        databases[slug] = placement.database
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    outcomes: Counter[str] = Counter()
    written: set[int] = set()
    loop = asyncio.get_running_loop()

    async def session(slug: str, number: int, read_only: bool) -> None:
        async with tenancy.session(slug, read_only=read_only) as opened:
            row = (await opened.execute(text(BOTH), {"number": number})).one()
            assert tuple(row) == (databases[slug], number)
            assert await opened.scalar(text("SELECT CAST(:number AS int)"), {"number": -number}) == -number

    async def reading(slug: str, number: int) -> None:
        assert await tenancy.fetch_value("SELECT CAST(:number AS int)", {"number": number}, tenant=slug) == number
        row = await tenancy.fetch_one(BOTH, {"number": number}, tenant=slug)
        assert row is not None and tuple(row) == (databases[slug], number)

    async def writing(slug: str, number: int) -> None:
        async with tenancy.transaction(slug) as opened:
            await opened.execute(text("INSERT INTO notes (body) VALUES (:body)"), {"body": str(number)})
        written.add(number)

    async def request(slug: str, number: int) -> None:
        kind = number % 4
        if kind == 0:
            await writing(slug, number)
        elif kind == 1:
            await reading(slug, number)
        else:
            await session(slug, number, read_only=kind == 2)

    async def attempt(number: int) -> None:
        task = loop.create_task(request(chance.choice(slugs), number))
        # by turns of the loop, so that every await of a request is met, and by time, for those of the server
        if chance.random() < 0.7:
            for _ in range(chance.randrange(60)):
                await asyncio.sleep(0)
        else:
            await asyncio.sleep(chance.random() * 0.05)
        if chance.random() < 0.97:
            task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        outcomes["cancelled" if task.cancelled() else "ended"] += 1

    numbers = iter(range(1, 1 << 30))

    async def worker() -> None:
        while outcomes["cancelled"] < CANCELLATIONS:
            await attempt(next(numbers))

    async with asyncio.TaskGroup() as group:
        for _ in range(TASKS):
            group.create_task(worker())
    print(outcomes)
    router = tenancy.internals.router

    def at_rest() -> bool:
        counts = router.statistics().servers["default"]
        return (counts.in_use, counts.opening, counts.closing, counts.waiting) == (0, 0, 0, 0)

    await until(at_rest)
    assert router.statistics().leased == 0
    for slug in slugs:
        await reading(slug, 1)
        found = Counter(body for (body,) in await tenancy.fetch_all("SELECT body FROM notes", tenant=slug))
        assert max(found.values(), default=1) == 1
        written -= set(map(int, found))
    assert not written, "a write that was acknowledged is lost"
    assert not tenancy.internals.servers["default"].breaker.is_open
