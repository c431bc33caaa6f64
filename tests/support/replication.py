"""A primary of a test module's own and streaming standbys of it: real servers, SCRAM, TCP at 127.0.0.1.

with primary_server() as primary, standby_of(primary) as standby:
    standby.pause_replay()
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg

from tenancy_orm.testing import _watchdog, embedded
from tenancy_orm.testing.embedded import HOST, SUPERUSER
from tests.support.clusters import CopiedServer
from tests.support.postgres import Postgres, close_administrators

SECONDS = 30.0

_PRIMARY: Mapping[str, str] = {
    "wal_level": "replica",
    # what a killed standby keeps of the log
    "max_slot_wal_keep_size": "256MB",
    # two servers and their tests at once
    "max_connections": "120",
    "shared_buffers": "64MB",
}


class TestServer(CopiedServer):
    """An embedded server that can be halted, killed and started again while its directory stays."""

    __test__ = False  # not a class of tests

    def query(self, statement: str, parameters: tuple[object, ...] = (), *, database: str = SUPERUSER) -> Any:
        """Run one statement as the superuser; returns the first column of its first row, or None."""
        with psycopg.connect(self.url(database), autocommit=True) as connection:
            cursor = connection.execute(statement.encode(), parameters or None)
            row = cursor.fetchone() if cursor.description else None
            return None if row is None else row[0]

    def halt(self) -> None:
        """Shut PostgreSQL down: sessions are ended, standbys receive what is written."""
        _watchdog.stop_postmaster(self._programs / "pg_ctl", self._pgdata, self._ids())

    def kill(self) -> None:
        """End PostgreSQL at once, as a crash does: SIGKILL."""
        if (pid := self.pid) is not None:
            os.kill(pid, signal.SIGKILL)
            _until(lambda: not self.is_running(), "the server does not end")

    def start_again(self) -> None:
        """Start PostgreSQL after ``halt`` or ``kill``, at the same port."""
        with self._mutex, self._lock(create=False):
            self._requested_port = self.port
            self._ensure_running()

    def as_postgres(self, template: Postgres) -> Postgres:
        """This server as the object that the tests' fixtures take; ``template`` names run and worker."""
        return Postgres(self.url(), self.server_version, template.run, template.worker, self.bin_dir, self.data_dir)

    @property
    def programs(self) -> Path:
        """The directory of PostgreSQL's programs, as the server's account can run them."""
        return self._programs

    def _ids(self) -> tuple[int, int] | None:
        return self._account.ids if self._account else None


class Standby(TestServer):
    """A streaming standby: a copy of the primary by pg_basebackup, with a replication slot of its own.

    It has the primary's roles and passwords, and answers at a port of its own.
    """

    primary: TestServer
    slot: str
    connection_info: str

    def pause_replay(self) -> None:
        """Have it replay nothing more; what the primary sends is kept."""
        self.query("SELECT pg_wal_replay_pause()")
        _until(lambda: self.query("SELECT pg_get_wal_replay_pause_state()") == "paused", "the replay does not pause")

    def resume_replay(self) -> None:
        """Have it replay again."""
        self.query("SELECT pg_wal_replay_resume()")

    def catch_up(self) -> None:
        """Wait until it has replayed all that the primary has written."""
        # not the place of the next record, which may be behind a page's header
        target = self.primary.query("SELECT pg_current_wal_flush_lsn()")
        reached = "SELECT pg_last_wal_replay_lsn() >= %s::pg_lsn"
        _until(lambda: self.query(reached, (str(target),)), "the standby does not catch up")

    def disconnect(self) -> None:
        """Have it receive nothing more, though primary and standby are up: the link between them is cut."""
        self.query("ALTER SYSTEM SET primary_conninfo = ''")
        self.query("SELECT pg_reload_conf()")
        _until(lambda: self.query("SELECT count(*) FROM pg_stat_wal_receiver") == 0, "the standby still receives")

    def reconnect(self) -> None:
        """Undo ``disconnect``."""
        self.query(f"ALTER SYSTEM SET primary_conninfo = '{self.connection_info}'")
        self.query("SELECT pg_reload_conf()")

    def promote(self) -> None:
        """Make it a primary: it accepts writes from then on, and follows nobody."""
        assert self.query("SELECT pg_promote(true, 60)"), "the standby was not promoted"

    def _initialise(self) -> None:
        """Copy the primary, where a server of its own would run initdb."""
        home = self._cluster_home()
        target, link = home / "pgdata", self.data_dir / "pgdata"
        target.mkdir(mode=0o700)
        if self._account is not None:
            os.chown(target, *self._account.ids)
        self._run(
            [
                str(self._programs / "pg_basebackup"),
                f"--dbname={self.primary.url()}",
                f"--pgdata={target}",
                "--checkpoint=fast",
                "--wal-method=stream",
                "--create-slot",
                f"--slot={self.slot}",
                "--no-sync",
            ],
            "pg_basebackup",
        )
        (target / "standby.signal").touch()
        # in this file, and not among the settings of the command line, so that ``disconnect`` can change it
        with (target / "postgresql.auto.conf").open("a", encoding="utf-8") as file:
            file.write(f"primary_conninfo = '{self.connection_info}'\n")
        if target != link:
            link.symlink_to(target)


