"""The schema revisions of the tenants, and of the fleet."""

from __future__ import annotations

import json
from uuid import UUID

from sqlalchemy import func, select, text, true, update

from ..context import refuse_other_tenant, refuse_while_bound
from ..control.models import fleet_revision, tenants
from ..control.notifications import CHANNEL, SCHEMA_CHANGED, SCHEMA_CHANGING
from ..tenant import Status, Tenant
from .rows import TENANT_COLUMNS, tenant_from_row
from .table import TenantTable

_NOTIFY = text("SELECT pg_notify(:channel, :payload)")


class Revisions(TenantTable):
    """Stores which schema revision a tenant has, and which one the last migration of the whole fleet brought about."""

    async def set_revision(self, tenant_id: UUID, revision: str | None) -> None:
        """Store the schema revision that was read back from the tenant's database, and notify every process."""
        refuse_other_tenant(tenant_id)
        async with self._control.transaction() as connection:
            await connection.execute(
                update(tenants)
                .where(tenants.c.id == tenant_id, tenants.c.schema_revision.is_distinct_from(revision))
                .values(schema_revision=revision, migrated_at=func.now())
            )
            await connection.execute(_NOTIFY, _notification(tenant_id, SCHEMA_CHANGED))

    async def announce_migration(self, tenant_id: UUID, *, ended: bool = False) -> None:
        """Notify every process that the tenant's schema is about to change: each statement is prepared again.

        That holds until ``set_revision`` says that the migration has ended, or this does, where it was interrupted.
        """
        refuse_other_tenant(tenant_id)
        async with self._control.connect() as connection:
            await connection.execute(_NOTIFY, _notification(tenant_id, SCHEMA_CHANGED if ended else SCHEMA_CHANGING))

    async def fleet_revision(self) -> str | None:
        """Return the revision that the last successful migration of all tenants brought about; None if unknown."""
        refuse_while_bound("reading the fleet's revision")
        async with self._control.connect() as connection:
            return await connection.scalar(select(fleet_revision.c.revision))

    async def set_fleet_revision(self, revision: str | None) -> None:
        """Store the revision that a migration of all tenants brought about; None if that is unknown."""
        refuse_while_bound("setting the fleet's revision")
        async with self._control.transaction() as connection:
            await connection.execute(update(fleet_revision).values(revision=revision, set_at=func.now()))

    async def created_behind(self, revision: str, tenant_id: UUID | None = None) -> list[Tenant]:
        """Return the tenants that were created at another revision than ``revision``, and never migrated.

        Args:
            revision: The fleet's revision.
            tenant_id: Only this tenant; all where None.
        """
        if tenant_id is None:
            refuse_while_bound("listing tenants")
        else:
            refuse_other_tenant(tenant_id)
        query = (
            select(*TENANT_COLUMNS)
            .where(
                # not one without a revision: it may have tables that no revision has made
                tenants.c.schema_revision != revision,
                tenants.c.migrated_at.is_(None),
                tenants.c.status.not_in([Status.PROVISIONING, Status.PURGED]),
                tenants.c.purge_started_at.is_(None),
                true() if tenant_id is None else tenants.c.id == tenant_id,
            )
            .order_by(tenants.c.id)
        )
        async with self._control.connect() as connection:
            return [tenant_from_row(row) for row in await connection.execute(query)]


def _notification(tenant_id: UUID, kind: str) -> dict[str, str]:
    return {"channel": CHANNEL, "payload": json.dumps({"t": str(tenant_id), "k": None, "c": kind})}
