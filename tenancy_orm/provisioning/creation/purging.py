"""The purge of one tenant: its database, role and secrets are removed, and its row becomes a tombstone."""

from __future__ import annotations

from uuid import UUID

from ...audit.actor import Actor
from ...cancellation import run_to_completion
from ...errors import ProvisioningError, RoutingError
from ...postgres import connections
from ...postgres.failures import SERVER_FAILURES
from ...registry.databases import FORGET_DATABASE
from ...tenant import Placement, Tenant
from ..server_objects import removal
from ..server_objects.replaced_databases import refuse_replaced
from .new_databases import NewDatabases, drop_all_beside
from .pipeline import ProvisioningServices, tenant_key


async def purge(
    services: ProvisioningServices,
    tenant_id: UUID,
    placement: Placement,
    *,
    deadline: float,
    listed: Tenant | None,
    actor: Actor,
) -> None:
    """Purge a tenant, under its lock; to finish an interrupted purge, repeat it.

    Args:
        services: Of provisioning.
        tenant_id: The tenant.
        placement: As its row had it.
        deadline: When its logins must be blocked, by the clock of the event loop.
        listed: The tenant as it was listed. If it differs once the lock is held, the purge is refused.
        actor: Who does this, for the audit log.

    Raises:
        InvalidTransitionError: the tenant is not deleted, or was changed since it was listed.
        ProvisioningError: the tenant got another database, or another one has replaced its own; or as
            ``removal.purge``.
        ServerUnavailableError, asyncpg.PostgresError, OSError: the server does not answer, or refuses.
    """
    server, key = services.servers[placement.server], tenant_key(tenant_id)
    timeout = services.config.provisioning.timeout
    connection = await services.admin_connections.acquire(server, key, timeout=timeout)
    try:
        found = await services.registry.get(tenant_id)
        now = found.placement
        if now is not None and (now.server, now.database) != (placement.server, placement.database):
            raise ProvisioningError(
                f"tenant {found.slug!r} got another database while this waited; try again",
                tenant=found.slug,
                step="purge",
            )
        # what has replaced it has the tenant's data, and would stay
        await refuse_replaced(connection, placement.database)
        await services.registry.begin_purge(tenant_id, listed=listed, actor=actor)
        await drop_all_beside(services, connection, server.name, tenant_id, timeout=timeout)
        await removal.purge(
            connection,
            services.blockers(server),
            services.names,
            services.registry,
            tenant_id,
            placement,
            deadline=deadline,
            actor=actor,
        )
    finally:
        await run_to_completion(services.admin_connections.release(server, connection, key))


async def begin_without_server(
    services: ProvisioningServices,
    tenant: Tenant,
    placement: Placement,
    lost: str,
    *,
    listed: Tenant | None,
    actor: Actor,
) -> None:
    """Begin the purge, and forget the databases beside the one in use that are on a lost server.

    Args:
        services: Of provisioning.
        tenant: The tenant.
        placement: As its row has it.
        lost: The server that does not exist any more.
        listed: As ``purge``.
        actor: Who does this, for the audit log.

    Raises:
        InvalidTransitionError: as ``purge``.
        ProvisioningError: the server answers, or has nothing of the tenant.
    """
    registry = services.registry
    beside = [one for one in await registry.databases_of(tenant.id) if one.server == lost]
    if not beside and placement.server != lost:
        raise ProvisioningError(
            f"tenant {tenant.slug!r} has no database on server {lost!r}", tenant=tenant.slug, step="purge"
        )
    if await _answers(services, lost):
        raise ProvisioningError(
            f"server {lost!r} answers, so that what tenant {tenant.slug!r} has there can be dropped: purge it "
            "without naming a lost server",
            tenant=tenant.slug,
            step="purge",
        )
    await registry.begin_purge(tenant.id, listed=listed, actor=actor)
    for one in beside:
        await registry.forget_lost_database(one, actor=actor)


async def _answers(services: ProvisioningServices, name: str) -> bool:
    try:
        # one that has no row any more is lost as well
        connection = await services.blockers(services.servers[name]).connect()
    except (RoutingError, *SERVER_FAILURES):
        return False
    await run_to_completion(connections.close(connection))
    return True


async def finish_without_server(
    services: ProvisioningServices,
    new_databases: NewDatabases,
    tenant_id: UUID,
    placement: Placement,
    *,
    actor: Actor,
) -> None:
    """Purge a tenant with a database in use that is lost with its server, once the purge has begun.

    Args:
        services: Of provisioning.
        new_databases: Drops the databases beside it, which are on other servers.
        tenant_id: The tenant.
        placement: As its row has it.
        actor: Who does this, for the audit log.

    Raises:
        TenancyError: a database beside it could not be dropped.
    """
    registry = services.registry
    for one in await registry.databases_of(tenant_id):
        await new_databases.drop(one)
    await registry.erase_secrets(tenant_id)
    detail = {"server": placement.server, "database": placement.database}
    await registry.record(tenant_id, FORGET_DATABASE, detail=detail, actor=actor)
    await registry.finish_purge(tenant_id, actor=actor)


__all__ = ["begin_without_server", "finish_without_server", "purge"]