@contextmanager
def primary_server(*, version: int = 18, settings: Mapping[str, str] | None = None) -> Iterator[TestServer]:
    """Run a server that standbys can follow, for the body; deleted at its end."""
    server = TestServer.for_tests(version=version, settings={**_PRIMARY, **(settings or {})})
    assert isinstance(server, TestServer)
    server.start()
    try:
        server.query("REVOKE ALL ON DATABASE postgres FROM PUBLIC")
        server.query("REVOKE ALL ON DATABASE template1 FROM PUBLIC")
        yield server
    finally:
        close_administrators()
        server.stop()


@contextmanager
def standby_of(
    primary: TestServer, *, name: str = "standby", settings: Mapping[str, str] | None = None
) -> Iterator[Standby]:
    """Run a streaming standby of ``primary`` for the body; deleted at its end, with its slot.

    Args:
        primary: A server of ``primary_server``, or a promoted standby.
        name: Its name, for the primary's ``pg_stat_replication``.
        settings: Further settings: ``{"hot_standby_feedback": "on"}`` where its reads must not be cancelled.
    """
    directory = Path(tempfile.mkdtemp(prefix="tenancy-pg-", dir=embedded.fast_directory()))
    (directory / "superuser.password").write_text(f"{primary.password}\n")
    (directory / "superuser.password").chmod(0o600)
    slot = f"{name}_{secrets.token_hex(4)}"
    followed = {
        **_PRIMARY,
        "primary_slot_name": slot,
        "hot_standby": "on",
        # a test that pauses the replay reads for as long as it likes
        "max_standby_streaming_delay": "-1",
        "wal_retrieve_retry_interval": "100ms",
        "wal_receiver_status_interval": "1s",
    }
    standby = Standby.for_tests(directory, version=primary.version, settings={**followed, **(settings or {})})
    assert isinstance(standby, Standby)
    standby.primary, standby.slot = primary, slot
    standby.connection_info = (
        f"host={HOST} port={primary.port} user={SUPERUSER} password={primary.password} application_name={name}"
    )
    try:
        standby.start()
        streaming = "SELECT count(*) FROM pg_stat_wal_receiver WHERE status = 'streaming'"
        _until(lambda: standby.query(streaming), "the standby does not stream")
        yield standby
    finally:
        close_administrators()
        standby.stop()
        shutil.rmtree(directory, ignore_errors=True)
        if primary.is_running():
            dropping = "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = %s"
            primary.query(dropping, (slot,))


def _until(condition: Any, failure: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, failure
        time.sleep(0.01)
