"""The grant hook in the database of a tenant that exists: an upgrade may have made what its statements name."""

from __future__ import annotations

import asyncio

from ...cancellation import run_to_completion
from ...errors import ProvisioningError
from ...postgres import connections
from ...postgres.errors import describe
from ...postgres.failures import SERVER_FAILURES
from ...tenant import Placement
from ..rights.tenant_rights import TenantRights
from .pipeline import ProvisioningServices


async def apply_hook(services: ProvisioningServices, slug: str, place: Placement, rights: TenantRights) -> None:
    """Run the statements of the grant hook, in one transaction.

    Args:
        services: Of provisioning.
        slug: The tenant's, for the error.
        place: Where its database is.
        rights: With the hook.

    Raises:
        ProvisioningError: a statement failed, or they took longer than ``provisioning.timeout``; none was applied.
        ServerUnavailableError: the server does not answer.
    """
    blockers = services.blockers(services.servers[place.server])
    connection = await blockers.connect(place.database, role=services.names.owner)

    async def work() -> None:
        async with connections.transaction(connection):
            await rights.run_hook(connection, place.database, place.role)

    try:
        # repeated after a conflict: a reconcile may run the hook in this database at the same time
        async with asyncio.timeout(services.config.provisioning.timeout):
            await blockers.run(connection, work)
    except (ProvisioningError, *SERVER_FAILURES) as exc:
        reason = ("" if isinstance(exc, ProvisioningError) else "provisioning.grants failed: ") + describe(exc)
        raise ProvisioningError(
            f"{reason}; the schema is upgraded, and another upgrade will not run the hook: run tenancy reconcile",
            tenant=slug,
            step="grants",
        ) from exc
    finally:
        await run_to_completion(connections.close(connection))


__all__ = ["apply_hook"]
