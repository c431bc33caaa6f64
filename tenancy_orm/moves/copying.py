"""Copying a tenant's database to another server: all of it at one snapshot, and what replication does not carry.

Logical replication carries rows of ordinary tables. Sequences, unlogged tables and large objects are copied within the
pause, when nobody writes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..cancellation import run_to_completion
from ..postgres import connections
from ..postgres.connections import Connection
from ..postgres.programs import Programs, run_piped, run_program
from ..postgres.quoting import quote_identifier, quote_pattern, quote_qualified
from ..provisioning.copies import archives
from ..provisioning.logins.copy_logins import UNBOUNDED, CopyLogin
from ..provisioning.rights import event_trigger
from ..provisioning.server_objects import roles

_SPOOLED_BYTES = 16 * 1024**2
_BATCH = 200

# none of an extension
_OWN = """
NOT EXISTS (SELECT FROM pg_depend e WHERE e.classid = 'pg_class'::regclass AND e.objid = c.oid AND e.deptype = 'e')
"""
MATERIALIZED = f"""
SELECT quote_ident(n.nspname) || '.' || quote_ident(c.relname) AS name,
       CASE WHEN EXISTS (SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indisunique AND i.indisvalid
                            AND i.indimmediate AND i.indpred IS NULL AND i.indexprs IS NULL)
            THEN 'CONCURRENTLY' ELSE '' END AS beside_readers
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE c.relkind = 'm' AND c.relispopulated AND {_OWN} ORDER BY c.oid
"""  # noqa: S608 - constants
"""The materialized views that are filled, each after those that it reads, and how one in use is filled again."""

_SEQUENCES = f"""
SELECT quote_ident(n.nspname) || '.' || quote_ident(c.relname) AS name
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE c.relkind = 'S' AND c.relpersistence <> 't' AND {_OWN} ORDER BY 1
"""  # noqa: S608 - constants
_TRIGGERS = """
SELECT t.tgrelid::regclass::text AS "table", quote_ident(t.tgname) AS name,
       CASE t.tgenabled WHEN 'A' THEN 'ALWAYS' WHEN 'R' THEN 'REPLICA' ELSE '' END AS "when"
  FROM pg_trigger t WHERE t.tgrelid = ANY ($1::text[]::regclass[]) AND NOT t.tgisinternal AND t.tgenabled <> 'D'
"""
TEXTS: Mapping[str, str] = {
    "DateStyle": "ISO, YMD",
    "IntervalStyle": "postgres",
    "lc_monetary": "C",
    "extra_float_digits": "1",
    # an error instead of some of the rows
    "row_security": "off",
}
"""Settings of both connections, by which a value that one writes as text is the same for the other."""
# their order may differ in the copy: a dump has the columns that a table inherits before its own
_COLUMNS = """
SELECT ARRAY(SELECT a.attname::text FROM pg_attribute a
              WHERE a.attrelid = t.oid AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = ''
              ORDER BY a.attnum) AS names
  FROM unnest($1::text[]::regclass[]) WITH ORDINALITY t (oid, number) ORDER BY t.number
"""
_LARGE_OBJECTS = "SELECT oid::text FROM pg_largeobject_metadata ORDER BY oid"


@dataclass(frozen=True, slots=True, kw_only=True)
class Copying:
    """Copies one database at one snapshot, by ``pg_dump`` and ``pg_restore``.

    Attributes:
        programs: Of the newer of the two servers' versions, at least of the source's.
        reader: A login that reads the source.
        restorer: A login that owns what it brings into the target.
        snapshot: The snapshot that is read; None: one of the dump's own.
        schemas: The schemas of extensions, which the target has already.
        exact: Whether both servers are of the programs' version, so that every error counts.
        everything: Whether unlogged tables and large objects are copied as well.
        without_rows: Tables and sequences of extensions, quoted, which the restorer may not write.
    """

    programs: Programs
    reader: CopyLogin
    restorer: CopyLogin
    snapshot: str | None
    schemas: frozenset[str]
    exact: bool
    everything: bool = False
    without_rows: tuple[str, ...] = ()

    async def run(self, *, connect_timeout: float) -> tuple[str, ...]:
        """Copy; returns what is left out, as ``pg_restore`` lists it.

        Raises:
            ProvisioningError: a program failed.
        """
        reader, restorer = self.reader.environment(), self.restorer.environment()
        guard = f"--exclude-schema={quote_pattern(event_trigger.NAME)}"
        dump = self.programs.dump_command(guard, "--no-publications", "--no-subscriptions", snapshot=self.snapshot)
        restore = self.programs.restore_command(self.restorer.database, exact=self.exact)
        carried = [
            *([] if self.everything else ["--no-blobs", "--no-unlogged-table-data"]),
            *(f"--exclude-table-data={name}" for name in self.without_rows),
        ]
        filled = await self._filled(connect_timeout)
        with tempfile.TemporaryDirectory(prefix="tenancy-move-") as directory:
            schema, listing = f"{directory}/schema.dump", Path(directory, "list")
            await run_program([*dump, "--schema-only", f"--file={schema}"], reader)
            left_out = await archives.write_list(self.programs, schema, listing, set(self.schemas))
            parts = [*restore, f"--use-list={listing}"]
            await run_program([*parts, "--section=pre-data", schema], restorer)
            await run_piped(
                [*dump, "--data-only", "--compress=0", *carried], [*restore, "--data-only"], reader, restorer
            )
            await run_program([*parts, "--section=post-data", schema], restorer)
        await self._finish(filled, connect_timeout)
        return left_out

    async def _filled(self, timeout: float) -> list[str]:
        connection = await self.reader.connect(timeout=timeout, settings=UNBOUNDED, purpose="tenancy-move")
        try:
            return [row["name"] for row in await connection.fetch(MATERIALIZED)]
        finally:
            await run_to_completion(connections.close(connection))

    async def _finish(self, filled: Sequence[str], timeout: float) -> None:
        """Fill materialized views, and make the planner's statistics."""
        connection = await self.restorer.connect(timeout=timeout, settings=UNBOUNDED, purpose="tenancy-move")
        try:
            for name in filled:
                await connection.execute(f"REFRESH MATERIALIZED VIEW {name}")
            await connection.execute("ANALYZE")
        finally:
            await run_to_completion(connections.close(connection))


