"""``ServerRecords``: the rows of servers are written, each change with its audit entry in the same transaction."""

from __future__ import annotations

from typing import Any

from sqlalchemy import delete, func, select, text, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from ..audit.actor import Actor
from ..audit.log import AuditLog
from ..connections.rows import forget_server
from ..control.database import ControlDatabase
from ..control.models import servers as table
from ..control.models import templates as template_table
from ..control.models import tenant_databases, tenants, warm_databases
from ..errors import ConfigurationError, PlacementError, UnknownServerError
from ..postgres.errors import sqlstate_of
from ..registry.databases import FORGET_DATABASE
from ..servers.identity import differ
from ..servers.rows import COLUMNS, ServerRow
from ..tenant import Status
from .check import refuse_known_cluster
from .fields import audited

_REFUSED_BY_TRIGGER = "TN003"


class ServerRecords:
    """Adds, changes and removes the rows of servers.

    Args:
        control: The control database.
        audit: Gets an entry with every change, which has no password.
    """

    def __init__(self, control: ControlDatabase, audit: AuditLog) -> None:
        self._control = control
        self._audit = audit

    async def add(self, name: str, values: dict[str, Any], *, same_cluster: bool, actor: Actor) -> ServerRow:
        """Add a row.

        Args:
            name: The server's name.
            values: All that the row has beside it.
            same_cluster: Whether its cluster may be a server already, by another name.
            actor: Who does this, for the audit log.

        Raises:
            ConfigurationError: there is a server of this name, or of this cluster.
        """
        async with self._control.transaction() as connection:
            if not same_cluster:
                await _lock_table(connection)
                await _refuse_known_cluster(connection, name, values["identity"])
            statement = insert(table).values(name=name, **values).on_conflict_do_nothing()
            if not (await connection.execute(statement)).rowcount:
                raise already_there(name)
            after = await _lock(connection, name)
            await self._write_audit(connection, "server.add", name, actor, None, after)
        return after

    async def change(
        self, name: str, action: str, values: dict[str, Any], *, actor: Actor, based_on: ServerRow | None = None
    ) -> ServerRow:
        """Change a row.

        Args:
            name: The server's name.
            action: For the audit log, which gets an entry where something changes.
            values: What changes.
            actor: Who does this, for the audit log.
            based_on: The row that ``values`` were made from, where they keep some of its addresses.

        Raises:
            UnknownServerError: there is none of this name.
            ConfigurationError: its addresses were changed since ``based_on`` was read, or it would be another server's
                cluster. A ``PlacementError`` where tenants of another region are there.
        """
        async with self._control.transaction() as connection:
            if "identity" in values:
                await _lock_table(connection)
            before = await _lock(connection, name)
            if based_on is not None and before.sealed_addresses != based_on.sealed_addresses:
                raise ConfigurationError(f"the addresses of server {name!r} were changed at the same time: try again")
            if values:
                if differ(before.identity, values.get("identity", before.identity)):
                    await _refuse_known_cluster(connection, name, values["identity"])
                try:
                    await connection.execute(update(table).where(table.c.name == name).values(**values))
                except DBAPIError as exc:
                    if sqlstate_of(exc) != _REFUSED_BY_TRIGGER:
                        raise
                    raise PlacementError(
                        f"server {name!r} holds tenants of region {before.region!r}: move or purge them first"
                    ) from exc
            after = await _lock(connection, name)
            if after != before:
                await self._write_audit(connection, action, name, actor, before, after)
        return after

    async def refuse_tenants(self, name: str) -> None:
        """Refuse a server that holds tenants.

        Raises:
            UnknownServerError: there is none of this name.
            ConfigurationError: it holds some; deleted ones count too until they are purged.
        """
        async with self._control.transaction() as connection:
            await _lock(connection, name)
            await _refuse_tenants(connection, name)

    async def remove(self, name: str, *, forget: bool, actor: Actor) -> None:
        """Remove a row.

        Args:
            name: The server's name.
            forget: Forget its templates, its warm databases, and tenants' databases beside those in use.
            actor: Who does this, for the audit log.

        Raises:
            UnknownServerError: there is none of this name.
            ConfigurationError: it holds tenants; or some of those databases, without ``forget``.
        """
        async with self._control.transaction() as connection:
            # no tenant is placed on it that this does not see
            before = await _lock(connection, name, removing=True)
            await _refuse_tenants(connection, name)
            if forget:
                await _forget_clones(connection, name)
                await self._forget_databases_beside(connection, name, actor)
            else:
                await _refuse_clones(connection, name)
                await _refuse_databases_beside(connection, name)
            await connection.execute(delete(table).where(table.c.name == name))
            await forget_server(connection, name)
            await self._write_audit(connection, "server.remove", name, actor, before, None)

    async def _forget_databases_beside(self, connection: AsyncConnection, name: str, actor: Actor) -> None:
        columns = tenant_databases.c
        gone = delete(tenant_databases).where(columns.server == name).returning(columns.tenant_id, columns.name)
        for tenant_id, database in (await connection.execute(gone)).all():
            # the certificate of the tenant's erasure says so
            await self._audit.append(
                connection,
                action=FORGET_DATABASE,
                tenant_id=tenant_id,
                slug=await connection.scalar(select(tenants.c.slug).where(tenants.c.id == tenant_id)),
                actor=actor,
                detail={"server": name, "database": database},
            )

    async def _write_audit(
        self,
        connection: AsyncConnection,
        action: str,
        name: str,
        actor: Actor,
        before: ServerRow | None,
        after: ServerRow | None,
    ) -> None:
        old, new = audited(before), audited(after)
        moved = before is not None and after is not None and before.sealed_addresses != after.sealed_addresses
        if before is not None and after is not None:
            changed = [field for field in new if old[field] != new[field]]
            old, new = {field: old[field] for field in changed}, {field: new[field] for field in changed}
        await self._audit.append(
            connection,
            action=action,
            actor=actor,
            before=old or None,
            after=new or None,
            detail={"server": name, **({"addresses": "changed"} if moved else {})},
        )


