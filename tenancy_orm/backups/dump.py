"""The dump of one database, on its way into a store: by ``pg_dump``, as files that are packed and encrypted in turn.

``pg_dump`` writes a directory with a file for each table. Each file is read, encrypted and deleted once it is complete,
so that the temporary directory has about as much as the largest table takes. When the store is slower than the server,
``pg_dump`` is stopped for a while.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol, TypeVar

from ..cancellation import run_to_completion
from ..errors import BackupError
from ..postgres import connections
from ..postgres.connections import Connection
from ..postgres.programs import Programs, running
from ..postgres.quoting import quote_pattern
from ..postgres.snapshots import LOCK_WAIT, begin_snapshot
from ..provisioning.copies.restoring import count_rows
from .archive import Digest, pack
from .encryption import encrypt
from .manifest import BackupExtension, BackupFile
from .sequences import read_sequences, unchanged
from .spool import Spool, largest_bytes, used_bytes
from .stores import Store

T = TypeVar("T")

logger = logging.getLogger("tenancy_orm.backups")

_POLL_SECONDS = 0.05
_STOP_SECONDS = 120.0  # an object store gives up by itself before that
_UNBOUNDED = {"statement_timeout": "0", "idle_in_transaction_session_timeout": "0", "row_security": "on"}
_COMPRESSION_NAMES_VERSION = 16  # from this on, --compress takes the name of a method

_FACTS = """
SELECT pg_catalog.pg_export_snapshot() AS snapshot, pg_catalog.pg_current_wal_lsn()::text AS lsn,
       pg_catalog.now() AS now, pg_catalog.current_setting('server_version') AS version,
       pg_catalog.pg_database_size(d.oid) AS bytes, pg_catalog.pg_encoding_to_char(d.encoding) AS encoding,
       d.datcollate AS "collate", d.datctype AS ctype,
       to_jsonb(d)->>'datlocprovider' AS provider,
       COALESCE(to_jsonb(d)->>'datlocale', to_jsonb(d)->>'daticulocale') AS locale,
       (SELECT pg_catalog.count(*) FROM pg_catalog.pg_largeobject_metadata) AS large_objects,
       -- row security of such a table holds for its owner, too
       EXISTS (SELECT FROM pg_catalog.pg_class WHERE relrowsecurity AND relforcerowsecurity) AS hides
  FROM pg_catalog.pg_database d WHERE d.datname = pg_catalog.current_database()
"""
# asyncpg knows the type text[], and would ask the server for name[], which takes 10 ms
_TABLES = """
SELECT pg_catalog.quote_ident(n.nspname) || '.' || pg_catalog.quote_ident(c.relname) AS name,
       pg_catalog.pg_table_size(c.oid) AS bytes
  FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
 WHERE c.relkind = 'r' AND c.relpersistence <> 't' AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
   -- a standby has no rows of unlogged tables, and lets nobody read them
   AND (c.relpersistence <> 'u' OR NOT pg_catalog.pg_is_in_recovery())
   AND n.nspname <> ALL ($1::text[]) AND ($2::text[] IS NULL OR n.nspname = ANY ($2::text[]))
   AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend e WHERE e.classid = 'pg_catalog.pg_class'::pg_catalog.regclass
                      AND e.objid = c.oid AND e.deptype = 'e')
 ORDER BY 1
