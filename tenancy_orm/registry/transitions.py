"""Changes of a tenant's status, at once or on a date."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Row

from ..audit.actor import SYSTEM, Actor
from ..context import refuse_other_tenant
from ..errors import InvalidTransitionError
from ..tenant import Status, Tenant
from .lifecycle import check_transition
from .table import TenantTable, check_unchanged, difference


def _status_columns(before: Tenant, row: Row[*tuple[Any, ...]], new: Status, reason: str | None) -> dict[str, Any]:
    """Return the columns of a change of status: status, reason, and what is stored for the way back."""
    values: dict[str, Any] = {"status": new, "next_status": None, "former_status": None, "former_reason": None}
    if new is Status.DELETED:
        values["next_status"] = before.status
    if new is Status.MAINTENANCE and before.status is not Status.DELETED:
        values |= {"former_status": before.status, "former_reason": before.reason}
    elif new is Status.DELETED or (before.status is Status.DELETED and new is Status.MAINTENANCE):
        values |= {"former_status": row.former_status, "former_reason": row.former_reason}
    if reason is not None or new in (Status.TRIAL, Status.ACTIVE):
        values["reason"] = reason
    elif before.status is Status.MAINTENANCE and new is Status.SUSPENDED:
        values["reason"] = row.former_reason
    return values


def _cleared_schedule(before: Tenant, new: Status) -> dict[str, Any]:
    """Return the columns of schedules to clear, since the change is what was scheduled, or replaces it."""
    cleared: dict[str, Any] = {}
    if new in (Status.SUSPENDED, Status.DELETED):
        cleared |= {"suspend_at": None, "suspend_reason": None}
    if before.status is Status.DELETED:
        cleared["purge_at"] = None
    return cleared


def _is_so(before: Tenant, target: Status | None, leaving: Status, values: Mapping[str, Any]) -> bool:
    """Whether the change has taken place: the repeat of a script, or of a webhook, is no error."""
    if target is Status.TRIAL and values.get("trial_ends_at") != before.trial_ends_at:
        return False
    if target is not None:
        return before.status is target
    left = {Status.TRIAL, Status.ACTIVE, Status.SUSPENDED} | ({Status.MAINTENANCE} - {leaving})
    return before.status in left


class Transitions(TenantTable):
    """Changes the status of tenants, and schedules such changes."""

    async def transition(
        self,
        tenant_id: UUID,
        target: Status | None,
        *,
        action: str,
        leaving: Status = Status.DELETED,
        reason: str | None = None,
        listed: Tenant | None = None,
        actor: Actor = SYSTEM,
        **values: Any,
    ) -> tuple[Tenant, Tenant]:
        """Change a tenant's status; returns it before and after, which are equal where it is so already.

        Args:
            tenant_id: The tenant.
            target: Its new status; None: the one that it had before ``leaving``.
            action: The action, for the audit log.
            leaving: If ``target`` is None: the status that ends, deleted or maintenance.
            reason: The operator's reason.
            listed: Refuse a tenant that was changed since it was listed as this.
            actor: Who does this.
            values: Further columns to set.

        Raises:
            TenantNotFoundError: no such tenant.
            InvalidTransitionError: the lifecycle does not allow this change, the tenant was changed since it was
                listed, or its purge has begun.
        """
        refuse_other_tenant(tenant_id)
        async with self._control.transaction() as connection:
            before, row = await self._lock(connection, tenant_id)
            if listed is not None:
                check_unchanged(before, listed, target or before.status)
            if _is_so(before, target, leaving, values):
                if reason in (None, before.reason):
                    return before, before
                after = await self._set(connection, tenant_id, reason=reason)
                old, changed = difference(before, after)
                await self._write_audit(connection, action, after, actor, before=old, after=changed)
                return before, after
            new = self._target(before, row, target, leaving)
            after = await self._set(
                connection,
                tenant_id,
                **_status_columns(before, row, new, reason),
                **_cleared_schedule(before, new),
                **values,
            )
            old, changed = difference(before, after)
            await self._write_audit(connection, action, after, actor, before=old, after=changed)
        return before, after

    @staticmethod
    def _target(before: Tenant, row: Row[*tuple[Any, ...]], target: Status | None, leaving: Status) -> Status:
        """Return the new status.

        Raises:
            InvalidTransitionError: the change is not allowed.
        """
        former = row.next_status if leaving is Status.DELETED else row.former_status
        new = Status(former or Status.ACTIVE) if target is None else target
        if before.status is Status.PROVISIONING:
            # only ``complete`` ends it: until then there may be no database
            raise InvalidTransitionError(before.slug, before.status.value, new.value)
        # without a target only ``leaving`` ends; a deletion ends in no other way
        if (target is None and before.status is not leaving) or (target and before.status is Status.DELETED):
            raise InvalidTransitionError(before.slug, before.status.value, new.value)
        if row.purge_started_at is not None and new is not Status.PURGED:
            raise InvalidTransitionError(before.slug, "being purged", new.value)
        check_transition(before.slug, before.status, new)
        return new

    async def schedule_suspension(
        self, tenant_id: UUID, at: datetime | None, *, reason: str | None, actor: Actor = SYSTEM
    ) -> Tenant:
        """Set when a tenant is to be suspended, and why; None cancels that.

        Raises:
            TenantNotFoundError: no such tenant.
        """
        refuse_other_tenant(tenant_id)
        values = {"suspend_at": at, "suspend_reason": reason if at else None}
        detail = {"at": at.isoformat() if at else None, "reason": reason}
        return await self._schedule(tenant_id, values, "tenant.schedule_suspension", detail, actor)

    async def schedule_purge(self, tenant_id: UUID, at: datetime | None, *, actor: Actor = SYSTEM) -> Tenant:
        """Set when a deleted tenant is to be purged; None: after the configured retention.

        Raises:
            TenantNotFoundError: no such tenant.
            InvalidTransitionError: it is not deleted, or its purge has begun.
        """
        refuse_other_tenant(tenant_id)
        detail = {"at": at.isoformat() if at else None}
        return await self._schedule(tenant_id, {"purge_at": at}, "tenant.schedule_purge", detail, actor)

    async def _schedule(
        self, tenant_id: UUID, values: Mapping[str, Any], action: str, detail: Mapping[str, Any], actor: Actor
    ) -> Tenant:
        async with self._control.transaction() as connection:
            before, row = await self._lock_unless_purged(connection, tenant_id)
            if "purge_at" in values and (before.status is not Status.DELETED or row.purge_started_at is not None):
                raise InvalidTransitionError(before.slug, before.status.value, Status.PURGED.value)
            after = await self._set(connection, tenant_id, **values)
            await self._write_audit(connection, action, after, actor, detail=detail)
        return after
