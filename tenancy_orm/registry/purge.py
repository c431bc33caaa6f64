"""The purge of a tenant: its secrets are erased, and then its row becomes a tombstone."""

from __future__ import annotations

from uuid import UUID

from sqlalchemy import delete, func, text, update

from ..audit.actor import SYSTEM, Actor
from ..audit.log import AuditLog
from ..context import refuse_other_tenant
from ..control.database import ControlDatabase
from ..control.models import api_keys, domains, former_slugs, invitations, members, schedule_runs, tenants
from ..errors import InvalidTransitionError
from ..tenant import Status, Tenant
from .table import TenantTable, check_unchanged

# who may use the tenant
_ACCESS = (api_keys, members, invitations)

# what was counted and measured of the tenant; its idempotency keys may name people
_DELETE_USAGE = tuple(
    text(f"DELETE FROM tenancy.{table} WHERE tenant_id = :id")  # noqa: S608 - constants of this module
    for table in ("usage_keys", "quota_holds", "quota_blocks", "quota_pressure", "tenant_metrics")
)

# a purged tenant's usage is still billed; where usage is not billed, no record of it is made
_CLOSE_USAGE = text(
    "SELECT tenancy.usage_close_tenant(:id) "
    "WHERE CAST(:billed AS boolean) OR EXISTS (SELECT 1 FROM tenancy.usage_records)"
)


class Purge(TenantTable):
    """Purges tenants.

    Args:
        control: The control database.
        audit: The log of changes.
        usage_billed: Whether usage is exported for billing. Where there are usage records already, it is.
    """

    def __init__(self, control: ControlDatabase, audit: AuditLog, *, usage_billed: bool = False) -> None:
        super().__init__(control, audit)
        self._usage_billed = usage_billed

    async def begin_purge(self, tenant_id: UUID, *, listed: Tenant | None = None, actor: Actor = SYSTEM) -> Tenant:
        """Mark a deleted tenant as being purged: it cannot be restored any more. Repeating it changes nothing.

        Args:
            tenant_id: The tenant.
            listed: Refuse a tenant that was changed since it was listed as this, unless its purge has begun.
            actor: Who does this.

        Raises:
            TenantNotFoundError: no such tenant.
            InvalidTransitionError: the tenant is not deleted, or was changed since it was listed.
        """
        refuse_other_tenant(tenant_id)
        async with self._control.transaction() as connection:
            before, row = await self._lock(connection, tenant_id)
            if listed is not None and row.purge_started_at is None:
                check_unchanged(before, listed, Status.PURGED)
            if before.status is not Status.DELETED:
                raise InvalidTransitionError(before.slug, before.status.value, Status.PURGED.value)
            if row.purge_started_at is None:
                before = await self._set(connection, tenant_id, purge_started_at=func.now())
                await self._write_audit(connection, "tenant.purge_begin", before, actor)
        return before

    async def erase_secrets(self, tenant_id: UUID) -> None:
        """Erase the keys, members and passwords of a tenant that is being purged, so that nobody can use it any more.

        An empty password stays: until the purge is finished, the row says where the tenant's database is.

        Raises:
            TenantNotFoundError: no such tenant.
            InvalidTransitionError: its purge has not begun.
            CrossTenantError: another tenant is bound.
        """
        refuse_other_tenant(tenant_id)
        async with self._control.transaction() as connection:
            before, row = await self._lock(connection, tenant_id)
            if before.status is not Status.DELETED or row.purge_started_at is None:
                raise InvalidTransitionError(before.slug, before.status.value, Status.PURGED.value)
            for table in _ACCESS:
                await connection.execute(delete(table).where(table.c.tenant_id == tenant_id))
            await connection.execute(
                update(tenants).where(tenants.c.id == tenant_id).values(sealed_password=b"", next_sealed_password=None)
            )

    async def finish_purge(self, tenant_id: UUID, *, actor: Actor = SYSTEM) -> None:
        """Turn the row into a tombstone, which frees the slug.

        Keys, members, the sealed password, metadata and overrides are removed.

        Usage records that are not sent yet keep the metadata until they are.

        Raises:
            TenantNotFoundError: no such tenant.
        """
        refuse_other_tenant(tenant_id)
        async with self._control.transaction() as connection:
            before, _ = await self._lock(connection, tenant_id)
            if before.status is Status.PURGED:
                return
            for table in (*_ACCESS, former_slugs, domains, schedule_runs):
                await connection.execute(delete(table).where(table.c.tenant_id == tenant_id))
            await connection.execute(_CLOSE_USAGE, {"id": tenant_id, "billed": self._usage_billed})
            for statement in _DELETE_USAGE:
                await connection.execute(statement, {"id": tenant_id})
            after = await self._set(
                connection,
                tenant_id,
                status=Status.PURGED,
                sealed_password=None,
                next_sealed_password=None,
                metadata={},
                quotas={},
                reason=None,
                next_status=None,
                former_status=None,
                former_reason=None,
                step=None,
                step_error=None,
                suspend_at=None,
                suspend_reason=None,
                purge_at=None,
            )
            await self._write_audit(
                connection,
                "tenant.purge",
                after,
                actor,
                before={"status": before.status.value},
                after={"status": after.status.value},
            )