"""
# Row security of the current role, by the rules of PostgreSQL: one permissive policy has to let all rows through, and
# no restrictive one may keep any. Nobody changes a policy of a table that is locked.
_FILTERED = """
SELECT pg_catalog.quote_ident(n.nspname) || '.' || pg_catalog.quote_ident(c.relname) AS name
  FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
 CROSS JOIN LATERAL (
   SELECT COALESCE(pg_catalog.bool_or(p.polpermissive AND p.condition = 'true'), false) AS lets_all_through,
          COALESCE(pg_catalog.bool_or(NOT p.polpermissive AND p.condition <> 'true'), false) AS keeps_some
     FROM (SELECT o.polpermissive, pg_catalog.pg_get_expr(o.polqual, o.polrelid) AS condition
             FROM pg_catalog.pg_policy o WHERE o.polrelid = c.oid AND o.polcmd IN ('r', '*')
              AND EXISTS (SELECT FROM pg_catalog.unnest(o.polroles) AS r (oid)
                           WHERE CASE WHEN r.oid = 0 THEN true ELSE pg_catalog.pg_has_role(r.oid, 'USAGE') END)) p
 ) policies
 WHERE pg_catalog.quote_ident(n.nspname) || '.' || pg_catalog.quote_ident(c.relname) = ANY ($1::text[])
   AND pg_catalog.row_security_active(c.oid) AND (NOT policies.lets_all_through OR policies.keeps_some)
 ORDER BY 1
"""
# what a partitioned table shows has to be in partitions that are dumped
_ELSEWHERE = """
SELECT t.relid::pg_catalog.regclass::text || ' of ' || c.oid::pg_catalog.regclass::text AS name
  FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
 CROSS JOIN LATERAL pg_catalog.pg_partition_tree(c.oid) t
  JOIN pg_catalog.pg_class l ON l.oid = t.relid JOIN pg_catalog.pg_namespace m ON m.oid = l.relnamespace
 WHERE c.relkind = 'p' AND n.nspname = ANY ($2::text[]) AND t.isleaf
   AND pg_catalog.quote_ident(m.nspname) || '.' || pg_catalog.quote_ident(l.relname) <> ALL ($1::text[])
 ORDER BY 1
"""
_EXTENSIONS = """
SELECT e.extname::text AS name, n.nspname::text AS schema, e.extversion AS version
  FROM pg_catalog.pg_extension e JOIN pg_catalog.pg_namespace n ON n.oid = e.extnamespace
 WHERE e.extname <> 'plpgsql' ORDER BY e.oid
"""


class Source(Protocol):
    """What is dumped: a login to one database."""

    def environment(self) -> dict[str, str]:
        """Return libpq's variables, the password included."""

    async def connect(self, *, timeout: float, settings: Mapping[str, str] = ..., purpose: str = ...) -> Connection:
        """Open a connection."""

    async def see_all_rows(self) -> None:
        """Read the rows of tables with FORCE ROW LEVEL SECURITY as well."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What was found in the snapshot that is dumped."""

    lsn: str
    snapshot_at: datetime
    server_version: str
    database_bytes: int
    locale: Mapping[str, str | None]
    extensions: tuple[BackupExtension, ...]
    large_objects: int
    largest_bytes: int
    tables: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dumped:
    """What is in the store."""

    snapshot: Snapshot
    sequences: Mapping[str, int]
    found: Any
    files: tuple[BackupFile, ...]
    dump_version: int
    archive_bytes: int
    archive_sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """What of a database is dumped.

    Attributes:
        left_out: Schemas that are not.
        schemas: Only these schemas; all where None.
        without_rows: Tables that are dumped without their rows, as quoted names.
        row_security: Whether the tables are read under row security, which must not keep a row from the login.
    """

    left_out: tuple[str, ...] = ()
    schemas: tuple[str, ...] | None = None
    without_rows: tuple[str, ...] = ()
    row_security: bool = False

    def to_arguments(self) -> Iterator[str]:
        """Return ``pg_dump``'s arguments."""
        yield from (f"--exclude-schema={quote_pattern(name)}" for name in self.left_out)
        yield from (f"--schema={quote_pattern(name)}" for name in self.schemas or ())
        yield from (f"--exclude-table-data={name}" for name in self.without_rows)
        if self.row_security:
            yield "--enable-row-security"


