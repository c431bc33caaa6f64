"""The tenant's role on the server that its database is moved to."""

from __future__ import annotations

from contextlib import suppress

from ..cancellation import run_to_completion
from ..errors import DatabaseExistsError
from ..postgres import connections
from ..provisioning.creation.pipeline import ProvisioningServices
from ..provisioning.provisioner import settings_of
from ..provisioning.server_objects import roles
from ..provisioning.server_objects.scram import scram_verifier
from ..tenant import Placement, Tenant
from .record import MoveRecord


async def create(move: MoveRecord) -> None:
    """Create the tenant's role on the new server, unless an earlier move has left it there."""
    provisioning, tenant, place = move.provisioning, move.tenant, move.new
    settings = await settings_of(move.services.provisioner, place.server)
    limit = provisioning.config.tiers[tenant.tier].connection_limit
    blockers = provisioning.blockers(provisioning.servers[place.server])
    connection = await blockers.connect(purpose="tenancy-move")
    try:
        with suppress(DatabaseExistsError):
            await roles.create(
                connection,
                place.role,
                verifier=_verifier(provisioning, tenant),
                connection_limit=limit,
                settings=settings.statements(place.role),
            )
        await roles.set_password(connection, place.role, verifier=_verifier(provisioning, tenant))
    finally:
        await run_to_completion(connections.close(connection))


async def renew_password(provisioning: ProvisioningServices, now: Tenant, place: Placement) -> None:
    """Give the role the password that the registry has now: it may have been rotated since.

    Args:
        provisioning: The objects of provisioning.
        now: The tenant, as the registry has it in the pause.
        place: The server and the role.
    """
    blockers = provisioning.blockers(provisioning.servers[place.server])
    connection = await blockers.connect(purpose="tenancy-move")
    try:
        await roles.set_password(connection, place.role, verifier=_verifier(provisioning, now))
    finally:
        await run_to_completion(connections.close(connection))


def _verifier(provisioning: ProvisioningServices, tenant: Tenant) -> str:
    assert tenant.placement is not None  # noqa: S101 - for the type checker: it is not purged
    return scram_verifier(provisioning.keyring.open_password(tenant.id, tenant.placement.sealed_password))


__all__ = ["create", "renew_password"]
