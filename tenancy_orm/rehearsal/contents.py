"""Digests of the values in each column: an upgrade and a downgrade must bring them back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from ..postgres.connections import Connection

Digests: TypeAlias = Mapping[str, Mapping[str, tuple[int, str]]]
"""By table and column: how many rows there are, and a sum over the values that does not depend on their order."""

_COLUMNS = """
SELECT pg_catalog.quote_ident(n.nspname) || '.' || pg_catalog.quote_ident(c.relname) AS table,
       pg_catalog.array_agg(pg_catalog.quote_ident(a.attname) ORDER BY a.attnum) AS columns
  FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
  JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
 WHERE c.relkind = 'r' AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
   AND pg_catalog.has_table_privilege(c.oid, 'SELECT')
 GROUP BY 1
"""


async def read_digests(connection: Connection) -> Digests:
    """Read every table once, and return the digests."""
    found: dict[str, dict[str, tuple[int, str]]] = {}
    for table, columns in await connection.fetch(_COLUMNS):
        sums = ", ".join(
            f"coalesce(sum(pg_catalog.hashtextextended({column}::text, 0)::numeric), 0)::text" for column in columns
        )
        row = await connection.fetchrow(f"SELECT count(*), {sums} FROM {table}")  # noqa: S608 - quoted by PostgreSQL
        assert row is not None  # noqa: S101 - an aggregate has one row
        found[table] = {column: (row[0], row[number]) for number, column in enumerate(columns, start=1)}
    return found


def lost(before: Digests, after: Digests) -> tuple[str, ...]:
    """Return the columns that are in both, and have other values: ``public.notes.body``. A table's rows are ``.*``."""
    names = []
    for table, columns in before.items():
        found = after.get(table)
        if found is None:
            continue
        counts = {count for count, _ in (*columns.values(), *found.values())}
        if len(counts) > 1:
            names.append(f"{table}.*")
            continue
        names += [f"{table}.{name}" for name, digest in columns.items() if found.get(name, digest) != digest]
    return tuple(names)
