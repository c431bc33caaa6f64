"""The schema revisions of the tenants, and of the fleet."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from sqlalchemy import ColumnElement, false, func, select, text, true, update

from ..context import refuse_other_tenant, refuse_while_bound
from ..control.models import fleet_revision, migration_run_tenants, migration_runs, tenants
from ..control.notifications import CHANNEL, SCHEMA_CHANGED, SCHEMA_CHANGING
from ..tenant import Status, Tenant
from .rows import TENANT_COLUMNS, tenant_from_row
from .table import TenantTable

BASE: Final = "base"
"""What a migration to no revision at all is announced as."""

# each in one round trip, which is one transaction
_SET_REVISION = text(
    "WITH changed AS (UPDATE tenancy.tenants SET schema_revision = CAST(:revision AS text), "
    "migrating_to = NULL, migrating_until = NULL, "
    "migrated_at = CASE WHEN schema_revision IS DISTINCT FROM CAST(:revision AS text) THEN now() ELSE migrated_at END, "
    "held_at = CASE WHEN schema_revision IS NOT DISTINCT FROM CAST(:revision AS text) THEN held_at "
    "WHEN :held THEN clock_timestamp() END "
    "WHERE id = :id AND (schema_revision IS DISTINCT FROM CAST(:revision AS text) OR migrating_to IS NOT NULL)), "
    # upgrades before its use that have failed; the one that runs has its own end
    "forgotten AS (DELETE FROM tenancy.tenant_upgrades u USING tenancy.tenants t WHERE u.tenant_id = :id "
    "AND t.id = :id AND t.schema_revision IS DISTINCT FROM CAST(:revision AS text) "
    "AND coalesce(u.claimed_until < clock_timestamp(), true)) "
    "SELECT pg_notify(:channel, :payload)"
)
_ANNOUNCE = text(
    "WITH marked AS (UPDATE tenancy.tenants SET migrating_to = :target, "
    "migrating_until = clock_timestamp() + make_interval(secs => :seconds) WHERE id = :id) "
    "SELECT pg_notify(:channel, :payload)"
)

# For many tenants at once, within a statement that has ended their migrations: it has them as the rows of ``finished``,
# with tenant_id, after and has_read (whether "after" was read); :held is as for ``set_revision``. Where it was not
# read, nobody knows what the schema is, and a notice stays: see ``Notices``.
RECORD_FINISHED: Final = (
    "recorded AS (UPDATE tenancy.tenants n SET "
    "schema_revision = CASE WHEN f.has_read THEN f.after ELSE n.schema_revision END, "
    "migrating_to = NULL, migrating_until = NULL, "
    "migrated_at = CASE WHEN f.has_read AND n.schema_revision IS DISTINCT FROM f.after THEN now() "
    "ELSE n.migrated_at END, "
    "held_at = CASE WHEN NOT f.has_read OR n.schema_revision IS NOT DISTINCT FROM f.after THEN n.held_at "
    "WHEN :held THEN clock_timestamp() END "
    "FROM finished f WHERE n.id = f.tenant_id AND (f.has_read AND n.schema_revision IS DISTINCT FROM f.after "
    "OR f.has_read AND n.migrating_to IS NOT NULL) RETURNING n.id), "
    "forgotten AS (DELETE FROM tenancy.tenant_upgrades u USING finished f, tenancy.tenants t "
    "WHERE u.tenant_id = f.tenant_id AND t.id = f.tenant_id AND f.has_read "
    "AND t.schema_revision IS DISTINCT FROM f.after AND coalesce(u.claimed_until < clock_timestamp(), true))"
)
# For many as well, within the statement of ``ControlDatabase.fetch`` that has begun their migrations: the rows of
# ``begun`` have tenant_id, target and seconds.
MARK_BEGUN: Final = (
    "marked AS (UPDATE tenancy.tenants n SET migrating_to = b.target, "
    "migrating_until = clock_timestamp() + make_interval(secs => b.seconds) FROM begun b WHERE n.id = b.tenant_id)"
)


_COUNTS = text(
    "SELECT schema_revision AS revision, count(*) AS tenants, "
    "count(*) FILTER (WHERE migrating_until > clock_timestamp()) AS migrating FROM tenancy.tenants "
    "WHERE status NOT IN ('provisioning', 'deleted', 'purged') GROUP BY 1 ORDER BY 1 NULLS FIRST"
)
_FAILED = text(
    "SELECT u.*, t.slug FROM tenancy.tenant_upgrades u JOIN tenancy.tenants t ON t.id = u.tenant_id "
    "WHERE u.failures > 0 ORDER BY u.failed_at DESC LIMIT :limit"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedUpgrade:
    """A tenant with an upgrade before its use that has failed, ``failures`` times in a row.

    ``error`` is one line, ``next_at`` when the next attempt may begin. The next migration that succeeds ends it.
    """

    tenant_id: UUID
    slug: str
    target: str
    failures: int
    error: str | None
    sqlstate: str | None
    failed_at: datetime
    next_at: datetime


@dataclass(frozen=True, slots=True)
class RecordedRevision:
    """The revision of a tenant's database, as the last migration or creation recorded it."""

    tenant_id: UUID
    slug: str
    server: str
    revision: str | None


