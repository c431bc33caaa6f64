"""Base backups of a whole server in a directory, and the WAL beside them: ``tenancy backup base``.

A directory has one of each server:

    DIRECTORY/SERVER/base/20261128T140300Z/backup.json     what it is, written last
    DIRECTORY/SERVER/base/20261128T140300Z/data/           the files, as pg_basebackup copies them
    DIRECTORY/SERVER/base/20261128T140300Z/tablespaces/
    DIRECTORY/SERVER/wal/000001/                           WAL, as pg_receivewal receives it; after a gap 000002, and so
                                                           where the server is another cluster
    DIRECTORY/SERVER/lock
"""

from __future__ import annotations

import asyncio
import fcntl
import itertools
import json
import os
import re
import shutil
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from ...cancellation import run_to_completion
from ...errors import OperationStateError, ProvisioningError, RecoveryError
from ...postgres import connections
from ...postgres.connections import Connection
from ...postgres.programs import Programs, find_server_programs, run_program
from ...servers import Server
from .kept_wal import KeptWal, directory_system, needed_ranges, prune_wal, read_wal, system_identifier
from .timelines import WalRange
from .verification import verify_files
from .wal_files import segment_number

_LABEL = re.compile(r"^START WAL LOCATION: (?P<lsn>[0-9A-F/]+) \(file (?P<file>[0-9A-F]{24})\)$", re.MULTILINE)
_PARTIAL = ".partial"
_FORM = "%Y%m%dT%H%M%SZ"
_SPACE_RESERVE = 1.05  # of the size that is measured before the copy begins, for what is written until its end

