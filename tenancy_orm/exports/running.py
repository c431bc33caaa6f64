"""One export under way: the transaction that it reads in, and the files that it writes."""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import asyncpg

from ..errors import ExportError, TenancyError
from ..postgres import connections
from ..postgres.connections import Connection
from ..postgres.failures import SERVER_FAILURES
from ..postgres.quoting import quote_literal
from ..postgres.snapshots import begin_snapshot, readable_tables
from ..tenant import Tenant
from .archives import Archive, FileWriter, Write, Written
from .catalogue import LARGE_OBJECTS, Catalogue, read_catalogue
from .documents import checksums, manifest, readme, schema
from .journal import Journal
from .plan import LeftOut, Plan, Table
from .values import SETTINGS

_PIECE = 4_194_304  # bytes of a large value that are read at once
_ROWS = 100  # rows with large values that are read at once
_SPOOLED = 1_048_576  # bytes of their list that are kept in memory

_SNAPSHOT = """
SELECT pg_catalog.clock_timestamp() AS taken_at, pg_catalog.pg_current_snapshot()::pg_catalog.text AS transactions
"""
_LARGE_OBJECT = "SELECT pg_catalog.lo_get($1::oid, $2::int8, $3::int4)"


@dataclass(frozen=True, slots=True)
class ExportProgress:
    """How far an export is.

    Attributes:
        part: What was begun last: a table by its schema and name, or "large objects".
        done: How many parts are done.
        total: How many there are.
        bytes: How many bytes were written in this run, before compression.
    """

    part: str
    done: int
    total: int
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """A complete export.

    Attributes:
        slug: The tenant.
        path: Where the archive is; None where it was sent.
        row_format: "jsonl" or "csv".
        tables: How many tables it has.
        rows: How many rows.
        files: How many files, the describing ones included.
        bytes: Their size before compression.
        snapshots: The times that its rows are of; more than one where it was resumed.
        left_out: What it has not, and why.
        seconds: How long this run took.
    """

    slug: str
    path: str | None
    row_format: str
    tables: int
    rows: int
    files: int
    bytes: int
    snapshots: tuple[datetime, ...]
    left_out: tuple[LeftOut, ...]
    seconds: float


def failed(tenant: Tenant, exc: BaseException) -> ExportError:
    """Return the error for what PostgreSQL or the disk has answered."""
    if isinstance(exc, asyncpg.LockNotAvailableError):
        reason = str(exc)
    elif isinstance(exc, OSError) and exc.strerror and not isinstance(exc, ConnectionError):
        reason = exc.strerror
    else:
        state = getattr(exc, "sqlstate", None)
        reason = f"{exc.args[0] if exc.args else type(exc).__name__}{f' ({state})' if state else ''}"
    return ExportError(f"tenant {tenant.slug!r} could not be exported: {reason}")


def check_files(tenant: Tenant, count: int, most: int | None) -> None:
    """Refuse more large values and large objects than one export may have; None: any number.

    Raises:
        ExportError: there are more.
    """
    if most is not None and count > most:
        raise ExportError(
            f"tenant {tenant.slug!r} has more than {most} large values and large objects, which are too many for a "
            "request; an operator can export it (tenancy export)"
        )


@asynccontextmanager
async def snapshot(connection: Connection, *, seconds: float = 0.0) -> AsyncIterator[Catalogue]:
    """Begin the transaction that an export reads in, with its tables locked, and read what there is.

    Args:
        connection: A connection without a transaction.
        seconds: How long the transaction may take, each of its statements before PostgreSQL 17; 0 is without a bound.
    """
    transaction = await begin_snapshot(connection, readable_tables, settings=_settings(connection, seconds))
    try:
        yield await read_catalogue(connection)
    finally:
        # nothing was written, so that there is nothing to commit
        await connections.finish(connection, transaction.rollback)


def _settings(connection: Connection, seconds: float) -> dict[str, str]:
    bound = f"{round(seconds * 1_000)}"
    settings = {**SETTINGS, "statement_timeout": bound, "idle_in_transaction_session_timeout": bound}
    if connections.version(connection) >= 17:
        settings["transaction_timeout"] = bound
    return {name: _setting(value) for name, value in settings.items()}


def _setting(value: str) -> str:
    # a list of names is no constant
    return value if value.startswith("pg_catalog,") else quote_literal(value)


