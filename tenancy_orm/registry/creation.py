"""The row of a tenant during its creation: registered, then completed or discarded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC
from typing import Any
from uuid import UUID

import asyncpg
from sqlalchemy import and_, delete, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from ..audit.actor import SYSTEM, Actor
from ..audit.entries import entry_parameters
from ..context import refuse_other_tenant, refuse_while_bound
from ..control.models import tenants
from ..errors import InvalidTransitionError, TenantNotFoundError
from ..keys.format import NewKey
from ..keys.rows import key_values
from ..tenant import Status, Tenant
from .rows import RETURNED, TENANT_COLUMNS, TenantDraft, tenant_from_row
from .table import TenantTable, constraint_error, difference, placement_error, snapshot

# What a creation waits for is one statement each, and so one round trip. The server's row is locked first: after the
# head of the audit log, for which a change of the server may wait already, the two could wait for each other.
_REGISTER = f"""
WITH place AS (SELECT name FROM tenancy.servers WHERE name = $5::text FOR NO KEY UPDATE),
claimed AS (
    DELETE FROM tenancy.warm_databases WHERE name = (
        SELECT w.name FROM tenancy.warm_databases AS w
         WHERE w.server = $5::text AND w.recipe = $16::text AND w.state = 'ready'
         ORDER BY w.created_at LIMIT 1 FOR UPDATE SKIP LOCKED)
    RETURNING name),
added AS (
    INSERT INTO tenancy.tenants (
        id, slug, status, tier, server, database_name, role_name, sealed_password, metadata, quotas, timezone, region,
        trial_ends_at, next_status, copied_from, step)
    SELECT $1::uuid, $2::text, $3::text, $4::text, coalesce(place.name, $5::text), coalesce(claimed.name, $6::text),
           coalesce(claimed.name, $7::text), $8::bytea, $9::text::jsonb, $10::text::jsonb, $11::text, $12::text,
           $13::timestamptz, $14::text, $24::uuid,
           CASE WHEN claimed.name IS NULL THEN $15::text ELSE coalesce($23::text, $15::text) END
      FROM (VALUES (1)) AS one LEFT JOIN place ON true LEFT JOIN claimed ON true
    RETURNING {RETURNED})
SELECT added.*, tenancy.audit_append(
    $17::text, added.id, added.slug, $18::text, $19::text, NULL, $20::text::jsonb, NULL, $21::text, $22::text)
  FROM added
"""  # noqa: S608 - constants
REBUILDING = "rebuilding"
"""The step of a tenant that is registered again, see ``Creation.register_again``, until it is proved."""

UNDOING = "undoing"
"""The step of a creation that is being undone, or could not be: nothing completes it, and ``reconcile`` undoes it."""

_RECORD_STEP = (
    "WITH relaxed AS (SELECT set_config('synchronous_commit', 'off', true)) "
    "UPDATE tenancy.tenants SET step = $1::text FROM relaxed WHERE id = $2::uuid"
)
_COMPLETE = f"""
WITH done AS (
    UPDATE tenancy.tenants
       SET status = coalesce(next_status, 'active'), next_status = NULL, step = NULL, step_error = NULL,
           schema_revision = $2::text
     -- a commit that comes late completes nothing that is being undone
     WHERE id = $1::uuid AND status = 'provisioning' AND step IS DISTINCT FROM '{UNDOING}'
    RETURNING {RETURNED}),
first_key AS (
    INSERT INTO tenancy.api_keys (id, tenant_id, prefix, name, digest, digest_version, scopes, networks)
    SELECT $3::text, done.id, $4::text, $5::text, $6::bytea, $7::text, $8::text[], $9::text[]::cidr[]
      FROM done WHERE $3::text IS NOT NULL)
SELECT done.*, tenancy.audit_append(
    'tenant.activate', done.id, done.slug, $10::text, $11::text, '{{"status": "provisioning"}}',
    jsonb_build_object('status', done.status, 'key_id', $3::text), NULL, $12::text, $13::text)
  FROM done
