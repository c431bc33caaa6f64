"""What a server has to be before it can hold tenants."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Final

import asyncpg

from ..errors import ConfigurationError
from ..postgres import connections
from ..servers import Server
from ..servers.rows import ServerRow
from ..servers.server import ServerFacts

OLDEST_VERSION: Final = 14
"""The oldest major version of PostgreSQL that can hold tenants."""

_RIGHTS = (
    "SELECT r.rolsuper OR (r.rolcreatedb AND r.rolcreaterole) FROM pg_catalog.pg_roles AS r "
    "WHERE r.rolname = current_user"
)


async def verify(server: Server) -> ServerFacts:
    """Log in as the administrator, and see that the server can hold tenants.

    Raises:
        PoolerError, ServerUnavailableError: as ``Server.connect_admin``.
        ConfigurationError: it is too old, or the administrator lacks rights.
    """
    try:
        connection = await server.connect_admin()
    except asyncpg.PostgresError as exc:
        raise server.unavailable(exc) from exc
    try:
        return await _verify(server, connection)
    except OSError as exc:  # no answer in time, for example
        raise server.unavailable(exc) from exc
    finally:
        await connections.close(connection)


async def _verify(server: Server, connection: connections.Connection) -> ServerFacts:
    async with asyncio.timeout(server.connect_timeout):
        if (version := connections.version(connection)) < OLDEST_VERSION:
            raise ConfigurationError(
                f"server {server.name!r} runs PostgreSQL {version}; {OLDEST_VERSION} or later can hold tenants"
            )
        if not await connection.fetchval(_RIGHTS):
            raise ConfigurationError(
                f"the administrator of server {server.name!r}, {server.dsn.user}, needs CREATEDB and CREATEROLE: "
                "run there as a superuser: ALTER ROLE ... CREATEDB CREATEROLE"
            )
        return await server.learn(connection)


def refuse_known_cluster(name: str, identity: str | None, rows: Iterable[ServerRow]) -> None:
    """Refuse a cluster, by its identity, that is a server already, by another name.

    Raises:
        ConfigurationError: it is.
    """
    for row in rows:
        if row.name != name and row.identity is not None and row.identity == identity:
            raise ConfigurationError(
                f"the address of server {name!r} leads to the cluster of server {row.name!r}: its connections and its "
                "capacity would be counted twice; to add it all the same: --same-cluster (same_cluster=True)"
            )


__all__ = ["OLDEST_VERSION", "refuse_known_cluster", "verify"]
