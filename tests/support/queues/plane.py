"""What the tests of task queues share: a Redis server, an installation with two tenants, and a worker's process."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tenancy_orm import Tenancy, TenancyConfig, Tenant
from tests.support import redis_server as redis_server_module
from tests.support.models import Base
from tests.support.postgres import Postgres
from tests.support.shell import ROOT, environment, is_group_alive, python_path
from tests.support.waiting import HANGS


@dataclass(frozen=True)
class QueuePlane:
    """An installation with the tenants acme and globex; ``env`` is what a worker's process needs of it."""

    tenancy: Tenancy
    acme: Tenant
    globex: Tenant
    directory: Path
    env: dict[str, str]

    async def notes(self, tenant: Tenant) -> list[str]:
        """What tasks have written into a tenant's database, in order."""
        rows = await self.tenancy.fetch_all("SELECT body FROM notes ORDER BY id", tenant=tenant.id)
        return [row.body for row in rows]

    async def clear(self) -> None:
        """Empty both tenants' databases."""
        for tenant in (self.acme, self.globex):
            await self.tenancy.execute("DELETE FROM notes", tenant=tenant.id)


@asynccontextmanager
async def queue_plane(postgres: Postgres, **env: str) -> AsyncIterator[QueuePlane]:
    """Make an installation for the body."""
    name, prefix = postgres.new_name(), f"q{secrets.token_hex(4)}"
    config = TenancyConfig(
        control_url=await postgres.create_database(name),
        servers={"default": postgres.admin_url},
        metadata=Base.metadata,
        encryption_keys={"1": "a2V5" * 10 + "a2U="},
        name_prefix=prefix,
    )
    tenancy = Tenancy(config)
    await tenancy.open(initialise=True)
    try:
        acme, globex = await tenancy.tenants.create("acme"), await tenancy.tenants.create("globex")
        with tempfile.TemporaryDirectory(prefix="queue") as directory:
            variables = {
                "TENANCY_CONTROL_URL": config.control_url,
                "TENANCY_SERVERS": f"default={postgres.admin_url}",
                "TENANCY_ENCRYPTION_KEYS": "1:" + "a2V5" * 10 + "a2U=",
                "TENANCY_NAME_PREFIX": prefix,
                "TENANCY_METADATA": "tests.support.models:Base.metadata",
                # a worker looks a tenant up for each task: a change of status need not have been notified by then
                "TENANCY_DIRECTORY_TTL": "0.001",
                "QUEUE_DIRECTORY": directory,
            }
            yield QueuePlane(tenancy, acme.tenant, globex.tenant, Path(directory), {**variables, **env})
    finally:
        await tenancy.close()
        await postgres.drop_all(prefix)
        await postgres.drop_database(name)


def import_application(name: str, plane: QueuePlane) -> Any:
    """Import ``tests.support.queues.<name>`` for this plane: again, where the process has for an earlier one."""
    path = f"tests.support.queues.{name}"
    sys.modules.pop(path, None)
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in plane.env.items():
            patch.setenv(variable, value)
        return importlib.import_module(path)


@asynccontextmanager
async def redis_server() -> AsyncIterator[Path]:
    """Run a Redis server for the body that listens on a Unix socket alone; the path of which is returned."""
    with redis_server_module.redis_server() as url:
        yield Path(url.removeprefix("unix://"))


@contextmanager
def worker_process(command: Sequence[str], plane: QueuePlane, log: str) -> Iterator[Path]:
    """Run a worker for the body, in a process group of its own; returns the path of its log."""
    path = plane.directory / log
    env = environment(PYTHONPATH=python_path(ROOT), PYTHONUNBUFFERED="1", **plane.env)
    env["PGSSLMODE"] = os.environ.get("PGSSLMODE", "prefer")
    with path.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=plane.directory,
            env=env,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield path
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        # its children too: they write into the directory and the databases, which are removed next
        deadline = time.monotonic() + HANGS
        while is_group_alive(process.pid):
            assert time.monotonic() < deadline, "a process of the worker does not end"
            time.sleep(0.01)
        if os.environ.get("SHOW_WORKER"):
            print(path.read_text("utf-8", "replace"))


async def both(plane: QueuePlane, *, times: int) -> list[tuple[Tenant, int]]:
    """Pairs of a tenant and a number, interleaved."""
    await asyncio.sleep(0)
    return [(tenant, number) for number in range(times) for tenant in (plane.acme, plane.globex)]
