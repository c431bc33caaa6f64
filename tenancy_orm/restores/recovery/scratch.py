"""``ScratchServer``: a server that is recovered at a point in time, for as long as one tenant is taken out of it.

What the base backup says of settings, files and logins is not used: the server has settings, ``pg_hba.conf`` and logins
of this module's own. It listens in a private directory, archives nothing, loads no library, starts no subscription and
no job. Nobody can log in while it recovers. After that two logins with random passwords can, each to one database: this
module's administrator to ``template1``, and a reader to the tenant's database. Nothing else is let in, so the databases
of other tenants are never opened.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

from ...cancellation import run_to_completion
from ...errors import MarkerMismatchError, RecoveryError, RecoveryTargetError
from ...postgres import connections, login
from ...postgres.connections import POLL_SECONDS, Connection
from ...postgres.dsn import Dsn
from ...postgres.failures import SERVER_FAILURES
from ...postgres.programs import Programs
from ...postgres.quoting import quote_identifier, quote_literal
from ...provisioning.checks.server_state import HALF_DROPPED
from ...provisioning.server_objects.scram import scram_verifier
from ...routing.marker import marker_text
from ...secrets.keyring import new_password
from .keeper import Keeper
from .wal_files import find_new_tablespace

_PORT = 5432  # of a socket's name alone
_CONNECT_SECONDS = 30.0
_ADMINISTRATION = "template1"
_TOO_SHORT = "recovery ended before configured recovery target was reached"
_STOPPED_AT = re.compile(r"recovery stopping (?:before|after) (?:commit|abort) of (?:prepared )?transaction \d+, time ")
_LAST_COMMIT = re.compile(r"last completed transaction was at log time ([0-9: .-]+\+00)")
_FATAL = re.compile(r"(?:FATAL|PANIC|ERROR): +(?P<text>.*)")
_SHOWN = 300  # characters of an error

# What else a server reads at its start, and what a standby or a killed server leaves. The last one would lead the
# tablespaces back to the directories of the server that was backed up.
_REMOVED = (
    "standby.signal",
    "postmaster.pid",
    "postmaster.opts",
    "recovery.conf",
    "backup_label.old",
    "tablespace_map",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveredDatabase:
    """One database of a recovered server, to be dumped.

    Attributes:
        dsn: How to reach it, with a login that can read it.
        database: Its name there.
        version: The server's major version.
        directory: Space for a dump. It is deleted when the recovery ends.
        time: What the server was recovered to; None where that is not known, as of a server of somebody else's.
        last_commit: When the last transaction was committed that it has; None where that is not known.
    """

    dsn: Dsn = field(repr=False)
    database: str
    version: int
    directory: Path
    time: datetime | None = None
    last_commit: datetime | None = None


class ScratchServer:
    """Recovers and runs one server.

    Args:
        keeper: Runs its programs. Its ``home`` has the files of the base backup in ``data``.
        programs: PostgreSQL's, of the version of the files.
        wal: The directory of the WAL.
        restore_command: The shell command that fetches a file of it; it runs in ``data``.
        timeline: The timeline that is recovered, as ``recovery_target_timeline``.
        settings: Further settings, ``shared_buffers`` for example.
    """

    def __init__(
        self,
        keeper: Keeper,
        programs: Programs,
        *,
        wal: Path,
        restore_command: str,
        timeline: str = "latest",
        settings: Mapping[str, str],
    ) -> None:
        self._keeper = keeper
        self._programs = programs
        self._wal = wal
        self._restore_command = restore_command
        self._timeline = timeline
        self._further = settings
        self._data = keeper.home / "data"
        self._log = keeper.home / "server.log"
        self._administrator = f"tenancy_recovery_{secrets.token_hex(8)}"
        self._reader = f"tenancy_recovery_{secrets.token_hex(8)}"
        self._passwords = {name: new_password() for name in (self._administrator, self._reader)}
        self._last_commit: datetime | None = None

    async def recover(self, target: datetime) -> datetime | None:
        """Recover the files to a time and shut the server down; returns the time of the last transaction it has.

        Raises:
            RecoveryTargetError: the WAL ends before that time, or a tablespace was made between the base backup and it.
            RecoveryError: PostgreSQL does not recover.
        """
        # PostgreSQL would make it at the same place, which is the directory of a server that runs
        if (place := await find_new_tablespace(self._programs, self._wal, target)) is not None:
            raise RecoveryTargetError(
                f"a tablespace was made in {place!r} between the base backup and {target.isoformat()}: a recovery "
                "would write into that directory; choose a time before that, or one after the next base backup, or "
                "recover the server on another machine and name it with --recovered-server"
            )
        await asyncio.to_thread(self._keeper.account.take, self._keeper.home)
        await asyncio.to_thread(self._neutralise, await self._required_settings(), target)
        await self._start()
        await self._keeper.stop()
        log = await asyncio.to_thread(self._log.read_text, "utf-8", "replace")
        if not _STOPPED_AT.search(log):
            # PostgreSQL ends with an error then; this makes sure that it goes on to do so
            raise RecoveryTargetError(f"the WAL ends before {target.isoformat()}")
        found = _LAST_COMMIT.findall(log)
        self._last_commit = datetime.fromisoformat(found[-1]) if found else None
        return self._last_commit

    @asynccontextmanager
    async def open(self, database: str, installation: UUID, tenant_id: UUID, slug: str) -> AsyncIterator[Dsn]:
        """Run the recovered server for the body, open to a reader of one database; yields that login.

        Raises:
            RecoveryTargetError: there was no such database at that time.
            MarkerMismatchError: the database was not this tenant's.
        """
        await self._make_administrator()
        await asyncio.to_thread(self._admit, database)
        await self._start()
        connection = await self._connect()
        try:
            await self._check(connection, database, marker_text(installation, tenant_id), slug)
            await self._make_reader(connection, database)
        finally:
            await run_to_completion(connections.close(connection))
        try:
            yield self._dsn(self._reader, database)
        finally:
            await run_to_completion(self._keeper.stop())

    # --- files ------------------------------------------------------------------------------------------------------

    async def _required_settings(self) -> dict[str, str]:
        """What the server that wrote the WAL had, which its prepared transactions need."""
        found = await self._keeper.run(self._programs.path("pg_controldata"), str(self._data))
        if found.status != 0:
            raise RecoveryError(f"the files of the base backup cannot be read: {found.errors.strip()[:_SHOWN]}")
        values = dict(re.findall(r"^(max_\w+) setting: +(\d+)$", found.output, re.MULTILINE))
        return {name: values[name] for name in ("max_prepared_xacts",) if name in values}

    def _neutralise(self, required: Mapping[str, str], target: datetime) -> None:
        """Replace everything that says how the server works, and what it recovers to."""
        for name in _REMOVED:
            (self._data / name).unlink(missing_ok=True)
        self._refuse_links()
        (self._data / "postgresql.auto.conf").write_text("", "utf-8")
        (self._data / "recovery.signal").touch()
        home = self._keeper.home
        settings = {
            **_settings(self._programs.version),
            "max_prepared_transactions": required.get("max_prepared_xacts", "0"),
            "unix_socket_directories": str(self._keeper.sockets),
            "port": str(_PORT),
            **self._further,
            "restore_command": self._restore_command,
            "recovery_target_time": target.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S.%f+00"),
            "recovery_target_inclusive": "on",
            "recovery_target_action": "promote",
            "recovery_target_timeline": self._timeline,
        }
        lines = [f"{name} = '{_quoted(value)}'\n" for name, value in settings.items()]
        (home / "postgresql.conf").write_text("".join(lines), "utf-8")
        (home / "pg_ident.conf").write_text("", "utf-8")
        (home / "pg_hba.conf").write_text("local all all reject\n", "utf-8")
        self._data.chmod(0o700)
        self._keeper.account.take(home)

    def _refuse_links(self) -> None:
        """Refuse files that are elsewhere: the server that they were copied from may still use them."""
        home = self._keeper.home.resolve()
        for link in (self._data / "pg_wal", *(self._data / "pg_tblspc").iterdir()):
            if not link.resolve().is_relative_to(home):
                raise RecoveryError(f"the recovered files lead to {str(link.resolve())!r}, which is not a copy")

    def _admit(self, database: str) -> None:
        """Let two logins in, each to one database, and nobody else."""
        entries = ((_ADMINISTRATION, self._administrator), (database, self._reader))
        lines = [f'local "{name}" "{user}" scram-sha-256\n' for name, user in entries]
        (self._keeper.home / "pg_hba.conf").write_text("".join(lines), "utf-8")

    def _arguments(self) -> list[str]:
        home = self._keeper.home
        files = {"config_file": "postgresql.conf", "hba_file": "pg_hba.conf", "ident_file": "pg_ident.conf"}
        return ["-D", str(self._data), *(f"--{name}={home / file}" for name, file in files.items())]

    # --- the process ------------------------------------------------------------------------------------------------

    async def _start(self) -> None:
        """Start the server, and wait until it has recovered and takes connections."""
        (self._data / "postmaster.pid").unlink(missing_ok=True)
        await self._keeper.start([self._programs.path("postgres"), *self._arguments()], self._log)
        while not self._is_ready():
            status = await self._keeper.status()
            if status is not None:
                raise await asyncio.to_thread(self._failure, status)
            await asyncio.sleep(POLL_SECONDS * 5)

    def _is_ready(self) -> bool:
        try:
            lines = (self._data / "postmaster.pid").read_text("utf-8").splitlines()
        except OSError:
            return False
        # the eighth line is the state, since PostgreSQL 10
        return len(lines) > 7 and lines[7].strip() == "ready"

    def _failure(self, status: int) -> RecoveryError | RecoveryTargetError:
        log = self._log.read_text("utf-8", "replace")
        if _TOO_SHORT in log:
            return RecoveryTargetError("the WAL that is kept ends before the time that was asked for")
        reasons = [match["text"] for match in _FATAL.finditer(log)]
        reason = reasons[-1][:_SHOWN] if reasons else f"it ended with status {status}"
        return RecoveryError(f"the recovered server does not start: {reason}")

    # --- logins -----------------------------------------------------------------------------------------------------

    async def _make_administrator(self) -> None:
        """Make a superuser, by the mode of the server that asks nobody for a password and opens no socket.

        How the superusers of the server are named, and what their passwords are, need not be known.
        """
        name, secret = self._administrator, scram_verifier(self._passwords[self._administrator])
        statements = (
            # the server's own settings are in force here, until they are reset
            "SET default_transaction_read_only = off",
            "ALTER ROLE ALL RESET ALL",
            f"CREATE ROLE {quote_identifier(name)} LOGIN SUPERUSER PASSWORD {quote_literal(secret)}",
            f"ALTER DATABASE {_ADMINISTRATION} WITH ALLOW_CONNECTIONS true",
            f"ALTER DATABASE {_ADMINISTRATION} RESET ALL",
        )
        found = await self._keeper.run(
            self._programs.path("postgres"),
            "--single",
            *self._arguments(),
            "-c",
            "log_statement=none",
            _ADMINISTRATION,
            text="".join(f"{statement}\n" for statement in statements),
        )
        if found.status != 0 or (failed := _FATAL.search(found.errors)):
            failed = _FATAL.search(found.errors)
            reason = failed["text"][:_SHOWN] if failed else f"status {found.status}"
            raise RecoveryError(f"the recovered server refuses logins: {reason}")

    async def _make_reader(self, connection: Connection, database: str) -> None:
        """Make the login that can read the tenant's database: all rows and large objects, and no other database."""
        name, quoted = quote_identifier(self._reader), quote_identifier(database)
        secret = quote_literal(scram_verifier(self._passwords[self._reader]))
        await connection.execute(
            f"CREATE ROLE {name} LOGIN BYPASSRLS PASSWORD {secret}; "
            f"ALTER ROLE {name} SET default_transaction_read_only = on; "
            f"GRANT pg_read_all_data TO {name}; "
            f"ALTER DATABASE {quoted} WITH ALLOW_CONNECTIONS true CONNECTION LIMIT -1; "
            f"ALTER DATABASE {quoted} RESET ALL; "
            f"GRANT CONNECT ON DATABASE {quoted} TO {name}"
        )

    async def _check(self, connection: Connection, database: str, marker: str, slug: str) -> None:
        """Check the marker, which is in a catalog that all databases share: the database itself is not opened."""
        row = await connection.fetchrow(
            "SELECT pg_catalog.shobj_description(oid, 'pg_database') AS marker, datconnlimit AS connection_limit "
            "FROM pg_catalog.pg_database WHERE datname = $1",
            database,
        )
        if row is None:
            raise RecoveryTargetError(f"tenant {slug!r} had no database {database!r} at that time")
        if row["marker"] != marker:
            raise MarkerMismatchError(tenant=slug, database=database, expected=marker, found=row["marker"])
        if row["connection_limit"] == HALF_DROPPED:
            raise dropped(database, slug, before=self._last_commit)

    async def _connect(self) -> Connection:
        try:
            return await login.connect(
                self._dsn(self._administrator, _ADMINISTRATION), purpose="tenancy-recovery", timeout=_CONNECT_SECONDS
            )
        except SERVER_FAILURES as exc:
            raise RecoveryError(f"the recovered server refuses logins: {login.reason_of(exc)}") from exc

    def _dsn(self, user: str, database: str) -> Dsn:
        hosts = ((str(self._keeper.sockets), _PORT),)
        return Dsn(hosts=hosts, user=user, password=self._passwords[user], database=database)


