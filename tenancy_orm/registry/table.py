"""Changes of the table of tenants: lock the row, set its columns, and write the change to the audit log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from uuid import UUID

from sqlalchemy import Row, select, update
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from ..audit.actor import Actor
from ..audit.log import AuditLog
from ..control.database import ControlDatabase
from ..control.models import tenants
from ..errors import InvalidTransitionError, PlacementError, TenantExistsError, TenantNotFoundError, UnknownTierError
from ..postgres.errors import constraint_of, sqlstate_of
from ..tenant import Status, Tenant
from .rows import TENANT_COLUMNS, tenant_from_row

_ILLEGAL_TRANSITION = "TN001"  # raised by the trigger tenants_guard
_ILLEGAL_PLACEMENT = "TN003"  # raised by the trigger tenants_placement
_REFUSALS = {
    "servers_state": "accepts no new tenants",
    "servers_capacity": "is full",
    "tenants_region": "is in another region than the tenant's",
}
_REMEDIES = {
    "servers_state": "; or: tenancy servers activate {server}",
    "servers_capacity": "; or: tenancy servers update {server} --capacity NUMBER",
}


def snapshot(tenant: Tenant) -> dict[str, Any]:
    """Return a tenant as the audit log records it: no placement, no secrets."""
    return {
        "slug": tenant.slug,
        "status": tenant.status.value,
        "tier": tenant.tier,
        "metadata": dict(tenant.metadata),
        "quotas": dict(tenant.quotas),
        "reason": tenant.reason,
        "timezone": tenant.timezone,
        "region": tenant.region,
        "trial_ends_at": tenant.trial_ends_at.isoformat() if tenant.trial_ends_at else None,
    }


def difference(before: Tenant, after: Tenant) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the fields that differ, before and after a change, for the audit log."""
    old, new = snapshot(before), snapshot(after)
    changed = [name for name in new if old[name] != new[name]]
    return {name: old[name] for name in changed}, {name: new[name] for name in changed}


def constraint_error(error: Exception, values: Mapping[str, Any]) -> Exception:
    """Return the error to raise where a constraint refuses a row of the registry."""
    constraint = constraint_of(error)
    if constraint in ("tenants_slug_key", "former_slugs_pkey"):
        return TenantExistsError(str(values["slug"]), reserved=constraint == "former_slugs_pkey")
    if constraint == "tenants_tier_fkey":
        return UnknownTierError(str(values["tier"]))
    return error


def placement_error(error: Exception, server: str) -> PlacementError | None:
    """Return the error to raise where the control database refuses a placement; None for another error."""
    if sqlstate_of(error) != _ILLEGAL_PLACEMENT:
        return None
    reason = _REFUSALS.get(constraint_of(error) or "", "does not take the tenant")
    able = _REMEDIES.get(constraint_of(error) or "", "").format(server=server)
    return PlacementError(
        f"server {server!r} {reason}; set default_server to another one, or name one{able}", {server: reason}
    )


def check_unchanged(found: Tenant, listed: Tenant, target: Status) -> None:
    """Refuse to change a tenant that was changed since it was listed.

    Raises:
        InvalidTransitionError: it was.
    """
    if found.updated_at != listed.updated_at:
        raise InvalidTransitionError(found.slug, f"{found.status.value} (changed since it was listed)", target.value)


class TenantTable:
    """The base of the registry's classes.

    Args:
        control: The control database.
        audit: The log of changes.
    """

    def __init__(self, control: ControlDatabase, audit: AuditLog) -> None:
        self._control = control
        self._audit = audit

    async def _lock(self, connection: AsyncConnection, tenant_id: UUID) -> tuple[Tenant, Row[*tuple[Any, ...]]]:
        former = (tenants.c.next_status, tenants.c.former_status, tenants.c.former_reason)
        query = (
            select(*TENANT_COLUMNS, *former, tenants.c.purge_started_at)
            .where(tenants.c.id == tenant_id)
            .with_for_update()
        )
        row = (await connection.execute(query)).one_or_none()
        if row is None:
            raise TenantNotFoundError(tenant_id)
        return tenant_from_row(row), row

    async def _lock_unless_purged(
        self, connection: AsyncConnection, tenant_id: UUID
    ) -> tuple[Tenant, Row[*tuple[Any, ...]]]:
        """Lock a tenant's row, unless it has been purged: a tombstone is not changed."""
        found, row = await self._lock(connection, tenant_id)
        if found.status is Status.PURGED:
            raise TenantNotFoundError(found.slug)
        return found, row

    async def _set(self, connection: AsyncConnection, tenant_id: UUID, **values: Any) -> Tenant:
        statement = update(tenants).where(tenants.c.id == tenant_id).values(**values).returning(*TENANT_COLUMNS)
        try:
            return tenant_from_row((await connection.execute(statement)).one())
        except IntegrityError as exc:
            raise constraint_error(exc, values) from exc
        except DBAPIError as exc:
            if sqlstate_of(exc) == _ILLEGAL_TRANSITION:
                raise InvalidTransitionError(str(tenant_id), "its status", str(values.get("status"))) from exc
            if (refused := placement_error(exc, str(values.get("server") or "of the tenant"))) is not None:
                raise refused from exc
            raise

    async def _write_audit(
        self,
        connection: AsyncConnection,
        action: str,
        tenant: Tenant,
        actor: Actor,
        *,
        before: Mapping[str, Any] | None = None,
        after: Mapping[str, Any] | None = None,
        detail: Mapping[str, Any] | None = None,
    ) -> None:
        await self._audit.append(
            connection,
            action=action,
            tenant_id=tenant.id,
            slug=tenant.slug,
            actor=actor,
            before=before,
            after=after,
            detail=detail,
        )
