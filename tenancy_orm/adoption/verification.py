"""What is verified of an adoption's contents before they become a tenant's: references, sequences, numbers of rows."""

from __future__ import annotations

from collections.abc import Callable

import asyncpg

from ..errors import AdoptionError, counted
from ..postgres.connections import Connection
from ..postgres.login import reason_of
from .contents import Contents, SourceTable, count_rows, differing_rows

_NOT_VALID = """
SELECT pg_catalog.quote_ident(n.nspname) || '.' || pg_catalog.quote_ident(c.relname) AS table,
       pg_catalog.quote_ident(k.conname) AS name
  FROM pg_catalog.pg_constraint k JOIN pg_catalog.pg_class c ON c.oid = k.conrelid
  JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
 WHERE k.contype = 'f' AND NOT k.convalidated AND k.conparentid = 0
   -- one that is NOT ENFORCED promises nothing, and cannot be validated
   AND COALESCE((pg_catalog.to_jsonb(k) ->> 'conenforced')::boolean, true) ORDER BY 1, 2
"""
# of their columns, and of columns that have them in their default, as a Sequence of SQLAlchemy is
_LINKED = """
SELECT d.objid AS sequence, d.refobjid AS relation, d.refobjsubid AS number FROM pg_catalog.pg_depend d
 WHERE d.classid = 'pg_catalog.pg_class'::pg_catalog.regclass AND d.refclassid = d.classid
   AND d.deptype IN ('a', 'i') AND d.refobjsubid > 0
UNION SELECT d.refobjid, f.adrelid, f.adnum FROM pg_catalog.pg_depend d
  JOIN pg_catalog.pg_attrdef f ON f.oid = d.objid
 WHERE d.classid = 'pg_catalog.pg_attrdef'::pg_catalog.regclass
   AND d.refclassid = 'pg_catalog.pg_class'::pg_catalog.regclass
"""
SEQUENCES = f"""
SELECT pg_catalog.quote_ident(sn.nspname) || '.' || pg_catalog.quote_ident(s.relname) AS sequence,
       pg_catalog.quote_ident(tn.nspname) || '.' || pg_catalog.quote_ident(t.relname) AS table,
       pg_catalog.quote_ident(a.attname) AS column, q.seqincrement AS increment
  FROM pg_catalog.pg_sequence q JOIN pg_catalog.pg_class s ON s.oid = q.seqrelid
  JOIN pg_catalog.pg_namespace sn ON sn.oid = s.relnamespace
  LEFT JOIN (({_LINKED}) l JOIN pg_catalog.pg_class t ON t.oid = l.relation
    JOIN pg_catalog.pg_namespace tn ON tn.oid = t.relnamespace
    JOIN pg_catalog.pg_attribute a ON a.attrelid = t.oid AND a.attnum = l.number
     AND a.atttypid IN ('int2'::pg_catalog.regtype, 'int4'::pg_catalog.regtype, 'int8'::pg_catalog.regtype))
    ON l.sequence = s.oid
 WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_depend e WHERE e.deptype = 'e'
         AND e.classid = 'pg_catalog.pg_class'::pg_catalog.regclass AND e.objid = s.oid)
 ORDER BY 1, 2, 3
"""  # noqa: S608 - constants
"""Every sequence, with each column of whole numbers that gets its values; without one where there is none."""


async def verify(connection: Connection, contents: Contents, place_of: Callable[[SourceTable], str]) -> list[str]:
    """Verify everything, and return what was set right.

    Args:
        connection: As whoever owns the contents.
        contents: What the source has.
        place_of: Returns the schema that a table of the source is in now.

    Raises:
        AdoptionError: rows are missing, or refer to rows that do not exist.
    """
    return [
        *await _validate_references(connection),
        *await _set_sequences(connection),
        *await _compare_rows(connection, contents, place_of),
    ]


async def _validate_references(connection: Connection) -> list[str]:
    """Validate the foreign keys that the source has as NOT VALID; the restore has validated the others."""
    notes = []
    for row in await connection.fetch(_NOT_VALID):
        try:
            await connection.execute(f"ALTER TABLE {row['table']} VALIDATE CONSTRAINT {row['name']}")
        except asyncpg.ForeignKeyViolationError as exc:
            raise AdoptionError(
                f"rows of table {row['table']} refer to rows that do not exist, by foreign key {row['name']}, which is "
                "NOT VALID in the source; delete or correct them there"
            ) from exc
        notes.append(f"foreign key {row['name']} of table {row['table']} was NOT VALID, and holds for all rows")
    return notes


async def _set_sequences(connection: Connection) -> list[str]:
    """Set each sequence of a column past the column's values, if it is not."""
    notes = []
    for row in await connection.fetch(SEQUENCES):
        sequence, column, table = row["sequence"], row["column"], row["table"]
        if column is None:
            continue
        down = row["increment"] < 0
        state = f"SELECT last_value, is_called FROM {sequence}"  # noqa: S608 - quoted by PostgreSQL, as below
        last, called = await connection.fetchrow(state) or (0, False)
        far = f"SELECT {'min' if down else 'max'}({column})::bigint FROM {table}"  # noqa: S608
        reached = await connection.fetchval(far)
        if reached is None or (called and (last <= reached if down else last >= reached)):
            continue
        if not called and (last < reached if down else last > reached):
            continue
        refusal = await set_sequence(connection, sequence, reached)
        what = f"and is set to {reached}" if refusal is None else f"and cannot be set to {reached}: {refusal}"
        notes.append(f"sequence {sequence} was behind column {table}.{column}, {what}")
    return notes


async def set_sequence(connection: Connection, sequence: str, value: int, called: bool = True) -> str | None:
    """Let a sequence go on after a value, or with it if it was not called; return why PostgreSQL refuses that."""
    try:
        async with connection.transaction():
            await connection.execute(
                "SELECT pg_catalog.setval($1::text::pg_catalog.regclass, $2, $3)", sequence, value, called
            )
    except asyncpg.DataError as exc:
        return reason_of(exc)
    return None


async def _compare_rows(
    connection: Connection, contents: Contents, place_of: Callable[[SourceTable], str]
) -> list[str]:
    found: dict[str, int | None] = {}
    for table in contents.tables:
        schema = place_of(table)
        try:
            found[table.label] = await count_rows(connection, schema, table.name)
        except asyncpg.UndefinedTableError:
            found[table.label] = None
        except asyncpg.PostgresError as exc:
            raise AdoptionError(f"table {schema}.{table.name} cannot be counted: {reason_of(exc)}") from exc
    if differing := differing_rows(contents.tables, found):
        raise AdoptionError(f"the copy is not complete: {'; '.join(differing[:5])}")
    return []


def rows_of(contents: Contents) -> str:
    """Return how many rows there are, in words."""
    rows = sum(one.rows or 0 for one in contents.tables)
    return f"{rows} row{'s' * (rows != 1)} in {counted(len(contents.tables)).replace('tenant', 'table')}"


__all__ = ["SEQUENCES", "rows_of", "set_sequence", "verify"]
