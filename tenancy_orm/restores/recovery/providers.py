"""``Recovery``: what recovers a server at a point in time; ``DirectoryRecovery`` does it from base backups and WAL."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import groupby, pairwise
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
from .kept_wal import KeptWal
from .scratch import RecoveredDatabase, ScratchServer
from .timelines import Branch
from .verification import verify_files
from .wal_files import Segment, copy_partial, first_time, last_time, stretches

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
        self,
        keeper: Keeper,
        programs: Programs,
        request: RecoveryRequest,
        *,
        wal: Path,
        restore_command: str,
        timeline: str = "latest",
    ) -> AsyncIterator[RecoveredDatabase]:
        """Recover the files in ``keeper.home / "data"``, and run them for the body."""
        scratch = ScratchServer(
            keeper, programs, wal=wal, restore_command=restore_command, timeline=timeline, settings=self.settings
        )
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Way:
    """A base backup, and the WAL of one timeline from there to the first gap.

    Attributes:
        backup: The base backup.
        programs: PostgreSQL's, of its version.
        branch: The timeline.
        segments: The WAL.
        has_gap: Whether there is WAL of this timeline after that, with some missing in between.
        newest: When the last transaction in it ended; None without one.
        histories: The files that say where timelines begin.
    """

    backup: BaseBackup
    programs: Programs
    branch: Branch
    segments: Sequence[Segment]
    has_gap: bool
    newest: datetime | None
    histories: Sequence[Path]

    def reaches(self, target: datetime) -> bool:
        """Whether it goes beyond a time."""
        return self.newest is not None and self.newest > target

    @property
    def size_bytes(self) -> int:
        """How much space a recovery of it takes."""
        return self.backup.size_bytes + len(self.segments) * self.backup.segment_bytes

    @property
    def timeline(self) -> str:
        """The value of ``recovery_target_timeline``: without a history, PostgreSQL only knows that of the files."""
        return str(self.branch.number) if self.branch.has_history or self.branch.number == 1 else "current"


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
        ends = list[tuple[datetime | None, datetime | None]]()
        for cluster in await asyncio.to_thread(_by_cluster, directory, backups):
            ends += await self._stretches(directory, cluster)
        newest = next((end for _, end in reversed(ends) if end is not None), None)
        gaps = tuple((end, begin) for (_, end), (begin, _) in pairwise(ends))
        return RecoveryWindow(server=server, oldest=backups[0].ended_at, newest=newest, gaps=gaps)

    async def _stretches(
        self, directory: BackupDirectory, backups: Sequence[BaseBackup]
    ) -> list[tuple[datetime | None, datetime | None]]:
        """Return the times that stretches of WAL of a cluster begin to be of use, and end: of its newest timeline."""
        wal = await asyncio.to_thread(directory.wal_after, backups[0])
        for branch in reversed(wal.branches):
            able = [one for one in backups if branch.has(directory.ranges(one))]
            if able:
                break
        else:
            return []
        first = able[0]
        programs = await asyncio.to_thread(find_server_programs, first.version, self._options.client_programs)
        found = []
        for part in stretches(_from(first, branch.select(wal.segments, first.segment_bytes))):
            # a base backup within a later stretch is where it can be recovered from again
            begin = next((one.ended_at for one in able if one.first_number >= part[0].number), None)
            found.append((begin, await last_time(programs, part[-3:])))
        return found

    @asynccontextmanager
    async def recover(self, request: RecoveryRequest) -> AsyncIterator[RecoveredDatabase]:
        """Recover a server for the body, see ``Recovery``."""
        directory = await self._directory(request.server)
        # nothing of it is deleted until it is copied
        with directory.locked("lock", shared=True):
            way = await self._plan(directory, request)
            opened = self._options.open(way.size_bytes)
            keeper = await opened.__aenter__()
            try:
                await _copy(keeper, directory, way)
                # a byte that was lost on the disk would come into the tenant's rows unseen
                await verify_files(way.programs, keeper.home / "data")
            except BaseException as exc:
                await opened.__aexit__(type(exc), exc, exc.__traceback__)
                raise
        try:
            wal = keeper.home / "wal"
            run = self._options.run(
                keeper,
                way.programs,
                request,
                wal=wal,
                restore_command='cp "../wal/%f" "%p"',
                timeline=way.timeline,
            )
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

    async def _plan(self, directory: BackupDirectory, request: RecoveryRequest) -> _Way:
        target, server = request.time, request.server
        backups = directory.base_backups()
        able = [backup for backup in backups if backup.ended_at <= target]
        if not able:
            raise RecoveryTargetError(
                f"{target.isoformat()} is before the oldest base backup of server {server!r}, which ended at "
                f"{backups[0].ended_at.isoformat()}"
            )
        # at that time the server was the cluster that the last of them is of
        cluster = (await asyncio.to_thread(_by_cluster, directory, able))[-1]
        way = await self._reaching(directory, cluster, target)
        if way is None:
            raise RecoveryTargetError(
                f"no base backup of server {server!r} that ended before {target.isoformat()} leads there: the server "
                "was recovered to a time before them; choose a time after the next base backup"
            )
        if not way.reaches(target):
            reached = "" if way.newest is None else way.newest.isoformat()
            if way.has_gap:
                last = way.segments[-1].name if way.segments else "none"
                raise RecoveryTargetError(
                    f"WAL of server {server!r} is missing after file {last}{reached and f', after {reached}'}: "
                    f"{target.isoformat()} cannot be reached from base backup {way.backup.id}; choose a time before "
                    "that, or one after the next base backup"
                )
            after = (
                f"{target.isoformat()} is after the last transaction in the WAL of server {server!r}"
                f"{reached and f', which ended at {reached}'}"
            )
            if not await asyncio.to_thread(directory.leads_on, way.backup):
                raise RecoveryTargetError(
                    f"{after}, as far as base backup {way.backup.id} leads: the server is another cluster since, or "
                    "was recovered to an earlier time; choose a time before that, or one after the next base backup"
                )
            raise RecoveryTargetError(
                f"{after}; make sure that tenancy backup wal runs and reaches the server, and try again"
            )
        needed = await _first_after(way.programs, way.segments, target)
        return replace(way, segments=way.segments[: needed + 2])

    async def _reaching(
        self, directory: BackupDirectory, backups: Sequence[BaseBackup], target: datetime
    ) -> _Way | None:
        """Return the way to a time, or else the one that comes nearest; None where no base backup leads there.

        Where the receiver runs, and its WAL does not reach the time yet, a transaction is ended on the server, and
        waited for.
        """
        asked = False
        deadline = asyncio.get_running_loop().time() + _RECEIVE_SECONDS
        while True:
            way = await self._way(directory, backups, target)
            if way is None or way.reaches(target) or way.has_gap or not _is_receiving(directory):
                return way
            if asyncio.get_running_loop().time() > deadline or not await asyncio.to_thread(
                directory.leads_on, way.backup
            ):
                return way
            if not asked:
                asked = True
                with suppress(TenancyError, *SERVER_FAILURES):
                    async with connected(self._servers[directory.server]) as connection:
                        await connection.execute(_COMMIT)
            await asyncio.sleep(POLL_SECONDS * 10)

    async def _way(self, directory: BackupDirectory, backups: Sequence[BaseBackup], target: datetime) -> _Way | None:
        """Return the way to a time in what is there now, see ``_reaching``."""
        newest = backups[-1]
        programs = await asyncio.to_thread(find_server_programs, newest.version, self._options.client_programs)
        wal = await asyncio.to_thread(directory.wal_after, newest)
        found: _Way | None = None
        for branch in await _since(programs, wal, newest.segment_bytes, target):
            backup = next((one for one in reversed(backups) if branch.has(directory.ranges(one))), None)
            if backup is None:
                continue
            if backup is not newest:
                wal = await asyncio.to_thread(directory.wal_after, backup)
            parts = stretches(_from(backup, branch.select(wal.segments, backup.segment_bytes)))
            part = parts[0] if parts and parts[0][0].number == backup.first_number else []
            found = _Way(
                backup=backup,
                programs=programs,
                branch=branch,
                segments=part,
                has_gap=len(parts) > (1 if part else 0),
                newest=await last_time(programs, part),
                histories=tuple(wal.histories.values()),
            )
            if found.reaches(target):
                break
        return found


async def _since(programs: Programs, wal: KeptWal, segment_bytes: int, target: datetime) -> Sequence[Branch]:
    """Return the timeline that the server was on at a time, and the later ones.

    What it has done before it was recovered to an earlier time is on the former timeline alone.
    """
    live = 0
    for place, branch in enumerate(wal.branches[1:], 1):
        began = await first_time(programs, branch.own(wal.segments, segment_bytes), branch.begin)
        if began is not None and began <= target:
            live = place
    return wal.branches[live:]


def _by_cluster(directory: BackupDirectory, backups: Sequence[BaseBackup]) -> list[list[BaseBackup]]:
    """Divide base backups by their cluster, which is another one where the server was replaced by it."""
    return [list(group) for _, group in groupby(backups, directory.system)]


def _from(backup: BaseBackup, segments: Sequence[Segment]) -> list[Segment]:
    """Return the segments that a recovery from a base backup may need."""
    return [segment for segment in segments if segment.number >= backup.first_number]


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


def _is_receiving(directory: BackupDirectory) -> bool:
    try:
        with directory.locked("wal.lock", shared=True):
            return False
    except OperationStateError:
        return True


async def _copy(keeper: Keeper, directory: BackupDirectory, way: _Way) -> None:
    """Copy a base backup and the WAL after it into the scratch directory, where the server changes them."""
    source, home = directory.bases / way.backup.id, keeper.home
    wal = home / "wal"
    wal.mkdir(mode=0o700)
    await _run(keeper, "cp", "-a", str(source / "data"), str(home / "data"))
    if (source / "tablespaces").is_dir():
        await _run(keeper, "cp", "-a", str(source / "tablespaces"), str(home / "tablespaces"))
        # in the base backup they lead two directories up as well
        for link in (home / "data" / "pg_tblspc").iterdir():
            link.unlink()
            link.symlink_to(home / "tablespaces" / link.name)
    whole = [str(segment.path) for segment in way.segments if not segment.is_partial]
    whole += [str(path) for path in way.histories]
    for begin in range(0, len(whole), _COPIED_AT_ONCE):
        await _run(keeper, "cp", "-p", *whole[begin : begin + _COPIED_AT_ONCE], str(wal))
    for segment in way.segments:
        if segment.is_partial:
            await asyncio.to_thread(copy_partial, segment, wal / segment.name)


async def _run(keeper: Keeper, *arguments: str) -> None:
    found = await keeper.run(*arguments, as_account=False)
    if found.status != 0:
        raise RecoveryError(f"{Path(arguments[0]).name} failed: {found.errors.strip()[-_SHOWN:]}")


__all__ = ["DirectoryRecovery", "Recovery", "RecoveryRequest", "RecoveryWindow", "ScratchOptions"]
