"""A tenant's lifecycle: which status may follow which.

The control database has the same table, which a trigger checks, so that it also refuses a hand-written UPDATE; a test
compares the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from ..control.models import tenants
from ..errors import (
    InvalidTransitionError,
    OperationError,
    TenantDeletedError,
    TenantMaintenanceError,
    TenantNotFoundError,
    TenantProvisioningError,
    TenantRevisionError,
    TenantSuspendedError,
)
from ..tenant import Status, Tenant

_RUNNING = frozenset({Status.TRIAL, Status.ACTIVE})

LOGIN_BLOCKED = frozenset({Status.SUSPENDED, Status.DELETED})
"""PostgreSQL refuses the logins of tenants with these statuses."""

TRANSITIONS: Mapping[Status, frozenset[Status]] = {
    Status.PROVISIONING: frozenset({Status.TRIAL, Status.ACTIVE}),
    Status.TRIAL: frozenset({Status.ACTIVE, Status.SUSPENDED, Status.MAINTENANCE, Status.DELETED}),
    Status.ACTIVE: frozenset({Status.SUSPENDED, Status.MAINTENANCE, Status.DELETED}),
    Status.SUSPENDED: frozenset({Status.TRIAL, Status.ACTIVE, Status.MAINTENANCE, Status.DELETED}),
    Status.MAINTENANCE: frozenset({Status.TRIAL, Status.ACTIVE, Status.SUSPENDED, Status.DELETED}),
    Status.DELETED: frozenset({Status.TRIAL, Status.ACTIVE, Status.SUSPENDED, Status.MAINTENANCE, Status.PURGED}),
    Status.PURGED: frozenset(),
}


def check_transition(slug: str, current: Status, target: Status) -> None:
    """Refuse a change of status that the lifecycle does not allow.

    Raises:
        InvalidTransitionError: ``target`` may not follow ``current``.
    """
    if target not in TRANSITIONS[current]:
        raise InvalidTransitionError(slug, current.value, target.value)


def check_usable(tenant: Tenant, *, operator: bool = False) -> None:
    """Refuse a tenant if its status does not admit sessions, or its revision none of this code.

    Args:
        tenant: The tenant that a session is requested for.
        operator: Whether the caller is an operator, who may use a tenant in maintenance, and at any revision. Nobody
            may use a suspended one: PostgreSQL refuses its role.

    Raises:
        TenantUnavailableError: one of its subclasses, by status.
        TenantNotFoundError: it has been purged.
    """
    status = tenant.status
    if status in _RUNNING:
        if tenant.revision_refusal is not None and not operator:
            check_revision(tenant)
        return
    if status is Status.PROVISIONING:
        raise TenantProvisioningError(tenant.slug)
    if status is Status.DELETED:
        raise TenantDeletedError(tenant.slug)
    if status is Status.PURGED:
        raise TenantNotFoundError(tenant.slug)
    if status is Status.SUSPENDED:
        raise TenantSuspendedError(tenant.slug, reason=tenant.reason)
    if not operator:
        raise TenantMaintenanceError(tenant.slug, reason=tenant.reason)


def check_database_in_use(tenant: Tenant) -> None:
    """Refuse a tenant that has no database in use, which could be copied or exchanged for another one.

    Raises:
        TenantDeletedError, TenantNotFoundError: it is deleted, or purged.
        OperationError: it is being created.
    """
    if tenant.status is Status.PURGED or tenant.placement is None:
        raise TenantNotFoundError(tenant.slug)
    if tenant.status is Status.DELETED:
        raise TenantDeletedError(tenant.slug)
    if tenant.status is Status.PROVISIONING:
        raise OperationError(f"tenant {tenant.slug!r} is being created")


def check_revision(tenant: Tenant) -> None:
    """Refuse a tenant if its schema is at a revision that this code cannot work with, as the directory has judged.

    Raises:
        TenantRevisionError: it is.
    """
    if tenant.revision_refusal is not None:
        raise TenantRevisionError(tenant.slug, reason=tenant.revision_refusal, revision=tenant.schema_revision)


async def lock_tenant_for_share(connection: AsyncConnection, tenant_id: UUID) -> tuple[str, Status]:
    """Lock a tenant's row FOR SHARE, so that it cannot be purged in this transaction; returns its slug and status.

    Raises:
        TenantNotFoundError: there is no such tenant, or it has been purged.
    """
    query = select(tenants.c.slug, tenants.c.status).where(tenants.c.id == tenant_id).with_for_update(read=True)
    row = (await connection.execute(query)).one_or_none()
    if row is None or row.status == Status.PURGED:
        raise TenantNotFoundError(tenant_id)
    return row.slug, Status(row.status)