async def _lock_table(connection: AsyncConnection) -> None:
    """Let nobody else add or change a server until this is committed; placements, which lock a row, do not wait."""
    await connection.execute(text("LOCK TABLE tenancy.servers IN SHARE ROW EXCLUSIVE MODE"))


async def _lock(connection: AsyncConnection, name: str, *, removing: bool = False) -> ServerRow:
    query = select(*COLUMNS).where(table.c.name == name).with_for_update(key_share=not removing)
    row = (await connection.execute(query)).mappings().one_or_none()
    if row is None:
        raise UnknownServerError(name)
    return ServerRow(**row)


async def _refuse_known_cluster(connection: AsyncConnection, name: str, identity: str | None) -> None:
    """Refuse a cluster that became a server, by another name, while this one was verified."""
    rows = (await connection.execute(select(*COLUMNS))).mappings()
    refuse_known_cluster(name, identity, [ServerRow(**row) for row in rows])


async def _refuse_tenants(connection: AsyncConnection, name: str) -> None:
    query = select(func.count(), func.min(tenants.c.slug)).where(
        tenants.c.server == name, tenants.c.status != Status.PURGED
    )
    count, slug = (await connection.execute(query)).one()
    if count:
        raise ConfigurationError(
            f"server {name!r} holds {count} tenant{'s' * (count != 1)}, {slug!r} for example; deleted ones count "
            "until they are purged"
        )


async def _refuse_clones(connection: AsyncConnection, name: str) -> None:
    for kind, of_server in (("template", template_table), ("warm database", warm_databases)):
        query = select(func.count()).select_from(of_server).where(of_server.c.server == name)
        if held := await connection.scalar(query):
            raise ConfigurationError(
                f"server {name!r} has {held} {kind}{'s' * (held != 1)}; drop them as well: "
                f"tenancy servers remove {name} --drop-templates; if the server does not exist any more: "
                "--forget-templates"
            )


async def _forget_clones(connection: AsyncConnection, name: str) -> None:
    for of_server in (template_table, warm_databases):
        await connection.execute(delete(of_server).where(of_server.c.server == name))


async def _refuse_databases_beside(connection: AsyncConnection, name: str) -> None:
    query = select(func.count()).select_from(tenant_databases).where(tenant_databases.c.server == name)
    if held := await connection.scalar(query):
        raise ConfigurationError(
            f"server {name!r} has {held} database{'s' * (held != 1)} that a move or a restore has left there; "
            "confirm the moves (tenancy move TENANT --confirm), or wait until housekeeping drops them; if the "
            "server does not exist any more: --forget-templates"
        )


def already_there(name: str) -> ConfigurationError:
    """Return the error about a server that is added a second time."""
    return ConfigurationError(f"there is a server {name!r} already; change it: tenancy servers update {name}")


__all__ = ["ServerRecords", "already_there"]
