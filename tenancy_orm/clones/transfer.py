"""The way of a tenant's database into a clone: values are replaced on the way, before the clone has any of them.

One snapshot is read by a login of its own. ``pg_dump`` and ``pg_restore`` bring the schema, and the rows of tables that
no rule changes. Those of the others pass through this process, row by row. Indexes, constraints, triggers and
materialized views are made of what arrives. So no original value is ever in a file, an index, a statistic or the
write-ahead log of the clone.
"""

from __future__ import annotations

import asyncio
import re
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import asyncpg

from ..cancellation import run_to_completion
from ..errors import AnonymisationError, OperationError
from ..postgres import connections
from ..postgres.connections import Connection
from ..postgres.programs import SCHEMA_ONLY, Programs, run_piped, run_program
from ..postgres.quoting import quote_identifier, quote_pattern
from ..provisioning.copies import archives
from ..provisioning.copies.restoring import check_rows, connected
from ..provisioning.logins.copy_logins import HIDES_ROWS, CopyLogin
from ..provisioning.logins.readers import Reader
from ..provisioning.rights import event_trigger
from .plan import Table
from .values import Replacement, Replacing, replace_rows

SETTINGS = {
    "statement_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    "datestyle": "ISO, MDY",
    "intervalstyle": "postgres",
    "extra_float_digits": "1",
    "bytea_output": "hex",
    "xmloption": "content",
    "lc_monetary": "C",
}
"""Settings of both sides' sessions: what one writes as text, the other one reads as the same value."""

READING = {
    **SETTINGS,
    "default_transaction_read_only": "on",
    "search_path": "pg_catalog, pg_temp",
    "row_security": "off",
    "synchronize_seqscans": "off",
}
"""Settings of the session that reads: names are complete, no row is hidden without an error, the order is the same."""

_QUEUED = 16  # pieces of a table that are in memory at most
_MATERIALIZED = """
SELECT pg_catalog.quote_ident(n.nspname) || '.' || pg_catalog.quote_ident(c.relname) AS name
  FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
 WHERE c.relkind = 'm' AND c.relispopulated
   AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend d WHERE d.classid = 'pg_catalog.pg_class'::pg_catalog.regclass
                      AND d.objid = c.oid AND d.deptype = 'e')
 ORDER BY c.oid
"""
_OF_VALUES = ("22", "23", "P0")  # data exception, integrity constraint violation, RAISE in a CHECK's function
_COLUMN = re.compile(r"^COPY [^\n]*, line \d+, column ([^:\n]+)", re.MULTILINE)