class Dump:
    """Dumps one database into a store.

    Args:
        source: The login.
        programs: Finds PostgreSQL's programs for a major version.
        spool: Temporary space.
        store: Where the dump goes.
        path: The archive's path there.
        recipients: Who can decrypt it.
        compression: As in ``backup.compression``.
        scope: What is dumped.
        look: Reads what else the manifest says, in the snapshot.
        connect_timeout: Seconds.
    """

    def __init__(
        self,
        source: Source,
        *,
        programs: Callable[[int], Awaitable[Programs]],
        spool: Spool,
        store: Store,
        path: str,
        recipients: Sequence[str],
        compression: str,
        scope: Scope,
        look: Callable[[Connection], Any],
        connect_timeout: float,
    ) -> None:
        self._source = source
        self._programs = programs
        self._spool = spool
        self._store = store
        self._path = path
        self._recipients = recipients
        self._compression = compression
        self._scope = scope
        self._look = look
        self._connect_timeout = connect_timeout

    async def run(self) -> Dumped:
        """Dump it. An error or a cancellation leaves nothing in the store or in the temporary space.

        Raises:
            BackupError: the store or the temporary space does not take it, or the login does not see all rows.
            ProvisioningError: ``pg_dump`` failed.
            asyncpg.PostgresError, OSError: the server refuses, or does not answer.
        """
        holding = await self._source.connect(
            timeout=self._connect_timeout, settings=_UNBOUNDED, purpose="tenancy-backup"
        )
        try:
            if connections.version(holding) >= 17:
                await holding.execute("SET transaction_timeout = 0")
            programs = await self._programs(connections.version(holding))
            # pg_dump and the counts see this snapshot, which is there as long as its transaction
            await begin_snapshot(holding, self._lockable)
            facts, tables = await self._facts(holding)
            if facts["hides"]:
                await self._source.see_all_rows()
            await self._refuse_partial(holding, tables)
            with self._spool.open(max((size for _, size in tables), default=0)) as directory:
                left_out, schemas = self._scope.left_out, self._scope.schemas
                sequences = await read_sequences(holding, left_out=left_out, schemas=schemas)
                dumped = await self._transfer(
                    programs, facts["snapshot"], directory / "dump", lambda: self._count(holding, facts, tables)
                )
                # what the login is a member of is no part of the snapshot
                await self._refuse_partial(holding, tables)
                sequences = await unchanged(holding, sequences, left_out=left_out, schemas=schemas)
                return replace(dumped, sequences=sequences)
        finally:
            await run_to_completion(connections.close(holding))

    async def _lockable(self, holding: Connection) -> list[str]:
        return await lockable_tables(holding, self._scope)

    async def _facts(self, holding: Connection) -> tuple[Any, list[tuple[str, int]]]:
        return await holding.fetchrow(_FACTS), await self._tables(holding)

    async def _tables(self, holding: Connection) -> list[tuple[str, int]]:
        return await read_tables(holding, self._scope)

    async def _refuse_partial(self, holding: Connection, tables: Sequence[tuple[str, int]]) -> None:
        """Refuse tables of which the dump, and the counts that it is compared with, would lack rows.

        Raises:
            BackupError: there are some.
        """
        if not self._scope.row_security:
            return  # pg_dump refuses it itself
        names = [name for name, _ in tables]
        if filtered := [row["name"] for row in await holding.fetch(_FILTERED, names)]:
            role = await holding.fetchval("SELECT current_user")
            raise BackupError(
                f"row security keeps rows of {', '.join(filtered)} from role {role!r}, and the backup would lack them; "
                "as the owner of the tables, run grant_application for the role again, and drop policies that are not "
                "this package's"
            )
        schemas = list(self._scope.schemas or ())
        if elsewhere := [row["name"] for row in await holding.fetch(_ELSEWHERE, names, schemas)]:
            raise BackupError(
                "the backup would lack the rows of partitions that it does not dump, since they are foreign tables or "
                f"in another schema: {', '.join(elsewhere)}; detach them, or bring them back"
            )

    async def _count(self, holding: Connection, facts: Any, tables: Sequence[tuple[str, int]]) -> tuple[Snapshot, Any]:
        counts = await count_rows(holding, [name for name, _ in tables])
        extensions = [BackupExtension(**dict(row)) for row in await holding.fetch(_EXTENSIONS)]
        snapshot = Snapshot(
            lsn=facts["lsn"],
            snapshot_at=facts["now"],
            server_version=facts["version"],
            database_bytes=facts["bytes"],
            locale={name: facts[name] for name in ("encoding", "collate", "ctype", "provider", "locale")},
            extensions=tuple(extensions),
            large_objects=facts["large_objects"],
            largest_bytes=max((size for _, size in tables), default=0),
            tables=counts,
        )
        return snapshot, await self._look(holding)

    async def _transfer(
        self,
        programs: Programs,
        snapshot: str,
        directory: Path,
        count: Callable[[], Awaitable[tuple[Snapshot, Any]]],
    ) -> Dumped:
        arguments = (
            programs.path("pg_dump"),
            "--format=directory",
            f"--file={directory}",
            "--no-sync",
            "--no-subscriptions",
            "--no-security-labels",
            f"--compress={_level(self._compression, programs.version)}",
            f"--lock-wait-timeout={LOCK_WAIT}",
            f"--snapshot={snapshot}",
            *self._scope.to_arguments(),
        )
        feed, digest, files = _Feed(), Digest(), list[BackupFile]()

        def ship() -> None:
            chunks = encrypt(pack(feed, files.append), self._recipients)
            self._store.write(self._path, digest.passing(chunks))

        async def write() -> None:
            await in_thread(ship, feed.stop)

        async def dump() -> None:
            try:
                await self._dump(arguments, directory, feed)
            finally:
                feed.stop()

        counting = asyncio.ensure_future(count())
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(write())
                group.create_task(dump())
                # a failure of it ends the others
                group.create_task(_awaited(counting))
        except BaseExceptionGroup as exc:
            raise _first(exc) from None
        finally:
            counting.cancel()
        found, extra = counting.result()
        return Dumped(
            snapshot=found,
            sequences={},
            found=extra,
            files=tuple(files),
            dump_version=programs.version,
            archive_bytes=digest.bytes,
            archive_sha256=digest.sha256,
        )

    async def _dump(self, arguments: Sequence[str], directory: Path, feed: _Feed) -> None:
        written = _Written(directory)
        async with running(arguments, self._source.environment()) as program:
            ended = asyncio.ensure_future(program.finish())
            try:
                while not ended.done():
                    await asyncio.wait([ended], timeout=_POLL_SECONDS)
                    feed.add(written.complete())
                    self._bound(program, directory, feed)
                await ended
            finally:
                ended.cancel()
        # the table of contents last
        feed.add(_rest(directory))
        feed.finish()

    def _bound(self, program: Any, directory: Path, feed: _Feed) -> None:
        used = used_bytes(directory)
        if used <= self._spool.max_bytes // 2:
            program.resume()
        elif feed.waiting:
            program.pause()
        elif largest_bytes(directory) > self._spool.max_bytes:
            raise BackupError(
                f"a table takes more than the {self._spool.max_bytes:,} bytes that backup.max_temporary_bytes allows "
                f"in {directory.parent.parent}; raise it"
            )
        else:
            program.resume()