def dropped(database: str, slug: str, *, before: datetime | None = None) -> RecoveryTargetError:
    """Return the error for a database that was being dropped: its files are deleted before DROP DATABASE commits.

    Args:
        database: The database's name.
        slug: The tenant's slug.
        before: When the last transaction was committed before that; None where it is not known.
    """
    earlier = "an earlier time" if before is None else f"a time before {before.isoformat()}"
    return RecoveryTargetError(
        f"database {database!r} of tenant {slug!r} was being dropped at that time, and its files are deleted; choose "
        f"{earlier}"
    )


def _settings(version: int) -> dict[str, str]:
    """Settings of a server that recovers, is read and is deleted."""
    settings = {
        "listen_addresses": "",
        "unix_socket_permissions": "0700",
        "ssl": "off",
        "password_encryption": "scram-sha-256",
        "hot_standby": "off",
        "wal_level": "minimal",
        "max_wal_senders": "0",
        "archive_mode": "off",
        "archive_command": "",
        "shared_preload_libraries": "",
        "session_preload_libraries": "",
        "local_preload_libraries": "",
        "max_logical_replication_workers": "0",
        "max_connections": "20",
        "superuser_reserved_connections": "3",
        "max_worker_processes": "4",
        "max_parallel_workers": "0",
        "max_parallel_maintenance_workers": "0",
        "shared_buffers": "128MB",
        "huge_pages": "off",
        "max_wal_size": "1GB",
        # neither indexes nor functions of tenants run
        "autovacuum": "off",
        "jit": "off",
        # nothing is kept
        "fsync": "off",
        "full_page_writes": "off",
        "synchronous_commit": "off",
        # large objects are the reader's to read, whoever owns them
        "lo_compat_privileges": "on",
        "logging_collector": "off",
        "log_destination": "stderr",
        "log_min_messages": "info",
        "log_min_error_statement": "panic",
        "log_statement": "none",
        "log_connections": "on",
        "log_checkpoints": "off",
        "log_line_prefix": "%m [%p] ",
        "log_timezone": "UTC",
        "timezone": "UTC",
        "lc_messages": "C",
        "cluster_name": "tenancy-recovery",
        "update_process_title": "off",
    }
    if version >= 17:
        settings["event_triggers"] = "off"
    return settings


def _quoted(value: str) -> str:
    return value.replace("\\", "\\\\").replace("'", "''")


__all__ = ["RecoveredDatabase", "ScratchServer", "dropped"]
