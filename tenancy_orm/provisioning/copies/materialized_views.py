"""Materialized views of a copied database: a dump of the schema has no entry that fills one."""

from __future__ import annotations

from collections.abc import Collection

from ...cancellation import run_to_completion
from ...postgres import connections
from ...postgres.connections import Connection
from ..logins.copy_logins import UNBOUNDED, CopyLogin

# in this order each comes after those that it reads
_VIEWS = """
SELECT pg_catalog.quote_ident(n.nspname) || '.' || pg_catalog.quote_ident(c.relname) AS name
  FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
 WHERE c.relkind = 'm' AND c.relispopulated = $1 ORDER BY c.oid
"""


async def filled_views(connection: Connection) -> set[str]:
    """Return the names of the views that are filled, quoted."""
    return {row["name"] for row in await connection.fetch(_VIEWS, True)}


async def fill_views(login: CopyLogin, filled: Collection[str], *, timeout: float) -> None:
    """Fill the copy's views that are filled in its source, and make the planner's statistics.

    Args:
        login: Owns what is in the copy.
        filled: Names of the source's views, quoted.
        timeout: Seconds that connecting may take.
    """
    connection = await login.connect(timeout=timeout, settings=UNBOUNDED)
    try:
        for row in await connection.fetch(_VIEWS, False):
            if row["name"] in filled:
                await connection.execute(f"REFRESH MATERIALIZED VIEW {row['name']}")
        await connection.execute("ANALYZE")
    finally:
        await run_to_completion(connections.close(connection))


__all__ = ["fill_views", "filled_views"]
