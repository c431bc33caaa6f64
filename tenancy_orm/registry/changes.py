"""Changes of a tenant's columns other than its status, such as its slug, tier and schema revision."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import delete, func, update
from sqlalchemy.dialects.postgresql import insert as postgresql_insert

from ..audit.actor import SYSTEM, Actor
from ..context import refuse_other_tenant, refuse_while_bound
from ..control.models import former_slugs, tenants
from ..errors import TierChangedError
from ..tenant import Tenant
from .table import TenantTable, difference


class Changes(TenantTable):
    """Sets columns of tenants, and writes the difference to the audit log."""

    async def change(
        self,
        tenant_id: UUID,
        *,
        action: str,
        actor: Actor = SYSTEM,
        expected_tier: str | None = None,
        merge: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None,
        **values: Any,
    ) -> tuple[Tenant, Tenant]:
        """Set columns of a tenant and write the difference to the audit log; returns the tenant before and after.

        Args:
            tenant_id: The tenant.
            action: The action, for the audit log.
            actor: Who does this.
            expected_tier: Change nothing unless it is in this tier.
            merge: Called with its metadata while its row is locked; returns the new metadata.
            values: Columns to set.

        Raises:
            TenantNotFoundError: no such tenant.
            TenantExistsError: a new slug is taken.
            TierChangedError: its tier is not ``expected_tier``.
        """
        refuse_other_tenant(tenant_id)
        async with self._control.transaction() as connection:
            before, _ = await self._lock_unless_purged(connection, tenant_id)
            if expected_tier not in (None, before.tier):
                raise TierChangedError(before.slug, expected=str(expected_tier), found=before.tier)
            if merge is not None:
                values["metadata"] = merge(before.metadata)
            after = await self._set(connection, tenant_id, **values)
            old, new = difference(before, after)
            if new:
                await self._write_audit(connection, action, after, actor, before=old, after=new)
        return before, after

    async def rename(
        self, tenant_id: UUID, slug: str, *, redirect_seconds: float, actor: Actor = SYSTEM
    ) -> tuple[Tenant, Tenant]:
        """Give a tenant another slug; the old one redirects to it, and is refused to others, for ``redirect_seconds``.

        Raises:
            TenantNotFoundError: no such tenant.
            TenantExistsError: the slug is another tenant's, or still redirects to one.
        """
        refuse_other_tenant(tenant_id)
        async with self._control.transaction() as connection:
            before, _ = await self._lock_unless_purged(connection, tenant_id)
            if before.slug == slug:
                return before, before
            after = await self._set(connection, tenant_id, slug=slug)
            until = func.now() + timedelta(seconds=redirect_seconds)
            former = postgresql_insert(former_slugs).values(
                slug=before.slug, tenant_id=tenant_id, redirects_until=until
            )
            await connection.execute(
                former.on_conflict_do_update(
                    index_elements=["slug"],
                    set_={"tenant_id": former.excluded.tenant_id, "redirects_until": former.excluded.redirects_until},
                )
            )
            after = replace(after, aliases=(after.aliases | {before.slug}) - {slug})
            detail = {"redirect_seconds": redirect_seconds}
            old, new = difference(before, after)
            await self._write_audit(connection, "tenant.rename", after, actor, before=old, after=new, detail=detail)
        return before, after

    async def expire_former_slugs(self) -> int:
        """Delete the former slugs that no longer redirect; returns how many."""
        refuse_while_bound("removing former slugs")
        async with self._control.transaction() as connection:
            result = await connection.execute(delete(former_slugs).where(former_slugs.c.redirects_until <= func.now()))
        return result.rowcount

    async def set_revision(self, tenant_id: UUID, revision: str | None) -> None:
        """Store the schema revision that was read back from the tenant's database."""
        refuse_other_tenant(tenant_id)
        async with self._control.transaction() as connection:
            await connection.execute(
                update(tenants)
                .where(tenants.c.id == tenant_id, tenants.c.schema_revision.is_distinct_from(revision))
                .values(schema_revision=revision)
            )
