"""Several workers, killed and stopped: each job is done by one of them at a time, and is taken over."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest

from tenancy_orm import Tenancy
from tests.support.postgres import Postgres
from tests.support.shell import ROOT, environment
from tests.support.waiting import until
from tests.support.warm import Program, start_module
from tests.support.worker_process import TABLES, config_of, register

pytestmark = pytest.mark.new_installation

SECONDS = 60.0

# pairs of turns that were under way at the same time, by what they have written
OVERLAPS = """
WITH spans AS (SELECT turn, min(at) AS began, max(at) AS ended FROM public.ticks GROUP BY turn)
SELECT count(*) FROM spans AS a JOIN spans AS b ON a.turn < b.turn AND a.ended > b.began
"""


class Workers:
    """Processes that do one job, and what they have written about it."""

    def __init__(self, task: dict[str, Any], connection: Any) -> None:
        self.task = task
        self.sql = connection
        self.processes: dict[int, Program] = {}

    async def start(self, count: int, *, ticks: int, stop_seconds: float = 20.0) -> None:
        for _ in range(count):
            child = await start_module("tests.support.worker_process", cwd=ROOT, env=environment())
            child.stdin.write(json.dumps({**self.task, "ticks": ticks, "stop_seconds": stop_seconds}).encode())
            child.stdin.close()
            self.processes[child.pid] = child

    async def at_work(self, *, but: int = 0) -> int:
        """The process that does the job, once one does and has written something."""
        found: list[int] = []

        async def one() -> bool:
            query = "SELECT pid FROM public.ticks WHERE pid <> $1 AND at > clock_timestamp() - interval '0.2 s' LIMIT 1"
            found[:] = [row["pid"] for row in await self.sql.fetch(query, but)]
            return bool(found)

        await until(one, seconds=SECONDS)
        return found[0]

    async def ended(self, pid: int) -> int:
        async with asyncio.timeout(SECONDS):
            return await self.processes[pid].wait()


@pytest.fixture
async def workers(postgres: Postgres, control_url: str, name_prefix: str) -> AsyncIterator[Workers]:
    """None yet; those that are started are killed at the end."""
    task = {"control_url": control_url, "admin_url": postgres.admin_url, "name_prefix": name_prefix}
    tenancy = Tenancy(config_of(task))
    await tenancy.open(initialise=True)
    await tenancy.close()
    connection = await asyncpg.connect(control_url)
    await connection.execute(TABLES)
    started = Workers(task, connection)
    try:
        yield started
    finally:
        for child in started.processes.values():
            child.send_signal(signal.SIGCONT)
            child.kill()
            await child.wait()
        await connection.close()


async def test_without_claims_three_processes_do_a_job_three_times(workers: Workers) -> None:
    """What claims are for: the same function, called by each of three processes, runs three times at once."""

    async def work() -> None:
        tenancy = Tenancy(config_of(workers.task))
        register(tenancy, workers.task["control_url"], 20)
        await tenancy._jobs[0].run()

    await asyncio.gather(work(), work(), work())
    assert await workers.sql.fetchval(OVERLAPS) == 3


async def test_a_killed_workers_job_is_taken_over_by_one_other(workers: Workers) -> None:
    """Of three workers one is killed in the middle: another goes on once its claim has run out, never two at once."""
    await workers.start(3, ticks=40)
    victim = await workers.at_work()
    workers.processes[victim].kill()
    assert await workers.ended(victim) == -signal.SIGKILL
    heir = await workers.at_work(but=victim)
    await until(
        lambda: workers.sql.fetchval("SELECT count(*) > 2 FROM public.turns WHERE ended AND pid <> $1", victim),
        seconds=SECONDS,
    )
    assert await workers.sql.fetchval(OVERLAPS) == 0
    unfinished = await workers.sql.fetch("SELECT pid FROM public.turns WHERE NOT ended ORDER BY id LIMIT 1")
    assert (unfinished[0]["pid"], heir != victim) == (victim, True)


async def test_a_stopped_worker_gives_its_job_up(workers: Workers) -> None:
    """One that was stopped for longer than its claim holds ends its turn when it goes on, and records nothing."""
    await workers.start(2, ticks=400)
    victim = await workers.at_work()
    workers.processes[victim].send_signal(signal.SIGSTOP)
    turn = await workers.sql.fetchval("SELECT max(id) FROM public.turns WHERE pid = $1", victim)
    heir = await workers.at_work(but=victim)
    assert heir != victim
    before = await workers.sql.fetchval("SELECT count(*) FROM public.ticks WHERE turn = $1", turn)
    claim = await workers.sql.fetchval("SELECT claim FROM tenancy.jobs WHERE name = 'turn'")
    workers.processes[victim].send_signal(signal.SIGCONT)

    async def is_over() -> bool:
        found = await workers.sql.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'INSERT INTO public.ticks%'"
        )
        return bool(found == 1)  # the heir's

    await until(is_over, seconds=SECONDS)
    after = await workers.sql.fetchval("SELECT count(*) FROM public.ticks WHERE turn = $1", turn)
    # what was on its way when it was stopped, and at most one more before it looks at its claim
    assert after - before <= 2
    assert not await workers.sql.fetchval("SELECT ended FROM public.turns WHERE id = $1", turn)
    assert await workers.sql.fetchval("SELECT claim FROM tenancy.jobs WHERE name = 'turn'") == claim


async def test_sigterm_lets_a_job_finish_and_hands_over_what_does_not(workers: Workers) -> None:
    """A short job ends before the process does; a long one is cancelled, and due at once for the next worker."""
    await workers.start(1, ticks=20)
    first = await workers.at_work()
    workers.processes[first].terminate()
    assert await workers.ended(first) == 0
    assert await workers.sql.fetchval("SELECT bool_and(ended) FROM public.turns")

    await workers.start(1, ticks=100_000, stop_seconds=0.2)
    second = await workers.at_work(but=first)
    workers.processes[second].terminate()
    assert await workers.ended(second) == 0
    row = await workers.sql.fetchrow("SELECT claim, due_at <= now() AS is_due, failures FROM tenancy.jobs")
    assert tuple(row) == (None, True, 0)
