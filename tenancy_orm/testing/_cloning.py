"""Mode clone: a tenant of the run gets a new database for each test, as a clone of what it was when it was created.

``tenancy.tenants.create`` makes a tenant once: its row, its role, its key, its rights. Then its database is kept as a
snapshot, and each test gets a clone of that: what one CREATE DATABASE costs, and one statement for what PostgreSQL does
not clone, the rights on the database itself and the marker. The database that a test has used is replaced while the
next test uses that of another tenant.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import asyncpg

from ..postgres import connections, login
from ..postgres.dsn import Dsn
from ..postgres.quoting import quote_identifier, quote_literal
from ..provisioning.server_objects import databases
from ..routing.marker import marker_text
from ..tenancy import Tenancy
from ..tenant import Placement, Tenant

SNAPSHOTS = "_s_"
"""What the names of snapshots have after the prefix of all names."""

_SECONDS = 60.0
_GRANTED = (
    "SELECT r.rolname, a.privilege_type FROM pg_database AS d, aclexplode(d.datacl) AS a "
    "JOIN pg_roles AS r ON r.oid = a.grantee WHERE d.datname = $1 AND a.grantee <> d.datdba"
)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a tenant's database is cloned from.

    Args:
        name: The database that is cloned.
        placement: Where the tenant's own one is.
        owner: The role that owns both.
        statements: What opens a clone to the tenant.
    """

    name: str
    placement: Placement
    owner: str
    statements: Sequence[str]


class Cloner:
    """Makes snapshots and clones, in the background loop.

    Args:
        server_url: The administrator's URL.
    """

    def __init__(self, server_url: str) -> None:
        self._dsn = Dsn.parse(server_url)
        self._connection: asyncpg.Connection[Any] | None = None
        self._using = asyncio.Lock()

    async def snapshot(self, tenancy: Tenancy, tenant: Tenant) -> Snapshot:
        """Keep what the database of a new tenant is.

        Args:
            tenancy: The one that has made it.
            tenant: The tenant, which nobody is connected to.
        """
        place = tenant.placement
        assert place is not None  # noqa: S101 - for the type checker: it was just created
        names, installation = tenancy.internals.provisioner.names, tenancy.internals.control.installation
        # no name of the installation's, so that no reconcile of a test takes it for a leftover
        name = f"{names.prefix}{SNAPSHOTS}{secrets.token_hex(8)}"
        async with self._using:
            connection = await self._connected()
            await databases.create(
                connection, name, template=place.database, owner=names.owner, open_to_connections=False
            )
            quoted, owner = quote_identifier(place.database), quote_identifier(names.owner)
            granted = [
                f"GRANT {right} ON DATABASE {quoted} TO {quote_identifier(role)}"
                for role, right in await connection.fetch(_GRANTED, place.database)
            ]
        marker = quote_literal(marker_text(installation, tenant.id))
        statements = [
            f"REVOKE ALL ON DATABASE {quoted} FROM PUBLIC",
            *granted,
            f"SET LOCAL ROLE {owner}",
            f"COMMENT ON DATABASE {quoted} IS {marker}",
            "RESET ROLE",
            f"ALTER DATABASE {quoted} WITH ALLOW_CONNECTIONS true",
        ]
        return Snapshot(name, place, names.owner, statements)

    async def replace(self, snapshot: Snapshot) -> None:
        """Give the tenant its database as it was; whoever is connected to the used one is disconnected."""
        async with self._using:
            connection = await self._connected()
            database = snapshot.placement.database
            await databases.drop(connection, database)
            await databases.create(
                connection, database, template=snapshot.name, owner=snapshot.owner, open_to_connections=False
            )
            await connection.execute("; ".join(snapshot.statements))

    async def drop(self, snapshot: Snapshot) -> None:
        """Drop a snapshot."""
        async with self._using:
            await databases.drop(await self._connected(), snapshot.name)

    async def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            await connections.close(self._connection)

    async def _connected(self) -> asyncpg.Connection[Any]:
        if self._connection is None or self._connection.is_closed():
            self._connection = await login.connect(self._dsn, purpose="tenancy-tests", timeout=_SECONDS)
        return self._connection


__all__ = ["SNAPSHOTS", "Cloner", "Snapshot"]
