"""Databases of a tenant beside the one in use, and the switch from one to another.

The tenant's own row names the database in use. Another one has a row in ``tenancy.tenant_databases`` before it exists
on a server, and until it is dropped, so that reconcile knows it. A restore or a move makes one. The switch exchanges
the two in one transaction, and leaves the former one behind for a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

from sqlalchemy import Row, delete, func, insert, or_, select, update

from ..audit.actor import SYSTEM, Actor
from ..context import refuse_other_tenant, refuse_while_bound
from ..control.models import operations, tenant_databases
from ..errors import JobLostError, OperationStateError, PlacementError
from ..tenant import Placement, Tenant
from .table import TenantTable

FORGET_DATABASE = "tenant.forget_database"
"""The action of an audit entry: a database was not dropped, since an operator has said that its server is lost."""

DatabaseState = Literal["making", "kept", "dropping"]

_IS_PLACED_AS = "SELECT FROM tenancy.tenants WHERE id = $1 AND server = $2 AND database_name = $3"


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantDatabase:
    """A database beside the one in use.

    Attributes:
        server: The server's name.
        name: The database's name.
        tenant_id: The tenant.
        role: The role that uses it, or would.
        state: "making", "kept" after a switch, or "dropping".
        operation: The number of the operation that makes it, or has left it behind.
        revision: The revision of its schema, where that is known.
        kept_until: When it is dropped; None: when somebody decides so.
        created_at: When its row was written.
    """

    server: str
    name: str
    tenant_id: UUID
    role: str
    state: DatabaseState
    operation: int | None = None
    revision: str | None = None
    kept_until: datetime | None = None
    created_at: datetime | None = None


class Databases(TenantTable):
    """Records databases beside the ones in use, and switches tenants to them."""

    async def record_database(self, beside: TenantDatabase) -> None:
        """Write the row of a database that is made next. Repeating it changes nothing.

        Raises:
            TenantNotFoundError: there is no such tenant, or it has been purged.
            OperationStateError: its purge has begun.
        """
        refuse_other_tenant(beside.tenant_id)
        async with self._control.transaction() as connection:
            tenant, row = await self._lock_unless_purged(connection, beside.tenant_id)
            if row.purge_started_at is not None:
                raise OperationStateError(f"tenant {tenant.slug!r} is being purged")
            found = await self._find(connection, beside.server, beside.name)
            if found is None:
                await connection.execute(insert(tenant_databases).values(**_columns(beside)))

    async def get_after_pending_commits(self, tenant_id: UUID) -> Tenant:
        """Return the tenant once nobody is changing its row.

        Where the answer to a COMMIT was lost, the transaction may go on: it is waited for, as a plain read would not.

        Raises:
            TenantNotFoundError: there is no such tenant.
            ControlUnavailableError: the control database does not answer, or the row did not become free in time.
        """
        refuse_other_tenant(tenant_id)
        async with self._control.transaction() as connection:
            found, _ = await self._lock(connection, tenant_id)
        return found

    async def is_placed_as(self, listed: Tenant) -> bool:
        """Whether the tenant still uses the database that it had when it was listed; False where it was purged."""
        refuse_other_tenant(listed)
        if listed.placement is None:
            return False
        place = listed.placement
        return bool(await self._control.fetch(_IS_PLACED_AS, listed.id, place.server, place.database))

    async def databases_of(self, tenant_id: UUID) -> tuple[TenantDatabase, ...]:
        """Return a tenant's databases beside the one in use, the newest last."""
        refuse_other_tenant(tenant_id)
        query = select(tenant_databases).where(tenant_databases.c.tenant_id == tenant_id)
        return await self._list(query.order_by(tenant_databases.c.created_at, tenant_databases.c.name))

    async def databases_to_drop(self) -> tuple[TenantDatabase, ...]:
        """Return the databases that are kept no longer, or that were being dropped."""
        refuse_while_bound("listing databases")
        over = (tenant_databases.c.state == "kept") & (tenant_databases.c.kept_until <= func.now())
        query = select(tenant_databases).where(or_(over, tenant_databases.c.state == "dropping"))
        return await self._list(query.order_by(tenant_databases.c.created_at, tenant_databases.c.name))

    async def begin_dropping_database(self, beside: TenantDatabase) -> bool:
        """Mark a database as being dropped: no switch goes back to it any more.

        False where it has no row any more; and where a switch has left it behind once more since it was listed, so that
        it is kept for longer.
        """
        refuse_other_tenant(beside.tenant_id)
        as_listed = tenant_databases.c.kept_until.is_not_distinct_from(beside.kept_until)
        statement = update(tenant_databases).where(*_is(beside), as_listed).values(state="dropping")
        async with self._control.transaction() as connection:
            return bool((await connection.execute(statement)).rowcount)

    async def forget_database(self, beside: TenantDatabase) -> None:
        """Delete the row of a database that does not exist any more."""
        refuse_other_tenant(beside.tenant_id)
        async with self._control.transaction() as connection:
            await connection.execute(delete(tenant_databases).where(*_is(beside)))

    async def forget_lost_database(self, beside: TenantDatabase, *, actor: Actor = SYSTEM) -> None:
        """Delete the row of a database that nobody can drop, since its server is lost for good. Audited."""
        refuse_other_tenant(beside.tenant_id)
        async with self._control.transaction() as connection:
            tenant, _ = await self._lock(connection, beside.tenant_id)
            if (await connection.execute(delete(tenant_databases).where(*_is(beside)))).rowcount:
                detail = {"server": beside.server, "database": beside.name}
                await self._write_audit(connection, FORGET_DATABASE, tenant, actor, detail=detail)

    async def switch_database(
        self,
        listed: Tenant,
        to: Placement,
        *,
        action: str,
        revision: str | None,
        kept_until: datetime | None,
        operation: int | None = None,
        claim: UUID | None = None,
        detail: Mapping[str, Any] | None = None,
        actor: Actor = SYSTEM,
    ) -> Tenant:
        """Make another database the one in use, and keep the former one, in one transaction. All processes learn of it.

        Args:
            listed: The tenant, with the placement that is in use now.
            to: The new placement; its database has a row.
            action: The action, for the audit log.
            revision: The revision of the new database's schema.
            kept_until: When the former database is dropped; None: when somebody decides so.
            operation: The operation's number.
            claim: Who must have claimed it; nobody else can take it over before this is committed.
            detail: Further facts for the audit log.
            actor: Who does this.

        Raises:
            TenantNotFoundError: there is no such tenant, or it has been purged.
            JobLostError: another process has the operation by now.
            PlacementError: its database is another one by now, the new one is not recorded or is being dropped, or its
                server does not take the tenant.
        """
        refuse_other_tenant(listed)
        former = listed.placement
        async with self._control.transaction() as connection:
            if claim is not None:
                claimed = (operations.c.id == operation) & (operations.c.claim == claim)
                if (await connection.execute(select(operations.c.id).where(claimed).with_for_update())).first() is None:
                    raise JobLostError
            found, _ = await self._lock_unless_purged(connection, listed.id)
            now = found.placement
            if now is None or former is None or (now.server, now.database) != (former.server, former.database):
                raise PlacementError(
                    f"tenant {found.slug!r} was moved or restored in the meantime; look it up again", {}
                )
            row = await self._find(connection, to.server, to.database)
            if row is None or row.tenant_id != listed.id or row.state == "dropping":
                raise PlacementError(f"database {to.database!r} is not one that tenant {found.slug!r} can use", {})
            await connection.execute(delete(tenant_databases).where(*_named(to.server, to.database)))
            values: dict[str, Any] = {
                "server": to.server,
                "database_name": to.database,
                "role_name": to.role,
                "schema_revision": revision,
            }
            if to.sealed_password != former.sealed_password:
                # otherwise it is the same password, and may have been sealed under another key since
                values["sealed_password"] = to.sealed_password
            after = await self._set(connection, listed.id, **values)
            kept = TenantDatabase(
                server=now.server,
                name=now.database,
                tenant_id=listed.id,
                role=now.role,
                state="kept",
                operation=operation,
                revision=found.schema_revision,
                kept_until=kept_until,
            )
            await connection.execute(insert(tenant_databases).values(**_columns(kept)))
            await self._write_audit(
                connection,
                action,
                after,
                actor,
                before={"server": now.server, "database": now.database, "revision": found.schema_revision},
                after={"server": to.server, "database": to.database, "revision": revision},
                detail={"operation": operation, **(detail or {})},
            )
        return replace(after, aliases=found.aliases)

    @staticmethod
    async def _find(connection: Any, server: str, name: str) -> Row[Any] | None:
        query = select(tenant_databases).where(*_named(server, name)).with_for_update()
        found: Row[Any] | None = (await connection.execute(query)).one_or_none()
        return found

    async def _list(self, query: Any) -> tuple[TenantDatabase, ...]:
        async with self._control.connect() as connection:
            return tuple(_database(row) for row in await connection.execute(query))


def _named(server: str, name: str) -> tuple[Any, Any]:
    return tenant_databases.c.server == server, tenant_databases.c.name == name


def _is(database: TenantDatabase) -> tuple[Any, ...]:
    return *_named(database.server, database.name), tenant_databases.c.tenant_id == database.tenant_id


def _columns(database: TenantDatabase) -> dict[str, Any]:
    return {
        "server": database.server,
        "name": database.name,
        "tenant_id": database.tenant_id,
        "role_name": database.role,
        "state": database.state,
        "operation": database.operation,
        "schema_revision": database.revision,
        "kept_until": database.kept_until,
    }


def _database(row: Row[Any]) -> TenantDatabase:
    return TenantDatabase(
        server=row.server,
        name=row.name,
        tenant_id=row.tenant_id,
        role=row.role_name,
        state=row.state,
        operation=row.operation,
        revision=row.schema_revision,
        kept_until=row.kept_until,
        created_at=row.created_at,
    )


__all__ = ["FORGET_DATABASE", "DatabaseState", "Databases", "TenantDatabase"]
