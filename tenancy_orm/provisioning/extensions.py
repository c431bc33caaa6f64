"""PostgreSQL extensions of the setting ``extensions``: in templates, and in the databases of existing tenants.

The administrator installs them, since most extensions need a superuser. So they belong to the administrator, and
everybody may use their types and functions, as their scripts grant it.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import ExtensionUnavailableError
from ..postgres.connections import Connection
from ..postgres.quoting import quote_identifier


async def check_available(connection: Connection, names: Sequence[str], *, server: str) -> None:
    """Check that a server has the files of these extensions.

    Args:
        connection: To any database of the server.
        names: The extensions.
        server: The server's name, for the error.

    Raises:
        ExtensionUnavailableError: it lacks one.
    """
    if not names:
        return
    query = "SELECT name::text FROM pg_catalog.pg_available_extensions WHERE name::text = ANY($1::text[])"
    found = {row["name"] for row in await connection.fetch(query, list(names))}
    if lacking := [name for name in names if name not in found]:
        raise ExtensionUnavailableError(lacking, server=server)


async def install(connection: Connection, names: Sequence[str]) -> None:
    """Install extensions in the database of ``connection``, which is an administrative one, with those they need."""
    for name in names:
        await connection.execute(f"CREATE EXTENSION IF NOT EXISTS {quote_identifier(name)} SCHEMA public CASCADE")
