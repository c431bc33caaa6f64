"""Look-ups in the table of tenants: one tenant, a page, unfinished ones, due ones."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, Select, and_, case, func, or_, select, true

from ..context import as_reference, refuse_other_tenant, refuse_while_bound
from ..control.lookup import check_name, has_name
from ..control.models import servers, tenant_databases, tenants, warm_databases
from ..errors import TenantNotFoundError
from ..tenant import Status, Tenant
from .rows import TENANT_COLUMNS, TenantPage, Unfinished, tenant_from_row
from .table import TenantTable

_PAGE = 500  # tenants that one query of ``iterate`` reads


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantFilter:
    """Which tenants are meant: those that match everything that is given.

    Args:
        status: Only these; purged tenants are meant only where named here.
        tier: Only these.
        server: Only tenants on this server.
        region: Only tenants of this region.
        slug: A pattern of slugs, as LIKE takes it.
        metadata: Only tenants with metadata that contains this.
    """

    status: Sequence[Status] = ()
    tier: Sequence[str] = ()
    server: str | None = None
    region: str | None = None
    slug: str | None = None
    metadata: Mapping[str, Any] | None = None

    def apply(self, query: Select[Any]) -> Select[Any]:
        """Return ``query`` for these tenants."""
        query = query.where(tenants.c.status.in_(self.status) if self.status else tenants.c.status != Status.PURGED)
        if self.tier:
            query = query.where(tenants.c.tier.in_(self.tier))
        if self.server is not None:
            query = query.where(tenants.c.server == self.server)
        if self.region is not None:
            query = query.where(tenants.c.region == self.region)
        if self.slug is not None:
            query = query.where(tenants.c.slug.like(self.slug))
        if self.metadata:
            # By itself: together with the order of a page, PostgreSQL would rather read all tenants in that order,
            # since it expects one tenant of a hundred to match while it does not know the parameter.
            found = select(tenants.c.id).where(tenants.c.metadata.contains(dict(self.metadata)))
            matching = found.cte("matching").prefix_with("MATERIALIZED")
            query = query.where(tenants.c.id.in_(select(matching.c.id)))
        return query


EVERY_TENANT = TenantFilter()


_TAKEN_OVER = (
    "SELECT EXISTS (SELECT FROM tenancy.operations WHERE tenant_id = $1::uuid AND kind = 'adopt' "
    "AND state IN ('running', 'waiting') AND detail ->> 'in_place' = 'true') "
    "AND EXISTS (SELECT FROM tenancy.tenants WHERE id = $1::uuid AND status = 'provisioning') AS found"
)


class Reading(TenantTable):
    """Finds tenants and lists them."""

    async def get(self, tenant_id: UUID) -> Tenant:
        """Return the tenant with this id, a purged one's tombstone included.

        Raises:
            TenantNotFoundError: there is no row with this id.
            CrossTenantError: another tenant is bound.
        """
        return await self.find(tenant_id)

    async def find(self, ref: str | UUID | Tenant) -> Tenant:
        """Return the tenant that ``ref`` names, as it is now; see ``control.lookup``. An id also finds a tombstone.

        Raises:
            TenantNotFoundError: there is no such tenant.
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
        # the name may be another tenant's since the tenant was bound
        refuse_other_tenant(found)
        return found

    async def find_with_purged(self, ref: str | UUID | Tenant) -> list[Tenant]:
        """Return the tenant that ``ref`` names, and every purged one with it as its last slug; at least one.

        A slug is free once its tenant is purged: several tenants may have had it, and another may have it now.

        Raises:
            TenantNotFoundError: there is none.
            CrossTenantError: another tenant is bound, or one is and another has had this slug.
        """
        refuse_other_tenant(ref)
        named = as_reference(ref)
        condition = tenants.c.id == named if isinstance(named, UUID) else has_name(check_name(named), purged=True)
        async with self._control.connect() as connection:
            rows = await connection.execute(select(*TENANT_COLUMNS).where(condition).order_by(tenants.c.id))
            found = [tenant_from_row(row) for row in rows]
        if not found:
            raise TenantNotFoundError(named)
        for tenant in found:
            refuse_other_tenant(tenant)
        return found

    async def page(
        self, which: TenantFilter = EVERY_TENANT, *, limit: int = 100, after: UUID | None = None
    ) -> TenantPage:
        """Return up to ``limit`` tenants in order of creation, after the id ``after``; tombstones only if asked for."""
        refuse_while_bound("listing tenants")
        query = which.apply(select(*TENANT_COLUMNS).order_by(tenants.c.id).limit(limit + 1))
        if after is not None:
            query = query.where(tenants.c.id > after)
        async with self._control.connect() as connection:
            rows = (await connection.execute(query)).all()
        items = tuple(tenant_from_row(row) for row in rows[:limit])
        return TenantPage(items, items[-1].id if len(rows) > limit else None)

    async def count(self, which: TenantFilter = EVERY_TENANT) -> int:
        """Return the number of tenants; tombstones count only if asked for."""
        refuse_while_bound("counting tenants")
        async with self._control.connect() as connection:
            return await connection.scalar(which.apply(select(func.count()).select_from(tenants))) or 0

    async def iterate(self, which: TenantFilter = EVERY_TENANT) -> AsyncIterator[Tenant]:
        """Yield every tenant in order of creation, page by page; tombstones only if asked for."""
        after: UUID | None = None
        while True:
            page = await self.page(which, limit=_PAGE, after=after)
            for tenant in page.items:
                yield tenant
            if page.next is None:
                return
            after = page.next

    async def unfinished(self) -> list[Unfinished]:
        """Return every unfinished creation and purge, oldest first."""
        refuse_while_bound("listing tenants")
        return await self._unfinished(true())

    async def is_taken_over(self, tenant_id: UUID) -> bool:
        """Whether an operation under way makes a tenant of a database in place: its database existed before.

        It is not for ``reconcile`` to remove: the operation brings it back to how it was.
        """
        refuse_other_tenant(tenant_id)
        return bool((await self._control.fetch(_TAKEN_OVER, tenant_id))[0].found)

    async def find_unfinished(self, tenant_id: UUID) -> Unfinished | None:
        """Return this tenant's unfinished creation or purge, or None; check it again once its lock is taken."""
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

    async def due(self, *, retention_seconds: float, limit: int = 1_000) -> list[tuple[Tenant, str, str | None]]:
        """Return tenants that are to be suspended or purged now, with the action ("suspend", "purge") and its reason.

        Args:
            retention_seconds: How long a deleted tenant's data is kept, unless its purge is scheduled.
            limit: The largest number of tenants for each action.
        """
        refuse_while_bound("listing tenants")
        trial_over = and_(tenants.c.status == Status.TRIAL, tenants.c.trial_ends_at <= func.now())
        scheduled = and_(
            tenants.c.status.in_([Status.TRIAL, Status.ACTIVE, Status.MAINTENANCE]),
            tenants.c.suspend_at <= func.now(),
        )
        retained = func.coalesce(tenants.c.purge_at, tenants.c.deleted_at + timedelta(seconds=retention_seconds))
        reason = case((scheduled, tenants.c.suspend_reason), else_="the trial has ended").label("due_reason")
        # the latest first: tenants that cannot be changed for a long time must not fill the list
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

    async def database_names(self, server: str) -> set[str]:
        """Return the names of all tenants' databases and roles on ``server``, and of all warm databases.

        Tombstones' are left out. Databases beside the ones in use are among them, see ``registry.databases``.
        """
        refuse_while_bound("listing databases")
        placed = select(tenants.c.database_name).where(tenants.c.server == server, tenants.c.status != Status.PURGED)
        roles = select(tenants.c.role_name).where(tenants.c.server == server, tenants.c.status != Status.PURGED)
        beside = tenant_databases.c.server == server
        # in one statement: a creation that claims a warm database takes its name from one table to the other, and so
        # does a switch to another database
        query = placed.union(
            roles,
            select(warm_databases.c.name).where(warm_databases.c.server == server),
            select(tenant_databases.c.name).where(beside),
            select(tenant_databases.c.role_name).where(beside),
        )
        async with self._control.connect() as connection:
            return set(await connection.scalars(query))

    async def id_by_database(self, name: str) -> UUID | None:
        """Return the id of the tenant that has, or had, the database or role of this name on any server, or None.

        A database beside the one in use is the tenant's too; so is a role that has the name of another database.
        """
        refuse_while_bound("finding a tenant by its database")
        # by server, as the index is
        placed = select(tenants.c.id).where(
            tenants.c.server.in_(select(servers.c.name)), tenants.c.database_name == name
        )
        by_role = select(tenants.c.id).where(tenants.c.role_name == name)
        beside = select(tenant_databases.c.tenant_id).where(
            or_(tenant_databases.c.name == name, tenant_databases.c.role_name == name)
        )
        async with self._control.connect() as connection:
            found = await connection.scalar(placed)
            # rarely: a restore or a move has given the tenant another database
            return found or await connection.scalar(by_role.union_all(beside).limit(1))
