"""``Recovery``: what recovers a server at a point in time; ``DirectoryRecovery`` does it from base backups and WAL."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Protocol
from uuid import UUID

from ...errors import OperationStateError, RecoveryError, RecoveryTargetError, TenancyError
from ...postgres.connections import POLL_SECONDS
from ...postgres.failures import SERVER_FAILURES
from ...postgres.programs import Programs, find_server_programs
from ...servers import Servers
from .accounts import Account, choose_account
from .base_backups import BackupDirectory, BaseBackup, check_space, connected
from .keeper import Keeper, open_keeper
from .scratch import RecoveredDatabase, ScratchServer
from .verification import verify_files
from .wal_files import Segment, copy_partial, last_time, list_histories, list_segments, read_header, stretches

_RECEIVE_SECONDS = 30.0
_RESERVE_BYTES = 1024**3  # what a server writes while it recovers
_COPIED_AT_ONCE = 500
_SHOWN = 300
_COMMIT = "SELECT pg_catalog.pg_logical_emit_message(true, 'tenancy', '')"
"""Ends a transaction in the WAL that changes nothing: a recovery knows by it that it has passed a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryRequest:
    """What is recovered, and whom it is recovered for.

    Attributes:
        server: The server's name.
        database: The only database that is opened.
        time: The point in time.
        installation: This installation, which the database's marker must name.
        tenant_id: The tenant, which the marker must name.
        slug: The tenant's slug, for messages.
    """

    server: str
    database: str
    time: datetime
    installation: UUID
    tenant_id: UUID
    slug: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryWindow:
    """The times that a server can be recovered at.

    Attributes:
        server: The server's name.
        oldest: From here on.
        newest: Before the last transaction that is received.
        gaps: Times between which WAL is missing.
    """

    server: str
    oldest: datetime | None
    newest: datetime | None
    gaps: tuple[tuple[datetime | None, datetime | None], ...] = ()


