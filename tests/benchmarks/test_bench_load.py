"""Many tenants on few connections: open-loop load from several processes, by contender and shape.

Latency is counted from when a request was due, so that a request that waits behind others counts as well. Run by
``make bench ARGS='-k load'``; at full size with
``TENANCY_TEST_CONNECTIONS=1700 BENCH_LOAD_DATABASES=300 BENCH_LOAD_SECONDS=30 BENCH_LOAD_RATE=160``. The contenders
without a cap then find as many connections as they open. With the databases, which are in memory, they take some
gigabytes.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tenancy_orm import Tenancy
from tests.support.pgbouncer import pgbouncer
from tests.support.postgres import Postgres
from tests.support.served import variables
from tests.support.shell import ROOT, environment

DATABASES = int(os.environ.get("BENCH_LOAD_DATABASES", "24"))
TENANTS = int(os.environ.get("BENCH_LOAD_TENANTS", "5000"))
CONNECTIONS = int(os.environ.get("BENCH_LOAD_CONNECTIONS", "50"))
PROCESSES = int(os.environ.get("BENCH_LOAD_PROCESSES", "4"))
SECONDS = float(os.environ.get("BENCH_LOAD_SECONDS", "4"))
RATE = float(os.environ.get("BENCH_LOAD_RATE", "80"))  # of all processes together
SHAPES = os.environ.get("BENCH_LOAD_SHAPES", "zipf-0.9 zipf-1.1 zipf-1.3 scan burst").split()
CONTENDERS = os.environ.get("BENCH_LOAD_CONTENDERS", "package unlimited nullpool pgbouncer").split()


def percentile(sorted_values: list[float], fraction: float) -> float:
    return sorted_values[min(len(sorted_values) - 1, int(len(sorted_values) * fraction))] if sorted_values else 0.0


class Load:
    """Runs one contender on one shape.

    Args:
        tenancy: Has the tenants.
        postgres: Their server.
        directory: For orders.
        logins: Slug, role, password and database of each tenant.
    """

    def __init__(self, tenancy: Tenancy, postgres: Postgres, directory: Path, logins: list[dict[str, str]]) -> None:
        self.postgres = postgres
        self.directory = directory
        self.logins = logins
        self.sampler = 0  # the process id of the one that runs
        self.env = environment(**variables(tenancy.config))

    async def run(self, contender: str, shape: str, address: str) -> tuple[list[float], list[str], int]:
        """Return the latencies in order, what failed, and the most sessions that the server had."""
        orders = []
        for number in range(PROCESSES):
            orders.append(self.directory / f"{contender}-{shape}-{number}.json")
            orders[-1].write_text(json.dumps(self._order(contender, shape, address, number)))
        started: list[asyncio.subprocess.Process] = []
        try:
            arguments = [("sample", self.postgres.admin_url), *(("work", str(order)) for order in orders)]
            await asyncio.gather(*(self._start(started, *given) for given in arguments))
            sampler = next(process for process in started if process.pid == self.sampler)
            workers = [process for process in started if process is not sampler]
            begin = f"{time.monotonic() + 0.5}\n".encode()
            answers = await asyncio.gather(*(worker.communicate(begin) for worker in workers))
            peak = int(json.loads((await sampler.communicate(b""))[0]))
        finally:
            for process in started:
                if process.returncode is None:
                    process.kill()
                    await process.wait()
        done: list[dict[str, Any]] = [json.loads(out) for out, _ in answers]
        latencies = sorted(latency for one in done for latency in one["latencies"])
        return latencies, [failure for one in done for failure in one["failures"]], peak

    def _order(self, contender: str, shape: str, address: str, number: int) -> dict[str, Any]:
        return {
            "contender": contender,
            "address": address,
            "logins": self.logins,
            "schedule": {
                "shape": shape,
                "tenants": TENANTS,
                "databases": len(self.logins),
                "rate": RATE / PROCESSES,
                "seconds": SECONDS,
                "seed": number,
            },
        }

    async def _start(self, started: list[asyncio.subprocess.Process], *arguments: str) -> None:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-W", "ignore", "-m", "tests.support.load", *arguments),
            cwd=ROOT,
            env=self.env,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=1 << 26,
        )
        started.append(process)
        if arguments[0] == "sample":
            self.sampler = process.pid
        assert process.stdout is not None
        assert await process.stdout.readline() == b"ready\n", arguments


async def _create(tenancy: Tenancy, slug: str, at_once: asyncio.Semaphore) -> dict[str, str]:
    """Make a tenant with one row; returns its slug, role, password and database."""
    async with at_once:
        tenant = (await tenancy.tenants.create(slug, tier="enterprise")).tenant
        await tenancy.execute("INSERT INTO notes (body) VALUES ('one row')", tenant=tenant)
        tenancy.internals.router.retire(tenant.id)
    placement = tenant.placement
    assert placement is not None
    password = tenancy.internals.provisioner.password(tenant)
    return {"slug": slug, "role": placement.role, "password": password, "database": placement.database}


@pytest.mark.timeout(0)
async def test_bench_load(tenancy: Tenancy, postgres: Postgres, tmp_path: Path) -> None:
    """A table: for each shape and contender p50 and p99 in ms, what failed, and the most connections at once."""
    began, at_once = time.monotonic(), asyncio.Semaphore(4)
    logins = await asyncio.gather(*(_create(tenancy, f"load-{number}", at_once) for number in range(DATABASES)))
    # all processes together
    await tenancy.servers.update("default", max_connections=CONNECTIONS)
    load = Load(tenancy, postgres, tmp_path, logins)
    print(
        f"\n{TENANTS} tenants on {DATABASES} real databases, {PROCESSES} processes, {RATE:g} requests a second for "
        f"{SECONDS:g} s; the package has {CONNECTIONS} connections; made in {time.monotonic() - began:.0f} s\n"
        f"{'shape':10}{'contender':12}{'done':>7}{'failed':>8}{'p50 ms':>9}{'p99 ms':>9}{'max ms':>9}{'most':>6}"
    )
    for shape in SHAPES:
        for contender in CONTENDERS:
            with ExitStack() as stack:
                address = postgres.admin_url
                if contender == "pgbouncer":
                    # one of its own, so that the next contender does not count what it leaves open
                    options = {"default_pool_size": "5", "server_idle_timeout": "30", "max_client_conn": "2000"}
                    address = stack.enter_context(pgbouncer(postgres, **options)).address
                latencies, failures, peak = await load.run(contender, shape, address)
            p50, p99 = (percentile(latencies, fraction) * 1e3 for fraction in (0.5, 0.99))
            print(
                f"{shape:10}{contender:12}{len(latencies):7}{len(failures):8}{p50:9.1f}{p99:9.1f}"
                f"{percentile(latencies, 1.0) * 1e3:9.1f}{peak:6}  {' '.join(sorted(set(failures)))}",
                flush=True,
            )
            if contender == "package":
                assert peak <= CONNECTIONS, peak