async def copy_sequences(source: Connection, target: Connection) -> int:
    """Set the target's sequences to where the source's are; returns how many. Both connect as the owner."""
    names = [row["name"] for row in await source.fetch(_SEQUENCES)]
    for start in range(0, len(names), _BATCH):
        batch = names[start : start + _BATCH]
        rows = await source.fetch(
            " UNION ALL ".join(f"SELECT {n} AS n, last_value, is_called FROM {name}" for n, name in enumerate(batch))  # noqa: S608 - quoted by PostgreSQL
        )
        calls = [
            f"setval({_literal(batch[row['n']])}::regclass, {row['last_value']}, {str(row['is_called']).lower()})"
            for row in rows
        ]
        await target.execute(f"SELECT {', '.join(calls)}")
    return len(names)


async def copy_tables(source: Connection, target: Connection, tables: Sequence[tuple[str, str]]) -> None:
    """Replace the rows of tables, each given by its schema and its name. Both connect as the owner, with ``TEXTS``.

    Args:
        source: To the database that is copied.
        target: To the other one, in which no trigger of these tables runs during the copy: their rows are copied too.
        tables: The tables, each after those that it refers to.
    """
    if not tables:
        return
    quoted = [quote_qualified(schema, name) for schema, name in tables]
    async with connections.transaction(target):
        columns = [row["names"] for row in await source.fetch(_COLUMNS, quoted)]
        triggers = await target.fetch(_TRIGGERS, quoted)
        for row in triggers:
            await target.execute(f"ALTER TABLE {row['table']} DISABLE TRIGGER {row['name']}")
        await target.execute(f"TRUNCATE {', '.join(f'ONLY {one}' for one in quoted)}")
        for (schema, name), names in zip(tables, columns, strict=True):
            with tempfile.SpooledTemporaryFile(max_size=_SPOOLED_BYTES) as file:
                # as text: the binary form has the numbers of types, which are others there
                await source.copy_from_table(name, schema_name=schema, columns=names, output=file)
                file.seek(0)
                await target.copy_to_table(name, schema_name=schema, columns=names, source=file)
        for row in triggers:
            await target.execute(f"ALTER TABLE {row['table']} ENABLE {row['when']} TRIGGER {row['name']}")


async def copy_large_objects(source: Connection, target: Connection, role: str) -> int:
    """Replace all large objects; returns how many. They belong to the tenant's role, which makes its own.

    Args:
        source: An administrative connection.
        target: Another one.
        role: The tenant's role, on both servers.
    """
    found = [row["oid"] for row in await source.fetch(_LARGE_OBJECTS)]
    there = [row["oid"] for row in await target.fetch(_LARGE_OBJECTS)]
    if not found and not there:
        return 0
    quoted = quote_identifier(role)
    async with roles.joined(source, role), roles.joined(target, role):
        for start in range(0, len(there), _BATCH):
            await target.execute(f"SELECT {', '.join(f'lo_unlink({oid})' for oid in there[start : start + _BATCH])}")
        for oid in found:
            content = await source.fetchval("SELECT lo_get($1::text::oid)", oid)
            await target.execute("SELECT lo_from_bytea($1::text::oid, $2)", oid, content)
            await target.execute(f"ALTER LARGE OBJECT {oid} OWNER TO {quoted}")
    return len(found)


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


__all__ = ["MATERIALIZED", "TEXTS", "Copying", "copy_large_objects", "copy_sequences", "copy_tables"]
