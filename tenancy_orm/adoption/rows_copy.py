"""Rows go from the source's snapshot into tables that a revision has made, by ``COPY``, and are verified there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import asyncpg

from ..errors import AdoptionError
from ..postgres.connections import Connection, transaction
from ..postgres.failures import SERVER_FAILURES
from ..postgres.login import reason_of
from .contents import Contents
from .frame import Tell
from .selection import PLAIN_TEXTS, Selection, Transferred
from .source import OpenSource
from .verification import SEQUENCES, set_sequence, verify

_CHUNKS = 8  # of a COPY, which are in memory at most
_FOREIGN_KEYS = """
SELECT k.conrelid::pg_catalog.regclass::text AS table, pg_catalog.quote_ident(k.conname) AS name,
       pg_catalog.pg_get_constraintdef(k.oid) AS definition,
       pg_catalog.obj_description(k.oid, 'pg_constraint') AS comment
  FROM pg_catalog.pg_constraint k JOIN pg_catalog.pg_class c ON c.oid = k.conrelid
 WHERE k.contype = 'f' AND k.conparentid = 0 AND c.relnamespace <> 'pg_catalog'::pg_catalog.regnamespace ORDER BY 1, 2
"""
_TRIGGERS = """
SELECT t.tgrelid::pg_catalog.regclass::text AS table, pg_catalog.quote_ident(t.tgname) AS name,
       t.tgenabled = 'A' AS always
  FROM pg_catalog.pg_trigger t WHERE NOT t.tgisinternal AND t.tgparentid = 0 AND t.tgenabled IN ('O', 'A')
   -- partitions may have triggers of their own
   AND COALESCE(pg_catalog.pg_partition_root(t.tgrelid), t.tgrelid) = ANY($1::oid[]) ORDER BY 1, 2
"""
_FORCED = """
SELECT c.oid::pg_catalog.regclass::text AS table FROM pg_catalog.pg_class c
 WHERE c.relforcerowsecurity AND c.oid = ANY($1::oid[]) ORDER BY 1
"""
_VIEWS = """
SELECT pg_catalog.quote_ident(n.nspname) || '.' || pg_catalog.quote_ident(c.relname) AS name
  FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
 WHERE c.relkind = 'm' AND c.relispopulated ORDER BY c.oid
"""
_OWN_SEQUENCES = """
SELECT pg_catalog.quote_ident(n.nspname) || '.' || pg_catalog.quote_ident(c.relname) AS name,
       pg_catalog.has_sequence_privilege(c.oid, 'SELECT') AS readable
  FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
 WHERE c.relkind = 'S' AND pg_catalog.quote_ident(n.nspname) || '.' || pg_catalog.quote_ident(c.relname) = ANY($1)
