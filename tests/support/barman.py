"""A real Barman that keeps base backups and the WAL of a server: Debian's package, in a directory of its own."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tenancy_orm.testing.embedded import HOST, SUPERUSER
from tests.support.replication import TestServer

NAME = "main-default"
SECONDS = 120

_CONFIGURATION = """
[barman]
barman_user = {user}
barman_home = {home}
barman_lock_directory = {home}
configuration_files_directory = {home}/none
log_file = {home}/barman.log

[{name}]
description = "the server of a test"
conninfo = {conninfo}
streaming_conninfo = {conninfo}
backup_method = postgres
streaming_archiver = on
slot_name = barman
create_slot = auto
path_prefix = {programs}
immediate_checkpoint = true
"""


@dataclass(frozen=True)
class Barman:
    """Barman with one server."""

    file: Path
    server: TestServer

    @property
    def command(self) -> str:
        """Its command line."""
        return f"barman -c {self.file}"

    def run(self, *arguments: str) -> str:
        """Run a command of it to its end."""
        completed = subprocess.run(
            [*self.command.split(), *arguments], capture_output=True, text=True, check=False, timeout=SECONDS
        )
        assert completed.returncode == 0, completed.stdout + completed.stderr
        return completed.stdout

    def backup(self) -> None:
        """Take a base backup, and have the WAL archived that it needs."""
        self.run("backup", NAME)
        self.archive()

    def archive(self) -> None:
        """Have all WAL that is written archived; ``switch-wal --archive`` looks every ten seconds alone."""
        file = str(self.server.query("SELECT pg_walfile_name(pg_current_wal_insert_lsn())"))
        self.server.query("SELECT pg_switch_wal()")
        deadline = time.monotonic() + SECONDS
        while not list(self.file.parent.glob(f"{NAME}/wals/*/{file}")):
            assert time.monotonic() < deadline, f"barman does not archive {file}"
            self.run("archive-wal", NAME)


@contextmanager
def barman(server: TestServer, directory: Path) -> Iterator[Barman]:
    """Run Barman's receiver of WAL for the body.

    Args:
        server: What it backs up.
        directory: For all of its files.
    """
    assert shutil.which("barman"), "install Debian's package barman"
    home = directory / "barman"
    home.mkdir()
    file = home / "barman.conf"
    conninfo = f"host={HOST} port={server.port} user={SUPERUSER} password={server.password} dbname=postgres"
    file.write_text(
        _CONFIGURATION.format(
            user=pwd.getpwuid(os.geteuid()).pw_name,
            home=home,
            name=NAME,
            conninfo=conninfo,
            programs=server.programs,
        ),
        "utf-8",
    )
    file.chmod(0o600)
    running = Barman(file, server)
    running.run("receive-wal", "--create-slot", NAME)
    receiver = subprocess.Popen([*running.command.split(), "receive-wal", NAME], start_new_session=True)
    try:
        _wait_until_it_receives(server)
        # it takes no base backup before the first WAL has come
        running.archive()
        yield running
    finally:
        receiver.terminate()
        receiver.wait(SECONDS)


def _wait_until_it_receives(server: TestServer) -> None:
    deadline = time.monotonic() + SECONDS
    while not server.query("SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'"):
        assert time.monotonic() < deadline, "barman does not receive WAL"
        time.sleep(0.02)
