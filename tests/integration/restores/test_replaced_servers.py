"""Base backups and WAL of a server that has a past: it was recovered to an earlier time, or is another cluster now."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path

import pytest
from sqlalchemy import text

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.errors import RecoveryTargetError
from tenancy_orm.postgres import login
from tenancy_orm.postgres.connections import Connection
from tenancy_orm.postgres.dsn import Dsn
from tenancy_orm.restores.recovery import BaseBackup, RecoveredDatabase, WalEvent
from tenancy_orm.restores.recovery.base_backups import BackupDirectory, BaseBackups
from tenancy_orm.restores.recovery.wal_receiver import WalReceiver
from tenancy_orm.servers import Server
from tests.support.processes import opened
from tests.support.recovery import backup_directory, left_in, now, receiving, recovery_settings
from tests.support.replication import TestServer, primary_server, standby_of
from tests.support.waiting import until

SECONDS = 60.0


@pytest.fixture
def server() -> Iterator[TestServer]:
    """A server of this test's own."""
    with primary_server() as made:
        yield made


@pytest.fixture
def directory() -> Iterator[Path]:
    """For base backups, WAL and recovered servers."""
    with backup_directory() as made:
        yield made


async def write(tenancy: Tenancy, body: str) -> None:
    async with tenancy.transaction("acme") as session:
        await session.execute(text("INSERT INTO notes (body) VALUES (:body)"), {"body": body})


async def read(recovered: RecoveredDatabase) -> list[str]:
    connection: Connection = await login.connect(recovered.dsn, purpose="test", timeout=SECONDS)
    try:
        return [row["body"] for row in await connection.fetch("SELECT body FROM notes ORDER BY id")]
    finally:
        await connection.close()


async def notes_at(tenancy: Tenancy, time: datetime) -> list[str]:
    """The notes of acme at a time."""
    async with tenancy.recovery.open("acme", time) as recovered:
        return await read(recovered)


def advance(server: TestServer, files: int) -> None:
    """Have a server write so many files of WAL."""
    for _ in range(files):
        server.query("SELECT pg_logical_emit_message(false, 'test', 'x')")
        server.query("SELECT pg_switch_wal()")


def recover_in_place(server: TestServer, kept: Path, base: BaseBackup, target: datetime) -> None:
    """Recover a whole server that is shut down, as PostgreSQL's documentation says: its own files are replaced."""
    data = (server.data_dir / "pgdata").resolve()
    owner = data.stat()
    for entry in data.iterdir():
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    subprocess.run(["cp", "-a", f"{kept / 'base' / base.id / 'data'}/.", data], check=True)
    wal = data / "received_wal"
    wal.mkdir()
    for file in (kept / "wal" / "000001").iterdir():
        shutil.copyfile(file, wal / file.name.removesuffix(".partial"))
    (data / "recovery.signal").touch()
    with (data / "postgresql.auto.conf").open("a", encoding="utf-8") as settings:
        settings.write(
            f"restore_command = 'cp received_wal/%f \"%p\"'\nrecovery_target_time = '{target.isoformat()}'\n"
            "recovery_target_action = 'promote'\n"
        )
    for path, directories, files in os.walk(data):
        for name in (".", *directories, *files):
            os.chown(Path(path, name), owner.st_uid, owner.st_gid, follow_symlinks=False)
    data.chmod(0o700)
    server.start_again()


async def test_a_server_that_was_recovered_to_an_earlier_time_is_recovered_on_both_of_its_timelines(
    tenancy_config: TenancyConfig, server: TestServer, directory: Path
) -> None:
    """At once, and not when the new timeline is as long as the former one; and to what was lost by that as well."""
    config = tenancy_config.replace(**recovery_settings(server, directory, base_seconds=3_600.0))
    kept = directory / "kept" / "default"
    async with opened(config, initialise=True) as tenancy:
        await tenancy.tenants.create("acme")
        async with receiving(tenancy):
            base = (await tenancy.recovery.take_base()).taken
            await write(tenancy, "kept")
            target = now(server)
            await write(tenancy, "lost")
            advance(server, 6)
            left = (await tenancy.recovery.take_base()).taken
            await write(tenancy, "later")
            lost = now(server)
            await write(tenancy, "last")
            # the receiver gets all that is written
            await asyncio.to_thread(server.halt)
    recover_in_place(server, kept, base, target)
    await until(lambda: not server.query("SELECT pg_is_in_recovery()"), seconds=SECONDS)
    assert server.query("SELECT timeline_id FROM pg_control_checkpoint()") == 2

    async with opened(config) as tenancy:
        async with receiving(tenancy) as events:
            assert [event.kind for event in events].count("gap") == 1
            await write(tenancy, "new")
            reached = now(server)
            # the former timeline has files of higher numbers, and a newer base backup
            newest = max(path.name for path in (kept / "wal").glob("000002/0*"))
            assert newest[8:24] < left.first_segment[8:]
            assert await notes_at(tenancy, reached) == ["kept", "new"]
            assert await notes_at(tenancy, lost) == ["kept", "lost", "later"]
            window = await tenancy.recovery.window()
            assert window.oldest == base.ended_at and window.newest is not None and window.newest > reached
            # that one leads nowhere any more, young as it is
            (report,) = (await tenancy.recovery.take_due_bases()).taken
            assert report.taken.timeline == 2
            assert (await tenancy.recovery.take_due_bases()).taken == ()
        await tenancy.recovery.drop_slot()
    assert left_in(directory) == []