"""  # noqa: S608 - constants


def _snapshot(draft: TenantDraft) -> dict[str, Any]:
    """The tenant of a draft as the audit log records it."""
    ends_at = draft.trial_ends_at
    return {
        "slug": draft.slug,
        "status": Status.PROVISIONING.value,
        "tier": draft.tier,
        "metadata": dict(draft.metadata),
        "quotas": dict(draft.quotas),
        "reason": None,
        "timezone": draft.timezone,
        "region": draft.region,
        "trial_ends_at": ends_at.astimezone(UTC).isoformat() if ends_at else None,
    }


class Creation(TenantTable):
    """Registers tenants, and records the progress of their creation."""

    async def register(
        self,
        draft: TenantDraft,
        *,
        recipe: str | None = None,
        claimed_step: str | None = None,
        actor: Actor = SYSTEM,
    ) -> Tenant:
        """Insert the row of a tenant that is being provisioned; its slug is taken from now on.

        Args:
            draft: The tenant's values.
            recipe: Claim a warm database of this recipe on its server, if there is one: the row has that one's name
                then in place of the draft's, and no other creation gets it.
            claimed_step: What the row says has begun, where a warm database was claimed.
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
            "status": Status.PROVISIONING.value,
            "tier": draft.tier,
            "server": draft.server,
            "database_name": draft.database,
            "role_name": draft.role,
            "sealed_password": draft.sealed_password,
            "metadata": json.dumps(dict(draft.metadata)),
            "quotas": json.dumps(dict(draft.quotas)),
            "timezone": draft.timezone,
            "region": draft.region,
            "trial_ends_at": draft.trial_ends_at,
            "next_status": draft.target_status.value,
            "step": "registered",
        }
        entry = entry_parameters(action="tenant.create", actor=actor, after=_snapshot(draft))
        about = (entry[name] for name in ("action", "actor_kind", "actor_id", "after", "request_id", "source"))
        try:
            (row,) = await self._control.fetch(
                _REGISTER, *values.values(), recipe, *about, claimed_step, draft.copied_from
            )
        except asyncpg.IntegrityConstraintViolationError as exc:
            raise constraint_error(exc, values) from exc
        except asyncpg.PostgresError as exc:
            raise (placement_error(exc, draft.server) or exc) from exc
        return tenant_from_row(row)

    async def register_again(self, draft: TenantDraft, *, reason: str, actor: Actor = SYSTEM) -> None:
        """Insert the row of a tenant that has its database already, in maintenance, unless it has one.

        Its step is ``REBUILDING``. Reconcile leaves such a tenant alone: it is not being created.

        Args:
            draft: The tenant's values.
            reason: Why it is in maintenance.
            actor: Who does this, for the audit log.

        Raises:
            TenantExistsError: the slug is taken.
            UnknownTierError: the tier is not in force.
            PlacementError: the server is in drain or full.
        """
        refuse_while_bound("registering a tenant")
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
            "step": REBUILDING,
        }
        try:
            async with self._control.transaction() as connection:
                inserted = insert(tenants).values(values).on_conflict_do_nothing(index_elements=["id"])
                if (await connection.execute(inserted.returning(tenants.c.id))).first() is None:
                    return
                tenant = await self._hold(connection, draft.id, reason)
                detail = {"server": draft.server, "database": draft.database}
                await self._write_audit(
                    connection, "tenant.rebuild", tenant, actor, after=snapshot(tenant), detail=detail
                )
        except DBAPIError as exc:
            error = constraint_error(exc, values)
            raise (placement_error(exc, draft.server) or error) from exc

    async def end_creation_for_rebuilding(self, tenant_id: UUID, *, reason: str, actor: Actor = SYSTEM) -> None:
        """Make of the row of a tenant that is being created one as ``register_again`` makes it; others are left.

        Args:
            tenant_id: The tenant. The row is of an older backup, and names the database in use by now.
            reason: Why it is in maintenance.
            actor: Who does this, for the audit log.

        Raises:
            TenantNotFoundError: there is no such tenant.
        """
        refuse_other_tenant(tenant_id)
        async with self._control.transaction() as connection:
            before, row = await self._lock_unless_purged(connection, tenant_id)
            if before.status is not Status.PROVISIONING:
                return
            after = await self._hold(connection, tenant_id, reason, former=row.next_status or Status.ACTIVE)
            old, new = difference(before, after)
            await self._write_audit(connection, "tenant.rebuild", after, actor, before=old, after=new)

    async def _hold(
        self, connection: AsyncConnection, tenant_id: UUID, reason: str, *, former: Status = Status.ACTIVE
    ) -> Tenant:
        """Hold a tenant that is being created in maintenance, until it is proved."""
        # the lifecycle admits no other way there
        await self._set(connection, tenant_id, status=former, next_status=None, step=REBUILDING)
        return await self._set(connection, tenant_id, status=Status.MAINTENANCE, former_status=former, reason=reason)

    async def rebuilding(self) -> frozenset[UUID]:
        """Return the tenants that ``register_again`` has registered and nothing has proved."""
        refuse_while_bound("listing tenants")
        unproved = and_(tenants.c.step == REBUILDING, tenants.c.status.not_in((Status.DELETED, Status.PURGED)))
        async with self._control.connect() as connection:
            return frozenset(await connection.scalars(select(tenants.c.id).where(unproved)))

    async def end_rebuilding(self, tenant_id: UUID, *, revision: str | None, actor: Actor = SYSTEM) -> Tenant:
        """Record that a tenant is proved, and end its maintenance; repeating it changes nothing.

        Raises:
            TenantNotFoundError: there is no such tenant.
        """
        refuse_other_tenant(tenant_id)
        async with self._control.transaction() as connection:
            before, row = await self._lock_unless_purged(connection, tenant_id)
            values: dict[str, Any] = {"step": None, "schema_revision": revision}
            if before.status is Status.MAINTENANCE:
                values |= {
                    "status": row.former_status or Status.ACTIVE,
                    "reason": None,
                    "former_status": None,
                    "former_reason": None,
                }
            after = await self._set(connection, tenant_id, **values)
            old, new = difference(before, after)
            await self._write_audit(connection, "tenant.activate", after, actor, before=old, after=new)
        return after

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
        await self._control.fetch(_RECORD_STEP, step, tenant_id)

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
        first: dict[str, Any] = {} if key is None else key_values(tenant_id, key, name=key_name, scopes=scopes)
        columns = ("id", "prefix", "name", "digest", "digest_version", "scopes", "networks")
        entry = entry_parameters(action="tenant.activate", tenant_id=tenant_id, actor=actor)
        about = (entry[name] for name in ("actor_kind", "actor_id", "request_id", "source"))
        rows = await self._control.fetch(_COMPLETE, tenant_id, revision, *map(first.get, columns), *about)
        if rows:
            return tenant_from_row(rows[0])
        async with self._control.transaction() as connection:
            found, row = await self._lock(connection, tenant_id)
        raise InvalidTransitionError(found.slug, found.status.value, row.next_status or Status.ACTIVE)

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
        """Store in the row of a creation that it is undone, for ``reconcile``; a completed one stays as it is."""
        refuse_other_tenant(tenant_id)
        condition = and_(tenants.c.id == tenant_id, tenants.c.status == Status.PROVISIONING)
        async with self._control.transaction() as connection:
            await connection.execute(update(tenants).where(condition).values(step=step, step_error=error))
