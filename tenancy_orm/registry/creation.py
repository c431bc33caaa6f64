"""The row of a tenant during its creation: registered, then completed or discarded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import UUID

from sqlalchemy import and_, delete, func, insert, select, text, update
from sqlalchemy.exc import DBAPIError, IntegrityError

from ..audit.actor import SYSTEM, Actor
from ..context import refuse_other_tenant, refuse_while_bound
from ..control.models import tenants, warm_databases
from ..errors import InvalidTransitionError, TenantNotFoundError
from ..keys.format import NewKey
from ..keys.rows import insert_key
from ..tenant import Status, Tenant
from .rows import TENANT_COLUMNS, TenantDraft, tenant_from_row
from .table import TenantTable, constraint_error, placement_error, snapshot


def _claimed(draft: TenantDraft, recipe: str) -> dict[str, Any]:
    """The names in a tenant's row: those of a warm database that this statement claims, or else the draft's."""
    # ready ones only; one that another transaction claims or drops at this moment is locked
    ready = (
        select(warm_databases.c.name)
        .where(
            warm_databases.c.server == draft.server,
            warm_databases.c.recipe == recipe,
            warm_databases.c.state == "ready",
        )
        .order_by(warm_databases.c.created_at)
        .limit(1)
        .with_for_update(skip_locked=True)
        .scalar_subquery()
    )
    claimed = delete(warm_databases).where(warm_databases.c.name == ready).returning(warm_databases.c.name)
    name = select(claimed.cte("claimed").c.name).scalar_subquery()
    return {
        "database_name": func.coalesce(name, draft.database),
        "role_name": func.coalesce(name, draft.role),
    }


class Creation(TenantTable):
    """Registers tenants, and records the progress of their creation."""

    async def register(self, draft: TenantDraft, *, recipe: str | None = None, actor: Actor = SYSTEM) -> Tenant:
        """Insert the row of a tenant that is being provisioned; its slug is taken from now on.

        Args:
            draft: The tenant's values.
            recipe: Claim a warm database of this recipe on its server, if there is one: the row has that one's name
                then in place of the draft's, and no other creation gets it.
            actor: Who does this, for the audit log.

        Raises:
            TenantExistsError: the slug is taken.
            UnknownTierError: the tier is not in force.
            PlacementError: the server is in another region, in drain or full.
        """
        refuse_while_bound("creating a tenant")
        values = {
            "id": draft.id,
            "slug": draft.slug,
            "status": Status.PROVISIONING,
            "tier": draft.tier,
            "server": draft.server,
            "database_name": draft.database,
            "role_name": draft.role,
            "sealed_password": draft.sealed_password,
            "metadata": dict(draft.metadata),
            "quotas": dict(draft.quotas),
            "timezone": draft.timezone,
            "region": draft.region,
            "trial_ends_at": draft.trial_ends_at,
            "next_status": draft.target_status,
            "step": "registered",
        }
        named = values if recipe is None else values | _claimed(draft, recipe)
        try:
            async with self._control.transaction() as connection:
                row = (await connection.execute(insert(tenants).values(named).returning(*TENANT_COLUMNS))).one()
                tenant = tenant_from_row(row)
                await self._write_audit(connection, "tenant.create", tenant, actor, after=snapshot(tenant))
        except IntegrityError as exc:
            raise constraint_error(exc, values) from exc
        except DBAPIError as exc:
            raise (placement_error(exc, draft.server) or exc) from exc
        return tenant

    async def rename_database(self, tenant_id: UUID, name: str) -> None:
        """Give a tenant that is being provisioned another database and role than those in its row.

        Raises:
            TenantNotFoundError: the row does not exist any more.
        """
        refuse_other_tenant(tenant_id)
        unfinished = and_(tenants.c.id == tenant_id, tenants.c.status == Status.PROVISIONING)
        async with self._control.transaction() as connection:
            changed = update(tenants).where(unfinished).values(database_name=name, role_name=name)
            if not (await connection.execute(changed)).rowcount:
                raise TenantNotFoundError(tenant_id)

    async def record_step(self, tenant_id: UUID, step: str) -> None:
        """Record that ``step`` is about to start.

        The commit is not flushed to disk, which would cost every creation a millisecond per step: after a crash of the
        server ``reconcile`` looks at what exists, whatever the row says. One statement is one round trip in place of
        four.
        """
        refuse_other_tenant(tenant_id)
        statement = text(
            "WITH relaxed AS (SELECT set_config('synchronous_commit', 'off', true)) "
            "UPDATE tenancy.tenants SET step = :step FROM relaxed WHERE id = :id"
        )
        async with self._control.connect() as connection:
            await connection.execute(statement, {"step": step, "id": tenant_id})

    async def complete(
        self,
        tenant_id: UUID,
        *,
        revision: str | None,
        key: NewKey | None,
        key_name: str = "default",
        scopes: Sequence[str] = (),
        actor: Actor = SYSTEM,
    ) -> Tenant:
        """Make a provisioned tenant usable, and insert its first API key, in one transaction.

        Raises:
            TenantNotFoundError: the row does not exist any more.
            InvalidTransitionError: the tenant is not being provisioned.
        """
        refuse_other_tenant(tenant_id)
        async with self._control.transaction() as connection:
            before, row = await self._lock(connection, tenant_id)
            if before.status is not Status.PROVISIONING:
                raise InvalidTransitionError(before.slug, before.status.value, row.next_status or Status.ACTIVE)
            after = await self._set(
                connection,
                tenant_id,
                status=row.next_status or Status.ACTIVE,
                next_status=None,
                step=None,
                step_error=None,
                schema_revision=revision,
            )
            if key is not None:
                await insert_key(connection, tenant_id, key, name=key_name, scopes=scopes)
            await self._write_audit(
                connection,
                "tenant.activate",
                after,
                actor,
                before={"status": before.status.value},
                after={"status": after.status.value, "key_id": key.key_id if key else None},
            )
        return after

    async def discard(self, tenant_id: UUID, *, step: str, error: str, actor: Actor = SYSTEM) -> None:
        """Delete the row of a creation that was undone, which frees its slug. Does nothing if there is no such row."""
        refuse_other_tenant(tenant_id)
        async with self._control.transaction() as connection:
            condition = and_(tenants.c.id == tenant_id, tenants.c.status == Status.PROVISIONING)
            row = (await connection.execute(delete(tenants).where(condition).returning(*TENANT_COLUMNS))).one_or_none()
            if row is None:
                return
            tenant = tenant_from_row(row)
            await self._write_audit(
                connection, "tenant.create_failed", tenant, actor, detail={"step": step, "error": error}
            )

    async def record_failure(self, tenant_id: UUID, *, step: str, error: str) -> None:
        """Store in the row that ``step`` failed and could not be undone, for ``reconcile``."""
        refuse_other_tenant(tenant_id)
        async with self._control.transaction() as connection:
            await connection.execute(
                update(tenants).where(tenants.c.id == tenant_id).values(step=step, step_error=error)
            )