@dataclass(slots=True, kw_only=True)
class CloneTransfer:
    """One transfer.

    Attributes:
        reader: The login that reads the tenant's database.
        source: Its connection, in a transaction of one snapshot.
        into: The login that fills the clone.
        tables: The tables, with their rules.
        replacing: Makes the values.
        programs: PostgreSQL's programs, for both servers.
        version: The clone's server's major version.
        large_objects: Whether large objects come along.
        connect_timeout: Seconds that a connection may take.
        rows: How many rows each table has, as ``check_rows`` names it.
    """

    reader: Reader
    source: Connection
    into: CopyLogin
    tables: Sequence[Table]
    replacing: Replacing
    programs: Programs
    version: int
    large_objects: bool
    connect_timeout: float
    rows: dict[str, int] = field(default_factory=dict)

    async def run(self) -> tuple[str, ...]:
        """Bring everything in, and return what is left out, as ``pg_restore`` lists it.

        Raises:
            AnonymisationError: a value that a rule makes is refused, or two rows became equal.
            OperationError: rows are missing.
            ProvisioningError: one of PostgreSQL's programs failed.
        """
        if await self.source.fetchval(HIDES_ROWS):
            await self.reader.see_all_rows()
        snapshot = await self.source.fetchval("SELECT pg_catalog.pg_export_snapshot()")
        views = [row["name"] for row in await self.source.fetch(_MATERIALIZED)]
        # before anything is written: Faker may lack a provider
        replacements = {
            table: {
                number: replacement
                for number, column in enumerate(column for column in table.columns if not column.generated)
                if (replacement := self.replacing.of(table, column)) is not None
            }
            for table in self.tables
        }
        with tempfile.TemporaryDirectory(prefix="tenancy-clone-") as directory:
            archive, listing = str(Path(directory, "schema.dump")), Path(directory, "list")
            guard = f"--exclude-schema={quote_pattern(event_trigger.NAME)}"
            dump = self.programs.dump_command(guard, snapshot=snapshot)
            await run_program([*dump, *SCHEMA_ONLY, f"--file={archive}"], self.reader.environment())
            schemas = {row[0] for row in await self._extension_schemas()}
            left_out = await archives.write_list(self.programs, archive, listing, schemas)
            use = f"--use-list={listing}"
            await self._restore(use, "--section=pre-data", archive)
            await self._bring_rows(dump)
            await self._anonymise(replacements)
            await self._restore(use, "--section=post-data", archive)
        await self._finish(views)
        return left_out

    def _restore_command(self) -> list[str]:
        # where not every error ends it, the rows are counted anyway
        return self.programs.restore_command(self.into.database, exact=self.programs.version == self.version)

    async def _restore(self, *options: str) -> None:
        await run_program([*self._restore_command(), *options], self.into.environment())

    async def _extension_schemas(self) -> Sequence[asyncpg.Record]:
        query = (
            "SELECT DISTINCT n.nspname::text FROM pg_catalog.pg_extension e "
            "JOIN pg_catalog.pg_namespace n ON n.oid = e.extnamespace"
        )
        return list(await self.source.fetch(query))

    async def _bring_rows(self, dump: Sequence[str]) -> None:
        """Bring the rows of tables that no rule changes, the positions of sequences, and large objects."""
        excluded = [
            f"--exclude-table-data={quote_pattern(table.schema)}.{quote_pattern(table.name)}"
            for table in self.tables
            if table.is_changed
        ]
        # -B: without large objects
        objects = () if self.large_objects else ("-B",)
        await run_piped(
            [*dump, "--data-only", "--compress=0", *objects, *excluded],
            [*self._restore_command(), "--data-only"],
            self.reader.environment(),
            self.into.environment(),
        )

    async def _anonymise(self, replacements: Mapping[Table, Mapping[int, Replacement]]) -> None:
        into = await self.into.connect(timeout=self.connect_timeout, settings=SETTINGS)
        try:
            for table in self.tables:
                if table.is_changed:
                    await self._copy(table, replacements[table], into)
                    await _check_unique(table, into)
                self.rows[await self._name(table)] = await self.source.fetchval(
                    f"SELECT count(*) FROM ONLY {table.quoted}"  # noqa: S608 - quoted
                )
        finally:
            await run_to_completion(connections.close(into))

    async def _name(self, table: Table) -> str:
        return str(
            await self.source.fetchval(
                "SELECT pg_catalog.quote_ident($1::text) || '.' || pg_catalog.quote_ident($2::text)",
                table.schema,
                table.name,
            )
        )

    async def _copy(self, table: Table, replacements: Mapping[int, Replacement], into: Connection) -> None:
        names = [column.name for column in table.columns if not column.generated]
        listed = ", ".join(quote_identifier(name) for name in names)
        pieces: asyncio.Queue[bytes | None] = asyncio.Queue(_QUEUED)

        async def read() -> None:
            query = f"SELECT {listed} FROM ONLY {table.quoted}"  # noqa: S608 - quoted
            await self.source.copy_from_query(query, output=pieces.put, format="text")
            await pieces.put(None)

        async def arriving() -> AsyncIterator[bytes]:
            rest = b""
            while (piece := await pieces.get()) is not None:
                *rows, rest = (rest + piece).split(b"\n")
                if rows:
                    yield b"\n".join(replace_rows(rows, replacements)) + b"\n"

        async def write() -> None:
            await into.copy_to_table(
                table.name, schema_name=table.schema, columns=names, source=arriving(), format="text"
            )

        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(read())
                group.create_task(write())
        except BaseExceptionGroup as exc:
            first = _first(exc)
            # of the others, a server that stops or a full disk for example, no rule is the cause
            if isinstance(first, asyncpg.PostgresError) and (first.sqlstate or "")[:2] in _OF_VALUES:
                raise _explained(table, first) from exc
            raise first from None

    async def _finish(self, views: Sequence[str]) -> None:
        """Fill materialized views, make the planner's statistics, and compare the numbers of rows."""
        into = await self.into.connect(timeout=self.connect_timeout, settings=SETTINGS)
        try:
            waiting = list(views)
            while waiting:
                later = []
                for name in waiting:
                    try:
                        await into.execute(f"REFRESH MATERIALIZED VIEW {name}")
                    except asyncpg.ObjectNotInPrerequisiteStateError:
                        later.append(name)  # it reads another one, which is not filled yet
                        if len(later) == len(waiting):
                            raise
                waiting = later
            await into.execute("ANALYZE")
        finally:
            await run_to_completion(connections.close(into))
        async with connected(_Filled(self.into), timeout=self.connect_timeout) as connection:
            await check_rows(connection, self.rows)


@dataclass(frozen=True, slots=True)
class _Filled:
    login: CopyLogin


async def _check_unique(table: Table, into: Connection) -> None:
    """Refuse rows that have become equal, by the names of the columns and without their values."""
    changed = {column.name for column in table.columns if column.is_changed}
    for index in table.unique:
        if changed.isdisjoint(index.columns):
            continue
        listed = ", ".join(quote_identifier(name) for name in index.columns)
        present = " AND ".join(f"{quote_identifier(name)} IS NOT NULL" for name in index.columns)
        query = f"SELECT FROM ONLY {table.quoted} WHERE {present} GROUP BY {listed} HAVING count(*) > 1"
        if await into.fetchval(f"SELECT EXISTS ({query})"):
            named = [f"{table.label}.{name}" for name in index.columns if name in changed]
            raise AnonymisationError(
                f"{', '.join(named)}: the rule makes values equal that {index.name} requires to differ", columns=named
            )


def _explained(table: Table, error: asyncpg.PostgresError) -> OperationError:
    """Name the column. What PostgreSQL says beside it may quote a row, and is left out."""
    context = _COLUMN.search(getattr(error, "context", None) or "")
    changed = [column.name for column in table.columns if column.is_changed]
    named = getattr(error, "column_name", None) or (context[1] if context else None)
    columns = [f"{table.label}.{name}" for name in ([named] if named else changed)]
    constraint = getattr(error, "constraint_name", None)
    what = f"constraint {constraint}" if constraint else "PostgreSQL"
    return AnonymisationError(
        f"{', '.join(columns)}: {what} refuses a value that the rule makes ({type(error).__name__})", columns=columns
    )


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the cause: an error of the values comes before that of the session which it has ended."""
    errors = list(_flat(group))
    return next(
        (error for error in errors if isinstance(error, AnonymisationError)),
        next((error for error in errors if not isinstance(error, asyncio.CancelledError)), errors[0]),
    )


def _flat(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [found for one in error.exceptions for found in _flat(one)]
    return [error]


__all__ = ["READING", "CloneTransfer"]
