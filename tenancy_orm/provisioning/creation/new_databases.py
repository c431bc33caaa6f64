"""``NewDatabases``: databases that are filled from elsewhere, and become a tenant's once they are proven harmless.

A restore, a clone or an adoption makes one. What comes into it is text that somebody else has written, and may be
hostile. It is brought in by a login that is made for this alone, owns what it brings in, and may do nothing elsewhere:
see ``copy_logins``. Functions, triggers and views run with their owner's rights, or with those of whoever changes a
table. So they become the owner's, which owns the databases of all tenants, only after the login has ended for good and
a ``ContentsPolicy`` has compared them with what a revision makes.

The tenant's role cannot connect before ``Databases.switch_database`` makes the database the one in use.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Protocol
from uuid import UUID

from ...cancellation import run_to_completion
from ...context import refuse_while_bound
from ...control.names import is_scratch
from ...errors import OperationError, OperationStateError, ProvisioningError, TenancyError, TenantNotFoundError
from ...loops import HomeLoop
from ...postgres import connections, locks
from ...postgres.connections import Connection
from ...postgres.errors import describe
from ...postgres.failures import SERVER_FAILURES
from ...postgres.quoting import quote_identifier, quote_literal
from ...registry.databases import TenantDatabase
from ...registry.rows import uuid7
from ...routing import marker
from ...servers import Server
from ...tenant import Placement, Status, Tenant, placement_of
from ..checks.contents_check import ContentsCheck
from ..checks.differences import enumeration
from ..copies.database_properties import DatabaseProperties
from ..copies.empty_databases import InstalledExtension, create_for_login
from ..logins import guests
from ..logins.copy_logins import CopyLogin, end_login
from ..rights import event_trigger, grants
from ..rights.tenant_rights import TenantRights
from ..server_objects import advisory_locks, databases, removal, roles
from ..server_objects.replaced_databases import refuse_replaced, refuse_stale
from .pipeline import ProvisioningServices, prove, tenant_key

logger = logging.getLogger("tenancy_orm.provisioning")

SAFE_PATH = {"search_path": "pg_catalog, pg_temp"}
"""Settings of a session in a database with contents that nobody has checked: no name is resolved to one of them."""

# what no login without further rights can make; if it is there, somebody else has been in the database
_FORBIDDEN = """
WITH member AS (SELECT classid, objid FROM pg_depend WHERE deptype = 'e'),
found AS (
  SELECT 'pg_event_trigger'::regclass AS class, oid, 'event trigger ' || evtname AS name FROM pg_event_trigger
  UNION ALL SELECT 'pg_language'::regclass, oid, 'language ' || lanname FROM pg_language WHERE oid >= 16384
  UNION ALL SELECT 'pg_foreign_server'::regclass, oid, 'foreign server ' || srvname FROM pg_foreign_server
  UNION ALL SELECT 'pg_publication'::regclass, oid, 'publication ' || pubname FROM pg_publication
  UNION ALL SELECT 'pg_subscription'::regclass, s.oid, 'subscription ' || subname FROM pg_subscription s
             JOIN pg_database d ON d.oid = s.subdbid WHERE d.datname = current_database())
SELECT name FROM found WHERE NOT EXISTS (SELECT FROM member WHERE classid = class AND objid = found.oid)
UNION ALL SELECT 'prepared transaction ' || gid FROM pg_prepared_xacts WHERE database = current_database()
"""
_LOGINS = """
SELECT pg_get_userbyid(a.grantee)::text AS name FROM pg_database d, aclexplode(d.datacl) a
 WHERE d.datname = $1 AND a.grantee <> 0
"""
_LARGE_OBJECTS = """
SELECT l.oid FROM pg_largeobject_metadata l WHERE pg_get_userbyid(lomowner) = $1 AND l.oid > $2::oid ORDER BY 1 LIMIT $3
"""
_STARTED = "SELECT pg_postmaster_start_time()"
_BATCH = 500


class ContentsPolicy(Protocol):
    """What decides whether contents that somebody else has written may become a tenant's."""

    async def check(self, connection: Connection, *, server: str, login: str, role: str) -> None:
        """Refuse what would raise rights once it is the owner's. Nobody else can change the database now.

        Args:
            connection: An administrative one to the database.
            server: The server's name.
            login: The role that owns everything that was brought in.
            role: The tenant's role.

        Raises:
            OperationError: it would.
        """

    async def give_back(self, connection: Connection, *, role: str) -> None:
        """Make the tenant's role the owner of what is its own, in the transaction that gives the rest to the owner.

        So it is never the owner's, with the owner's rights.
        """

    async def align(self, connection: Connection, *, role: str) -> None:
        """Give everybody the rights on objects that they should have, once the owner owns them."""