class Recovery(Protocol):
    """Recovers servers at a point in time (``recovery.provider``)."""

    async def window(self, server: str) -> RecoveryWindow:
        """Return the times that a server can be recovered at."""

    async def check(self, request: RecoveryRequest) -> None:
        """Make sure that ``recover`` has what it needs; nothing is started.

        Raises:
            RecoveryTargetError, RecoveryError, ConfigurationError: as ``recover``.
        """

    def recover(self, request: RecoveryRequest) -> AbstractAsyncContextManager[RecoveredDatabase]:
        """Recover a server for the body, and let one login in, to one database.

        Raises:
            RecoveryTargetError: what is kept does not reach the time. Nothing was started.
            RecoveryError: the server could not be recovered.
            MarkerMismatchError: the database was not that tenant's.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class ScratchOptions:
    """How and where recovered servers run.

    Attributes:
        directory: Where their files are while they run.
        account: The account that they run as where this process is root's.
        settings: Further settings of PostgreSQL.
        max_bytes: How much space one may take.
        client_programs: The directory of PostgreSQL's programs; None as in ``find_programs``.
    """

    directory: Path
    account: str
    settings: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    max_bytes: int
    client_programs: str | None = None

    @asynccontextmanager
    async def open(self, needed: int) -> AsyncIterator[Keeper]:
        """A place for a recovered server of so many bytes.

        Raises:
            RecoveryError: there is no room for it.
            ConfigurationError: there is no account to run it as.
        """
        account = await self.check(needed)
        async with open_keeper(self.directory, account) as keeper:
            yield keeper

    async def check(self, needed: int) -> Account:
        """Return the account; make sure that there is room for so many bytes.

        Raises:
            RecoveryError, ConfigurationError: as ``open``.
        """
        account = choose_account(self.account)
        # another account goes through it, into a directory that it alone can read
        await asyncio.to_thread(self.directory.mkdir, mode=0o711, parents=True, exist_ok=True)
        await asyncio.to_thread(check_space, self.directory, needed + _RESERVE_BYTES, most=self.max_bytes)
        return account

    @asynccontextmanager
    async def run(
        self, keeper: Keeper, programs: Programs, request: RecoveryRequest, *, wal: Path, restore_command: str
    ) -> AsyncIterator[RecoveredDatabase]:
        """Recover the files in ``keeper.home / "data"``, and run them for the body."""
        scratch = ScratchServer(keeper, programs, wal=wal, restore_command=restore_command, settings=self.settings)
        last_commit = await scratch.recover(request.time)
        async with scratch.open(request.database, request.installation, request.tenant_id, request.slug) as dsn:
            yield RecoveredDatabase(
                dsn=dsn,
                database=request.database,
                version=programs.version,
                directory=keeper.home,
                time=request.time,
                last_commit=last_commit,
            )


@dataclass(frozen=True, slots=True)
class _Plan:
    backup: BaseBackup
    programs: Programs
    segments: Sequence[Segment]
    histories: Sequence[Path]

    @property
    def size_bytes(self) -> int:
        return self.backup.size_bytes + len(self.segments) * self.backup.segment_bytes


class DirectoryRecovery:
    """Recovers servers from the base backups of ``tenancy backup base`` and the WAL of ``tenancy backup wal``.

    Args:
        root: The directory that they are in.
        servers: The servers by name.
        options: How and where recovered servers run.
    """

    def __init__(self, root: Path, servers: Servers, options: ScratchOptions) -> None:
        self._root = root
        self._servers = servers
        self._options = options

    async def window(self, server: str) -> RecoveryWindow:
        """Return the times that a server can be recovered at."""
        directory = BackupDirectory(self._root, server)
        backups = await asyncio.to_thread(directory.base_backups)
        if not backups:
            return RecoveryWindow(server=server, oldest=None, newest=None)
        oldest = backups[0]
        programs = await asyncio.to_thread(find_server_programs, oldest.version, self._options.client_programs)
        parts = stretches(await asyncio.to_thread(_segments, directory, oldest))
        ends = [(await last_time(programs, part[-3:]), part) for part in parts]
        gaps = []
        for (end, _), (_, part) in pairwise(ends):
            # a base backup within the later stretch is where it can be recovered from again
            after = next((b.ended_at for b in backups if b.first_number >= part[0].number), None)
            gaps.append((end, after))
        newest = next((end for end, _ in reversed(ends) if end is not None), None)
        return RecoveryWindow(server=server, oldest=oldest.ended_at, newest=newest, gaps=tuple(gaps))

    @asynccontextmanager
    async def recover(self, request: RecoveryRequest) -> AsyncIterator[RecoveredDatabase]:
        """Recover a server for the body, see ``Recovery``."""
        directory = await self._directory(request.server)
        # nothing of it is deleted until it is copied
        with directory.locked("lock", shared=True):
            plan = await self._plan(directory, request)
            opened = self._options.open(plan.size_bytes)
            keeper = await opened.__aenter__()
            try:
                await _copy(keeper, directory, plan)
                # a byte that was lost on the disk would come into the tenant's rows unseen
                await verify_files(plan.programs, keeper.home / "data")
            except BaseException as exc:
                await opened.__aexit__(type(exc), exc, exc.__traceback__)
                raise
        try:
            wal = keeper.home / "wal"
            run = self._options.run(keeper, plan.programs, request, wal=wal, restore_command='cp "../wal/%f" "%p"')
            async with run as recovered:
                yield recovered
        finally:
            await opened.__aexit__(None, None, None)

    async def check(self, request: RecoveryRequest) -> None:
        """Make sure that the time can be reached, and that there is room for the server."""
        directory = await self._directory(request.server)
        with directory.locked("lock", shared=True):
            await self._options.check((await self._plan(directory, request)).size_bytes)

    async def _directory(self, server: str) -> BackupDirectory:
        directory = BackupDirectory(self._root, server)
        if not await asyncio.to_thread(directory.base_backups):
            raise RecoveryTargetError(
                f"there is no base backup of server {server!r} in {str(self._root)!r}; take one with: "
                f"tenancy backup base --server {server}"
            )
        return directory

    async def _plan(self, directory: BackupDirectory, request: RecoveryRequest) -> _Plan:
        target, server = request.time, request.server
        backups = directory.base_backups()
        able = [backup for backup in backups if backup.ended_at <= target]
        if not able:
            raise RecoveryTargetError(
                f"{target.isoformat()} is before the oldest base backup of server {server!r}, which ended at "
                f"{backups[0].ended_at.isoformat()}"
            )
        backup = able[-1]
        programs = await asyncio.to_thread(find_server_programs, backup.version, self._options.client_programs)
        part, later = await self._reaching(directory, backup, programs, target)
        newest = await last_time(programs, part)
        if newest is None or newest <= target:
            reached = "" if newest is None else f", after {newest.isoformat()}"
            if later:
                raise RecoveryTargetError(
                    f"WAL of server {server!r} is missing after file {part[-1].name if part else 'none'}{reached}: "
                    f"{target.isoformat()} cannot be reached from base backup {backup.id}; choose a time before that, "
                    "or one after the next base backup"
                )
            raise RecoveryTargetError(
                f"{target.isoformat()} is after the last transaction in the WAL of server {server!r}"
                f"{'' if newest is None else f', which ended at {newest.isoformat()}'}; make sure that tenancy backup "
                "wal runs and reaches the server, and try again"
            )
        needed = await _first_after(programs, part, target)
        histories = await asyncio.to_thread(list_histories, directory.wal_directories())
        return _Plan(backup, programs, part[: needed + 2], histories)

    async def _reaching(
        self, directory: BackupDirectory, backup: BaseBackup, programs: Programs, target: datetime
    ) -> tuple[list[Segment], bool]:
        """Return the WAL from the base backup to the first gap, and whether there is some after that.

        Where the receiver runs, and its WAL does not reach the time yet, a transaction is ended on the server, and
        waited for.
        """
        asked = False
        deadline = asyncio.get_running_loop().time() + _RECEIVE_SECONDS
        while True:
            parts = stretches(await asyncio.to_thread(_segments, directory, backup))
            part = parts[0] if parts and parts[0][0].number == backup.first_number else []
            newest = await last_time(programs, part[-3:])
            reaches = newest is not None and newest > target
            if reaches or len(parts) > 1 or not _is_receiving(directory):
                return part, len(parts) > (1 if part else 0)
            if asyncio.get_running_loop().time() > deadline:
                return part, False
            if not asked:
                asked = True
                with suppress(TenancyError, *SERVER_FAILURES):
                    async with connected(self._servers[directory.server]) as connection:
                        await connection.execute(_COMMIT)
            await asyncio.sleep(POLL_SECONDS * 10)


async def _first_after(programs: Programs, part: Sequence[Segment], target: datetime) -> int:
    """Return the place of the first segment in which a transaction ended after a time."""
    low, high = 0, len(part) - 1
    while low < high:
        middle = (low + high) // 2
        newest = await last_time(programs, part[low : middle + 1])
        if newest is not None and newest > target:
            high = middle
        else:
            low = middle + 1
    return low


def _segments(directory: BackupDirectory, backup: BaseBackup) -> list[Segment]:
    """The WAL from the beginning of a base backup on, its own included. Another cluster's is none of it."""
    data = directory.bases / backup.id / "data"
    with (data / "global" / "pg_control").open("rb") as file:
        (system,) = struct.unpack("=Q", file.read(8))
    found = []
    for segment in list_segments([data / "pg_wal", *directory.wal_directories()], backup.segment_bytes):
        if segment.number < backup.first_number:
            continue
        header = None
        with suppress(FileNotFoundError):  # renamed, or deleted
            header = read_header(segment.path)
        if header is not None and header.system != system:
            raise RecoveryError(
                f"{str(segment.path)!r} is of another cluster than base backup {backup.id}: server {backup.server!r} "
                "was replaced; take a base backup, and have its WAL received in another directory"
            )
        found.append(segment)
    return found


