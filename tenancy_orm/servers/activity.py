"""How busy the databases of a server are, by PostgreSQL's own statistics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, TypeAlias

from ..postgres import connections
from .server import Server

Activity: TypeAlias = tuple[bool, int]
"""Whether a database has connections, so that a process has used it a moment ago; and how many transactions it had."""

_ASK_SECONDS: Final = 10.0  # how long a server's answer may take

# both columns are for everybody to read
_ACTIVITY = """
    SELECT datname::text AS name, numbackends > 0 AS connected, xact_commit + xact_rollback AS transactions
    FROM pg_catalog.pg_stat_database WHERE pg_catalog.starts_with(datname::text, $1)
    ORDER BY connected DESC, transactions DESC LIMIT $2
    """


async def read_activity(server: Server, stem: str, *, most: int | None = None) -> Mapping[str, Activity]:
    """Return the activity of the databases with names that begin with ``stem``, by name; the busiest first.

    Raises:
        ServerUnavailableError, asyncpg.PostgresError, OSError: the server does not answer.
    """
    connection = await server.connect_admin()
    try:
        rows = await connection.fetch(_ACTIVITY, stem, most, timeout=_ASK_SECONDS)
    finally:
        await connections.close(connection)
    return {row["name"]: (row["connected"], row["transactions"]) for row in rows}


__all__ = ["Activity", "read_activity"]
