"""Rows of the registry: every statement on ``tenancy.tenants`` is here, each change with its audit row.

``TenantManager`` and the provisioning pipeline are built on this; neither writes SQL on tenants of its own.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import Any, Literal
from uuid import UUID

from sqlalchemy import (
    ARRAY,
    ColumnElement,
    Row,
    Text,
    and_,
    delete,
    func,
    insert,
    literal_column,
    or_,
    select,
    text,
    update,
)
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from ..context import Placement, Status, Tenant
from ..errors import InvalidTransitionError, TenantExistsError, TenantNotFoundError
from .audit import SYSTEM, Actor, AuditLog
from .database import ControlDatabase
from .keys import NewKey, insert_key
from .lifecycle import check_transition
from .models import api_keys, domains, former_slugs, tenants

_ILLEGAL_TRANSITION = "TN001"  # raised by the trigger tenants_guard

TENANT_COLUMNS: tuple[ColumnElement[Any], ...] = (
    tenants.c.id,
    tenants.c.slug,
    tenants.c.status,
    tenants.c.tier,
    tenants.c.server,
    tenants.c.database_name,
    tenants.c.role_name,
    tenants.c.sealed_password,
    tenants.c.schema_revision,
    tenants.c.metadata,
    tenants.c.quotas,
    tenants.c.reason,
    tenants.c.timezone,
    tenants.c.trial_ends_at,
    tenants.c.created_at,
    tenants.c.updated_at,
    tenants.c.deleted_at,
    # what else may name the tenant: former slugs that still lead to it, and verified domains of its own
    literal_column(
        "ARRAY(SELECT f.slug FROM tenancy.former_slugs f "
        "WHERE f.tenant_id = tenancy.tenants.id AND f.redirects_until > now() "
        "UNION ALL SELECT d.domain FROM tenancy.domains d "
        "WHERE d.tenant_id = tenancy.tenants.id AND d.verified_at IS NOT NULL)",
        ARRAY(Text),
    ).label("aliases"),
)


def uuid7() -> UUID:
    """Return a time-ordered UUID (RFC 9562, version 7): 48 bits of milliseconds, then random bits."""
    value = (time.time_ns() // 1_000_000) << 80 | int.from_bytes(os.urandom(10))
    value = value & ~(0xF << 76) | 0x7 << 76
    value = value & ~(0x3 << 62) | 0x2 << 62
    return UUID(int=value)


def tenant_from_row(row: Row[*tuple[Any, ...]]) -> Tenant:
    """Build the value object from a row of ``TENANT_COLUMNS``."""
    placement = None
    if row.sealed_password is not None:
        placement = Placement(row.server, row.database_name, row.role_name, row.sealed_password)
    return Tenant(
        id=row.id,
        slug=row.slug,
        status=Status(row.status),
        tier=row.tier,
        placement=placement,
        schema_revision=row.schema_revision,
        metadata=MappingProxyType(row.metadata),
        quotas=MappingProxyType(row.quotas),
        reason=row.reason,
        created_at=row.created_at,
        updated_at=row.updated_at,
        deleted_at=row.deleted_at,
        trial_ends_at=row.trial_ends_at,
        timezone=row.timezone,
        aliases=frozenset(row.aliases),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantDraft:
    """A tenant that is about to be created. ``target_status`` is what it becomes once it is usable."""

    id: UUID
    slug: str
    tier: str
    server: str
    database: str
    role: str
    sealed_password: bytes = field(repr=False)
    target_status: Status = Status.ACTIVE
    metadata: Mapping[str, Any] = field(default_factory=dict, repr=False)
    quotas: Mapping[str, Any] = field(default_factory=dict, repr=False)
    timezone: str = "UTC"
    trial_ends_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A creation or purge that was begun and not ended; ``step`` is the last one that was started."""

    tenant: Tenant
    kind: Literal["provisioning", "purging"]
    step: str | None


@dataclass(frozen=True, slots=True)
class TenantPage:
    """Some tenants in the order of their creation; ``next`` continues after the last, None at the end."""

    items: tuple[Tenant, ...]
    next: UUID | None


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


