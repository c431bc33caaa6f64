"""Tables that replication cannot truncate: an unlogged table, which is not replicated, refers to them."""

from __future__ import annotations

from ..postgres.connections import Connection

# A partition has a constraint of its own, which belongs to that of the whole table.
_REFERRED = """
SELECT DISTINCT quote_ident(n.nspname) || '.' || quote_ident(f.relname) AS name
  FROM pg_constraint k JOIN pg_class c ON c.oid = k.conrelid JOIN pg_class f ON f.oid = k.confrelid
  JOIN pg_namespace n ON n.oid = f.relnamespace
 WHERE k.contype = 'f' AND k.conparentid = 0 AND c.relpersistence = 'u' AND f.relpersistence = 'p' ORDER BY 1
"""


async def referred_by_unlogged(connection: Connection) -> tuple[str, ...]:
    """Return the logged tables that an unlogged one refers to, quoted.

    A statement that truncates one names the other as well, or has CASCADE. A subscription repeats it for the replicated
    one alone, which PostgreSQL refuses.

    Args:
        connection: An administrative one to the database.
    """
    return tuple(row["name"] for row in await connection.fetch(_REFERRED))


__all__ = ["referred_by_unlogged"]
