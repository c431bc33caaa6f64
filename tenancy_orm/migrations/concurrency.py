"""Calling a function for many tenants, several at once."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from itertools import zip_longest
from typing import TypeVar

from ..tenant import Tenant, placement_of

T = TypeVar("T")


def interleave(tenants: list[Tenant]) -> list[Tenant]:
    """Order tenants so that those of different servers alternate: a slow server does not delay all the others."""
    by_server: dict[str, list[Tenant]] = {}
    for tenant in tenants:
        by_server.setdefault(placement_of(tenant).server, []).append(tenant)
    return [tenant for turn in zip_longest(*by_server.values()) for tenant in turn if tenant is not None]


async def map_concurrently(
    function: Callable[[Tenant], Awaitable[T]],
    tenants: Sequence[Tenant],
    concurrency: int,
    *,
    proceed: Callable[[], bool] = lambda: True,
) -> list[T]:
    """Call ``function`` for each tenant, ``concurrency`` at once, each in a task and context of its own.

    Returns the results in order. Once ``proceed`` returns False no other tenant is started; these have no result.
    """
    queue = deque(enumerate(tenants))
    results: dict[int, T] = {}

    async def call(tenant: Tenant) -> T:
        return await function(tenant)

    async def work() -> None:
        while queue and proceed():
            index, tenant = queue.popleft()
            results[index] = await asyncio.create_task(call(tenant), name=f"tenancy-migrate-{tenant.slug}")

    workers = [asyncio.create_task(work()) for _ in range(min(concurrency, len(queue)))]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            # a second cancellation would interrupt the clean-up that the first one has started
            if not worker.cancelling():
                worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
    return [results[index] for index in sorted(results)]
