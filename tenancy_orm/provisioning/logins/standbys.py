"""Ending a tenant's connections to replicas: a standby replays that logins are blocked, and not that sessions end."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from ...control.names import Names, login_stem
from ...errors import PoolerError, ServerUnavailableError
from ...postgres import connections
from ...postgres.failures import SERVER_FAILURES
from ...postgres.login import reason_of
from ...servers.server import CLOSE_SECONDS, Server
from . import guests

logger = logging.getLogger("tenancy_orm.provisioning")

REPLAY_SECONDS: Final = 3.0
"""How long a replica has for replaying that the logins are blocked; after that it is left as it is, which is logged."""

_CAN_LOG_IN: Final = (
    "SELECT count(*) FROM pg_roles WHERE (rolname = $1 OR starts_with(rolname::text, $2)) AND rolcanlogin"
)
_END: Final = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = $1 OR starts_with(usename::text, $2)"
)
_CAN_CONNECT: Final = (
    "SELECT count(*) FROM pg_roles r, pg_database d WHERE (r.rolname = $1 OR starts_with(r.rolname::text, $2)) "
    "AND d.datname = $3 AND has_database_privilege(r.oid, d.oid, 'CONNECT')"
)
_END_IN: Final = f"""
SELECT pg_terminate_backend(a.pid) FROM pg_stat_activity a JOIN pg_roles r ON r.oid = a.usesysid
 WHERE a.datname = $1 AND ({guests.OUTSIDER.format(owner="$2", stem="$3", tenants="$4")})
"""  # noqa: S608 - constants


async def end_on_replicas(server: Server, role: str, *, deadline: float) -> None:
    """End the connections of a tenant's role, and of its temporary logins, to all replicas of a server.

    Its logins were blocked on the primary before. A replica that does not answer is left out.

    Args:
        server: The primary.
        role: The tenant's role.
        deadline: When all must be done, by the clock of the event loop.
    """
    ends = min(deadline, asyncio.get_running_loop().time() + REPLAY_SECONDS)
    await asyncio.gather(*(_end(replica, role, ends) for replica in server.replicas))


async def end_in_database_on_replicas(server: Server, names: Names, role: str, database: str) -> None:
    """End the connections of all but administrators to a database on all replicas of a server.

    They lost the right to connect to it on the primary before, the tenant's role last. A replica that does not answer
    is left out.

    Args:
        server: The primary.
        names: Of this installation.
        role: The tenant's role.
        database: The database, which the tenant does not use any more.
    """
    ends = asyncio.get_running_loop().time() + REPLAY_SECONDS
    end = (_END_IN, database, *guests.outsider_names(names))
    may = (_CAN_CONNECT, role, login_stem(role), database)
    await asyncio.gather(*(_repeat(replica, role, ends, may, end) for replica in server.replicas))


async def _end(replica: Server, role: str, ends: float) -> None:
    given = (role, login_stem(role))
    await _repeat(replica, role, ends, (_CAN_LOG_IN, *given), (_END, *given))


async def _repeat(replica: Server, role: str, ends: float, may: tuple[str, ...], end: tuple[str, ...]) -> None:
    """End connections until none is left and ``may`` is replayed; both are a query with its parameters."""
    try:
        async with asyncio.timeout_at(ends):
            connection = await replica.connect_admin()
            try:
                while True:
                    blocked = not await connection.fetchval(*may)
                    if not await connection.fetch(*end) and blocked:
                        return
                    await asyncio.sleep(connections.POLL_SECONDS)
            finally:
                await connections.close(connection, timeout=CLOSE_SECONDS)
    except (ServerUnavailableError, PoolerError, *SERVER_FAILURES) as exc:
        logger.warning(
            "open connections of role %s to replica %s were not ended: %s", role, replica.name, reason_of(exc)
        )


__all__ = ["end_in_database_on_replicas", "end_on_replicas"]
