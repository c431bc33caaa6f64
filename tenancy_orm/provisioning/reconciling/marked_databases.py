"""Tenants' databases as the servers alone tell: by their markers, and by who may connect.

For when the registry does not know them. The marker names the installation and the tenant; the right to connect names
the tenant's role, and tells the database in use from those beside it: a restore or a move closes what it replaces, and
opens the new one last. That right is also the last that a creation gives, and the first that a deletion takes away.
The marker of a database that was replaced says so as well.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from typing import Any
from uuid import UUID

from ...audit.actor import Actor
from ...cancellation import run_to_completion
from ...control.names import Names
from ...errors import ProvisioningError
from ...postgres import connections, locks
from ...postgres.connections import Connection
from ...registry.databases import TenantDatabase
from ...registry.lifecycle import LOGIN_BLOCKED
from ...registry.rows import TenantDraft
from ...routing.marker import replaced_by
from ...secrets.keyring import new_password
from ...tenant import Placement, Tenant
from ..checks.differences import Difference
from ..creation import clone_marks
from ..creation.clone_marks import CloneMark
from ..creation.pipeline import ProvisioningServices, prove, tenant_key
from ..rights import grants
from ..server_objects import databases
from ..server_objects.replaced_databases import refuse_stale
from .alignment import align_role
from .tenants import TenantCheck

_MARKED = """
SELECT d.datname::text AS name, shobj_description(d.oid, 'pg_database') AS marker, o.rolname::text AS owner,
       d.datallowconn AND d.datconnlimit <> -2 AND NOT d.datistemplate AS usable,
       EXISTS (SELECT FROM pg_roles WHERE rolname = d.datname) AS has_role,
       ARRAY(SELECT DISTINCT g.rolname::text FROM aclexplode(d.datacl) a JOIN pg_roles g ON g.oid = a.grantee
              WHERE a.privilege_type = 'CONNECT' AND a.grantee <> d.datdba AND g.rolcanlogin ORDER BY 1) AS logins
  FROM pg_database d JOIN pg_roles o ON o.oid = d.datdba
 WHERE shobj_description(d.oid, 'pg_database') ~ '^tenancy:' AND ($1::text IS NULL OR d.datname = $1) ORDER BY 1
