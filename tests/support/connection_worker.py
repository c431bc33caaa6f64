"""A process that uses connections of tenants, in competition with others like it.

Run as ``python -m tests.support.connection_worker SETTINGS``, JSON as ``worker`` writes it. It obeys one command a
line, and answers each with a line of JSON: ``busy COUNT SECONDS`` keeps so many sessions at work, ``idle`` ends them,
``report`` says what the process has, ``forget`` what it had counted so far too, ``quit`` closes it.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from sqlalchemy import text

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.config import PoolConfig
from tests.support.models import Base


class Worker:
    """One such process, from the outside."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.pid = process.pid

    async def ask(self, *words: object) -> dict[str, Any]:
        """Send a command, and return the answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{' '.join(map(str, words))}\n".encode())
        line = await asyncio.wait_for(self._process.stdout.readline(), 60)
        assert line, "the worker has ended"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    async def end(self) -> None:
        """End it if it still runs."""
        if self._process.returncode is None:
            self._process.send_signal(signal.SIGCONT)
            self._process.kill()
        await self._process.wait()


@asynccontextmanager
async def worker(config: TenancyConfig, server_url: str, slugs: list[str], **changes: Any) -> AsyncIterator[Worker]:
    """Start a process, and end it after the body."""
    settings = {
        "control_url": config.control_url,
        "server_url": server_url,
        "encryption_keys": dict(config.encryption_keys or {}),
        "name_prefix": config.name_prefix,
        "slugs": slugs,
        **changes,
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.support.connection_worker",
        json.dumps(settings, default=str),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONFAULTHANDLER": "1"},
    )
    started = Worker(process)
    try:
        yield started
    finally:
        await started.end()


async def work(tenancy: Tenancy, slug: str, seconds: float, done: Counter[str]) -> None:
    """Use one connection after the other."""
    while True:
        try:
            async with tenancy.session(slug) as session:
                await session.execute(text("SELECT pg_sleep(:seconds)"), {"seconds": seconds})
            done["done"] += 1
        except Exception as exc:  # noqa: BLE001 - counted
            done[type(exc).__name__] += 1
            await asyncio.sleep(0.05)


async def main(settings: dict[str, Any]) -> None:
    """Obey commands until told to quit."""
    config = TenancyConfig(
        control_url=settings["control_url"],
        servers={"default": settings["server_url"]},
        metadata=Base.metadata,
        encryption_keys=settings["encryption_keys"],
        name_prefix=settings["name_prefix"],
        # a machine under load serves them late
        pool=PoolConfig(checkout_timeout=60),
    )
    tasks: list[asyncio.Task[None]] = []
    done = Counter[str]()
    async with Tenancy(config) as tenancy:
        while words := (await asyncio.to_thread(sys.stdin.readline)).split():
            match words:
                case ["busy", count, seconds]:
                    slugs = settings["slugs"]
                    for number in range(int(count)):
                        made = work(tenancy, slugs[number % len(slugs)], float(seconds), done)
                        tasks.append(asyncio.create_task(made))
                case ["idle"]:
                    for task in tasks:
                        task.cancel()
                    await asyncio.gather(*tasks, return_exceptions=True)
                    tasks.clear()
                case ["quit"]:
                    break
            counted = tenancy.internals.router.statistics().servers["default"]
            lease = tenancy.internals.leases.lease("default")
            answer = {name: getattr(counted, name) for name in counted.__slots__}
            answer |= {"tag": lease.tag, "is_cut_off": lease.is_cut_off, "done": dict(done)}
            print(json.dumps(answer), flush=True)
            if words == ["forget"]:
                done.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    print("{}", flush=True)


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1])))
