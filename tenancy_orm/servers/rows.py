"""The rows of the servers: whether they accept tenants, and which database holds their administrators' locks."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import func, select, update

from ..audit.actor import SYSTEM, Actor
from ..audit.log import AuditLog
from ..context import refuse_while_bound
from ..control.database import ControlDatabase
from ..control.models import servers, tenants
from ..errors import UnknownServerError
from ..tenant import Status


@dataclass(frozen=True, slots=True)
class ServerRow:
    """A server as the control database knows it.

    Attributes:
        name: Its name in the configuration.
        host: The first host of its administrative URL.
        port: That host's port.
        maintenance_database: The database of its administrative URL, in which advisory locks are taken.
        accepts_tenants: Whether a tenant that names no server may be placed on it.
        tenants: How many tenants it holds.
    """

    name: str
    host: str
    port: int
    maintenance_database: str | None
    accepts_tenants: bool
    tenants: int


async def list_servers(control: ControlDatabase) -> list[ServerRow]:
    """Return every server that was ever configured, by name.

    Raises:
        ControlUnavailableError: the control database does not answer.
        CrossTenantError: a tenant is bound.
    """
    refuse_while_bound("listing servers")
    counted = (
        select(tenants.c.server, func.count().label("held"))
        .where(tenants.c.status != Status.PURGED)
        .group_by(tenants.c.server)
        .subquery()
    )
    query = (
        select(servers, func.coalesce(counted.c.held, 0).label("held"))
        .outerjoin(counted, counted.c.server == servers.c.name)
        .order_by(servers.c.name)
    )
    async with control.connect() as connection:
        return [
            ServerRow(row.name, row.host, row.port, row.maintenance_database, row.accepts_tenants, row.held)
            for row in await connection.execute(query)
        ]


async def set_maintenance_database(
    control: ControlDatabase, audit: AuditLog, name: str, database: str, *, actor: Actor = SYSTEM
) -> str | None:
    """Record another maintenance database for a server, and return the former one.

    Locks in two databases do not exclude each other: stop every process of the installation before.

    Args:
        control: The open control database.
        audit: Where the change is recorded.
        name: The server's name.
        database: The database that its administrative URL names from now on.
        actor: Who does this.

    Raises:
        UnknownServerError: no process has been opened with a server of this name.
        ControlUnavailableError: the control database does not answer.
        CrossTenantError: a tenant is bound.
    """
    refuse_while_bound("changing servers")
    async with control.transaction() as connection:
        found = await connection.execute(
            select(servers.c.maintenance_database).where(servers.c.name == name).with_for_update()
        )
        if (row := found.one_or_none()) is None:
            raise UnknownServerError(name)
        former: str | None = row.maintenance_database
        await connection.execute(update(servers).where(servers.c.name == name).values(maintenance_database=database))
        await audit.append(
            connection,
            action="server.maintenance_database",
            actor=actor,
            before={"maintenance_database": former},
            after={"maintenance_database": database},
            detail={"server": name},
        )
    return former


__all__ = ["ServerRow", "list_servers", "set_maintenance_database"]
