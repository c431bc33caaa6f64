"""The values of sequences, which no snapshot has: ``pg_dump`` reads them as they are at that moment."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from ..postgres.connections import Connection
from ..postgres.errors import describe
from ..postgres.failures import SERVER_FAILURES

logger = logging.getLogger("tenancy_orm.backups")

# NULL: it was never used, or this login may not read it
_SEQUENCES = """
SELECT pg_catalog.quote_ident(n.nspname) || '.' || pg_catalog.quote_ident(c.relname) AS name,
       CASE WHEN pg_catalog.has_sequence_privilege(c.oid, 'USAGE, SELECT')
            THEN pg_catalog.pg_sequence_last_value(c.oid) END AS value
  FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
 WHERE c.relkind = 'S' AND c.relpersistence <> 't' AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
   AND n.nspname <> ALL ($1::text[]) AND ($2::text[] IS NULL OR n.nspname = ANY ($2::text[]))
   AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend e WHERE e.classid = 'pg_catalog.pg_class'::pg_catalog.regclass
                      AND e.objid = c.oid AND e.deptype = 'e')
"""


async def read_sequences(
    connection: Connection, *, left_out: Sequence[str], schemas: Sequence[str] | None
) -> dict[str, int]:
    """Return the last value of each sequence that was used, by its quoted name with the schema.

    Args:
        connection: To the database.
        left_out: Not those in these schemas.
        schemas: Those in these schemas alone; all where None.
    """
    rows = await connection.fetch(_SEQUENCES, list(left_out), None if schemas is None else list(schemas))
    return {row["name"]: row["value"] for row in rows if row["value"] is not None}


async def unchanged(
    connection: Connection, before: Mapping[str, int], *, left_out: Sequence[str], schemas: Sequence[str] | None
) -> dict[str, int]:
    """Return those that still have the value of before: what ``pg_dump`` has read of the others, nobody knows."""
    try:
        now = await read_sequences(connection, left_out=left_out, schemas=schemas)
    except SERVER_FAILURES as exc:
        # one was dropped, say; the dump is complete
        logger.warning("the values of sequences are not in the manifest: %s", describe(exc))
        return {}
    return {name: value for name, value in before.items() if now.get(name) == value}


__all__ = ["read_sequences", "unchanged"]
