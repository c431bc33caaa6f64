"""Whether the row of a creation is that of an older backup of the control database, by what there is on the servers.

The backup may have been made while the tenant was being created, and be restored long after. The tenant has been a
customer's since, perhaps in another database or on another server: the row alone looks like that of a process that has
died.
"""

from __future__ import annotations

import asyncio
import logging
from uuid import UUID

from ...cancellation import run_to_completion
from ...errors import TenancyError
from ...postgres import connections
from ...postgres.connections import Connection
from ...postgres.errors import describe
from ...postgres.failures import SERVER_FAILURES
from ...routing import marker
from ...tenant import Placement
from ..server_objects import databases, roles
from .pipeline import ProvisioningServices

logger = logging.getLogger("tenancy_orm.provisioning")

_PATIENCE = 0.25  # the part of the time for a creation for which another server is waited for

_MARKED = "SELECT datname::text FROM pg_database WHERE shobj_description(oid, 'pg_database') = $1 ORDER BY 1"


async def is_whole(
    services: ProvisioningServices, connection: Connection, tenant_id: UUID, placement: Placement
) -> bool:
    """Whether a creation has made its database to the end, whichever step its row names.

    Args:
        services: Of provisioning.
        connection: An administrative one, to the row's server.
        tenant_id: The tenant.
        placement: As the row has it.
    """
    state = await databases.state(connection, placement.database)
    if state is None or state.comment != marker.marker_text(services.installation, tenant_id):
        return False
    return not await roles.is_unfinished(connection, placement.role)


async def find_another(
    services: ProvisioningServices,
    connection: Connection,
    tenant_id: UUID,
    placement: Placement,
    *,
    but: str | None = None,
) -> str | None:
    """Return why a tenant has another database than the one that its row names; None where none is found.

    A server that does not answer is not asked: whatever it has stays, and is unknown where the row is removed.

    Args:
        services: Of provisioning.
        connection: An administrative one, to the row's server.
        tenant_id: The tenant.
        placement: As the row has it.
        but: A database on that server that is the same one, under its former name.
    """
    own = marker.marker_text(services.installation, tenant_id)
    state = await databases.state(connection, placement.database)
    if state is not None and state.comment == own:
        return None
    if state is not None and (by := marker.replaced_by(state.comment)) is not None:
        return f"{by} has replaced database {placement.database!r}"

    async def look(name: str) -> str | None:
        if name == placement.server:
            found = [one for one in await _marked(connection, own) if one != but]
        else:
            try:
                async with asyncio.timeout(services.config.provisioning.timeout * _PATIENCE):
                    other = await services.blockers(services.servers[name]).connect()
                    try:
                        found = await _marked(other, own)
                    except BaseException:
                        other.terminate()  # nothing waits for a server that does not answer
                        raise
                    await run_to_completion(connections.close(other))
            except (TenancyError, *SERVER_FAILURES) as exc:
                # what is there stays there, whatever becomes of the row
                logger.info("server %s cannot be asked for tenant %s: %s", name, tenant_id, describe(exc))
                return None
        return f"database {found[0]!r} on server {name!r} has its marker" if found else None

    return next(filter(None, await asyncio.gather(*map(look, services.servers))), None)


async def _marked(connection: Connection, text: str) -> list[str]:
    return [row[0] for row in await connection.fetch(_MARKED, text)]


__all__ = ["find_another", "is_whole"]