"""
_NOTHING = Contents(tables=(), extensions=(), unused=(), filled=frozenset(), notes=())


class RowsCopy:
    """Copies the rows of one customer.

    Args:
        opened: The source.
        selection: What comes along.
        pairs: The tables, with their columns.
        expected: The number of rows of each table of the source that comes along, by its label.
    """

    def __init__(
        self, opened: OpenSource, selection: Selection, pairs: Sequence[Transferred], expected: dict[str, int]
    ) -> None:
        self._opened = opened
        self._selection = selection
        self._pairs = pairs
        self._expected = expected

    async def run(self, target: Connection, tell: Tell) -> list[str]:
        """Copy everything in one transaction of the target, and return what is worth knowing.

        Foreign keys are taken off and made again at the end, which checks all rows: so circles are no hindrance.

        Args:
            target: As the login that owns the tables.
            tell: Receives each table.

        Raises:
            AdoptionError: the rows do not fit there, or refer to rows that are not there.
        """
        notes: list[str] = []
        for setting in PLAIN_TEXTS:
            await self._opened.connection.execute(setting)
        async with transaction(target):
            await target.execute("SET LOCAL search_path = pg_catalog, pg_temp")
            for setting in PLAIN_TEXTS:
                await target.execute(setting)
            async with self._without_checks(target):
                for pair in self._pairs:
                    notes += await self._empty(target, pair)
                for pair in self._pairs:
                    tell(f"copy {pair.reached.relation.label}")
                    await self._copy(target, pair)
                await target.execute("SET CONSTRAINTS ALL IMMEDIATE")
            tell("verify")
            await self._compare(target)
            # references are validated, and sequences set
            notes += await verify(target, _NOTHING, lambda table: table.schema)
            notes += await self._set_free_sequences(target)
            for row in await target.fetch(_VIEWS):
                await target.execute(f"REFRESH MATERIALIZED VIEW {row['name']}")
        await target.execute("ANALYZE")
        return notes

    @asynccontextmanager
    async def _without_checks(self, target: Connection) -> AsyncIterator[None]:
        """Take foreign keys, triggers and forced row security off for the body."""
        numbers = [pair.target.oid for pair in self._pairs]
        keys = await target.fetch(_FOREIGN_KEYS)
        triggers = await target.fetch(_TRIGGERS, numbers)
        forced = await target.fetch(_FORCED, numbers)
        for key in keys:
            await target.execute(f"ALTER TABLE {key['table']} DROP CONSTRAINT {key['name']}")
        for trigger in triggers:
            await target.execute(f"ALTER TABLE {trigger['table']} DISABLE TRIGGER {trigger['name']}")
        for table in forced:
            await target.execute(f"ALTER TABLE {table['table']} NO FORCE ROW LEVEL SECURITY")
        yield
        for table in forced:
            await target.execute(f"ALTER TABLE {table['table']} FORCE ROW LEVEL SECURITY")
        for trigger in triggers:
            how = "ENABLE ALWAYS" if trigger["always"] else "ENABLE"
            await target.execute(f"ALTER TABLE {trigger['table']} {how} TRIGGER {trigger['name']}")
        for key in keys:
            await self._restore(target, key)

    async def _restore(self, target: Connection, key: asyncpg.Record) -> None:
        table, name = key["table"], key["name"]
        try:
            await target.execute(f"ALTER TABLE {table} ADD CONSTRAINT {name} {key['definition']}")
        except asyncpg.ForeignKeyViolationError as exc:
            raise AdoptionError(
                f"rows of table {table} refer to rows that do not come along, by foreign key {name}: {exc.detail}"
            ) from exc
        if key["comment"] is not None:
            comment = await target.fetchval("SELECT pg_catalog.quote_literal($1::text)", key["comment"])
            await target.execute(f"COMMENT ON CONSTRAINT {name} ON {table} IS {comment}")

    async def _empty(self, target: Connection, pair: Transferred) -> list[str]:
        """Remove rows that a revision has written, of a table that the source has."""
        table = pair.target.quoted
        if not await target.fetchval(f"SELECT EXISTS (SELECT FROM {table})"):  # noqa: S608 - quoted
            return []
        await target.execute(f"DELETE FROM {table}")  # noqa: S608 - quoted
        return [f"the rows that revisions write into {pair.target.label} are replaced by the source's"]

    async def _copy(self, target: Connection, pair: Transferred) -> None:
        label, expected = pair.reached.relation.label, self._expected[pair.reached.relation.label]
        if not expected:
            return
        chunks: asyncio.Queue[bytes | None] = asyncio.Queue(_CHUNKS)

        async def read() -> None:
            async def keep(chunk: bytes) -> None:
                await chunks.put(bytes(chunk))

            await self._opened.connection.copy_from_query(self._selection.query(pair), output=keep)
            await chunks.put(None)

        async def written() -> AsyncIterator[bytes]:
            while (chunk := await chunks.get()) is not None:
                yield chunk

        failures: list[BaseException] = []
        status = ""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(read())
                writing = group.create_task(
                    target.copy_to_table(
                        pair.target.name,
                        schema_name=pair.target.schema,
                        columns=[name for _, name in pair.columns],
                        source=written(),
                    )
                )
            status = writing.result()
        except* SERVER_FAILURES as exc:
            failures += exc.exceptions
        if failures:
            raise AdoptionError(f"table {label} cannot be copied: {reason_of(failures[0])}") from failures[0]
        if (count := int(status.rpartition(" ")[2])) != expected:
            raise AdoptionError(f"the copy is not complete: {label} has {count} rows, and the source {expected}")

    async def _set_free_sequences(self, target: Connection) -> list[str]:
        """Let sequences that no column of whole numbers tells the state of go on where the source's are.

        The code of the application asks for their values, or a text is made of them: they are past those of all
        customers in the source.
        """
        notes = []
        found = await target.fetch(SEQUENCES)
        free = [row["sequence"] for row in found if row["column"] is None]
        own = await self._opened.connection.fetch(_OWN_SEQUENCES, free)
        readable = {row["name"]: row["readable"] for row in own}
        for name in free:
            if not readable.get(name):
                why = "has none of this name" if name not in readable else "does not let this role read it"
                notes.append(f"sequence {name} is where the revisions leave it: the source {why}")
                continue
            state = await self._opened.connection.fetchrow(f"SELECT last_value, is_called FROM {name}")  # noqa: S608
            assert state is not None  # noqa: S101 - a sequence has one row
            refusal = await set_sequence(target, name, *state)
            what = f"goes on where the source's is, at {state['last_value']}"
            notes.append(f"sequence {name} {what if refusal is None else f'is not where the source has it: {refusal}'}")
        return notes

    async def _compare(self, target: Connection) -> None:
        for pair in self._pairs:
            label = pair.reached.relation.label
            only = "" if pair.target.partitioned else "ONLY "
            found = await target.fetchval(f"SELECT count(*) FROM {only}{pair.target.quoted}")  # noqa: S608 - quoted
            if found != self._expected[label]:
                wanted = self._expected[label]
                raise AdoptionError(f"the copy is not complete: {pair.target.label} has {found} rows, not {wanted}")


__all__ = ["RowsCopy"]
