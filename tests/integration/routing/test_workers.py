"""Several processes, as ``uvicorn --workers`` starts them, share the connections that each tenant's role may have."""

from __future__ import annotations

import asyncio
import time
from collections import Counter

import pytest

from tenancy_orm.config import TenancyConfig
from tenancy_orm.tenancy import Tenancy
from tests.support.asgi import Wire
from tests.support.served import uvicorn_command
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
    """For a tenant of every tier, bursts and the single requests after them are all answered, and soon."""
    keys = [(await tenancy.tenants.create(f"of-{tier}", tier=tier)).api_key for tier in tenancy_config.tiers]
    async with uvicorn_command("create_guarded", tenancy_config, "--workers", str(workers)) as port:
        await until(lambda: listens(port), seconds=60)
        for key in keys:
            answers = Counter[int]()
            for _ in range(3):
                answers.update(await asyncio.gather(*(ask(port, key) for _ in range(BURST))))
            assert answers == {200: 3 * BURST}
            for _ in range(SINGLE):
                began = time.monotonic()
                assert await ask(port, key) == 200
                assert time.monotonic() - began < QUICK
