"""What a frozen server costs the tenants of another one.

Run by ``make bench ARGS='-k faults'``.
"""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import suppress

from sqlalchemy import text

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.errors import ServerUnavailableError, TenancyError
from tests.support.outages import frozen
from tests.support.postgres import Postgres
from tests.support.replication import primary_server

PHASE_SECONDS = float(os.environ.get("BENCH_SECONDS", "8"))
RATE = 100.0


async def test_bench_faults(tenancy_config: TenancyConfig, postgres: Postgres) -> None:
    """The p99 of one server's tenant, and how soon the others are refused, before and while their server is frozen."""
    with primary_server() as other:
        config = tenancy_config.replace(
            servers={"default": postgres.admin_url, "other": other.url()}, default_server="default"
        )
        async with Tenancy(config) as tenancy:
            await tenancy.tenants.create("acme", server="default")
            for number in range(5):
                await tenancy.tenants.create(f"eve-{number}", server="other")

            async def ask(slug: str, seconds: list[float], refused: list[float]) -> None:
                began = time.perf_counter()
                try:
                    async with tenancy.session(slug) as session:
                        await session.execute(text("SELECT 1"))
                except ServerUnavailableError as exc:
                    if exc.retry_after is not None:
                        refused.append(time.perf_counter() - began)
                except (TenancyError, OSError):
                    pass
                else:
                    seconds.append(time.perf_counter() - began)

            async def phase(what: str) -> float:
                """Offer requests at a rate, for one tenant of each server, whatever becomes of those before."""
                mine: list[float] = []
                others: list[float] = []
                refused: list[float] = []
                begun = set()
                ends = time.perf_counter() + PHASE_SECONDS
                number = 0
                while time.perf_counter() < ends:
                    number += 1
                    begun.add(asyncio.create_task(ask("acme", mine, [])))
                    begun.add(asyncio.create_task(ask(f"eve-{number % 5}", others, refused)))
                    await asyncio.sleep(1 / RATE)
                _, pending = await asyncio.wait(begun, timeout=1.0)
                for task in pending:
                    task.cancel()
                    with suppress(asyncio.CancelledError):
                        await task
                p99 = sorted(mine)[int(0.99 * len(mine))]
                print(
                    f"{what}: neighbour p50 {sorted(mine)[len(mine) // 2] * 1e3:.1f} ms, p99 {p99 * 1e3:.1f} ms, "
                    f"{len(mine)} answered; own tenants: {len(others)} answered, {len(refused)} refused at once"
                    + (f", in {sorted(refused)[len(refused) // 2] * 1e3:.2f} ms" if refused else "")
                    + f", {len(pending)} waiting"
                )
                return p99

            print()
            await phase("warm")
            before = await phase("both servers up")
            with frozen(other):
                during = max([await phase("one frozen"), await phase("one frozen, later")])
            print(f"p99 of the neighbour: {during / before:.2f} times")
