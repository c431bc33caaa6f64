"""Making a tenant's role agree with the registry: its login with the status, its connection limit with the tier."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import partial

from ...cancellation import run_to_completion
from ...errors import ProvisioningError
from ...postgres import locks
from ...postgres.connections import Connection
from ...postgres.errors import describe
from ...postgres.failures import SERVER_FAILURES
from ...registry.lifecycle import LOGIN_BLOCKED
from ...servers import Server
from ...tenant import Status, Tenant, placement_of
from ..creation.pipeline import ProvisioningServices, tenant_key
from ..logins import guests
from ..logins.standbys import end_on_replicas
from ..rights import role_settings
from ..server_objects import access, roles
from ..server_objects.roles import RoleState


def role_deviations(services: ProvisioningServices, tenant: Tenant, states: Mapping[str, RoleState]) -> dict[str, str]:
    """Return what of a role does not agree with the registry, by kind, each with a sentence about it.

    Args:
        services: Of provisioning.
        tenant: The tenant.
        states: The states of roles, by name.
    """
    state = states.get(tenant.placement.role) if tenant.placement else None
    if state is None or tenant.status is Status.PROVISIONING:
        return {}
    found = {}
    may_connect = tenant.placement is not None and tenant.placement.database in state.connect_granted_on
    if tenant.status not in LOGIN_BLOCKED:
        if not (state.can_login and may_connect):
            found["role.login"] = "its role cannot log in to its database"
    # a connection may still be open: the process that blocked the login died before it ended the connection
    elif state.can_login or state.connected or may_connect:
        found["role.login"] = f"its role can log in, or is connected, although the tenant is {tenant.status.value}"
    limit = _limit(services, tenant)
    if limit not in (None, state.connection_limit):
        found["role.connection_limit"] = f"its role's connection limit is {state.connection_limit}, not {limit}"
    return found


async def align(services: ProvisioningServices, tenant: Tenant, *, timeout: float) -> None:
    """Make a tenant's role agree with the registry, as it is once the tenant's lock is held.

    Args:
        services: Of provisioning.
        tenant: The tenant.
        timeout: Seconds for all of it, waiting for the lock included.

    Raises:
        ProvisioningError: the role is missing, or the server did not finish in time.
        ServerUnavailableError: the server does not answer.
        TenantNotFoundError: the tenant has been purged.
    """
    place = placement_of(tenant)
    server, key = services.servers[place.server], tenant_key(tenant.id)
    deadline = asyncio.get_running_loop().time() + timeout
    try:
        async with asyncio.timeout_at(deadline):
            connection = await services.admin_connections.connect(server)
            try:
                if not await locks.try_lock(connection, key):
                    await _block_early(services, connection, server, tenant, deadline=deadline)
                    await locks.lock(connection, key, timeout=timeout)
                current = await services.registry.get(tenant.id)
                moved = current.placement is not None and current.placement.server != place.server
                if not moved:
                    await align_role(services, connection, current, deadline=deadline)
                if not moved and current.status in LOGIN_BLOCKED:
                    await end_on_replicas(server, place.role, deadline=deadline)
            finally:
                await run_to_completion(services.admin_connections.release(server, connection, key))
            if moved:  # while this waited for the lock
                await align(services, current, timeout=deadline - asyncio.get_running_loop().time())
    except SERVER_FAILURES as exc:
        raise ProvisioningError(
            f"the role of tenant {tenant.slug!r} could not be aligned within {timeout:g} s ({describe(exc)}); "
            "try again, or run: tenancy reconcile",
            tenant=tenant.slug,
            step="align",
        ) from exc


async def _block_early(
    services: ProvisioningServices, connection: Connection, server: Server, tenant: Tenant, *, deadline: float
) -> None:
    """Block the logins of a suspended or deleted tenant before the lock is free, which may take long.

    If the tenant is activated at this moment, the alignment under the lock, which follows, unblocks it again.
    """
    current = await services.registry.get(tenant.id)
    if current.status in LOGIN_BLOCKED and current.placement is not None and current.placement.server == server.name:
        place, blockers = current.placement, services.blockers(server)
        await access.block(connection, blockers, database=place.database, role=place.role, deadline=deadline)


async def align_role(
    services: ProvisioningServices, connection: Connection, tenant: Tenant, *, deadline: float
) -> None:
    """Make a tenant's role agree with its status and tier: its login, its connection limit and its settings.

    Guests whom an interrupted exchange of its database has left outside are let in again.

    Call it under the tenant's lock, with the tenant as it was read under that lock: of two changes at the same time,
    the later one must be applied last.

    Args:
        services: Of provisioning.
        connection: An administrative one, which holds the tenant's lock.
        tenant: The tenant.
        deadline: When a login must be blocked and its connections ended, by the clock of the event loop.
    """
    if tenant.placement is None or tenant.status is Status.PROVISIONING:
        return
    database, role = tenant.placement.database, tenant.placement.role
    blockers = services.blockers(services.servers[tenant.placement.server])
    if tenant.status in LOGIN_BLOCKED:
        await access.block(connection, blockers, database=database, role=role, deadline=deadline)
    else:
        await access.unblock(connection, blockers, database=database, role=role)
    await guests.let_in(connection, blockers, database=database, role=role)
    if (limit := _limit(services, tenant)) is not None:
        set_limit = partial(roles.set_connection_limit, connection, role, limit)
        await blockers.run(connection, set_limit, role=role)
    settings = services.config.provisioning.role_settings
    if tenant.status in LOGIN_BLOCKED:
        # its logins are blocked: a failure to restore settings must not look like a failure of that
        await role_settings.try_restore(connection, blockers, role, settings, deadline=deadline)
    else:
        await role_settings.restore(connection, blockers, role, settings)


def _limit(services: ProvisioningServices, tenant: Tenant) -> int | None:
    """The connection limit of the tenant's tier; None if the configuration no longer has that tier."""
    tier = services.config.tiers.get(tenant.tier)
    return None if tier is None else tier.connection_limit
