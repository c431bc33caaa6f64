"""The cap of a server holds for all processes together, whatever happens to one of them."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import asyncpg
import pytest
from sqlalchemy import text

from tenancy_orm import Tenancy
from tenancy_orm.config import TenancyConfig
from tests.support.connection_worker import Worker, worker
from tests.support.postgres import Postgres
from tests.support.proxy import proxied
from tests.support.waiting import until

CAP = 24
TENANTS = 8
LONG = 120.0


class Sampler:
    """How many connections tenants' roles have, every 10 ms: in all, and by process.

    Attributes:
        resumed: Tags of processes that were stopped: a login that was under way then may complete when they go on, and
            its connection is closed at once.
    """

    def __init__(self) -> None:
        self.now: dict[str, int] = {}
        self.worst: dict[str, int] = {}
        self.resumed: set[str] = set()

    @property
    def total(self) -> int:
        return sum(self.now.values())

    @property
    def most(self) -> int:
        return sum(self.worst.values())

    async def run(self, connection: Any, prefix: str) -> None:
        query = (
            "SELECT pid, backend_start, coalesce(substring(application_name from '/([0-9a-f]{12})$'), '') AS tag "
            "FROM pg_stat_activity WHERE starts_with(usename, $1)"
        )
        while True:
            found = await connection.fetch(query, prefix)
            if len(found) > CAP:
                # The server does not read all at one instant, so that one that ended and one that began after it may
                # both be there: what was there at one instant is in the next look as well.
                again = set(await connection.fetch(query, prefix))
                found = [row for row in found if row in again]
            self.now = dict(Counter(row["tag"] for row in found))
            counted = {tag: number for tag, number in self.now.items() if tag not in self.resumed}
            if sum(counted.values()) > self.most:
                self.worst = counted
            await asyncio.sleep(0.01)


@asynccontextmanager
async def sampled(postgres: Postgres, prefix: str) -> AsyncIterator[Sampler]:
    connection = await asyncpg.connect(postgres.admin_url)
    sampler = Sampler()
    task = asyncio.create_task(sampler.run(connection, prefix))
    try:
        yield sampler
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await connection.close()


async def set_cap(tenancy: Tenancy, cap: int) -> None:
    async with tenancy.internals.control.transaction() as connection:
        await connection.execute(text("UPDATE tenancy.servers SET max_connections = :cap"), {"cap": cap})


@pytest.fixture
async def slugs(tenancy: Tenancy) -> list[str]:
    """Tenants of a tier that bounds none of them here."""
    await set_cap(tenancy, CAP)
    created = [await tenancy.tenants.create(f"t{number}", tier="enterprise") for number in range(TENANTS)]
    return [one.tenant.slug for one in created]


def has(one: Worker, condition: Callable[[dict[str, Any]], object]) -> Callable[[], Any]:
    async def check() -> object:
        return condition(await one.ask("report"))

    return check


@pytest.mark.timeout(300)
async def test_no_number_of_processes_passes_the_cap(
    tenancy: Tenancy, tenancy_config: TenancyConfig, postgres: Postgres, slugs: list[str]
) -> None:
    """Busy, killed, stopped or added: the connections are shared, all are used, and there is never one too many."""
    leases = tenancy.internals.leases
    async with AsyncExitStack() as stack:
        sampler = await stack.enter_async_context(sampled(postgres, tenancy_config.name_prefix))

        async def start() -> Worker:
            return await stack.enter_async_context(worker(tenancy_config, postgres.admin_url, slugs))

        workers = [await start() for _ in range(4)]
        await asyncio.gather(*(one.ask("report") for one in workers))
        one = workers[0]

        # one that is alone at work has all but what the idle ones keep: these, and the test's own process
        await one.ask("busy", 2 * CAP, 0.005)
        await until(has(one, lambda found: found["limit"] >= CAP - len(workers)), seconds=LONG)

        # all at work: each has its part, soon
        await asyncio.gather(*(other.ask("busy", 2 * CAP, 0.005) for other in workers[1:]))
        part = CAP // (len(workers) + 1)
        for other in workers:
            await until(has(other, lambda found: found["limit"] >= part and found["guaranteed"] == part), seconds=LONG)

        # an added one too
        added = await start()
        await added.ask("busy", CAP, 0.005)
        await until(has(added, lambda found: found["limit"] >= CAP // 6), seconds=LONG)
        await added.ask("quit")
        assert added.pid not in {row.pid for found in await leases.read() for row in found.leases}

        # what a killed one had is free again
        killed = workers.pop()
        killed.signal(signal.SIGKILL)
        await until(lambda: until_gone(tenancy, killed.pid), seconds=LONG)
        part = CAP // (len(workers) + 1)
        for other in workers:
            await until(has(other, lambda found: found["limit"] >= part), seconds=LONG)
        errors = [(await other.ask("report"))["done"] for other in workers]
        assert all(set(counted) == {"done"} for counted in errors), errors

        # ... and of one that is stopped: it holds its connections, which are ended before others get them
        stopped = workers.pop()
        before = (await stopped.ask("report"))["tag"]
        stopped.signal(signal.SIGSTOP)
        assert sampler.now[before] > 0
        await until(lambda: until_gone(tenancy, stopped.pid), seconds=LONG)
        assert before not in sampler.now
        await until(lambda: sampler.total >= CAP - 2, seconds=LONG)
        sampler.resumed.add(before)
        stopped.signal(signal.SIGCONT)
        await until(has(stopped, lambda found: found["tag"] != before and found["limit"] >= part), seconds=LONG)
        # what it had under way has failed, and nothing else does
        await stopped.ask("idle")
        await stopped.ask("forget")
        await stopped.ask("busy", 2 * CAP, 0.005)
        await until(has(stopped, lambda found: found["done"].get("done", 0) > 2 * CAP), seconds=LONG)
        assert (await stopped.ask("report"))["done"].keys() == {"done"}

        for other in (*workers, stopped):
            await other.ask("quit")
        assert sampler.most <= CAP, sampler.worst
        assert before not in sampler.now
    assert sampler.most >= CAP - 2
    assert [len(found.leases) for found in await leases.read()] == [1]


async def until_gone(tenancy: Tenancy, pid: int) -> bool:
    return pid not in {row.pid for found in await tenancy.internals.leases.read() for row in found.leases}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("how", ["refuse", "swallow"])
async def test_a_process_without_the_control_database_keeps_its_guaranteed_part(
    tenancy: Tenancy, tenancy_config: TenancyConfig, postgres: Postgres, slugs: list[str], how: str
) -> None:
    """It gives back what it has borrowed and serves on; others get that, and it borrows again once it is back."""
    async with (
        proxied(tenancy_config.control_url) as proxy,
        worker(tenancy_config, postgres.admin_url, slugs, control_url=proxy.url(tenancy_config.control_url)) as cut,
        worker(tenancy_config, postgres.admin_url, slugs) as other,
        sampled(postgres, tenancy_config.name_prefix) as sampler,
    ):
        await cut.ask("busy", 2 * CAP, 0.005)
        await until(has(cut, lambda found: found["limit"] >= CAP - 2), seconds=LONG)
        part = CAP // 3  # the third is the test's own process

        async def is_recorded() -> bool:
            # the others go by its row, which has the smaller part with the renewal after it has learnt of it
            [found] = await tenancy.internals.leases.read()
            return any(row.pid == cut.pid and row.guaranteed == part for row in found.leases)

        await until(is_recorded, seconds=LONG)
        getattr(proxy, how)()
        await until(has(cut, lambda found: found["is_cut_off"] and found["limit"] == part), seconds=LONG)
        await other.ask("busy", 2 * CAP, 0.005)
        await until(has(other, lambda found: found["limit"] >= CAP - part - 1), seconds=LONG)
        served = await cut.ask("forget")
        assert (served["limit"], served["done"].keys()) == (part, {"done"})
        await until(has(cut, lambda found: found["done"].get("done", 0) > 2 * CAP), seconds=LONG)
        await other.ask("idle")
        proxy.restore()
        await until(has(cut, lambda found: found["limit"] >= CAP - 2 and not found["is_cut_off"]), seconds=LONG)
        assert sampler.most <= CAP, sampler.worst
