"""Databases that another one has replaced, by a restore or a move: their markers say so.

A control database that was restored from an older backup names them as the ones in use. To open one would bring back
what it had, and leave the tenant with two databases that are written to. So nothing uses a database with such a marker
but the undo or the rollback of what has replaced it, which gives it its own marker again first.
"""

from __future__ import annotations

from ...errors import ProvisioningError
from ...postgres.connections import Connection
from ...routing.marker import replaced_by
from ...servers import Server
from . import databases
from .admin_connections import AdminConnections

_REMEDY = "see which one the tenant uses: tenancy rebuild --dry-run"


async def refuse_replaced(connection: Connection, database: str) -> None:
    """Refuse to use a database as the one in use if another one has replaced it.

    Args:
        connection: An administrative one, to any database of the server.
        database: The database that a tenant's row names.

    Raises:
        ProvisioningError: another one has.
    """
    state = await databases.state(connection, database)
    if state is not None and (by := replaced_by(state.comment)) is not None:
        raise ProvisioningError(
            f"database {database!r} is not in use any more: {by!r} has replaced it, and the control database is older "
            f"than that; {_REMEDY}",
            step="replaced",
        )


async def refuse_stale(
    admin_connections: AdminConnections, server: Server, database: str, *, missing: bool = True
) -> None:
    """Refuse what a tenant's row says if that cannot be the database in use: it was replaced, or does not exist.

    Args:
        admin_connections: To the servers.
        server: The server that the row names.
        database: The database that it names.
        missing: Whether one that does not exist is refused as well: not where a backup is restored in its place.

    Raises:
        ProvisioningError: it cannot be.
        ServerUnavailableError: the server does not answer.
    """
    async with admin_connections.use(server) as connection:
        await refuse_replaced(connection, database)
        if missing and await databases.state(connection, database) is None:
            raise ProvisioningError(f"database {database!r} does not exist; {_REMEDY}", step="replaced")


__all__ = ["refuse_replaced", "refuse_stale"]