class NewDatabase:
    """A database that is being filled. ``login`` may connect until ``hand_over``.

    Attributes:
        server: The server's name.
        name: The database's name.
        login: The login that owns what it brings in.
        handed_over: Whether it is the tenant's.
    """

    def __init__(
        self,
        services: ProvisioningServices,
        server: str,
        name: str,
        login: CopyLogin,
        connection: Connection,
        *,
        like: DatabaseProperties | None = None,
    ) -> None:
        self.server = server
        self.name = name
        self.login = login
        self.handed_over = False
        self._services = services
        self._blockers = services.blockers(services.servers[server])
        self._connection = connection  # an administrative one, which holds the lock of the login
        self._like = like

    @property
    def server_version(self) -> int:
        """The server's major version."""
        return connections.version(self._connection)

    async def connect(self) -> Connection:
        """Open an administrative connection to it, which the caller closes; no name is looked up in its schemas.

        Raises:
            ServerUnavailableError: the server does not answer.
        """
        return await self._blockers.connect(self.name, settings=SAFE_PATH, purpose="tenancy-restore")

    async def seal(self) -> None:
        """End the login and its sessions for good: what was brought in cannot be changed any more.

        Raises:
            TimeoutError: its sessions did not end in time.
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("making a tenant's database")
        await end_login(self._connection, self._blockers, self.login.role)

    async def hand_over(self, tenant: Tenant, role: str, *, policy: ContentsPolicy) -> None:
        """Make what was brought in the tenant's: owners, rights and marker. The role cannot connect yet.

        Args:
            tenant: The tenant.
            role: Its role on this server.
            policy: What decides whether the contents may become the owner's.

        Raises:
            OperationError: they would raise rights, and stay the login's.
            ProvisioningError: the server refused.
        """
        await self.seal()
        owner = self._services.names.owner
        connection = await self.connect()
        try:
            if found := await find_forbidden(connection):
                raise OperationError(
                    f"the contents for tenant {tenant.slug!r} are refused: they have {enumeration(found)}"
                )
            # also to read what the login owns, where the administrator is no superuser
            async with roles.joined(connection, self.login.role, role):
                await policy.check(connection, server=self.server, login=self.login.role, role=role)
                await self._give_large_objects(connection, role)
                quoted = quote_identifier(self.login.role)
                async with connections.transaction(connection):
                    await policy.give_back(connection, role=role)
                    await connection.execute(
                        f"REASSIGN OWNED BY {quoted} TO {quote_identifier(owner)}; DROP OWNED BY {quoted}"
                    )
            await grants.prepare_schema(connection, owner)
            if await advisory_locks.may_restrict(connection):
                await advisory_locks.restrict(connection, owner, server=self.server)
            await event_trigger.install(connection, owner)
            await self._grant(tenant, role)
            await policy.align(connection, role=role)
        finally:
            await run_to_completion(connections.close(connection))
        await self._mend_rights(tenant, role)
        if self._like is not None:
            # last: they hold for the sessions that fill the database as well
            await self._like.apply(self._connection, self.name, server=self.server)
        self.handed_over = True

    async def _mend_rights(self, tenant: Tenant, role: str) -> None:
        """Mend what differs from what a tenant's database is, as reconcile does, and run the grant hook once more."""
        # with the search_path of every session, by which the hook names tables
        connection = await self._blockers.connect(self.name, purpose="tenancy-restore")
        try:
            check = ContentsCheck(
                connection,
                self._blockers,
                names=self._services.names,
                database=self.name,
                role=role,
                rights=TenantRights.of(self._services.config, self._services.names.owner),
            )
            result = await check.settle(mend=True)
            if left := [one.detail for one in result.left if one.dangerous and one.kind != "advisory_locks"]:
                raise OperationError(
                    f"the contents for tenant {tenant.slug!r} are refused: {'; '.join(left)}; a superuser may have "
                    "to mend that"
                )
        finally:
            await run_to_completion(connections.close(connection))

    async def shut_guests_out(self, role: str) -> None:
        """Let nobody but administrators connect, whom the grant hook has let in, until the database is in use.

        Args:
            role: The tenant's role on this server.

        Raises:
            TimeoutError: somebody had connected already, and that session did not end in time.
        """
        names = self._services.names
        connection = await self._blockers.connect(purpose="tenancy-restore")
        try:
            await guests.shut_out(connection, self._blockers, names, database=self.name, role=role)
            await guests.end_sessions(connection, names, self.name)
        finally:
            await run_to_completion(connections.close(connection))

    async def _give_large_objects(self, connection: Connection, role: str) -> None:
        """Give large objects to the tenant's role, which makes its own: some hundreds in a transaction."""
        last, quoted = 0, quote_identifier(role)
        while found := [row[0] for row in await connection.fetch(_LARGE_OBJECTS, self.login.role, last, _BATCH)]:
            await connection.execute("; ".join(f"ALTER LARGE OBJECT {oid} OWNER TO {quoted}" for oid in found))
            last = found[-1]

    async def _grant(self, tenant: Tenant, role: str) -> None:
        owner = self._services.names.owner
        connection = await self._blockers.connect(self.name, role=owner, purpose="tenancy-restore")
        try:
            await grants.grant_and_mark(
                connection,
                self.name,
                role=role,
                rights=TenantRights.of(self._services.config, owner),
                what=await grants.contents(connection, owner),
                marker=marker.marker_text(self._services.installation, tenant.id),
            )
        finally:
            await run_to_completion(connections.close(connection))


