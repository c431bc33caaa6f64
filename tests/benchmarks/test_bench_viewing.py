"""Reading the control database for one tenant, under row-level security, against reading it as the application.

Run by ``make bench ARGS='-k viewing'``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from functools import partial

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from tests.support.quotas import quota_plane

_COUNT = text("SELECT count(*) FROM tenancy.tenants WHERE slug LIKE 't%'")


async def test_bench_viewing(control_url: str) -> None:
    """A transaction that takes on the viewer's role and back, and the policies in its query."""
    async with quota_plane(control_url) as plane:
        tenants = [await plane.tenant(f"t{number}") for number in range(200)]
        control = plane.control

        async def best(reading: Callable[[], AbstractAsyncContextManager[AsyncConnection]], expected: int) -> float:
            fastest = float("inf")
            for _ in range(5):
                started = time.perf_counter()
                for _ in range(100):
                    async with reading() as connection:
                        assert await connection.scalar(_COUNT) == expected
                fastest = min(fastest, time.perf_counter() - started)
            return fastest / 100

        single = await best(partial(control.connect), 200)
        plain = await best(partial(control.transaction), 200)
        viewed = await best(partial(control.viewing, tenants[0].id), 1)
    print(f"\none statement, AUTOCOMMIT (connect)   {single * 1e6:7.0f} us")
    print(f"one statement in a transaction        {plain * 1e6:7.0f} us")
    print(f"the same for one tenant (viewing)     {viewed * 1e6:7.0f} us   {viewed / plain:.2f} x a transaction")