def _is_receiving(directory: BackupDirectory) -> bool:
    try:
        with directory.locked("wal.lock", shared=True):
            return False
    except OperationStateError:
        return True


async def _copy(keeper: Keeper, directory: BackupDirectory, plan: _Plan) -> None:
    """Copy a base backup and the WAL after it into the scratch directory, where the server changes them."""
    source, home = directory.bases / plan.backup.id, keeper.home
    wal = home / "wal"
    wal.mkdir(mode=0o700)
    await _run(keeper, "cp", "-a", str(source / "data"), str(home / "data"))
    if (source / "tablespaces").is_dir():
        await _run(keeper, "cp", "-a", str(source / "tablespaces"), str(home / "tablespaces"))
        # in the base backup they lead two directories up as well
        for link in (home / "data" / "pg_tblspc").iterdir():
            link.unlink()
            link.symlink_to(home / "tablespaces" / link.name)
    whole = [str(segment.path) for segment in plan.segments if not segment.is_partial]
    whole += [str(path) for path in plan.histories]
    for begin in range(0, len(whole), _COPIED_AT_ONCE):
        await _run(keeper, "cp", "-p", *whole[begin : begin + _COPIED_AT_ONCE], str(wal))
    for segment in plan.segments:
        if segment.is_partial:
            await asyncio.to_thread(copy_partial, segment, wal / segment.name)


async def _run(keeper: Keeper, *arguments: str) -> None:
    found = await keeper.run(*arguments, as_account=False)
    if found.status != 0:
        raise RecoveryError(f"{Path(arguments[0]).name} failed: {found.errors.strip()[-_SHOWN:]}")


__all__ = ["DirectoryRecovery", "Recovery", "RecoveryRequest", "RecoveryWindow", "ScratchOptions"]
