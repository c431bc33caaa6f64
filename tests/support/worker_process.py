"""A worker with one job, which writes what it does into the control database: python -m tests.support.worker_process.

It reads its configuration as JSON from stdin. Claims hold for two seconds, so that tests need not wait for longer.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from typing import Any

import asyncpg

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.jobs import claims, manager
from tests.support.models import Base

CLAIM_SECONDS = 2.0

TABLES = """
CREATE TABLE public.turns (id bigserial PRIMARY KEY, pid integer, ended boolean DEFAULT false);
CREATE TABLE public.ticks (id bigserial PRIMARY KEY, turn bigint, pid integer, at timestamptz DEFAULT clock_timestamp())
"""


def config_of(task: dict[str, Any]) -> TenancyConfig:
    """The configuration of an application."""
    return TenancyConfig(
        control_url=task["control_url"],
        servers={"default": task["admin_url"]},
        metadata=Base.metadata,
        encryption_keys={"1": "a2V5" * 10 + "a2U="},
        name_prefix=task["name_prefix"],
    )


def register(tenancy: Tenancy, url: str, ticks: int) -> None:
    """Make the job, which ticks so many times."""

    @tenancy.job(every=0.05)
    async def turn() -> None:
        connection = await asyncpg.connect(url)
        try:
            number = await connection.fetchval("INSERT INTO public.turns (pid) VALUES ($1) RETURNING id", os.getpid())
            for _ in range(ticks):
                await connection.execute("INSERT INTO public.ticks (turn, pid) VALUES ($1, $2)", number, os.getpid())
                await asyncio.sleep(0.02)
            await connection.execute("UPDATE public.turns SET ended = true WHERE id = $1", number)
        finally:
            await connection.close(timeout=5)


async def run(task: dict[str, Any]) -> None:
    """Work until SIGTERM."""
    for module, name, value in (
        (claims, "CLAIM_SECONDS", CLAIM_SECONDS),
        (claims, "_RENEW_SECONDS", CLAIM_SECONDS / 6),
        (claims, "_ATTEMPT_SECONDS", CLAIM_SECONDS / 6),
        (manager, "CLAIM_SECONDS", CLAIM_SECONDS),
    ):
        setattr(module, name, value)
    tenancy = Tenancy(config_of(task))
    register(tenancy, task["control_url"], task["ticks"])
    async with tenancy:
        worker = tenancy.worker(["turn"], stop_seconds=task["stop_seconds"])
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, worker.stop)
        await worker.run()


if __name__ == "__main__":
    asyncio.run(run(json.load(sys.stdin)))