class Revisions(TenantTable):
    """Stores which schema revision a tenant has, and which one the last migration of the whole fleet brought about."""

    async def set_revision(self, tenant_id: UUID, revision: str | None, *, held: bool = False) -> None:
        """Store the schema revision that was read back from the tenant's database, and notify every process.

        Args:
            tenant_id: The tenant.
            revision: The revision.
            held: Whether an operator has moved it there otherwise than by an upgrade, so that no process upgrades it by
                itself.
        """
        refuse_other_tenant(tenant_id)
        values = {"id": tenant_id, "revision": revision, "held": held, **_notification(tenant_id, SCHEMA_CHANGED)}
        async with self._control.connect() as connection:
            await connection.execute(_SET_REVISION, values)

    async def announce_migration(self, tenant_id: UUID, *, target: str | None, seconds: float) -> None:
        """Notify every process that the tenant's schema is about to change: each statement is prepared again.

        That holds until ``set_revision`` says that the migration has ended.

        Args:
            tenant_id: The tenant.
            target: The revision that it is brought to; code that cannot work with that serves it no more.
            seconds: How long that can take at most: if the migration is killed, nobody says that it has ended.
        """
        refuse_other_tenant(tenant_id)
        values = {"target": target or BASE, "seconds": seconds, **_notification(tenant_id, SCHEMA_CHANGING)}
        async with self._control.connect() as connection:
            await connection.execute(_ANNOUNCE, {"id": tenant_id, **values})

    async def with_notice(self) -> list[tuple[Tenant, bool]]:
        """Return the tenants with the notice of a migration, also where that should have ended by now.

        Each with whether the last run that has begun to change it was another one than an upgrade.
        """
        refuse_while_bound("listing tenants")
        last = (
            select(migration_runs.c.command != "upgrade")
            .join(migration_run_tenants, migration_run_tenants.c.run == migration_runs.c.id)
            .where(migration_run_tenants.c.tenant_id == tenants.c.id, migration_run_tenants.c.is_read)
            .order_by(migration_runs.c.id.desc())
            .limit(1)
            .scalar_subquery()
        )
        query = (
            select(*TENANT_COLUMNS, func.coalesce(last, false()).label("was_moved"))
            .where(
                tenants.c.migrating_to.is_not(None),
                tenants.c.status.not_in([Status.PROVISIONING, Status.PURGED]),
                tenants.c.purge_started_at.is_(None),
                tenants.c.server.is_not(None),
            )
            .order_by(tenants.c.id)
        )
        async with self._control.connect() as connection:
            return [(tenant_from_row(row), row.was_moved) for row in await connection.execute(query)]

    async def recorded_revisions(self, only: Collection[UUID] | None = None) -> list[RecordedRevision]:
        """Return the revision of every tenant that is not being created or purged, in order of creation; in one query.

        Args:
            only: The ids of the tenants; all where None.
        """
        refuse_while_bound("listing tenants")
        query = (
            select(tenants.c.id, tenants.c.slug, tenants.c.server, tenants.c.schema_revision)
            .where(
                tenants.c.status.not_in([Status.PROVISIONING, Status.PURGED]),
                tenants.c.purge_started_at.is_(None),
                tenants.c.server.is_not(None),
                true() if only is None else tenants.c.id.in_(only),
            )
            .order_by(tenants.c.id)
        )
        async with self._control.connect() as connection:
            return [RecordedRevision(*row) for row in await connection.execute(query)]

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

    async def count_revisions(self) -> list[tuple[str | None, int, int]]:
        """Return each revision with how many tenants have it, and how many of them are being migrated now.

        Tenants that are being created, deleted or purged do not count.
        """
        refuse_while_bound("counting tenants")
        async with self._control.connect() as connection:
            return [(row.revision, row.tenants, row.migrating) for row in await connection.execute(_COUNTS)]

    async def failed_upgrades(self, *, limit: int = 100) -> list[FailedUpgrade]:
        """Return the tenants with upgrades before their use that have failed, the latest first."""
        refuse_while_bound("listing the upgrades that have failed")
        async with self._control.connect() as connection:
            rows = (await connection.execute(_FAILED, {"limit": limit})).all()
        return [
            FailedUpgrade(
                tenant_id=row.tenant_id,
                slug=row.slug,
                target=row.target,
                failures=row.failures,
                error=row.error,
                sqlstate=row.sqlstate,
                failed_at=row.failed_at,
                next_at=row.next_at,
            )
            for row in rows
        ]

    async def created_behind(self, revision: str, tenant_id: UUID | None = None) -> list[Tenant]:
        """Return the tenants that were created at another revision than ``revision``, and never migrated.

        Args:
            revision: The fleet's revision.
            tenant_id: Only this tenant; all where None.
        """
        return await self._behind(revision, tenant_id, tenants.c.migrated_at.is_(None))

    async def behind(self, revision: str, tenant_id: UUID | None = None) -> list[Tenant]:
        """Return the tenants at another revision than ``revision``, without those that an operator has moved back.

        Args:
            revision: The revision.
            tenant_id: Only this tenant; all where None.
        """
        return await self._behind(revision, tenant_id, tenants.c.held_at.is_(None))

    async def _behind(self, revision: str, tenant_id: UUID | None, condition: ColumnElement[bool]) -> list[Tenant]:
        if tenant_id is None:
            refuse_while_bound("listing tenants")
        else:
            refuse_other_tenant(tenant_id)
        query = (
            select(*TENANT_COLUMNS)
            .where(
                # not one without a revision: it may have tables that no revision has made
                tenants.c.schema_revision != revision,
                condition,
                tenants.c.status.not_in([Status.PROVISIONING, Status.PURGED]),
                tenants.c.purge_started_at.is_(None),
                true() if tenant_id is None else tenants.c.id == tenant_id,
            )
            .order_by(tenants.c.id)
        )
        async with self._control.connect() as connection:
            return [tenant_from_row(row) for row in await connection.execute(query)]


def _notification(tenant_id: UUID, kind: str) -> dict[str, Any]:
    return {"channel": CHANNEL, "payload": json.dumps({"t": str(tenant_id), "k": None, "c": kind})}