_FACTS = """
SELECT pg_catalog.clock_timestamp() AS now, pg_catalog.current_setting('wal_segment_size') AS segment,
       (SELECT setting::bigint FROM pg_catalog.pg_settings WHERE name = 'wal_segment_size') AS segment_bytes,
       (SELECT pg_catalog.sum(pg_catalog.pg_tablespace_size(oid)) FROM pg_catalog.pg_tablespace)::bigint AS bytes,
       (SELECT rolreplication OR rolsuper FROM pg_catalog.pg_roles WHERE rolname = current_user) AS may_replicate
"""
_TABLESPACES = """
SELECT oid::bigint AS oid, pg_catalog.pg_tablespace_location(oid) AS location FROM pg_catalog.pg_tablespace
 WHERE pg_catalog.pg_tablespace_location(oid) <> ''
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseBackup:
    """A base backup.

    Attributes:
        server: The server's name.
        id: Its name: when it was begun, in UTC.
        version: The server's major version.
        started_at: When it was begun, by the server's clock.
        ended_at: When it had ended; earlier times cannot be recovered from it.
        first_segment: The file of WAL that a recovery begins with.
        segment_bytes: The size of a file of WAL.
        size_bytes: The size of its files.
    """

    server: str
    id: str
    version: int
    started_at: datetime
    ended_at: datetime
    first_segment: str
    segment_bytes: int
    size_bytes: int

    @property
    def first_number(self) -> int:
        """The place of ``first_segment`` among all."""
        return segment_number(self.first_segment, self.segment_bytes)

    @property
    def timeline(self) -> int:
        """The timeline that the server was on when it was begun."""
        return int(self.first_segment[:8], 16)


class BackupDirectory:
    """The directory of one server's base backups and WAL.

    Args:
        root: The directory of all servers.
        server: The server's name.
    """

    def __init__(self, root: Path, server: str) -> None:
        self.server = server
        self.path = root / server.replace("/", "_")
        self.bases = self.path / "base"
        self.wal = self.path / "wal"

    def prepare(self) -> None:
        """Make the directories, for this account alone: they have all tenants' data."""
        for directory in (self.path, self.bases, self.wal):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path.chmod(0o700)

    def base_backups(self) -> list[BaseBackup]:
        """Return the base backups that are whole, the oldest first."""
        found = []
        for path in sorted(self.bases.glob("*/backup.json")) if self.bases.is_dir() else ():
            if path.parent.name.endswith(_PARTIAL):
                continue  # it is being made, or deleted
            values = json.loads(path.read_text("utf-8"))
            times = {name: datetime.fromisoformat(values[name]) for name in ("started_at", "ended_at")}
            found.append(BaseBackup(**{**values, **times}))
        return found

    def data(self, backup: BaseBackup) -> Path:
        """Return the directory of a base backup's files."""
        return self.bases / backup.id / "data"

    def system(self, backup: BaseBackup) -> int | None:
        """Return the system identifier of a base backup's cluster; None where its files are not there."""
        return system_identifier(self.data(backup))

    def ranges(self, backup: BaseBackup) -> list[WalRange]:
        """Return the WAL that a base backup needs to be consistent."""
        begin = backup.first_number * backup.segment_bytes
        return needed_ranges(self.data(backup)) or [WalRange(backup.timeline, begin, begin)]

    def wal_after(self, backup: BaseBackup) -> KeptWal:
        """Return the WAL of a base backup's cluster, what is in the base backup included."""
        data = self.data(backup)
        directories = [data / "pg_wal", *self.wal_directories()]
        return read_wal(directories, backup.segment_bytes, system=self.system(backup))

    def leads_on(self, backup: BaseBackup) -> bool:
        """Whether the newest WAL can be reached from a base backup: it is of the same cluster, and of its timeline."""
        system = self.system(backup)
        received = (directory_system(path) for path in reversed(self.wal_directories()))
        if next((found for found in received if found is not None), system) != system:
            return False
        ranges = self.ranges(backup)
        return all(branch.has(ranges) for branch in self.wal_after(backup).branches[-1:])

    def wal_directories(self) -> list[Path]:
        """Return the directories of WAL in order."""
        return sorted(path for path in self.wal.iterdir() if path.is_dir()) if self.wal.is_dir() else []

    @contextmanager
    def locked(self, name: str, *, shared: bool = False) -> Iterator[None]:
        """Hold a lock of this directory, so that no file is deleted that a recovery reads, for example.

        Raises:
            OperationStateError: another process holds it.
        """
        descriptor = os.open(self.path / name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OperationStateError(
                    f"another process works on {str(self.path)!r} now; try again when it has ended"
                ) from None
            yield
        finally:
            os.close(descriptor)


class BaseBackups:
    """Takes, verifies and prunes base backups of one server.

    Args:
        server: The server.
        directory: Where they are.
        client_programs: The directory of PostgreSQL's programs; None as in ``find_programs``.
    """

    def __init__(self, server: Server, directory: BackupDirectory, *, client_programs: str | None) -> None:
        self._server = server
        self._directory = directory
        self._client_programs = client_programs

    async def take(self) -> BaseBackup:
        """Copy the server's files, with the WAL that they need, and verify the copy.

        Raises:
            RecoveryError: the server refuses, the copy does not verify, or the disk is too small for it.
            ConfigurationError: there are no programs of the server's version.
            OperationStateError: another process takes one now.
            ServerUnavailableError: the server does not answer.
        """
        directory = self._directory
        await asyncio.to_thread(directory.prepare)
        with directory.locked("base.lock"):
            async with connected(self._server) as connection:
                facts = await connection.fetchrow(_FACTS)
                tablespaces = {row["oid"]: row["location"] for row in await connection.fetch(_TABLESPACES)}
                version = connections.version(connection)
                assert facts is not None  # noqa: S101 - it has no condition
                check_replication(self._server, bool(facts["may_replicate"]))
                programs = await asyncio.to_thread(find_server_programs, version, self._client_programs)
                await asyncio.to_thread(check_space, directory.path, int(facts["bytes"] * _SPACE_RESERVE))
                made = directory.bases / self._free_name(facts["now"])
                partial = made.with_name(f"{made.name}{_PARTIAL}")
                try:
                    await asyncio.to_thread(self._clear)
                    partial.mkdir(mode=0o700)
                    await self._copy(programs, partial, made, tablespaces)
                    ended_at = await connection.fetchval("SELECT pg_catalog.clock_timestamp()")
                    backup = await asyncio.to_thread(
                        self._describe, partial, made.name, version, int(facts["segment_bytes"]), facts["now"], ended_at
                    )
                    partial.rename(made)
                finally:
                    await run_to_completion(asyncio.to_thread(shutil.rmtree, partial, True))
        return backup

    def _free_name(self, now: datetime) -> str:
        # two may begin within a second, or the server's clock be set back
        begun = now.astimezone(UTC).strftime(_FORM)
        names = itertools.chain([begun], (f"{begun}-{number}" for number in itertools.count(2)))
        return next(name for name in names if not (self._directory.bases / name).exists())

    async def _copy(self, programs: Programs, partial: Path, made: Path, tablespaces: dict[int, str]) -> None:
        mapped = [
            f"--tablespace-mapping={_escaped(location)}={_escaped(str(partial / 'tablespaces' / str(oid)))}"
            for oid, location in tablespaces.items()
        ]
        data = partial / "data"
        try:
            await run_program(
                [
                    programs.path("pg_basebackup"),
                    f"--pgdata={data}",
                    "--checkpoint=fast",
                    "--wal-method=stream",
                    "--manifest-checksums=SHA256",
                    f"--label=tenancy {made.name}",
                    "--no-password",
                    *mapped,
                ],
                replication_environment(self._server),
            )
        except ProvisioningError as exc:
            raise RecoveryError(f"server {self._server.name!r} has no base backup: {exc}") from exc
        await verify_files(programs, data)
        for oid in tablespaces:
            # relative, so that the directory can be moved
            link = data / "pg_tblspc" / str(oid)
            link.unlink()
            link.symlink_to(Path("..", "..", "tablespaces", str(oid)))

    def _describe(
        self, partial: Path, name: str, version: int, segment_bytes: int, started_at: datetime, ended_at: datetime
    ) -> BaseBackup:
        label = _LABEL.search((partial / "data" / "backup_label").read_text("utf-8"))
        if label is None:
            raise RecoveryError("the base backup has no label that names its first file of WAL")
        backup = BaseBackup(
            server=self._server.name,
            id=name,
            version=version,
            started_at=started_at,
            ended_at=ended_at,
            first_segment=label["file"],
            segment_bytes=segment_bytes,
            size_bytes=size_of(partial),
        )
        text = json.dumps(asdict(backup), default=str, indent=2)
        (partial / "backup.json").write_text(f"{text}\n", "utf-8")
        return backup

    async def verify(self, backup: BaseBackup) -> None:
        """Compare the files of a base backup with its checksums.

        Raises:
            RecoveryError: a file was changed or is missing.
        """
        programs = await asyncio.to_thread(find_server_programs, backup.version, self._client_programs)
        await verify_files(programs, self._directory.bases / backup.id / "data")

    async def prune(self, *, keep_seconds: float) -> list[BaseBackup]:
        """Delete the base backups, and the WAL, that no time of the last ``keep_seconds`` needs; returns the former.

        The newest one is always kept.
        """
        return await asyncio.to_thread(self._prune, timedelta(seconds=keep_seconds))

    def _prune(self, window: timedelta) -> list[BaseBackup]:
        directory = self._directory
        found = directory.base_backups()
        if not found:
            return []
        with directory.locked("lock"):
            kept = self._needed(found, datetime.now(UTC) - window)
            gone = [backup for backup in found if backup not in kept]
            for backup in gone:
                path = directory.bases / backup.id
                # it is none any more, should this end in the middle, and _clear deletes the rest
                shutil.rmtree(path.rename(path.with_name(f"{path.name}{_PARTIAL}")))
            needed: dict[int, tuple[int, int]] = {}
            for backup in kept:
                if (system := directory.system(backup)) is None:
                    break  # it is damaged: nobody knows which WAL is its own
                first, _ = needed.get(system, (backup.first_number, 0))
                needed[system] = (min(first, backup.first_number), backup.segment_bytes)
            else:
                prune_wal(directory.wal_directories(), needed)
            for path in directory.wal_directories()[:-1]:
                if not any(path.iterdir()):
                    path.rmdir()
        return gone

    def _needed(self, found: Sequence[BaseBackup], oldest: datetime) -> list[BaseBackup]:
        """Return the base backups that a recovery at a time from ``oldest`` on begins with."""
        # from the last one that had ended before that
        reaching = [number for number, backup in enumerate(found) if backup.ended_at <= oldest]
        first = reaching[-1] if reaching else 0
        kept, last = list(found[first:]), found[first]
        if first == 0:
            return kept
        # a server that was recovered to an earlier time goes on from there: that one leads no further
        directory = self._directory
        system, ranges = directory.system(last), directory.ranges(last)
        before = [one for one in found[:first] if directory.system(one) == system]
        for branch in directory.wal_after(last).branches:
            if branch.number > last.timeline and not branch.has(ranges):
                able = [one for one in before if branch.has(directory.ranges(one))]
                kept[:0] = [one for one in able[-1:] if one not in kept]
        return kept

    def _clear(self) -> None:
        """Delete what a killed process has left; the caller holds a lock that no base backup is taken without."""
        for path in self._directory.bases.iterdir():
            if path.name.endswith(_PARTIAL):
                shutil.rmtree(path, ignore_errors=True)


@asynccontextmanager
async def connected(server: Server) -> AsyncIterator[Connection]:
    """An administrator's connection to a server.

    Raises:
        ServerUnavailableError: the server does not answer.
    """
    connection = await server.connect_admin()
    try:
        yield connection
    finally:
        await run_to_completion(connections.close(connection))


def check_replication(server: Server, may_replicate: bool) -> None:
    """Refuse an administrator who may not replicate.

    Raises:
        RecoveryError: ... with what to do.
    """
    if not may_replicate:
        raise RecoveryError(
            f"the administrator of server {server.name!r} may not replicate: run ALTER ROLE ... REPLICATION as a "
            "superuser; a managed server does not offer that, recover it by its own means and name the recovered "
            "server with --recovered-server"
        )


def replication_environment(server: Server) -> dict[str, str]:
    """Return libpq's variables for programs that replicate a server, as its administrator."""
    dsn = server.dsn
    found = dsn.environment(user=dsn.user or "", database="replication", purpose="tenancy-recovery")
    del found["PGDATABASE"]
    return found if dsn.password is None else {**found, "PGPASSWORD": dsn.secret()}


def check_space(directory: Path, needed: int, *, most: int | None = None) -> None:
    """Refuse what the disk has no room for.

    Raises:
        RecoveryError: ... with the sizes.
    """
    free = shutil.disk_usage(directory).free
    if most is not None and needed > most:
        raise RecoveryError(
            f"{needed:,} bytes are needed in {str(directory)!r}, more than recovery.max_bytes, {most:,}"
        )
    if needed > free:
        raise RecoveryError(f"{needed:,} bytes are needed in {str(directory)!r}, and {free:,} are free")


def size_of(path: Path) -> int:
    """Return the size of the files in a directory, in bytes."""
    return sum((Path(directory) / name).lstat().st_size for directory, _, files in os.walk(path) for name in files)


def _escaped(path: str) -> str:
    return path.replace("=", "\\=")


__all__ = [
    "BackupDirectory",
    "BaseBackup",
    "BaseBackups",
    "check_replication",
    "check_space",
    "connected",
    "replication_environment",
    "size_of",
]
