"""The installation's id in the control database, and how a new one takes over that of a lost one.

The id is in the markers of tenants' databases, and in the names of databases and roles. So a new control database knows
none of the tenants of a lost one before it has the same id. What is derived from the id is made again by the next
opening: check values of keys, and the viewer role by ``ControlDatabase.upgrade``. Data keys are wrapped for the id; the
caller has wrapped them again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from uuid import UUID

from sqlalchemy import delete, select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection

from ..errors import ConfigurationError
from .models import data_keys, installation, key_checks, templates

# with a row in one of them, something on a server, or in a store, has the present id
_UNUSED = ("tenants", "warm_databases", "backups", "backup_keys", "operations", "audit_cuts")
_LOCK = text("LOCK TABLE tenancy.tenants IN SHARE ROW EXCLUSIVE MODE")
_OTHERS = text(
    "SELECT DISTINCT host, pid FROM tenancy.connection_leases "
    "WHERE process <> ALL(CAST(:own AS text[])::uuid[]) AND expires_at > clock_timestamp() ORDER BY 1, 2"
)


async def read(connection: AsyncConnection) -> tuple[UUID, str | None]:
    """Return the id, and the name of the viewer role; None until ``ControlDatabase.upgrade`` has made that one."""
    row = (await connection.execute(select(installation.c.id, installation.c.viewer))).one()
    return row.id, row.viewer


async def take(
    connection: AsyncConnection, to: UUID, *, processes: Collection[UUID], wrapped: Mapping[str, bytes]
) -> UUID:
    """Give a control database that was not used yet the id of another one; returns the former id.

    Args:
        connection: A transaction on the control database, as the tables' owner.
        to: The id.
        processes: The ids of this process in its leases of connections.
        wrapped: The data keys, wrapped for that id.

    Raises:
        ConfigurationError: it was used, or another process has it open.
    """
    await connection.execute(_LOCK)
    for table in _UNUSED:
        if await connection.scalar(text(f"SELECT EXISTS (SELECT FROM tenancy.{table})")):  # noqa: S608 - constants
            raise ConfigurationError(
                f"the control database was used already (it has rows in {table}), and keeps its id: make a new empty "
                "one, and run: tenancy init"
            )
    if others := (await connection.execute(_OTHERS, {"own": list(map(str, processes))})).all():
        places = ", ".join(f"{row.host} ({row.pid})" for row in others)
        raise ConfigurationError(
            f"other processes have the control database open: {places}; end them first, they would go on with its "
            "former id"
        )
    former, _ = await read(connection)
    await connection.execute(delete(key_checks))
    await connection.execute(delete(templates))
    for key_id, value in wrapped.items():
        await connection.execute(update(data_keys).where(data_keys.c.id == key_id).values(wrapped=value))
    await connection.execute(update(installation).values(id=to, viewer=None))
    return former


__all__ = ["read", "take"]
