"""A process that upgrades a fleet and is killed in its third batch: ``python -m tests.support.data_migration_process``.

It reads its configuration, and the moment, as JSON from stdin.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.migrations import data_batches, data_checkpoints
from tests.support.shell import ROOT, environment
from tests.support.warm import Program, start_module

_BATCH = 3


async def start(config: TenancyConfig, moment: str) -> Program:
    """Start it."""
    assert config.servers is not None
    assert config.encryption_keys is not None
    child = await start_module("tests.support.data_migration_process", cwd=ROOT, env=environment())
    task = {
        "moment": moment,
        "config": {
            "control_url": config.control_url,
            "servers": {name: str(url) for name, url in config.servers.items()},
            "migrations": str(config.migrations),
            "encryption_keys": {name: str(key) for name, key in config.encryption_keys.items()},
            "name_prefix": config.name_prefix,
        },
    }
    child.stdin.write(json.dumps(task).encode())
    child.stdin.close()
    return child


def arrange(moment: str) -> None:
    """Have this process killed at a moment of its third batch."""
    calls = 0

    def dying(function: Callable[..., Any], *, first: bool) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if first and calls == _BATCH:
                os.kill(os.getpid(), signal.SIGKILL)
            found = function(*args, **options)
            if calls == _BATCH:
                os.kill(os.getpid(), signal.SIGKILL)
            return found

        return wrapped

    if moment == "after the commit":
        observe = data_batches.DataRunner._observe
        calls = -1  # the beginning of the pass is observed as well
        data_batches.DataRunner._observe = dying(observe, first=True)  # type: ignore[method-assign]
    elif moment == "between the commit and the checkpoint":
        # what would happen if these were two transactions
        advance = dying(data_checkpoints.advance, first=True)

        def apart(connection: Any, *args: Any, **options: Any) -> None:
            connection.commit()
            advance(connection, *args, **options)

        data_checkpoints.advance = apart
    else:
        data_checkpoints.advance = dying(data_checkpoints.advance, first=moment == "in the batch")


async def run(task: dict[str, Any]) -> None:
    """Upgrade one tenant."""
    arrange(task["moment"])
    async with Tenancy(TenancyConfig(**task["config"])) as tenancy:
        await tenancy.migrations.upgrade(tenants=["acme"])


if __name__ == "__main__":
    asyncio.run(run(json.load(sys.stdin)))