class NewDatabases:
    """Makes databases that are filled from elsewhere (``tenancy.internals.provisioner.new_databases``).

    Args:
        services: Of provisioning.
    """

    def __init__(self, services: ProvisioningServices) -> None:
        self._services = services
        self._home = HomeLoop()

    def new_name(self) -> str:
        """Return a name for a database: with a number of its own, as that of a warm one has."""
        return self._services.names.tenant(uuid7())

    @asynccontextmanager
    async def open(
        self,
        tenant: Tenant,
        server: str,
        name: str,
        *,
        extensions_of: Sequence[InstalledExtension] | None = None,
        like: DatabaseProperties | None = None,
        timeout: float,
        valid_for: float,
        lock_held: bool = False,
    ) -> AsyncIterator[NewDatabase]:
        """Make an empty database of a tenant, and a login of its own, for the body to fill and hand over.

        Unless it is handed over, it is dropped at the end, also after a cancellation. If the process dies, whoever
        takes the operation over drops it.

        Args:
            tenant: The tenant. It has a row for the database (``Databases.record_database``), or is being created.
            server: The server's name.
            name: The database's name, of ``new_name``.
            extensions_of: The extensions that it gets, beside the configured ones.
            like: The locale and the settings that it gets, those of a database that it is a copy of; the server's own
                locale and no settings where None.
            timeout: Seconds that making it may take.
            valid_for: Seconds for which the login is valid after that.
            lock_held: Whether the caller holds the tenant's lock on this server.

        Raises:
            OperationStateError: the database has no row any more.
            OperationError: the server does not have the locale, or refuses the settings.
            DatabaseExistsError: there is such a database.
            ProvisioningError: the server refused, or did not finish in time.
            TenantNotFoundError: the tenant has been purged.
            ServerUnavailableError: the server does not answer.
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("making a tenant's database")
        self._home.check()
        services = self._services
        found = services.servers[server]
        blockers = services.blockers(found)
        role = services.names.scratch(secrets.token_hex(8))
        # its lock tells reconcile that the login is in use
        connection = await services.admin_connections.acquire(found, locks.lock_key(role), timeout=timeout)
        new: NewDatabase | None = None
        try:
            try:
                async with asyncio.timeout(timeout):
                    async with self._locked(tenant, server, held=lock_held, timeout=timeout):
                        await self._check_row(tenant, server, name)
                        login = await create_for_login(
                            connection,
                            blockers,
                            found,
                            services.names,
                            database=name,
                            login=role,
                            seconds=timeout + valid_for,
                            extensions=extensions_of or (),
                            wanted=services.config.extensions,
                            locale=None if like is None else like.locale,
                        )
                        if like is not None and like.required:
                            # before it is filled, which may take hours
                            await like.apply(connection, name, server=server, trial=True)
            except TenancyError:
                raise
            except SERVER_FAILURES as exc:
                raise ProvisioningError(
                    f"a database for tenant {tenant.slug!r} could not be made within {timeout:g} s ({describe(exc)})",
                    tenant=tenant.slug,
                    step="database",
                ) from exc
            new = NewDatabase(services, server, name, login, connection, like=like)
            yield new
        finally:
            keep = new is not None and new.handed_over
            await run_to_completion(self._end(found, connection, name, role, keep=keep))

    @asynccontextmanager
    async def _locked(self, tenant: Tenant, server: str, *, held: bool, timeout: float) -> AsyncIterator[None]:
        """Hold the tenant's lock on a server, so that no purge runs beside the body."""
        if held:
            yield
            return
        found, key = self._services.servers[server], tenant_key(tenant.id)
        connection = await self._services.admin_connections.acquire(found, key, timeout=timeout)
        try:
            yield
        finally:
            await run_to_completion(self._services.admin_connections.release(found, connection, key))

    @asynccontextmanager
    async def locked(self, tenant: Tenant) -> AsyncIterator[Tenant]:
        """Hold the lock that a purge, a rotation and ``reconcile`` take, and yield the tenant as it is under it.

        Raises:
            TenantNotFoundError: the tenant has been purged.
            ProvisioningError: the lock was not free within ``provisioning.timeout``.
            ServerUnavailableError: the server does not answer.
        """
        refuse_while_bound("changing a tenant's database")
        self._home.check()
        place = placement_of(tenant)
        timeout = self._services.config.provisioning.timeout
        try:
            async with self._locked(tenant, place.server, held=False, timeout=timeout):
                yield await self._services.registry.get(tenant.id)
        except TimeoutError as exc:
            raise ProvisioningError(
                f"another process changes tenant {tenant.slug!r}, and did not end within {timeout:g} s; try again",
                tenant=tenant.slug,
                step="locked",
            ) from exc

    async def _check_row(self, tenant: Tenant, server: str, name: str) -> None:
        """Refuse to make a database that nobody would know of."""
        current = await self._services.registry.get(tenant.id)
        place = current.placement
        if place is None:
            raise TenantNotFoundError(tenant.slug)
        if current.status is Status.PROVISIONING and (place.server, place.database) == (server, name):
            return
        beside = await self._services.registry.databases_of(tenant.id)
        if not any((one.server, one.name, one.state) == (server, name, "making") for one in beside):
            raise OperationStateError(f"database {name!r} of tenant {current.slug!r} is not to be made any more")

    async def _end(self, server: Server, connection: Connection, name: str, role: str, *, keep: bool) -> None:
        """Drop the login, and the database unless it is kept; what fails is left to ``reconcile``."""
        blockers = self._services.blockers(server)
        try:
            async with asyncio.timeout(self._services.config.provisioning.timeout):
                if not await connections.is_alive(connection):
                    connection.terminate()
                    connection = await blockers.connect(purpose="tenancy-restore")
                await end_login(connection, blockers, role)
                if not keep:
                    await removal.drop_database(connection, blockers, name)
                await removal.drop_retired(connection, blockers, self._services.names, role)
        except (TenancyError, *SERVER_FAILURES) as exc:
            logger.warning("login %s, or database %s, was not dropped: %s", role, name, describe(exc))
        finally:
            await self._services.admin_connections.release(server, connection, locks.lock_key(role))

    # --- using ------------------------------------------------------------------------------------------------------

    async def prove(self, tenant: Tenant, placement: Placement) -> None:
        """Log in to a database as the tenant's role, which can connect to it, and verify its marker.

        Raises:
            MarkerMismatchError: the database is another tenant's.
            LoginRefusedError: PostgreSQL refuses the role.
            ServerUnavailableError: the server does not answer.
        """
        refuse_while_bound("proving a tenant's database")
        self._home.check()
        await connections.close(await prove(self._services, tenant.id, tenant.slug, placement))

    async def set_connect(self, placement: Placement, allowed: bool, *, mark: str | None = None) -> None:
        """Let the tenant's role connect to a database; or let nobody connect, and end the sessions that are there.

        A database that nobody can connect to can be dropped, or be opened again. To close one that does not exist does
        nothing.

        Args:
            placement: The database and the role.
            allowed: Whether the role may connect.
            mark: The marker that the database gets with this; it keeps the one that it has where None.

        Raises:
            ProvisioningError: the server refused; another database has replaced this one; or, at the step "sessions",
                sessions did not end in time, and nobody can connect all the same.
            ServerUnavailableError: the server does not answer.
        """
        refuse_while_bound("opening and closing tenants' databases")
        self._home.check()
        server = self._services.servers[placement.server]
        name, role = quote_identifier(placement.database), quote_identifier(placement.role)
        if allowed:
            statement = f"GRANT CONNECT ON DATABASE {name} TO {role}; ALTER DATABASE {name} WITH ALLOW_CONNECTIONS true"
        else:
            statement = (
                f"ALTER DATABASE {name} WITH ALLOW_CONNECTIONS false; REVOKE CONNECT ON DATABASE {name} FROM {role}"
            )
        if mark is not None:
            # together they are one transaction
            statement = f"COMMENT ON DATABASE {name} IS {quote_literal(mark)}; {statement}"
        step = "connect"
        async with self._services.admin_connections.use(server) as connection:
            try:
                async with asyncio.timeout(self._services.config.provisioning.timeout):
                    if allowed:
                        await refuse_replaced(connection, placement.database)
                    elif await databases.state(connection, placement.database) is None:
                        return
                    work = partial(connection.execute, statement)
                    await self._services.blockers(server).run(connection, work, role=placement.role)
                    if not allowed:
                        step = "sessions"
                        await self._end_sessions(connection, placement)
            except SERVER_FAILURES as exc:
                what = "opened" if allowed else "closed"
                raise ProvisioningError(
                    f"database {placement.database!r} was not {what} ({describe(exc)})", step=step
                ) from exc

    async def open_to_administrators(self, beside: TenantDatabase) -> None:
        """Let the owner and administrators, and nobody else, connect to a database that was closed."""
        refuse_while_bound("opening and closing tenants' databases")
        self._home.check()
        blockers = self._services.blockers(self._services.servers[beside.server])
        connection = await blockers.connect()
        try:
            await guests.shut_out(connection, blockers, self._services.names, database=beside.name, role=beside.role)
            await databases.open_to_owner(connection, beside.name)
        finally:
            await run_to_completion(connections.close(connection))

    async def _end_sessions(self, connection: Connection, placement: Placement) -> None:
        """End every session in a database that lets nobody in any more, and wait until none is left."""
        query = "SELECT DISTINCT usename::text FROM pg_stat_activity WHERE datname = $1 AND usename IS NOT NULL"
        count = "SELECT pid FROM pg_stat_activity WHERE datname = $1 AND usename = $2"
        deadline = time.monotonic() + connections.CLOSE_SECONDS
        while present := [row[0] for row in await connection.fetch(query, placement.database)]:
            for role in present:
                pids = [row[0] for row in await connection.fetch(count, placement.database, role)]
                await roles.end_connections(connection, role, pids)
            if time.monotonic() > deadline:
                raise TimeoutError(f"sessions of {', '.join(present)} did not end")
            await asyncio.sleep(connections.POLL_SECONDS)

    async def drop(self, beside: TenantDatabase) -> None:
        """Drop a database beside the one in use, and delete its row. To finish an interrupted drop, repeat it.

        Raises:
            ProvisioningError: it cannot be dropped, see ``removal.drop_database``; the server was too slow; or it may
                be the one in use, see ``drop_beside``.
            ServerUnavailableError: the server does not answer.
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("dropping a tenant's database")
        self._home.check()
        server, key = self._services.servers[beside.server], tenant_key(beside.tenant_id)
        timeout = self._services.config.provisioning.timeout
        try:
            async with asyncio.timeout(timeout):
                connection = await self._services.admin_connections.acquire(server, key, timeout=timeout)
                try:
                    await drop_beside(self._services, connection, beside)
                finally:
                    await run_to_completion(self._services.admin_connections.release(server, connection, key))
        except SERVER_FAILURES as exc:
            raise ProvisioningError(
                f"database {beside.name!r} could not be dropped ({describe(exc)}); try again, or run: tenancy "
                "housekeeping",
                step="drop",
            ) from exc


async def find_forbidden(connection: Connection) -> list[str]:
    """Return what is in a database that runs or sends by itself, and that no login without further rights makes."""
    return [row[0] for row in await connection.fetch(_FORBIDDEN)]


async def drop_beside(services: ProvisioningServices, connection: Connection, beside: TenantDatabase) -> None:
    """Drop a database beside the one in use, its login, and its role if the tenant does not need that here any more.

    Args:
        services: Of provisioning.
        connection: An administrative one, which holds the tenant's lock on that server.
        beside: The database.

    Raises:
        ProvisioningError: see ``removal.drop_database``; or it may be the one in use: no other one has replaced it, and
            the one that the tenant's row names has been replaced, or does not exist and this one is open.
    """
    registry, names = services.registry, services.names
    own = marker.marker_text(services.installation, beside.tenant_id)
    state = await databases.state(connection, beside.name)
    is_replaced = state is not None and (state.comment or "").startswith(f"{own}:")
    if state is not None and state.comment == own:
        await _refuse_in_use(services, connection, beside)
    if not await registry.begin_dropping_database(beside):
        return  # it is in use, or gone
    blockers = services.blockers(services.servers[beside.server])
    if is_replaced or not await removal.is_foreign(connection, beside.name, own):
        granted = [row["name"] for row in await connection.fetch(_LOGINS, beside.name)]
        logins = [name for name in granted if is_scratch(name) and name.startswith(names.stem)]
        for login in logins:
            await end_login(connection, blockers, login)
        await removal.drop_database(connection, blockers, beside.name)
        for login in logins:
            await removal.drop_retired(connection, blockers, names, login)
        if not await _uses_role(services, beside):
            await removal.remove_role(connection, blockers, names, beside.role)
    await registry.forget_database(beside)


async def _refuse_in_use(services: ProvisioningServices, connection: Connection, beside: TenantDatabase) -> None:
    """Refuse to drop a database that may be the one in use, since the tenant's row is older than its last switch."""
    place = (await services.registry.get(beside.tenant_id)).placement
    unfinished = await services.registry.find_unfinished(beside.tenant_id)
    if place is None or (unfinished is not None and unfinished.kind == "purging"):
        return
    server = services.servers[place.server]
    logins = [row["name"] for row in await connection.fetch(_LOGINS, beside.name)]
    is_open = any(services.names.parse(name) is not None for name in logins)
    # one that no tenant has used is a restore's, perhaps in the place of one that is missing
    missing = is_open or beside.state == "kept"
    await refuse_stale(services.admin_connections, server, place.database, missing=missing)