class Run:
    """Writes the archive of one export.

    Args:
        connection: In the transaction of ``snapshot``.
        tenant: The tenant.
        plan: What the archive has.
        archive: Where it is written.
        journal: What was written before, and is now.
        send: Sends on what the archive returns.
        progress: Called as the export goes on.
        most_files: How many large values and large objects it may have, which are listed in memory; None: any number.
    """

    def __init__(
        self,
        connection: Connection,
        tenant: Tenant,
        plan: Plan,
        archive: Archive,
        journal: Journal,
        *,
        send: Write | None = None,
        progress: Callable[[ExportProgress], None] | None = None,
        most_files: int | None = None,
    ) -> None:
        self._connection = connection
        self._tenant = tenant
        self._plan = plan
        self._archive = archive
        self._journal = journal
        self._send = send
        self._progress = progress
        self._most_files = most_files
        self._files = plan.catalogue.large_objects
        self._total = len(plan.tables) + 1
        self._done = 0
        self._bytes = 0
        self._snapshot = 0
        self._shown = 0.0

    async def write(self, path: str | None = None) -> ExportReport:
        """Write what is not done yet, and complete the archive.

        Raises:
            ExportError: PostgreSQL or the disk refuses; the archive is not complete then.
        """
        started = time.monotonic()
        try:
            await self._write_all()
        except (ExportError, *_NOT_OURS):
            raise
        except (OSError, *SERVER_FAILURES) as exc:
            raise failed(self._tenant, exc) from exc
        return self._report(path, time.monotonic() - started)

    async def _write_all(self) -> None:
        row = await self._connection.fetchrow(_SNAPSHOT)
        assert row is not None  # noqa: S101 - for the type checker
        self._snapshot = self._journal.add_snapshot(
            taken_at=row["taken_at"].astimezone(UTC).isoformat(), transactions=row["transactions"]
        )
        await self._part("description", self._describe)
        for table in self._plan.tables:
            self._show(table.relation.full_name, force=True)
            await self._part(f"table {table.path}", lambda table=table: self._table(table))  # type: ignore[misc]
            self._done += 1
        self._show("large objects", force=True)
        await self._part("large objects", self._large_objects)
        self._done += 1
        about = {
            "tenant": {"id": str(self._tenant.id), "slug": self._tenant.slug},
            "schema_revision": self._tenant.schema_revision,
            "postgresql": ".".join(map(str, self._connection.get_server_version()[:2])),
        }
        for name, pieces in (
            ("manifest.json", manifest(self._journal, self._plan, about)),
            ("SHA256SUMS", checksums(self._journal)),
        ):
            await self._document(name, pieces)
        data = self._archive.finish()
        if data and self._send is not None:
            await self._send(data)
        self._show("large objects", force=True)

    async def _part(self, name: str, write: Callable[[], Awaitable[None]]) -> None:
        if name in self._journal.parts:
            return
        await write()
        await asyncio.to_thread(self._archive.sync)
        await asyncio.to_thread(self._journal.end_part, name)

    # --- files ------------------------------------------------------------------------------------------------------

    async def _describe(self) -> None:
        for path, data in (("README.txt", readme(self._tenant.slug, self._plan)), ("schema.json", schema(self._plan))):
            await self._document(path, [data], size=len(data))

    async def _document(self, path: str, pieces: Iterable[bytes], *, size: int | None = None) -> None:
        writer = FileWriter(self._archive, self._send)
        await writer.begin(path, size=size)
        for piece in pieces:
            await writer.write(piece)
        self._add(path, await writer.end(), kind="document")

    async def _table(self, table: Table) -> None:
        # of an earlier run, that was interrupted amid this table
        await asyncio.to_thread(self._archive.clear, table.directory)
        writer = FileWriter(self._archive, self._send)
        await writer.begin(table.path)
        jsonl = self._plan.row_format == "jsonl"
        if jsonl:
            lines = _Lines(writer)
            status = await self._copy(table, lines.write, format="text")
            await lines.end()
        else:
            status = await self._copy(table, writer.write, format="csv", header=True)
        rows = int(status.rpartition(" ")[2])
        written = await writer.end()
        self._add(table.path, written, kind="table", table=table.relation.full_name, rows=rows)
        if table.large and rows:
            await self._large_values(table)

    async def _copy(self, table: Table, write: Write, **options: Any) -> str:
        async def output(data: bytes) -> None:
            self._count(len(data), table.relation.full_name)
            await write(bytes(data))

        # a bound of asyncpg's would count the time that a slow client takes
        return str(
            await self._connection.copy_from_query(
                table.rows_sql(self._plan.row_format), output=output, timeout=_NO_BOUND, encoding="utf8", **options
            )
        )

    async def _large_values(self, table: Table) -> None:
        """Write the values that the rows name files for. Their list may be long, and is kept in a file then."""
        with tempfile.SpooledTemporaryFile(_SPOOLED) as spool:
            async for row in self._connection.cursor(table.large_sql(), prefetch=_ROWS):
                for number in range(len(table.large)):
                    if (size := row[f"size_{number}"]) is not None:
                        self._files += 1
                        check_files(self._tenant, self._files, self._most_files)
                        found = [number, row["part"], list(row["place"]), row["key"], size]
                        spool.write(json.dumps(found).encode() + b"\n")
            spool.seek(0)
            while line := spool.readline():
                number, part, place, key, size = json.loads(line)
                await self._large_value(table, number, part, tuple(place), key, size)

    async def _large_value(
        self, table: Table, number: int, part: int, place: tuple[int, int], key: str, size: int
    ) -> None:
        value = table.large[number]
        path = f"{value.directory}/{key}{value.extension}"
        writer = FileWriter(self._archive, self._send)
        await writer.begin(path, size=size)
        query = table.content_sql(value)
        for offset in range(0, size, _PIECE):
            piece = await self._connection.fetchval(query, offset + 1, _PIECE, place, part)
            self._count(len(piece), table.relation.full_name)
            await writer.write(piece)
        written = await writer.end()
        if written.size != size:
            raise ExportError(f"{path} has {written.size} bytes instead of {size}")
        self._add(path, written, kind="value", table=table.relation.full_name, column=value.column.name)

    async def _large_objects(self) -> None:
        await asyncio.to_thread(self._archive.clear, "large-objects")
        async for row in self._connection.cursor(LARGE_OBJECTS, prefetch=_ROWS):
            oid = row["oid"]
            path = f"large-objects/{oid}.bin"
            writer = FileWriter(self._archive, self._send)
            await writer.begin(path)
            offset = 0
            while piece := await self._connection.fetchval(_LARGE_OBJECT, oid, offset, _PIECE):
                self._count(len(piece), "large objects")
                await writer.write(piece)
                offset += len(piece)
            self._add(path, await writer.end(), kind="large object")

    def _add(self, path: str, written: Written, **values: Any) -> None:
        entry = {
            "path": path,
            **values,
            "bytes": written.size,
            "sha256": written.sha256,
            "snapshot": self._snapshot,
            "at": dict(written.at),
        }
        self._journal.add_file(entry)

    # --- progress ---------------------------------------------------------------------------------------------------

    def _count(self, size: int, part: str) -> None:
        self._bytes += size
        self._show(part)

    def _show(self, part: str, *, force: bool = False) -> None:
        now = time.monotonic()
        if self._progress is not None and (force or now - self._shown > 0.2):
            self._shown = now
            self._progress(ExportProgress(part, self._done, self._total, self._bytes))

    def _report(self, path: str | None, seconds: float) -> ExportReport:
        rows = files = size = 0
        for entry in self._journal.files():
            files += 1
            rows += entry.get("rows", 0)
            size += entry["bytes"]
        return ExportReport(
            slug=self._tenant.slug,
            path=path,
            row_format=self._plan.row_format,
            tables=len(self._plan.tables),
            rows=rows,
            files=files,
            bytes=size,
            snapshots=tuple(datetime.fromisoformat(one["taken_at"]) for one in self._journal.snapshots),
            left_out=self._plan.left_out,
            seconds=seconds,
        )


_NO_BOUND = 10 * 366 * 86_400.0
_NOT_OURS = (TenancyError, TimeoutError)


class _Lines:
    """Turns what COPY writes of one column, in its text format, into the lines of JSON that it is of.

    COPY escapes the backslashes of JSON, and the line feeds and tabs that a value of type json may have between its
    tokens, where a space means the same.
    """

    def __init__(self, writer: FileWriter) -> None:
        self._writer = writer
        self._rest = b""

    async def write(self, data: bytes) -> None:
        if not data.endswith(b"\n") or self._rest:
            data = self._rest + data
            end = data.rfind(b"\n") + 1
            data, self._rest = data[:end], data[end:]
        if b"\\" in data:
            # what was a backslash before is kept apart by a byte that COPY never writes as it is
            data = data.replace(b"\\\\", b"\x08")
            for escape in (b"\\n", b"\\t", b"\\r", b"\\b", b"\\f", b"\\v"):
                data = data.replace(escape, b" ")
            data = data.replace(b"\x08", b"\\")
        await self._writer.write(data)

    async def end(self) -> None:
        if self._rest:
            raise ExportError("PostgreSQL has not sent whole rows")


__all__ = ["ExportProgress", "ExportReport", "Run", "check_files", "failed", "snapshot"]
