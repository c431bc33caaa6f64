"""A server whose base backups are taken and whose WAL is received, for tests of recoveries at a point in time."""

from __future__ import annotations

import asyncio
import os
import pwd
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from tenancy_orm import Tenancy
from tenancy_orm.restores.recovery import WalEvent
from tenancy_orm.testing import embedded
from tests.support.replication import TestServer
from tests.support.waiting import until

SECONDS = 60.0


@contextmanager
def backup_directory() -> Iterator[Path]:
    """A directory for base backups, WAL and recovered servers, in memory if there is room."""
    directory = Path(tempfile.mkdtemp(prefix="tenancy-test-", dir=embedded.fast_directory()))
    directory.chmod(0o711)  # the account of a recovered server goes through it
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def recovery_settings(server: TestServer, directory: Path, **further: Any) -> dict[str, Any]:
    """The sections of a configuration that recovers ``server`` from ``directory``."""
    account = pwd.getpwuid(server.data_dir.joinpath("pgdata").resolve().stat().st_uid).pw_name
    return {
        "servers": {"default": server.url()},
        "provisioning": {"client_programs": str(server.programs)},
        "recovery": {
            "provider": f"directory:{directory / 'kept'}",
            "directory": str(directory / "scratch"),
            "account": account if os.geteuid() == 0 else "postgres",
            "heartbeat_seconds": 1.0,
            **further,
        },
    }


@asynccontextmanager
async def receiving(tenancy: Tenancy) -> AsyncIterator[list[WalEvent]]:
    """Receive the server's WAL during the body; yields what happens."""
    events: list[WalEvent] = []
    task = asyncio.create_task(tenancy.recovery.receive_wal(progress=events.append))
    try:
        await until(lambda: task.done() or any(event.kind == "received" for event in events), seconds=SECONDS)
        yield events
    finally:
        task.cancel()
        await asyncio.wait([task])
        if not task.cancelled():
            task.result()


def now(server: TestServer) -> datetime:
    """The time by the server's clock."""
    found = server.query("SELECT clock_timestamp()")
    assert isinstance(found, datetime)
    return found


def left_in(directory: Path) -> list[str]:
    """What recoveries have left: files, and processes."""
    scratch = directory / "scratch"
    found = [str(path) for path in scratch.iterdir()] if scratch.exists() else []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = process.read_text("utf-8", "replace")
        except OSError:
            continue
        if str(scratch) in command:
            found.append(command.replace("\0", " "))
    return found