async def drop_all_beside(
    services: ProvisioningServices, connection: Connection, server: str, tenant_id: UUID, *, timeout: float
) -> None:
    """Drop every database of a tenant beside the one in use, on whichever server: a part of its purge.

    Args:
        services: Of provisioning.
        connection: An administrative one, which holds the tenant's lock on ``server``.
        server: The server's name.
        tenant_id: The tenant, for which a purge has begun.
        timeout: Seconds for which a lock on another server is waited for.

    Raises:
        ProvisioningError: one cannot be dropped, see ``removal.drop_database``.
        ServerUnavailableError: a server does not answer.
        UnknownServerError: a server is not configured any more.
    """
    key = tenant_key(tenant_id)
    for beside in await services.registry.databases_of(tenant_id):
        if beside.server == server:
            await drop_beside(services, connection, beside)
            continue
        other = services.servers[beside.server]
        held = await services.admin_connections.connect(other)
        try:
            # one that is configured under two names has one lock, and ``connection`` holds it
            if await connection.fetchval(_STARTED) != await held.fetchval(_STARTED):
                await locks.lock(held, key, timeout=timeout)
            await drop_beside(services, held, beside)
        finally:
            await run_to_completion(services.admin_connections.release(other, held, key))


async def _uses_role(services: ProvisioningServices, beside: TenantDatabase) -> bool:
    """Whether the tenant needs the role of a database that is dropped, for another one on the same server."""
    place = (await services.registry.get(beside.tenant_id)).placement
    if place is not None and (place.server, place.role) == (beside.server, beside.role):
        return True
    others = await services.registry.databases_of(beside.tenant_id)
    return any(one.name != beside.name and (one.server, one.role) == (beside.server, beside.role) for one in others)


__all__ = ["ContentsPolicy", "NewDatabase", "NewDatabases", "drop_all_beside", "drop_beside", "find_forbidden"]
