"""The rows of the servers: where they are, how much they hold, and which database has their administrators' locks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Literal

from sqlalchemy import func, select, update

from ..audit.actor import SYSTEM, Actor
from ..audit.log import AuditLog
from ..context import refuse_while_bound
from ..control.database import ControlDatabase
from ..control.models import servers, tenants
from ..errors import UnknownServerError
from ..tenant import Status

ServerState = Literal["active", "drain"]
"""Whether a server takes new tenants; one in ``drain`` takes none, and serves those that it has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerRow:
    """A server as the control database knows it.

    Attributes:
        name: Its name.
        host: The first host of its administrative URL.
        port: That host's port.
        maintenance_database: The database of its administrative URL, in which advisory locks are taken.
        region: Where it is, as tenants name it; None: nowhere in particular.
        labels: What else is known of it, for placement.
        capacity: How many tenants it may hold; None: any number.
        weight: Its share of the tenants, in proportion to the weights of the others.
        state: Whether it takes new tenants.
        max_connections: How many connections all processes together may have; None: as many as the server offers.
        max_opening: How many connections may be opened at once; None: the setting's value.
        identity: Which cluster it is, as far as it was seen.
        sealed_addresses: Its addresses, sealed; None where each process has them from its settings.
        tenants: How many tenants it holds, without purged ones; None where that was not counted.
    """

    name: str
    host: str
    port: int
    maintenance_database: str | None = None
    region: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    capacity: int | None = None
    weight: float = 1.0
    state: ServerState = "active"
    max_connections: int | None = None
    max_opening: int | None = None
    identity: str | None = None
    sealed_addresses: bytes | None = field(default=None, repr=False)
    tenants: int | None = None

    @property
    def accepts_tenants(self) -> bool:
        """Whether it takes new tenants, if it has room."""
        return self.state == "active"


COLUMNS = tuple(servers.c[item.name] for item in fields(ServerRow) if item.name != "tenants")
"""What a ``ServerRow`` is made of; tenants are counted by another query."""


async def read_rows(control: ControlDatabase) -> list[ServerRow]:
    """Return the rows of all servers, by name; tenants are not counted.

    Raises:
        ControlUnavailableError: the control database does not answer.
        CrossTenantError: a tenant is bound.
    """
    refuse_while_bound("listing servers")
    async with control.connect() as connection:
        rows = await connection.execute(select(*COLUMNS).order_by(servers.c.name))
        return [ServerRow(**row) for row in rows.mappings()]


async def list_servers(control: ControlDatabase) -> list[ServerRow]:
    """Return the rows of all servers, by name, with how many tenants each holds.

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
        select(*COLUMNS, func.coalesce(counted.c.held, 0).label("tenants"))
        .outerjoin(counted, counted.c.server == servers.c.name)
        .order_by(servers.c.name)
    )
    async with control.connect() as connection:
        return [ServerRow(**row) for row in (await connection.execute(query)).mappings()]


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


__all__ = ["COLUMNS", "ServerRow", "ServerState", "list_servers", "read_rows", "set_maintenance_database"]
