"""Rows of the registry: every statement on ``tenancy.tenants`` is here, each change with its audit row.

``TenantManager`` and the provisioning pipeline are built on this; neither writes SQL on tenants of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import (
    ColumnElement,
    Row,
    and_,
    case,
    delete,
    func,
    insert,
    or_,
    select,
    text,
    true,
    update,
)
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from ..audit.actor import SYSTEM, Actor
from ..audit.log import AuditLog
from ..context import as_reference, refuse_other_tenant, refuse_while_bound
from ..control.database import ControlDatabase
from ..control.lookup import check_name, has_name
from ..control.models import api_keys, domains, former_slugs, tenants
from ..errors import InvalidTransitionError, TenantExistsError, TenantNotFoundError, TierChangedError, UnknownTierError
from ..keys.format import NewKey
from ..keys.rows import insert_key
from ..postgres.errors import constraint_of, sqlstate_of
from ..tenant import Status, Tenant
from .lifecycle import check_transition
from .rows import TENANT_COLUMNS, TenantDraft, TenantPage, Unfinished, tenant_from_row

_ILLEGAL_TRANSITION = "TN001"  # raised by the trigger tenants_guard


def _snapshot(tenant: Tenant) -> dict[str, Any]:
    """What the audit log keeps of a tenant: no placement, no secrets."""
    return {
        "slug": tenant.slug,
        "status": tenant.status.value,
        "tier": tenant.tier,
        "metadata": dict(tenant.metadata),
        "quotas": dict(tenant.quotas),
        "reason": tenant.reason,
        "timezone": tenant.timezone,
        "trial_ends_at": tenant.trial_ends_at.isoformat() if tenant.trial_ends_at else None,
    }


def _difference(before: Tenant, after: Tenant) -> tuple[dict[str, Any], dict[str, Any]]:
    old, new = _snapshot(before), _snapshot(after)
    changed = [name for name in new if old[name] != new[name]]
    return {name: old[name] for name in changed}, {name: new[name] for name in changed}


# what was counted and measured of a tenant: its own keys of idempotency, which may name people, among it
_REMAINS = tuple(
    text(f"DELETE FROM tenancy.{table} WHERE tenant_id = :id")  # noqa: S608 - constants of this module
    for table in ("usage_keys", "quota_holds", "quota_leases", "quota_pressure", "tenant_metrics")
)
# what a tenant used is to be paid though it is purged; but where nobody bills, nothing of it is kept for that
_SETTLE = text(
    "SELECT tenancy.usage_settle(:id) WHERE CAST(:bills AS boolean) OR EXISTS (SELECT 1 FROM tenancy.usage_records)"
)


def _memory(before: Tenant, row: Row[*tuple[Any, ...]], new: Status, reason: str | None) -> dict[str, Any]:
    """What a change of status makes of the status, its reason, and what is remembered for the way back."""
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


def _schedule(before: Tenant, new: Status) -> dict[str, Any]:
    """What was scheduled and has taken place, or has been overtaken, is taken off the schedule."""
    cleared: dict[str, Any] = {}
    if new in (Status.SUSPENDED, Status.DELETED):
        cleared |= {"suspend_at": None, "suspend_reason": None}
    if before.status is Status.DELETED:
        cleared["purge_at"] = None
    return cleared


def _refusal(error: IntegrityError, values: Mapping[str, Any]) -> Exception:
    """What to raise where a constraint refuses a row of the registry."""
    constraint = constraint_of(error)
    if constraint in ("tenants_slug_key", "former_slugs_pkey"):
        return TenantExistsError(str(values["slug"]), reserved=constraint == "former_slugs_pkey")
    if constraint == "tenants_tier_fkey":
        return UnknownTierError(str(values["tier"]))
    return error


def _check_unchanged(found: Tenant, listed: Tenant, target: Status) -> None:
    if found.updated_at != listed.updated_at:
        raise InvalidTransitionError(found.slug, f"{found.status.value} (changed meanwhile)", target.value)


class Registry:
    """Reads and writes tenants' rows.

    Args:
        control: The control database.
        audit: Where changes are written down.
        bills: Whether usage is exported for billing; known also by there being records of it.
    """

    def __init__(self, control: ControlDatabase, audit: AuditLog, *, bills: bool = False) -> None:
        self._control = control
        self._audit = audit
        self._bills = bills

    # --- reading ----------------------------------------------------------------------------------------------------

    async def get(self, tenant_id: UUID) -> Tenant:
        """Return the tenant with this id, a purged one's tombstone included.

        Raises:
            TenantNotFoundError: no row has this id.
            CrossTenantError: another tenant is bound.
        """
        return await self.find(tenant_id)

    async def by_slug(self, slug: str) -> Tenant:
        """Return the tenant that has this slug, or a former slug that still redirects.

        Raises:
            TenantNotFoundError: none has; one that was purged has given it up.
            CrossTenantError: another tenant is bound.
        """
        return await self.find(slug)

    async def find(self, ref: str | UUID | Tenant) -> Tenant:
        """Return the tenant that ``ref`` names, as it is now: see ``lookup``. By id, a tombstone is found as well.

        Raises:
            TenantNotFoundError: there is none.
            CrossTenantError: another tenant is bound.
        """
        refuse_other_tenant(ref)
        named = as_reference(ref)
        condition = tenants.c.id == named if isinstance(named, UUID) else has_name(check_name(named))
        async with self._control.connect() as connection:
            row = (await connection.execute(select(*TENANT_COLUMNS).where(condition))).one_or_none()
        if row is None:
            raise TenantNotFoundError(named)
        found = tenant_from_row(row)
        # the name may have become another tenant's since the tenant was bound
        refuse_other_tenant(found)
        return found

    async def page(
        self,
        *,
        status: Sequence[Status] = (),
        tier: Sequence[str] = (),
        server: str | None = None,
        limit: int = 100,
        after: UUID | None = None,
    ) -> TenantPage:
        """Return up to ``limit`` tenants in order of creation, after the id ``after``; tombstones only if asked for."""
        refuse_while_bound("listing tenants")
        query = select(*TENANT_COLUMNS).order_by(tenants.c.id).limit(limit + 1)
        query = query.where(tenants.c.status.in_(status) if status else tenants.c.status != Status.PURGED)
        if tier:
            query = query.where(tenants.c.tier.in_(tier))
        if server is not None:
            query = query.where(tenants.c.server == server)
        if after is not None:
            query = query.where(tenants.c.id > after)
        async with self._control.connect() as connection:
            rows = (await connection.execute(query)).all()
        items = tuple(tenant_from_row(row) for row in rows[:limit])
        return TenantPage(items, items[-1].id if len(rows) > limit else None)

    async def unfinished(self) -> list[Unfinished]:
        """Return every creation and purge that was begun and not ended, oldest first."""
        refuse_while_bound("listing tenants")
        return await self._unfinished(true())

    async def is_unfinished(self, tenant_id: UUID) -> Unfinished | None:
        """Return this tenant's unfinished creation or purge, or None: asked again once its lock is held."""
        refuse_other_tenant(tenant_id)
        return next(iter(await self._unfinished(tenants.c.id == tenant_id)), None)

    async def _unfinished(self, condition: ColumnElement[bool]) -> list[Unfinished]:
        purging = and_(tenants.c.status == Status.DELETED, tenants.c.purge_started_at.is_not(None))
        query = (
            select(*TENANT_COLUMNS, tenants.c.step)
            .where(or_(tenants.c.status == Status.PROVISIONING, purging), condition)
            .order_by(tenants.c.id)
        )
        async with self._control.connect() as connection:
            rows = (await connection.execute(query)).all()
        return [
            Unfinished(
                tenant_from_row(row), "provisioning" if row.status == Status.PROVISIONING else "purging", row.step
            )
            for row in rows
        ]

    async def placements(self, server: str) -> set[str]:
        """Return the names of all databases that the registry knows on ``server``, tombstones left out."""
        refuse_while_bound("listing databases")
        query = select(tenants.c.database_name).where(tenants.c.server == server, tenants.c.status != Status.PURGED)
        async with self._control.connect() as connection:
            return set(await connection.scalars(query))

    async def count_by_server(self) -> dict[str, int]:
        """Return how many tenants each server that accepts new ones holds."""
        refuse_while_bound("counting tenants")
        query = text(
            "SELECT s.name, count(t.id) FROM tenancy.servers s "
            "LEFT JOIN tenancy.tenants t ON t.server = s.name AND t.status <> 'purged' "
            "WHERE s.accepts_tenants GROUP BY s.name"
        )
        async with self._control.connect() as connection:
            return {row[0]: row[1] for row in await connection.execute(query)}

    # --- creation ---------------------------------------------------------------------------------------------------

    async def register(self, draft: TenantDraft, *, actor: Actor = SYSTEM) -> Tenant:
        """Insert the row of a tenant that is being provisioned; from here on its slug is taken.

        Raises:
            TenantExistsError: the slug is taken.
            UnknownTierError: the tier is not in force.
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
            "trial_ends_at": draft.trial_ends_at,
            "next_status": draft.target_status,
            "step": "registered",
        }
        try:
            async with self._control.transaction() as connection:
                row = (await connection.execute(insert(tenants).values(values).returning(*TENANT_COLUMNS))).one()
                tenant = tenant_from_row(row)
                await self._write_audit(connection, "tenant.create", tenant, actor, after=_snapshot(tenant))
        except IntegrityError as exc:
            raise _refusal(exc, values) from exc
        return tenant

    async def record_step(self, tenant_id: UUID, step: str) -> None:
        """Record that ``step`` is about to start.

        The commit is not flushed to disk: after a crash of the server ``reconcile`` looks at what is really there, so
        a lost note costs nothing, and a flush would cost every creation a millisecond per step. One statement is one
        round trip in place of four.
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
        """Make a provisioned tenant usable, with its first API key, in one transaction.

        Raises:
            TenantNotFoundError: the row is gone.
            InvalidTransitionError: the tenant is not being provisioned.
        """
        refuse_other_tenant(tenant_id)
        async with self._control.transaction() as connection:
            before, row = await self._locked(connection, tenant_id)
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
        """Remove the row of a creation that was undone; its slug is free again. Does nothing where the row is gone."""
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

    async def note_failure(self, tenant_id: UUID, *, step: str, error: str) -> None:
        """Record on the row that ``step`` failed and could not be undone; ``reconcile`` takes it from there."""
        refuse_other_tenant(tenant_id)
        async with self._control.transaction() as connection:
            await connection.execute(
                update(tenants).where(tenants.c.id == tenant_id).values(step=step, step_error=error)
            )

    # --- changes ----------------------------------------------------------------------------------------------------

    async def change(
        self,
        tenant_id: UUID,
        *,
        action: str,
        actor: Actor = SYSTEM,
        expected_tier: str | None = None,
        **values: Any,
    ) -> tuple[Tenant, Tenant]:
        """Set columns of a tenant and audit the difference; returns the tenant before and after.

        Raises:
            TenantNotFoundError: no such tenant.
            TenantExistsError: a new slug is taken.
            TierChangedError: its tier is not ``expected_tier``.
        """
        refuse_other_tenant(tenant_id)
        async with self._control.transaction() as connection:
            before, _ = await self._living(connection, tenant_id)
            if expected_tier not in (None, before.tier):
                raise TierChangedError(before.slug, expected=str(expected_tier), found=before.tier)
            after = await self._set(connection, tenant_id, **values)
            old, new = _difference(before, after)
            if new:
                await self._write_audit(connection, action, after, actor, before=old, after=new)
        return before, after

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
        """Change a tenant's status; returns it before and after.

        Args:
            tenant_id: Which tenant.
            target: Its status from now on; None: what it was before it was ``leaving``.
            action: What this is, for the audit log.
            leaving: Where ``target`` is None: the status that ends, deleted or maintenance.
            reason: Why.
            listed: Refuse, unless the tenant is still as it was listed here.
            actor: Who does this.
            values: Further columns to set.

        Raises:
            TenantNotFoundError: no such tenant.
            InvalidTransitionError: the lifecycle does not have this change, the tenant was changed since it was listed,
                or a purge is under way.
        """
        refuse_other_tenant(tenant_id)
        async with self._control.transaction() as connection:
            before, row = await self._locked(connection, tenant_id)
            new = self._target(before, row, target, leaving)
            if listed is not None:
                _check_unchanged(before, listed, new)
            after = await self._set(
                connection, tenant_id, **_memory(before, row, new, reason), **_schedule(before, new), **values
            )
            old, changed = _difference(before, after)
            await self._write_audit(connection, action, after, actor, before=old, after=changed)
        return before, after

    @staticmethod
    def _target(before: Tenant, row: Row[*tuple[Any, ...]], target: Status | None, leaving: Status) -> Status:
        """The status that a change leads to, if it may.

        Raises:
            InvalidTransitionError: it may not.
        """
        remembered = row.next_status if leaving is Status.DELETED else row.former_status
        new = Status(remembered or Status.ACTIVE) if target is None else target
        if before.status is Status.PROVISIONING:
            # only the creation itself ends it, by ``complete``: until then there may be no database
            raise InvalidTransitionError(before.slug, before.status.value, new.value)
        # only restore leads out of deletion, and it is nothing but that
        if (target is None and before.status is not leaving) or (target and before.status is Status.DELETED):
            raise InvalidTransitionError(before.slug, before.status.value, new.value)
        if row.purge_started_at is not None and new is not Status.PURGED:
            raise InvalidTransitionError(before.slug, "being purged", new.value)
        check_transition(before.slug, before.status, new)
        return new

    async def rename(
        self, tenant_id: UUID, slug: str, *, redirect_seconds: float, actor: Actor = SYSTEM
    ) -> tuple[Tenant, Tenant]:
        """Give a tenant another slug; the old one leads to it, and is refused to others, for ``redirect_seconds``.

        Raises:
            TenantNotFoundError: no such tenant.
            TenantExistsError: the slug is another tenant's, or still leads to one.
        """
        refuse_other_tenant(tenant_id)
        async with self._control.transaction() as connection:
            before, _ = await self._living(connection, tenant_id)
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
            old, new = _difference(before, after)
            await self._audit.append(
                connection,
                action="tenant.rename",
                tenant_id=tenant_id,
                slug=slug,
                actor=actor,
                before=old,
                after=new,
                detail=detail,
            )
        return before, after

    async def schedule_suspension(
        self, tenant_id: UUID, at: datetime | None, *, reason: str | None, actor: Actor = SYSTEM
    ) -> Tenant:
        """Set when a tenant is to be suspended, and why; None: not at all.

        Raises:
            TenantNotFoundError: no such tenant.
        """
        refuse_other_tenant(tenant_id)
        values = {"suspend_at": at, "suspend_reason": reason if at else None}
        detail = {"at": at.isoformat() if at else None, "reason": reason}
        return await self._schedule(tenant_id, values, "tenant.schedule_suspension", detail, actor)

    async def schedule_purge(self, tenant_id: UUID, at: datetime | None, *, actor: Actor = SYSTEM) -> Tenant:
        """Set when a deleted tenant is to be purged; None: after the usual retention.

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
            before, row = await self._living(connection, tenant_id)
            if "purge_at" in values and (before.status is not Status.DELETED or row.purge_started_at is not None):
                raise InvalidTransitionError(before.slug, before.status.value, Status.PURGED.value)
            after = await self._set(connection, tenant_id, **values)
            await self._write_audit(connection, action, after, actor, detail=detail)
        return after

    async def due(self, *, retention_seconds: float, limit: int = 1_000) -> list[tuple[Tenant, str, str | None]]:
        """Return tenants whose time has come, with what is due ("suspend" or "purge") and the reason to give.

        Args:
            retention_seconds: How long a deleted tenant's data is kept, where it has no time of its own.
            limit: How many at most of each kind.
        """
        refuse_while_bound("listing tenants")
        trial_over = and_(tenants.c.status == Status.TRIAL, tenants.c.trial_ends_at <= func.now())
        scheduled = and_(
            tenants.c.status.in_([Status.TRIAL, Status.ACTIVE, Status.MAINTENANCE]),
            tenants.c.suspend_at <= func.now(),
        )
        retained = func.coalesce(tenants.c.purge_at, tenants.c.deleted_at + timedelta(seconds=retention_seconds))
        reason = case((scheduled, tenants.c.suspend_reason), else_="the trial has ended").label("due_reason")
        # the latest first: what cannot be done for a long time must not keep the others from being listed
        suspending = (
            select(*TENANT_COLUMNS, reason)
            .where(or_(trial_over, scheduled))
            .order_by(func.least(tenants.c.suspend_at, tenants.c.trial_ends_at).desc())
            .limit(limit)
        )
        purging = (
            select(*TENANT_COLUMNS)
            .where(tenants.c.status == Status.DELETED, retained <= func.now())
            .order_by(retained.desc())
            .limit(limit)
        )
        async with self._control.connect() as connection:
            found: list[tuple[Tenant, str, str | None]] = [
                (tenant_from_row(row), "suspend", row.due_reason) for row in await connection.execute(suspending)
            ]
            found += [(tenant_from_row(row), "purge", None) for row in await connection.execute(purging)]
        return found

    async def expire_former_slugs(self) -> int:
        """Forget the slugs whose redirect period is over; returns how many."""
        refuse_while_bound("removing former slugs")
        async with self._control.transaction() as connection:
            result = await connection.execute(delete(former_slugs).where(former_slugs.c.redirects_until <= func.now()))
        return result.rowcount

    async def set_revision(self, tenant_id: UUID, revision: str | None) -> None:
        """Record the schema revision that was read back from the tenant's database."""
        refuse_other_tenant(tenant_id)
        async with self._control.transaction() as connection:
            await connection.execute(
                update(tenants)
                .where(tenants.c.id == tenant_id, tenants.c.schema_revision.is_distinct_from(revision))
                .values(schema_revision=revision)
            )

    # --- purge ------------------------------------------------------------------------------------------------------

    async def begin_purge(self, tenant_id: UUID, *, listed: Tenant | None = None, actor: Actor = SYSTEM) -> Tenant:
        """Mark a deleted tenant as being purged: from here on it cannot be restored. Repeating it changes nothing.

        Args:
            tenant_id: Which tenant.
            listed: Refuse, unless the tenant is still as it was listed here, or its purge has begun.
            actor: Who does this.

        Raises:
            TenantNotFoundError: no such tenant.
            InvalidTransitionError: the tenant is not deleted, or was changed since it was listed.
        """
        refuse_other_tenant(tenant_id)
        async with self._control.transaction() as connection:
            before, row = await self._locked(connection, tenant_id)
            if listed is not None and row.purge_started_at is None:
                _check_unchanged(before, listed, Status.PURGED)
            if before.status is not Status.DELETED:
                raise InvalidTransitionError(before.slug, before.status.value, Status.PURGED.value)
            if row.purge_started_at is None:
                before = await self._set(connection, tenant_id, purge_started_at=func.now())
                await self._write_audit(connection, "tenant.purge_begin", before, actor)
        return before

    async def erase_secrets(self, tenant_id: UUID) -> None:
        """Erase the keys and passwords of a tenant that is being purged. What is left of it is of use to nobody.

        An empty password stays: until the purge is finished, the row says where the tenant was.

        Raises:
            TenantNotFoundError: no such tenant.
            InvalidTransitionError: its purge has not begun.
            CrossTenantError: another tenant is bound.
        """
        refuse_other_tenant(tenant_id)
        async with self._control.transaction() as connection:
            before, row = await self._locked(connection, tenant_id)
            if before.status is not Status.DELETED or row.purge_started_at is None:
                raise InvalidTransitionError(before.slug, before.status.value, Status.PURGED.value)
            await connection.execute(delete(api_keys).where(api_keys.c.tenant_id == tenant_id))
            await connection.execute(
                update(tenants).where(tenants.c.id == tenant_id).values(sealed_password=b"", next_sealed_password=None)
            )

    async def finish_purge(self, tenant_id: UUID, *, actor: Actor = SYSTEM) -> None:
        """Leave a tombstone: the keys, the sealed password, metadata and overrides go, and the slug is free again.

        Usage that is yet to be billed keeps the metadata until it is.

        Raises:
            TenantNotFoundError: no such tenant.
        """
        refuse_other_tenant(tenant_id)
        async with self._control.transaction() as connection:
            before, _ = await self._locked(connection, tenant_id)
            if before.status is Status.PURGED:
                return
            for table in (api_keys, former_slugs, domains):
                await connection.execute(delete(table).where(table.c.tenant_id == tenant_id))
            await connection.execute(_SETTLE, {"id": tenant_id, "bills": self._bills})
            for statement in _REMAINS:
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

    async def note(self, tenant_id: UUID, action: str, *, detail: Mapping[str, Any], actor: Actor = SYSTEM) -> None:
        """Write into the audit log what was done to a tenant elsewhere than in the control database.

        Raises:
            TenantNotFoundError: no such tenant.
        """
        tenant = await self.get(tenant_id)
        async with self._control.transaction() as connection:
            await self._write_audit(connection, action, tenant, actor, detail=detail)

    # --- parts ------------------------------------------------------------------------------------------------------

    async def _locked(self, connection: AsyncConnection, tenant_id: UUID) -> tuple[Tenant, Row[*tuple[Any, ...]]]:
        remembered = (tenants.c.next_status, tenants.c.former_status, tenants.c.former_reason)
        query = (
            select(*TENANT_COLUMNS, *remembered, tenants.c.purge_started_at)
            .where(tenants.c.id == tenant_id)
            .with_for_update()
        )
        row = (await connection.execute(query)).one_or_none()
        if row is None:
            raise TenantNotFoundError(tenant_id)
        return tenant_from_row(row), row

    async def _living(self, connection: AsyncConnection, tenant_id: UUID) -> tuple[Tenant, Row[*tuple[Any, ...]]]:
        """Lock a tenant that has not been purged: nothing is written on a tombstone."""
        found, row = await self._locked(connection, tenant_id)
        if found.status is Status.PURGED:
            raise TenantNotFoundError(found.slug)
        return found, row

    async def _set(self, connection: AsyncConnection, tenant_id: UUID, **values: Any) -> Tenant:
        statement = update(tenants).where(tenants.c.id == tenant_id).values(**values).returning(*TENANT_COLUMNS)
        try:
            return tenant_from_row((await connection.execute(statement)).one())
        except IntegrityError as exc:
            raise _refusal(exc, values) from exc
        except DBAPIError as exc:
            if sqlstate_of(exc) == _ILLEGAL_TRANSITION:
                raise InvalidTransitionError(str(tenant_id), "its status", str(values.get("status"))) from exc
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