"""
_UUID = "([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})"
_MARKER = re.compile(f"tenancy:{_UUID}:{_UUID}(?::replaced:.*)?", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class MarkedDatabase:
    """A database with the marker of a tenant.

    Attributes:
        server: The server's name.
        name: The database's name.
        installation: The installation that the marker names.
        tenant_id: The tenant that it names.
        role: The tenant's role, which may connect to it; None where it is not the one in use.
        reason: Why it is not the one in use; empty where it is.
        replaced: Whether its marker says that another one has replaced it.
        ours: Whether name and owner are those of that installation's databases, with the configured ``name_prefix``.
        size_bytes: Its size; None where the administrator may not ask.
    """

    server: str
    name: str
    installation: UUID
    tenant_id: UUID
    role: str | None
    reason: str
    ours: bool
    replaced: bool = False
    size_bytes: int | None = None


async def find(connection: Connection, server: str, prefix: str, *, only: str | None = None) -> list[MarkedDatabase]:
    """Return the databases of a server that have a tenant's marker, of any installation.

    Args:
        connection: An administrative one, to any database of the server.
        server: The server's name.
        prefix: ``TenancyConfig.name_prefix``.
        only: This database alone.
    """
    found: list[MarkedDatabase] = []
    for row in await connection.fetch(_MARKED, only):
        if (match := _MARKER.fullmatch(row["marker"])) is None:
            continue
        installation, tenant_id = UUID(match[1]), UUID(match[2])
        names = Names(prefix, installation)
        logins = [role for role in row["logins"] if names.parse(role) is not None]
        by = replaced_by(row["marker"])
        reason, named = "", names.parse(row["name"]) is not None
        if not named:
            reason = f"it is not named as a tenant's database is with name_prefix {prefix!r}"
        elif row["owner"] != names.owner:
            reason = f"it is owned by {row['owner']}, and not by {names.owner}"
        elif by is not None:
            reason = f"it is not in use any more: {by!r} has replaced it"
        elif not row["usable"]:
            reason = "nobody may connect to it, or it is a template"
        elif not logins and not row["has_role"]:
            reason = "its role is missing, or may not connect"
        elif not logins:
            reason = "its role may not connect: it was replaced, or its tenant was suspended or deleted"
        elif len(logins) > 1:
            reason = f"several tenants' roles may connect: {', '.join(logins)}"
        found.append(
            MarkedDatabase(
                server=server,
                name=row["name"],
                installation=installation,
                tenant_id=tenant_id,
                role=None if reason else logins[0],
                reason=reason,
                ours=named and row["owner"] == names.owner,
                replaced=by is not None,
            )
        )
    return found


class MarkedDatabases:
    """Finds tenants' databases on the servers, and takes them back into the registry, one at a time.

    Args:
        services: Of provisioning.
    """

    def __init__(self, services: ProvisioningServices) -> None:
        self._services = services
        self._timeout = services.config.provisioning.timeout

    async def on(self, server: str) -> list[MarkedDatabase]:
        """Return the databases of a server that have a tenant's marker, with their sizes.

        Raises:
            ServerUnavailableError, asyncpg.PostgresError: the server does not answer, or refuses.
        """
        connection = await self._services.blockers(self._services.servers[server]).connect()
        try:
            async with asyncio.timeout(self._timeout):
                found = await find(connection, server, self._services.config.name_prefix)
                sizes = await databases.sizes(connection, [one.name for one in found])
        finally:
            await run_to_completion(connections.close(connection))
        return [replace(one, size_bytes=sizes.get(one.name)) for one in found]

    async def revision(self, found: MarkedDatabase) -> str | None:
        """Return the revision of a database's schema.

        Raises:
            ServerUnavailableError, asyncpg.PostgresError: the server does not answer, or refuses.
        """
        async with self._connected(found) as connection:
            return await grants.revision(connection, self._owner_of(found))

    async def clone_mark(self, found: MarkedDatabase) -> CloneMark | None:
        """Return what a database says of itself if its tenant is a clone; None where it is none.

        Raises:
            ProvisioningError: what it says is malformed.
            ServerUnavailableError, asyncpg.PostgresError: the server does not answer, or refuses.
        """
        async with self._connected(found) as connection:
            return await clone_marks.read(connection, found.tenant_id, owner=self._owner_of(found))

    async def register(
        self,
        found: MarkedDatabase,
        *,
        slug: str,
        tier: str,
        metadata: Mapping[str, Any],
        reason: str,
        actor: Actor,
    ) -> None:
        """Write the row of a database's tenant, in maintenance, unless it has one. Nobody has its password yet.

        Args:
            found: The database in use.
            slug: The tenant's slug.
            tier: Its tier.
            metadata: Its metadata.
            reason: Why it is in maintenance.
            actor: Who does this, for the audit log.

        Raises:
            ProvisioningError: the database is another one by now, or another process changes it.
            TenantExistsError, UnknownTierError, PlacementError: as ``Registry.register_again``.
        """
        async with self._locked(found) as connection:
            role = await self._role_again(connection, found)
            draft = TenantDraft(
                id=found.tenant_id,
                slug=slug,
                tier=tier,
                metadata=metadata,
                server=found.server,
                database=found.name,
                role=role,
                # in the row until the rotation; the role never has it
                sealed_password=self._services.keyring.seal_password(found.tenant_id, new_password()),
            )
            await run_to_completion(self._services.registry.register_again(draft, reason=reason, actor=actor))

    async def _role_again(self, connection: Connection, found: MarkedDatabase) -> str:
        """Return the role that may connect to a database, which must be as it was found.

        Raises:
            ProvisioningError: it is not.
        """
        again = await find(connection, found.server, self._services.config.name_prefix, only=found.name)
        if not again or again[0].role is None or again[0].role != found.role or _owner(again[0]) != _owner(found):
            raise ProvisioningError(f"database {found.name!r} has been changed since it was looked at; try again")
        return again[0].role

    async def is_stale(self, placement: Placement) -> bool:
        """Whether what a tenant's row says cannot be the database in use: it was replaced, or does not exist.

        Raises:
            UnknownServerError, ServerUnavailableError, asyncpg.PostgresError: that is not known.
        """
        try:
            server = self._services.servers[placement.server]
            await refuse_stale(self._services.admin_connections, server, placement.database)
        except ProvisioningError as exc:
            if exc.step != "replaced":
                raise
            return True
        return False

    async def switch(self, found: MarkedDatabase, *, kept_until: datetime, actor: Actor) -> None:
        """Have the row of a registered tenant name the database in use, in place of one that it has replaced.

        Args:
            found: The database in use.
            kept_until: When the other one is dropped, if it exists.
            actor: Who does this, for the audit log.

        Raises:
            ProvisioningError: the database is another one by now, or another process changes it; or the row names one
                that may be in use.
            TenantNotFoundError, OperationStateError, PlacementError: as ``Registry.switch_database``.
        """
        registry = self._services.registry
        async with self._locked(found) as connection:
            role = await self._role_again(connection, found)
            tenant = await registry.get(found.tenant_id)
            place = tenant.placement
            if place is None or (place.server, place.database) == (found.server, found.name):
                return
            if not await self.is_stale(place):
                raise ProvisioningError(f"database {place.database!r} of tenant {tenant.slug!r} may be in use")
            after = replace(place, server=found.server, database=found.name, role=role)
            revision = await self.revision(found)
            await registry.record_database(
                TenantDatabase(server=found.server, name=found.name, tenant_id=tenant.id, role=role, state="making")
            )
            await run_to_completion(
                registry.switch_database(
                    tenant, after, action="tenant.rebuild", revision=revision, kept_until=kept_until, actor=actor
                )
            )

    async def finish(
        self, found: MarkedDatabase, *, beside: list[MarkedDatabase], switched: bool = False, actor: Actor
    ) -> tuple[Tenant, list[Difference]]:
        """Mend a registered tenant's database and role as reconcile does, prove them, and make the tenant active.

        Does nothing to one that is active already, because another process has done it, unless its row has just been
        ``switched``. Databases ``beside`` the one in use are recorded: a purge drops them, and nothing else does.

        Returns:
            The tenant, and how its database differed from what provisioning makes.

        Raises:
            IsolationError: the database is not the tenant's.
            TenancyError, asyncpg.PostgresError: a step failed, and may be repeated.
        """
        services, told = self._services, list[Difference]()
        async with self._locked(found) as connection:
            unfinished = await services.registry.rebuilding()
            tenant = await services.registry.get(found.tenant_id)
            place = tenant.placement
            if place is None or not (switched or tenant.id in unfinished):
                return tenant, told
            if (place.server, place.database) != (found.server, found.name):
                raise ProvisioningError(f"tenant {tenant.slug!r} is registered with database {place.database!r}")
            check = TenantCheck(services, found.server, mend=True, spare_others=True, adopt=(), actor=actor)
            await check.settle(connection, tenant, told)
            deadline = asyncio.get_running_loop().time() + self._timeout
            await align_role(services, connection, tenant, deadline=deadline)
            if tenant.status not in LOGIN_BLOCKED:
                await connections.close(await prove(services, tenant.id, tenant.slug, place))
            for one in beside:
                kept = TenantDatabase(
                    server=one.server, name=one.name, tenant_id=tenant.id, role=place.role, state="kept"
                )
                await services.registry.record_database(kept)
            if tenant.id not in unfinished:
                return tenant, told
            revision = await self.revision(found)
            tenant = await run_to_completion(
                services.registry.end_rebuilding(tenant.id, revision=revision, actor=actor)
            )
        return tenant, told

    @asynccontextmanager
    async def _connected(self, found: MarkedDatabase) -> AsyncIterator[Connection]:
        """Connect to a database as an administrator, for as long as ``provisioning.timeout``."""
        connection = await self._services.blockers(self._services.servers[found.server]).connect(found.name)
        try:
            async with asyncio.timeout(self._timeout):
                yield connection
        finally:
            await run_to_completion(connections.close(connection))

    def _owner_of(self, found: MarkedDatabase) -> str:
        return Names(self._services.config.name_prefix, found.installation).owner

    @asynccontextmanager
    async def _locked(self, found: MarkedDatabase) -> AsyncIterator[Connection]:
        """Hold the locks of a tenant, and of the number in its database's name, which reconcile takes for an orphan.

        Raises:
            ProvisioningError: another process has one of them for too long, or the work takes too long.
        """
        services, server = self._services, self._services.servers[found.server]
        number = services.names.parse(found.name)
        keys = dict.fromkeys([tenant_key(found.tenant_id), *([] if number is None else [tenant_key(number)])])
        first, *more = keys
        connection = await services.admin_connections.acquire(server, first, timeout=self._timeout)
        try:
            async with asyncio.timeout(self._timeout):
                for key in more:
                    await locks.lock(connection, key, timeout=self._timeout)
                yield connection
        finally:
            try:
                for key in more:
                    await connections.finish(connection, partial(locks.unlock, connection, key))
            finally:
                await run_to_completion(services.admin_connections.release(server, connection, first))


def _owner(found: MarkedDatabase) -> tuple[UUID, UUID]:
    return found.installation, found.tenant_id


__all__ = ["MarkedDatabase", "MarkedDatabases", "find"]
