"""What a server shows of the connections to it: how many there are, and which process each one belongs to.

The ``application_name`` of each connection ends in the tag of its process's lease. A session may give itself another
name. So a connection of a tenant's role without a known tag is a process's as well, as far as the processes may have
more than those with their tags. All others are somebody else's: an administrator's, or another application's.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from uuid import UUID

from ..postgres import connections
from ..postgres.connections import POLL_SECONDS, Connection
from ..postgres.locks import lock_key
from ..postgres.membership import end_connections
from ..servers.server import CLOSE_SECONDS, Server

_LOGIN_SECONDS = 3.0
_NAME_BYTES = 63  # PostgreSQL cuts an application_name after that

# Parallel workers do not count. A role that is no superuser does not see which backends are some.
_COUNT = """
SELECT pg_catalog.substring(a.application_name, '/([0-9a-f]{12})$') AS tag, pg_catalog.count(a.pid)::int AS number,
       coalesce(a.usename::text ~ $1, false) AS is_tenants, s.accepted
FROM (SELECT pg_catalog.current_setting('max_connections')::int
             - pg_catalog.current_setting('superuser_reserved_connections')::int
             - coalesce(pg_catalog.current_setting('reserved_connections', true)::int, 0) AS accepted) AS s
LEFT JOIN pg_catalog.pg_stat_activity AS a
  ON a.datid IS NOT NULL AND a.usesysid IS NOT NULL AND a.pid <> pg_catalog.pg_backend_pid()
     AND a.backend_type IS DISTINCT FROM 'parallel worker'
GROUP BY 1, 3, 4
"""
_OF_TAG = """
SELECT a.pid, a.usename::text AS role FROM pg_catalog.pg_stat_activity AS a
WHERE pg_catalog.right(a.application_name, 13) = '/' || $1 ORDER BY a.backend_start
"""


@dataclass(frozen=True, slots=True)
class ServerCount:
    """The connections to a server at one moment.

    Attributes:
        accepted: How many it accepts, less those that it reserves.
        foreign: How many are not of a tenant's role.
        tenants: How many are, by the tag in their name; by None those without one.
    """

    accepted: int
    foreign: int
    tenants: Mapping[str | None, int]

    def others(self, granted: Mapping[str, int], *, elsewhere: Collection[str] = ()) -> int:
        """Return how many of them are none of the processes'.

        Args:
            granted: How many each process may have, by its tag.
            elsewhere: The tags of leases of other servers, which may be this cluster by other names.
        """
        others, unknown = self.foreign, 0
        for tag, number in self.tenants.items():
            if tag in elsewhere and tag not in granted:
                others += number
            elif tag not in granted:
                unknown += number
        renamed = sum(max(0, number - self.tenants.get(tag, 0)) for tag, number in granted.items())
        return others + max(0, unknown - renamed)


@asynccontextmanager
async def administration(server: Server) -> AsyncIterator[Connection]:
    """Yield an administrative connection to a server.

    Raises:
        ServerUnavailableError, asyncpg.PostgresError, ConfigurationError: as ``Server.connect_admin``.
    """
    connection = await server.connect_admin(timeout=_LOGIN_SECONDS, purpose="tenancy-leases")
    try:
        yield connection
    finally:
        await connections.close(connection, timeout=CLOSE_SECONDS)


async def count(connection: Connection, stem: str) -> ServerCount:
    """Count the connections to a server.

    Args:
        connection: An administrator's.
        stem: What the names of tenants' roles begin with.

    Raises:
        asyncpg.PostgresError: the server refuses.
    """
    rows = await connection.fetch(_COUNT, f"^{stem}[0-9a-f]{{32}}$")
    return ServerCount(
        accepted=rows[0]["accepted"],
        foreign=sum(row["number"] for row in rows if not row["is_tenants"]),
        tenants={row["tag"]: row["number"] for row in rows if row["is_tenants"]},
    )


async def end_tagged(connection: Connection, tag: str, *, keep: int = 0, timeout: float) -> None:
    """End the connections of a process as the administrator, the latest first, and wait until ``keep`` are left.

    Raises:
        TimeoutError: there are more after ``timeout`` seconds.
        asyncpg.PostgresError: the server refuses.
    """
    async with asyncio.timeout(timeout):
        # a login that succeeded just before appears among the connections a moment later: look again
        looks_left = 2
        while looks_left:
            above = (await connection.fetch(_OF_TAG, tag))[keep:]
            looks_left = 2 if above else looks_left - 1
            by_role: dict[str, list[int]] = {}
            for row in above:
                by_role.setdefault(row["role"], []).append(row["pid"])
            for role, pids in by_role.items():
                await end_connections(connection, role, pids)
            if looks_left:
                await asyncio.sleep(POLL_SECONDS)


def presence_key(process: UUID) -> int:
    """The key of the lock on a server that a process holds while it cannot renew its lease."""
    return lock_key(f"connection lease {process.hex}")


def tagged(name: str, tag: str) -> str:
    """Return an ``application_name`` with a process's tag, unless it has that; a long name is cut."""
    if name.endswith(f"/{tag}"):
        return name
    plain = name.encode("ascii", "replace").decode()
    return f"{plain[: _NAME_BYTES - len(tag) - 1]}/{tag}"


def tag_in(name: str) -> str:
    """Return the tag that a name was given by ``tagged``."""
    return name.rpartition("/")[2]


__all__ = ["ServerCount", "administration", "count", "end_tagged", "presence_key", "tag_in", "tagged"]