class _Written:
    """Tells which files ``pg_dump`` has closed. It writes one at a time: all but the one that appeared last.

    Their times say nothing where the clock was set back. Files that appear while the directory is read may be found in
    another order; so those of the last two looks with new ones are left for later.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._seen: set[str] = set()
        self._last: list[Path] = []
        self._last_but_one: list[Path] = []
        self._looks = 0
        self._last_at = 0

    def complete(self) -> list[Path]:
        """Return the files that are known to be closed since the last call."""
        self._looks += 1
        try:
            names = {file.name for file in self._directory.iterdir()}
        except FileNotFoundError:
            return []  # there is none yet
        new = [self._directory / name for name in sorted(names - self._seen) if _has_rows(name)]
        if not new:
            return []
        self._seen |= names
        closed = self._last_but_one
        if self._looks > self._last_at + 1:
            # seen in a look before the last one: whatever was opened since is in this one
            closed, self._last = [*closed, *self._last], []
        self._last_but_one, self._last, self._last_at = self._last, new, self._looks
        return closed


def _has_rows(name: str) -> bool:
    """Whether a file is no table of contents, which is written until the end."""
    return not name.endswith(".toc") and name != "toc.dat"


def _rest(directory: Path) -> list[Path]:
    """Return what there is at the end, the tables of contents last."""
    return sorted(directory.iterdir(), key=lambda file: (file.name.endswith(".toc"), file.name == "toc.dat", file.name))


def _level(compression: str, version: int) -> str:
    method, _, level = compression.partition(":")
    if method == "none":
        return "0"
    if version >= _COMPRESSION_NAMES_VERSION:
        return compression
    if method != "gzip":
        raise BackupError(f"backup.compression is {compression}, and pg_dump of version {version} supports only gzip")
    return level or "6"


class _Feed:
    """The complete files, from the event loop to a thread."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[Path | None] = SimpleQueue()
        self._added: set[Path] = set()
        self._finished = False
        self._stopped = threading.Event()

    @property
    def waiting(self) -> bool:
        """Whether files wait to be read, or one is being read: it exists until it was."""
        return any(file.exists() for file in self._added)

    def add(self, files: Sequence[Path]) -> None:
        for file in files:
            if file not in self._added:
                self._added.add(file)
                self._queue.put(file)

    def finish(self) -> None:
        """No further file comes."""
        self._finished = True
        self._queue.put(None)

    def stop(self) -> None:
        """Let the thread fail, unless it has all files."""
        if not self._finished:
            self._stopped.set()
            self._queue.put(None)

    def __iter__(self) -> Iterator[Path]:
        while (file := self._queue.get()) is not None:
            yield file
        if self._stopped.is_set():
            raise BackupError("the dump was stopped")