@asynccontextmanager
async def received_from(server: TestServer, directory: Path) -> AsyncIterator[BaseBackups]:
    """Receive the WAL of a server that no installation knows during the body; yields its base backups."""
    reached = Server("default", Dsn.parse(server.url()), connect_timeout=SECONDS)
    kept, programs, events = BackupDirectory(directory / "kept", "default"), str(server.programs), list[WalEvent]()
    receiver = WalReceiver(
        reached, kept, slot="test", client_programs=programs, look_seconds=0.2, progress=events.append
    )
    task = asyncio.create_task(receiver.run())
    try:
        await until(lambda: task.done() or any(event.kind == "received" for event in events), seconds=SECONDS)
        yield BaseBackups(reached, kept, client_programs=programs)
    finally:
        task.cancel()
        await asyncio.wait([task])
        await receiver.drop_slot()


async def test_a_standby_that_is_promoted_before_it_has_all_that_was_received_is_received(
    server: TestServer, directory: Path
) -> None:
    """It has left the timeline that the directory has the end of, so that this cannot be gone on with."""
    wal = directory / "kept" / "default" / "wal"
    with standby_of(server) as standby:
        standby.query("SELECT pg_create_physical_replication_slot('test', true)")
        standby.disconnect()
        async with received_from(server, directory):
            advance(server, 3)
            await until(lambda: len(list((wal / "000001").iterdir())) > 3, seconds=SECONDS)
        standby.promote()
        async with received_from(standby, directory):
            await until(lambda: any((wal / "000002").glob("00000002*")), seconds=SECONDS)
        assert sorted(path.name for path in wal.iterdir()) == ["000001", "000002"]


async def test_a_server_that_is_another_cluster_now_keeps_its_wal_and_is_recovered(
    tenancy_config: TenancyConfig, server: TestServer, directory: Path
) -> None:
    """Its WAL begins with low numbers again, in a directory that still has the base backups of the former one."""
    advance(server, 8)
    async with received_from(server, directory) as former:
        old = await former.take()
        advance(server, 2)
        wal = directory / "kept" / "default" / "wal"
        await until(lambda: len(list((wal / "000001").iterdir())) > 2, seconds=SECONDS)
    with primary_server() as another:
        settings = recovery_settings(another, directory, base_seconds=3_600.0)
        async with opened(tenancy_config.replace(**settings), initialise=True) as tenancy:
            await tenancy.tenants.create("acme")
            early = now(another)
            async with receiving(tenancy) as events:
                assert "the server is another cluster now; take a base backup now" in str(events)
                await write(tenancy, "first")
                advance(another, 2)
                received = wal / "000002"
                await until(lambda: sum(not one.suffix for one in received.iterdir()) > 1, seconds=SECONDS)
                before = {one.name for one in received.iterdir() if not one.suffix}
                assert max(before) < old.first_segment
                assert await former.prune(keep_seconds=86_400.0) == []
                assert before <= {one.name for one in received.iterdir()}
                with pytest.raises(
                    RecoveryTargetError, match=f"as far as base backup {old.id} leads: the server is another"
                ):
                    await notes_at(tenancy, early)
                (report,) = (await tenancy.recovery.take_due_bases()).taken
                window = await tenancy.recovery.window()
                assert (window.oldest, [end for _, end in window.gaps]) == (old.ended_at, [report.taken.ended_at])
                # ... until no time needs the former one
                newest = await tenancy.recovery.take_base()
                assert [one.id for one in await former.prune(keep_seconds=0.0)] == [old.id, report.taken.id]
                assert [path.name for path in wal.iterdir()] == ["000002"]
                assert await tenancy.recovery.bases() == [newest.taken]
                await write(tenancy, "second")
                assert await notes_at(tenancy, now(another)) == ["first", "second"]
            await tenancy.recovery.drop_slot()