def sqlstate_of(error: DBAPIError) -> str | None:
    """PostgreSQL's SQLSTATE of a wrapped driver error."""
    found = getattr(error.orig, "sqlstate", None)
    return found if isinstance(found, str) else None


def constraint_of(error: DBAPIError) -> str | None:
    """The name of the constraint that a statement violated."""
    found = getattr(getattr(error.orig, "__cause__", None), "constraint_name", None)
    return found if isinstance(found, str) else None


async def tenant_id_of(connection: AsyncConnection, ref: str | UUID | Tenant) -> UUID:
    """Return the id that ``ref`` stands for: a ``Tenant``, an id, its text, a slug, or a slug that still leads to it.

    Raises:
        TenantNotFoundError: no tenant has this slug. An id is taken at its word.
    """
    if isinstance(ref, Tenant):
        return ref.id
    if isinstance(ref, UUID):
        return ref
    try:
        return UUID(ref)
    except ValueError:
        found = await connection.scalar(select(tenants.c.id).where(_has_slug(ref)))
    if found is None:
        raise TenantNotFoundError(ref)
    return UUID(str(found))


def _has_slug(slug: str) -> ColumnElement[bool]:
    former = select(former_slugs.c.tenant_id).where(
        former_slugs.c.slug == slug, former_slugs.c.redirects_until > func.now()
    )
    has = or_(tenants.c.slug == slug, tenants.c.id == former.scalar_subquery())
    return and_(has, tenants.c.status != Status.PURGED)