async def read_tables(connection: Connection, scope: Scope) -> list[tuple[str, int]]:
    """Return the tables with rows that are dumped, by their quoted names, and their sizes in bytes."""
    schemas = None if scope.schemas is None else list(scope.schemas)
    rows = await connection.fetch(_TABLES, list(scope.left_out), schemas)
    return [(row["name"], row["bytes"]) for row in rows if row["name"] not in scope.without_rows]


async def lockable_tables(connection: Connection, scope: Scope) -> list[str]:
    """Return their names as ``begin_snapshot`` locks them."""
    return [f"ONLY {name}" for name, _ in await read_tables(connection, scope)]


async def in_thread(work: Callable[[], T], stop: Callable[[], None]) -> T:
    """Run blocking work in a thread of its own. A cancellation calls ``stop``, and waits until it has ended.

    It does not wait for ever: a file system that hangs, as over a network, would keep the claim of a backup that way,
    and all others with it.
    """
    loop = asyncio.get_running_loop()
    with_thread = ThreadPoolExecutor(1, thread_name_prefix="tenancy-backup")
    try:
        future = loop.run_in_executor(with_thread, work)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            stop()
            await run_to_completion(_wait_until_ended(future))
            raise
    finally:
        with_thread.shutdown(wait=False)


async def _wait_until_ended(future: asyncio.Future[Any]) -> None:
    future.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # it is known
    if not (await asyncio.wait([future], timeout=_STOP_SECONDS))[0]:
        logger.error(
            "the store, or temporary space, has not answered for %g s: a thread that waits for it is left",
            _STOP_SECONDS,
        )


async def _awaited(future: asyncio.Future[T]) -> T:
    return await future


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the error that was the cause: what was stopped because of it follows."""
    errors = [error for error in _flat(group) if not isinstance(error, asyncio.CancelledError)]
    return next((error for error in errors if str(error) != "the dump was stopped"), errors[0])


def _flat(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for one in error.exceptions:
            yield from _flat(one)
    else:
        yield error


__all__ = [
    "Dump",
    "Dumped",
    "Scope",
    "Snapshot",
    "Source",
    "in_thread",
    "lockable_tables",
    "read_tables",
]
