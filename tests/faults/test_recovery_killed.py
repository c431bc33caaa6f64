"""A recovery that is cancelled, or loses its processes, leaves neither files nor a server; a receiver begins again."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import datetime
from functools import partial
from pathlib import Path

import pytest

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.errors import RecoveryError
from tenancy_orm.tenant import Tenant
from tests.support.recovery import backup_directory, left_in, now, receiving, recovery_settings
from tests.support.replication import TestServer, primary_server
from tests.support.waiting import until

SECONDS = 60.0


@pytest.fixture(scope="module")
def primary() -> Iterator[TestServer]:
    """The server of this module's tenants."""
    with primary_server() as server:
        yield server


@pytest.fixture
def directory() -> Iterator[Path]:
    """For base backups, WAL and recovered servers."""
    with backup_directory() as made:
        yield made


@pytest.fixture
async def tenancy(tenancy_config: TenancyConfig, primary: TestServer, directory: Path) -> AsyncIterator[Tenancy]:
    """A ``Tenancy`` on that server; its slot is dropped at the end."""
    opened = Tenancy(tenancy_config.replace(**recovery_settings(primary, directory)))
    await opened.open(initialise=True)
    try:
        yield opened
        await opened.recovery.drop_slot()
    finally:
        await opened.close()


def commands(word: str, directory: Path) -> dict[int, list[str]]:
    """The command lines of processes with a word and a directory in them, by their ids."""
    found = {}
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = file.read_text("utf-8", "replace")
        except OSError:
            continue
        if word in command and str(directory) in command:
            found[int(file.parent.name)] = command.rstrip("\0").split("\0")
    return found


def sockets(directory: Path) -> Path:
    """The directory of the socket of the recovered server."""
    # a program that it starts has its command line for a moment
    (place,) = {command[-1] for command in commands("_keeper.py", directory).values()}
    return Path(place)


async def test_a_recovery_that_is_cancelled_or_loses_its_processes_leaves_nothing(
    tenancy: Tenancy, primary: TestServer, directory: Path
) -> None:
    """While files are copied, while it recovers, while it is read; also when its keeper or its server is killed."""
    tenant = (await tenancy.tenants.create("acme")).tenant
    scratch = directory / "scratch"
    async with receiving(tenancy):
        await tenancy.recovery.take_base()
        target = now(primary)
        stages: dict[str, Callable[[], object]] = {
            "copying": lambda: list(scratch.glob("tenancy-recovery-*/wal")),
            "recovering": lambda: list(scratch.glob("tenancy-recovery-*/server.log")),
            "reading": lambda: "template1" in "".join(map(Path.read_text, scratch.glob("*/server.log"))),
        }
        for reached in stages.values():
            task = asyncio.create_task(_stay(tenancy, tenant, target))
            begun = asyncio.ensure_future(until(reached, seconds=SECONDS))
            await asyncio.wait([task, begun], return_when=asyncio.FIRST_COMPLETED)
            assert begun.done() and not task.done(), task
            place = sockets(scratch)
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled()
            assert (left_in(directory), place.exists()) == ([], False)

        for word in ("_keeper.py", "config_file"):
            with pytest.raises((RecoveryError, OSError)):
                async with tenancy.recovery.open(tenant, target):
                    place = sockets(scratch)
                    (pid,) = commands(word, scratch)
                    os.kill(pid, signal.SIGKILL)
                    await until(partial(_has_gone, word, scratch), seconds=SECONDS)
                    raise OSError("so that it ends with an error in either case")
            await until(lambda: left_in(directory) == [], seconds=SECONDS)
            assert not place.exists()

        # what was left by a crash of the machine goes with the next recovery
        stale = scratch / "tenancy-recovery-stale"
        (stale / "data").mkdir(parents=True)
        (stale / "lock").touch()
        async with tenancy.recovery.open(tenant, target):
            assert not stale.exists()


def _has_gone(word: str, directory: Path) -> bool:
    return not commands(word, directory)


async def _stay(tenancy: Tenancy, tenant: Tenant, target: datetime) -> None:
    async with tenancy.recovery.open(tenant, target):
        await asyncio.Event().wait()


async def test_a_receiver_begins_again_after_its_program_or_the_server_has_gone(
    tenancy: Tenancy, primary: TestServer, directory: Path
) -> None:
    """No WAL is missing: the slot keeps what is not received."""
    tenant = (await tenancy.tenants.create("acme")).tenant
    assert tenant.placement is not None
    async with receiving(tenancy) as events:
        await tenancy.recovery.take_base()

        def begun() -> int:
            return [event.kind for event in events].count("receiving")

        (pid,) = commands("pg_receivewal", directory)
        os.kill(pid, signal.SIGKILL)
        await until(lambda: begun() == 2, seconds=SECONDS)
        primary.halt()
        primary.start_again()
        primary.query("CREATE TABLE after_it (a int)", database=tenant.placement.database)
        await until(lambda: begun() >= 3, seconds=SECONDS)
        target = now(primary)
        async with tenancy.recovery.open(tenant, target):
            pass
        assert not [event for event in events if event.kind == "gap"]
        assert (await tenancy.recovery.window()).gaps == ()
    assert commands("pg_receivewal", directory) == {}