class Registry:
    """Reads and writes tenants' rows."""

    def __init__(self, control: ControlDatabase, audit: AuditLog) -> None:
        self._control = control
        self._audit = audit

    # --- reading ----------------------------------------------------------------------------------------------------

    async def get(self, tenant_id: UUID) -> Tenant:
        """Return the tenant with this id, a purged one's tombstone included.

        Raises:
            TenantNotFoundError: no row has this id.
        """
        return await self._one(tenants.c.id == tenant_id, tenant_id)

    async def by_slug(self, slug: str) -> Tenant:
        """Return the tenant that has this slug, or had it and is still led to by it.

        Raises:
            TenantNotFoundError: none has; one that was purged has given it up.
        """
        return await self._one(_has_slug(slug), slug)

    async def find(self, ref: str | UUID | Tenant) -> Tenant:
        """Return the tenant that ``ref`` stands for; a ``Tenant`` is returned as it is.

        Raises:
            TenantNotFoundError: there is none.
        """
        if isinstance(ref, Tenant):
            return ref
        async with self._control.connect() as connection:
            tenant_id = await tenant_id_of(connection, ref)
        return await self.get(tenant_id)

    async def _one(self, condition: Any, wanted: UUID | str) -> Tenant:
        async with self._control.connect() as connection:
            row = (await connection.execute(select(*TENANT_COLUMNS).where(condition))).one_or_none()
        if row is None:
            raise TenantNotFoundError(wanted)
        return tenant_from_row(row)

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
        purging = and_(tenants.c.status == Status.DELETED, tenants.c.purge_started_at.is_not(None))
        query = (
            select(*TENANT_COLUMNS, tenants.c.step)
            .where(or_(tenants.c.status == Status.PROVISIONING, purging))
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

    async def is_unfinished(self, tenant_id: UUID) -> Unfinished | None:
        """Return this tenant's unfinished creation or purge, or None: asked again once its lock is held."""
        return next((found for found in await self.unfinished() if found.tenant.id == tenant_id), None)

    async def placements(self, server: str) -> set[str]:
        """Return the names of all databases that the registry knows on ``server``, tombstones left out."""
        query = select(tenants.c.database_name).where(tenants.c.server == server, tenants.c.status != Status.PURGED)
        async with self._control.connect() as connection:
            return set(await connection.scalars(query))

    async def count_by_server(self) -> dict[str, int]:
        """Return how many tenants each server that accepts new ones holds."""
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
        """
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
            if constraint_of(exc) == "tenants_slug_key":
                raise TenantExistsError(draft.slug) from exc
            raise
        return tenant

    async def record_step(self, tenant_id: UUID, step: str) -> None:
        """Record that ``step`` is about to start.

        The commit is not flushed to disk: after a crash of the server ``reconcile`` looks at what is really there, so
        a lost note costs nothing, and a flush would cost every creation a millisecond per step. One statement is one
        round trip in place of four.
        """
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
        async with self._control.transaction() as connection:
            await connection.execute(
                update(tenants).where(tenants.c.id == tenant_id).values(step=step, step_error=error)
            )

    # --- changes ----------------------------------------------------------------------------------------------------

    async def change(
        self, tenant_id: UUID, *, action: str, actor: Actor = SYSTEM, **values: Any
    ) -> tuple[Tenant, Tenant]:
        """Set columns of a tenant and audit the difference; returns the tenant before and after.

        Raises:
            TenantNotFoundError: no such tenant.
            TenantExistsError: a new slug is taken.
        """
        async with self._control.transaction() as connection:
            before, _ = await self._locked(connection, tenant_id)
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
        reason: str | None = None,
        actor: Actor = SYSTEM,
    ) -> tuple[Tenant, Tenant]:
        """Change a tenant's status; returns it before and after. ``target`` None restores what it was before.

        Raises:
            TenantNotFoundError: no such tenant.
            InvalidTransitionError: the lifecycle does not have this change, or a purge is under way.
        """
        async with self._control.transaction() as connection:
            before, row = await self._locked(connection, tenant_id)
            new = Status(row.next_status or Status.ACTIVE) if target is None else target
            # only restore leads out of deletion, and it is nothing but that
            if (target is None) != (before.status is Status.DELETED):
                raise InvalidTransitionError(before.slug, before.status.value, new.value)
            if before.status is Status.PROVISIONING:
                # only the creation itself ends it, by ``complete``: until then there may be no database
                raise InvalidTransitionError(before.slug, before.status.value, new.value)
            if row.purge_started_at is not None and new is not Status.PURGED:
                raise InvalidTransitionError(before.slug, "being purged", new.value)
            check_transition(before.slug, before.status, new)
            # a deleted tenant remembers what it was, for restore
            remembered = before.status if new is Status.DELETED else None
            kept = reason if reason is not None or new in (Status.TRIAL, Status.ACTIVE) else before.reason
            # what was scheduled has taken place, or has been overtaken
            cleared = {"suspend_at": None, "suspend_reason": None, "purge_at": None}
            after = await self._set(connection, tenant_id, status=new, reason=kept, next_status=remembered, **cleared)
            old, changed = _difference(before, after)
            await self._write_audit(connection, action, after, actor, before=old, after=changed)
        return before, after

    async def rename(
        self, tenant_id: UUID, slug: str, *, redirect_seconds: float, actor: Actor = SYSTEM
    ) -> tuple[Tenant, Tenant]:
        """Give a tenant another slug; the old one leads to it, and is refused to others, for ``redirect_seconds``.

        Raises:
            TenantNotFoundError: no such tenant.
            TenantExistsError: the slug is another tenant's, or still leads to one.
        """
        async with self._control.transaction() as connection:
            before, _ = await self._locked(connection, tenant_id)
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
            after = replace(after, aliases=after.aliases | {before.slug})
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

    async def schedule(
        self, tenant_id: UUID, values: Mapping[str, Any], *, action: str, detail: Mapping[str, Any], actor: Actor
    ) -> Tenant:
        """Set times at which something is to happen to a tenant.

        Raises:
            TenantNotFoundError: no such tenant.
        """
        async with self._control.transaction() as connection:
            await self._locked(connection, tenant_id)
            after = await self._set(connection, tenant_id, **values)
            await self._write_audit(connection, action, after, actor, detail=detail)
        return after

    async def due(self, *, retention_seconds: float, limit: int = 1_000) -> list[tuple[Tenant, str, str | None]]:
        """Return tenants whose time has come, with what is due ("suspend" or "purge") and the reason to give.

        Args:
            retention_seconds: How long a deleted tenant's data is kept, where it has no time of its own.
            limit: How many at most of each kind.
        """
        trial_over = and_(tenants.c.status == Status.TRIAL, tenants.c.trial_ends_at <= func.now())
        scheduled = and_(
            tenants.c.status.in_([Status.TRIAL, Status.ACTIVE, Status.MAINTENANCE]),
            tenants.c.suspend_at <= func.now(),
        )
        retained = func.coalesce(tenants.c.purge_at, tenants.c.deleted_at + timedelta(seconds=retention_seconds))
        suspending = select(*TENANT_COLUMNS, tenants.c.suspend_reason).where(or_(trial_over, scheduled)).limit(limit)
        purging = select(*TENANT_COLUMNS).where(tenants.c.status == Status.DELETED, retained <= func.now()).limit(limit)
        async with self._control.connect() as connection:
            found: list[tuple[Tenant, str, str | None]] = [
                (tenant_from_row(row), "suspend", row.suspend_reason or "the trial has ended")
                for row in await connection.execute(suspending)
            ]
            found += [(tenant_from_row(row), "purge", None) for row in await connection.execute(purging)]
        return found

    async def expire_former_slugs(self) -> int:
        """Forget the slugs whose redirect period is over; returns how many."""
        async with self._control.transaction() as connection:
            result = await connection.execute(delete(former_slugs).where(former_slugs.c.redirects_until <= func.now()))
        return result.rowcount

    async def set_revision(self, tenant_id: UUID, revision: str | None) -> None:
        """Record the schema revision that was read back from the tenant's database."""
        async with self._control.transaction() as connection:
            await connection.execute(
                update(tenants)
                .where(tenants.c.id == tenant_id, tenants.c.schema_revision.is_distinct_from(revision))
                .values(schema_revision=revision)
            )

    # --- purge ------------------------------------------------------------------------------------------------------

    async def begin_purge(self, tenant_id: UUID, *, actor: Actor = SYSTEM) -> Tenant:
        """Mark a deleted tenant as being purged: from here on it cannot be restored. Repeating it changes nothing.

        Raises:
            TenantNotFoundError: no such tenant.
            InvalidTransitionError: the tenant is not deleted.
        """
        async with self._control.transaction() as connection:
            before, row = await self._locked(connection, tenant_id)
            if before.status is not Status.DELETED:
                raise InvalidTransitionError(before.slug, before.status.value, Status.PURGED.value)
            if row.purge_started_at is None:
                before = await self._set(connection, tenant_id, purge_started_at=func.now())
                await self._write_audit(connection, "tenant.purge_begin", before, actor)
        return before

    async def finish_purge(self, tenant_id: UUID, *, actor: Actor = SYSTEM) -> None:
        """Leave a tombstone: the keys, the sealed password, metadata and overrides go, and the slug is free again.

        Raises:
            TenantNotFoundError: no such tenant.
        """
        async with self._control.transaction() as connection:
            before, _ = await self._locked(connection, tenant_id)
            if before.status is Status.PURGED:
                return
            for table in (api_keys, former_slugs, domains):
                await connection.execute(delete(table).where(table.c.tenant_id == tenant_id))
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

    # --- parts ------------------------------------------------------------------------------------------------------

    async def _locked(self, connection: AsyncConnection, tenant_id: UUID) -> tuple[Tenant, Row[*tuple[Any, ...]]]:
        query = (
            select(*TENANT_COLUMNS, tenants.c.next_status, tenants.c.purge_started_at)
            .where(tenants.c.id == tenant_id)
            .with_for_update()
        )
        row = (await connection.execute(query)).one_or_none()
        if row is None:
            raise TenantNotFoundError(tenant_id)
        return tenant_from_row(row), row

    async def _set(self, connection: AsyncConnection, tenant_id: UUID, **values: Any) -> Tenant:
        statement = update(tenants).where(tenants.c.id == tenant_id).values(**values).returning(*TENANT_COLUMNS)
        try:
            return tenant_from_row((await connection.execute(statement)).one())
        except IntegrityError as exc:
            if constraint_of(exc) == "tenants_slug_key":
                raise TenantExistsError(str(values["slug"])) from exc
            raise
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
