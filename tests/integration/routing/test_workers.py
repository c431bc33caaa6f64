"""Several processes, as ``uvicorn --workers`` starts them, share the connections that each tenant's role may have."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections import Counter

import pytest
from sqlalchemy import text

from tenancy_orm.config import TenancyConfig
from tenancy_orm.tenancy import Tenancy
from tests.support.asgi import Wire
from tests.support.postgres import Postgres
from tests.support.served import gunicorn_command, uvicorn_command
from tests.support.waiting import until

BURST = 40
SINGLE = 10
QUICK = 5.0
"""Seconds within which an idle system must answer: half of the default ``pool.checkout_timeout``."""


async def ask(port: int, key: str) -> int:
    """Send one request over a connection of its own, and return the status; 0 if there is no answer in 10 s."""
    try:
        async with Wire.to(port) as wire:
            return (await wire.request("/notes", [("X-API-Key", key)])).status
    except TimeoutError:
        return 0


async def listens(port: int) -> bool:
    """Whether a worker accepts connections: uvicorn names the port before one does."""
    try:
        async with Wire.to(port) as wire:
            return (await wire.request("/open")).status == 200
    except OSError:
        return False


@pytest.mark.parametrize("workers", [1, 2, 4])
async def test_the_defaults_serve_whatever_the_number_of_workers(
    tenancy: Tenancy, tenancy_config: TenancyConfig, workers: int
) -> None:
    """For a tenant of every tier, bursts and the single requests after them are all answered, and soon.

    So is a crowd of all tiers at once where the server's cap was just lowered to less than two for each worker.
    """
    keys = [(await tenancy.tenants.create(f"of-{tier}", tier=tier)).api_key for tier in tenancy_config.tiers]
    async with uvicorn_command("create_guarded", tenancy_config, "--workers", str(workers)) as port:
        await until(lambda: listens(port))
        for key in keys:
            answers = Counter[int]()
            for _ in range(3):
                answers.update(await asyncio.gather(*(ask(port, key) for _ in range(BURST))))
            assert answers == {200: 3 * BURST}
            for _ in range(SINGLE):
                began = time.monotonic()
                assert await ask(port, key) == 200
                assert time.monotonic() - began < QUICK
        async with tenancy.internals.control.transaction() as connection:
            await connection.execute(text("UPDATE tenancy.servers SET max_connections = :cap"), {"cap": 2 * workers})
        for _ in range(2):
            answers = Counter(await asyncio.gather(*(ask(port, key) for key in keys for _ in range(BURST))))
            assert answers == {200: len(keys) * BURST}


@pytest.mark.parametrize(
    ("factory", "options"),
    [
        ("create_forking_asgi", ["--worker-class", "uvicorn_worker.UvicornWorker"]),
        ("create_forking_asgi", ["--worker-class", "uvicorn_worker.UvicornWorker", "--preload"]),
        ("create_forking_wsgi", ["--worker-class", "gthread", "--threads", "4"]),
        ("create_forking_wsgi", ["--worker-class", "gthread", "--threads", "4", "--preload"]),
    ],
    ids=["asgi", "asgi-preload", "wsgi", "wsgi-preload"],
)
async def test_gunicorn_with_and_without_preload(
    tenancy: Tenancy, tenancy_config: TenancyConfig, postgres: Postgres, factory: str, options: list[str]
) -> None:
    """Each worker opens its own, also where the application has opened it at import, before the fork.

    The session of the first process outlives a worker, and a further worker works.
    """
    key = (await tenancy.tenants.create("acme", tier="enterprise")).api_key
    preload = "--preload" in options
    call = f"{factory}('acme')" if preload else f"{factory}()"

    async def processes(port: int) -> dict[str, int]:
        async with Wire.to(port) as wire:
            answer = await wire.request("/", [("X-API-Key", key), ("Connection", "close")])
        assert answer.status == 200, answer
        return dict(json.loads(answer.body))

    async with gunicorn_command(call, tenancy_config, *options) as port:
        first = await processes(port)
        workers, sessions = {first["worker"]}, {first["session"]}

        async def two_workers() -> bool:
            answers = await asyncio.gather(*(processes(port) for _ in range(8)))
            workers.update(answer["worker"] for answer in answers)
            sessions.update(answer["session"] for answer in answers)
            return len(workers) >= 2

        await until(two_workers)
        assert (first["before"] is not None) is preload
        assert first["before"] not in sessions
        os.kill(first["worker"], signal.SIGTERM)

        async def a_third() -> bool:
            try:
                return await two_workers() and len(workers) == 3
            except (OSError, asyncio.IncompleteReadError):
                return False  # of the worker that ends

        await until(a_third)
        if preload:
            async with postgres.connect() as admin:
                assert await admin.fetchval("SELECT true FROM pg_stat_activity WHERE pid = $1", first["before"])
