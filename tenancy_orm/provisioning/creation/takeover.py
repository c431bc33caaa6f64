"""``DatabaseTakeover``: an existing database on one of the servers becomes a tenant's, in place; and back.

Before anything is changed, the statements that bring back owners and rights are recorded. Then the owner of tenants'
databases becomes the database's owner, nobody else may connect, and sessions end. What is inside is judged once nobody
can change it any more. Owners and rights inside change in one transaction, then the marker is set, and last the
database gets a name of this installation. Until then ``reconcile`` does not touch it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import asyncpg

from ...audit.actor import Actor
from ...cancellation import run_to_completion
from ...errors import OperationError, OperationStateError, ProvisioningError
from ...postgres import connections, locks
from ...postgres.connections import Connection
from ...postgres.errors import describe
from ...postgres.failures import SERVER_FAILURES
from ...postgres.login import reason_of
from ...postgres.quoting import quote_identifier, quote_literal
from ...routing import marker
from ...tenant import Placement, Tenant
from ..checks.contents_check import ContentsCheck
from ..checks.differences import enumeration
from ..rights import event_trigger, grants
from ..rights.tenant_rights import TenantRights
from ..server_objects import advisory_locks, databases, removal, roles
from ..server_objects.blockers import Blockers
from .new_databases import SAFE_PATH, ContentsPolicy, find_forbidden
from .older_rows import find_another, is_whole
from .pipeline import ProvisioningServices, tenant_key

_DATABASE = """
SELECT pg_get_userbyid(datdba)::text AS owner, datconnlimit AS connection_limit, datistemplate AS is_template,
       datallowconn AS is_open, shobj_description(d.oid, 'pg_database') AS comment,
       ARRAY(SELECT unnest(setconfig) FROM pg_db_role_setting WHERE setdatabase = d.oid) AS settings,
       ARRAY(SELECT gid::text FROM pg_prepared_xacts WHERE database = datname) AS prepared,
       ARRAY(SELECT slot_name::text FROM pg_replication_slots s WHERE s.database = datname) AS slots,
       ARRAY(SELECT subname::text FROM pg_subscription WHERE subdbid = d.oid) AS subscriptions
  FROM pg_database d WHERE datname = $1
"""
_GRANTEES = """
SELECT DISTINCT a.grantee::regrole::text AS name FROM pg_database d, aclexplode(d.datacl) a
 WHERE datname = $1 AND a.grantee NOT IN (0, d.datdba)
"""
_SESSIONS = (
    "SELECT DISTINCT usename::text FROM pg_stat_activity "
    "WHERE datname = $1 AND pid <> pg_backend_pid() AND usename IS NOT NULL AND pid <> ALL($2::int[])"
)
_MAY_JOIN = "SELECT pg_has_role(current_user, $1::name, 'MEMBER WITH ADMIN OPTION')"
_PIDS = (
    "SELECT pid FROM pg_stat_activity WHERE datname = $1 AND usename = $2 AND pid <> pg_backend_pid() "
    "AND backend_type = 'client backend'"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Takeover:
    """What becomes a tenant's database in place.

    Attributes:
        database: The database, by its present name.
        policy: Decides whether its contents may become the tenant's.
        begin: Awaited with the tenant, before anything else: records that the database is taken over.
        record: Awaited with the statements that undo everything, before anything is changed.
        prepare: Awaited once nobody else can connect, with the name of the database: writes its revision, for example.
        timeout: Seconds that all of it may take, beside ``provisioning.timeout``.
        undo: Further statements that undo what ``prepare`` does.
    """

    database: str
    policy: ContentsPolicy
    begin: Callable[[Tenant], Awaitable[None]]
    record: Callable[[Mapping[str, Any]], Awaitable[None]]
    prepare: Callable[[str], Awaitable[None]] | None = None
    timeout: float
    undo: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TakeoverFacts:
    """What was found of a database that is to be taken over.

    Attributes:
        owner: Who owns it.
        foreign_rights: What PUBLIC and roles other than the owner may do in it, in words.
        obstacles: Why it cannot be taken over as it is.
    """

    owner: str
    foreign_rights: tuple[str, ...]
    obstacles: tuple[str, ...]


class DatabaseTakeover:
    """The takeover of one database.

    Args:
        services: Of provisioning.
        server: The server's name.
        database: The database, by its present name.
        role: The role of the tenant that it becomes.
    """

    def __init__(self, services: ProvisioningServices, server: str, database: str, role: str) -> None:
        self._services = services
        self._server = server
        self._blockers: Blockers = services.blockers(services.servers[server])
        self._former = database
        self._role = role
        self._owner = services.names.owner

    # --- looking ----------------------------------------------------------------------------------------------------

    async def look(self, *, but: Iterable[int] = ()) -> TakeoverFacts:
        """Look at the database. Nothing is changed.

        Args:
            but: Sessions that are the caller's own.

        Raises:
            OperationError: there is no such database, or the administrator may not look at it.
            ServerUnavailableError: the server does not answer.
        """
        try:
            return await self._look(tuple(but))
        except SERVER_FAILURES as exc:
            raise OperationError(f"database {self._former!r} cannot be looked at: {reason_of(exc)}") from exc

    async def _look(self, but: tuple[int, ...]) -> TakeoverFacts:
        connection = await self._connect()
        try:
            row = await connection.fetchrow(_DATABASE, self._former)
            assert row is not None  # noqa: S101 - we are connected to it
            found = await self._check(connection).look()
            sessions = [one[0] for one in await connection.fetch(_SESSIONS, self._former, list(but))]
            administrator = await connection.fetchval("SELECT current_user::text")
            obstacles = [
                *(["it is a template"] if row["is_template"] else []),
                *([f"it has settings of its own ({', '.join(row['settings'])})"] if row["settings"] else []),
                *(f"it has the prepared transaction {name}" for name in row["prepared"]),
                *(f"it has the replication slot {name}" for name in row["slots"]),
                *(f"it has the subscription {name}" for name in row["subscriptions"]),
                *(f"it has {name}" for name in await find_forbidden(connection)),
                *(
                    f"the administrator may not act for role {name}, which owns something in it; run as a superuser: "
                    f"GRANT {quote_identifier(name)} TO {quote_identifier(administrator)} WITH ADMIN "
                    "OPTION"
                    for name in await self._strange(connection, row["owner"])
                ),
                *([f"sessions of {enumeration(sessions)} are open in it"] if sessions else []),
            ]
            return TakeoverFacts(
                owner=row["owner"],
                foreign_rights=tuple(one.detail for one in found if one.kind in ("right.other", "right.public")),
                obstacles=tuple(dict.fromkeys(obstacles)),
            )
        finally:
            await run_to_completion(connections.close(connection))

    async def _connect(self, database: str | None = None) -> Connection:
        try:
            return await self._blockers.connect(
                database or self._former, settings=SAFE_PATH, purpose="tenancy-adopt", role=None
            )
        except asyncpg.InvalidCatalogNameError as exc:
            raise OperationError(f"server {self._server!r} has no database {self._former!r}") from exc

    def _check(self, connection: Connection) -> ContentsCheck:
        return ContentsCheck(
            connection,
            self._blockers,
            names=self._services.names,
            database=self._former,
            role=self._role,
            rights=TenantRights.of(self._services.config, self._owner),
        )

    # --- there ------------------------------------------------------------------------------------------------------

    async def undo_statements(self) -> dict[str, Any]:
        """Return what brings the database back to how it is now."""
        connection = await self._connect()
        try:
            row = await connection.fetchrow(_DATABASE, self._former)
            assert row is not None  # noqa: S101 - as above
            name = quote_identifier(self._former)
            comment = "NULL" if row["comment"] is None else quote_literal(row["comment"])
            check = self._check(connection)
            statements = [
                f"ALTER DATABASE {name} OWNER TO {quote_identifier(row['owner'])}",
                f"ALTER DATABASE {name} CONNECTION LIMIT {row['connection_limit']}",
                f"COMMENT ON DATABASE {name} IS {comment}",
                *await check.restoring_statements(),
            ]
            if not await event_trigger.is_installed(connection, self._owner):
                guard = quote_identifier(event_trigger.NAME)
                statements.append(f"DROP EVENT TRIGGER IF EXISTS {guard}")
                statements.append(f"DROP SCHEMA IF EXISTS {guard} CASCADE")
            if await advisory_locks.may_restrict(connection) and not await advisory_locks.is_restricted(
                connection, self._owner
            ):
                statements += advisory_locks.releases(self._owner)
            owners = sorted({one.owner for one in await check.owners()})
            return {"database": self._former, "owner": row["owner"], "owners": owners, "statements": statements}
        finally:
            await run_to_completion(connections.close(connection))

    async def take(self, tenant: Tenant, takeover: Takeover, admin: Connection, *, name: str) -> None:
        """Take the database over.

        Args:
            tenant: The tenant.
            takeover: What decides about it.
            admin: An administrative connection, to another database.
            name: The name that it gets.

        Raises:
            OperationError: its contents are refused.
            ProvisioningError: the server refused.
        """
        connection = await self._connect()
        try:
            former = [one.owner for one in await self._check(connection).owners()]
            async with self._joined(connection, [*former, await self._owner_of(connection), self._role]):
                await self._close(connection)
                if found := await find_forbidden(connection):
                    raise OperationError(f"database {self._former!r} is refused: it has {enumeration(found)}")
                await takeover.policy.check(connection, server=self._server, login=self._owner, role=self._role)
                if takeover.prepare is not None:
                    await takeover.prepare(self._former)
                await grants.prepare_schema(connection, self._owner)
                if await advisory_locks.may_restrict(connection):
                    await advisory_locks.restrict(connection, self._owner, server=self._server)
                await event_trigger.install(connection, self._owner)
                await self._settle(connection)
                await takeover.policy.align(connection, role=self._role)
        finally:
            await run_to_completion(connections.close(connection))
        await self._mark(tenant)
        await self._rename(admin, self._former, name)
        await databases.open_to_role(admin, name, role=self._role)

    @asynccontextmanager
    async def _joined(self, connection: Connection, names: Iterable[str]) -> AsyncIterator[None]:
        """Run the body with the rights of these roles; a membership that exists already stays."""
        wanted = [name for name in dict.fromkeys(names) if not await roles.is_member(connection, name)]
        async with roles.joined(connection, *wanted):
            yield

    async def _strange(self, connection: Connection, owner: str) -> list[str]:
        """Return the owners that this administrator can neither act as, nor make itself a member of."""
        if await roles.is_superuser(connection):
            return []
        owners = dict.fromkeys([owner, *(one.owner for one in await self._check(connection).owners())])
        return [
            name
            for name in owners
            if not await roles.is_member(connection, name) and not await connection.fetchval(_MAY_JOIN, name)
        ]

    async def _owner_of(self, connection: Connection) -> str:
        row = await connection.fetchrow(_DATABASE, self._former)
        return str(row["owner"]) if row is not None else self._owner

    async def _close(self, connection: Connection) -> None:
        """Let nobody in but administrators, and end every session."""
        name = quote_identifier(self._former)
        grantees = [row["name"] for row in await connection.fetch(_GRANTEES, self._former)]
        await connection.execute(
            "; ".join(
                [
                    f"REVOKE ALL ON DATABASE {name} FROM PUBLIC",
                    # regrole has quoted them
                    *(f"REVOKE ALL ON DATABASE {name} FROM {grantee} CASCADE" for grantee in grantees),
                    f"ALTER DATABASE {name} OWNER TO {quote_identifier(self._owner)}",
                    f"ALTER DATABASE {name} CONNECTION LIMIT -1",
                ]
            )
        )
        deadline = time.monotonic() + connections.CLOSE_SECONDS
        while present := [row[0] for row in await connection.fetch(_SESSIONS, self._former, [])]:
            for role in present:
                pids = [row[0] for row in await connection.fetch(_PIDS, self._former, role)]
                if pids:
                    await roles.end_connections(connection, role, pids)
            if time.monotonic() > deadline:
                raise ProvisioningError(f"sessions of {enumeration(present)} in {self._former!r} do not end")
            await asyncio.sleep(connections.POLL_SECONDS)

    async def _settle(self, connection: Connection) -> None:
        """Give everything to the owner, and the rights to those who have them in tenants' databases."""
        check = self._check(connection)
        while (result := await check.settle(mend=True)).more:
            pass
        if left := [one.detail for one in result.left if one.dangerous and one.kind != "advisory_locks"]:
            raise OperationError(f"database {self._former!r} is refused: {'; '.join(left)}")

    async def _mark(self, tenant: Tenant) -> None:
        connection = await self._blockers.connect(self._former, role=self._owner, purpose="tenancy-adopt")
        try:
            await grants.grant_and_mark(
                connection,
                self._former,
                role=self._role,
                rights=TenantRights.of(self._services.config, self._owner),
                what=await grants.contents(connection, self._owner),
                marker=marker.marker_text(self._services.installation, tenant.id),
            )
        finally:
            await run_to_completion(connections.close(connection))

    async def _rename(self, admin: Connection, former: str, name: str) -> None:
        rename = f"ALTER DATABASE {quote_identifier(former)} RENAME TO {quote_identifier(name)}"
        await self._blockers.run(admin, partial(admin.execute, rename))

    # --- and back ---------------------------------------------------------------------------------------------------

    async def undo(self, state: Mapping[str, Any], admin: Connection, *, name: str) -> None:
        """Bring the database back to how it was. It may be repeated, and begins wherever a takeover has stopped.

        Args:
            state: What ``undo_statements`` has returned.
            admin: An administrative connection, to another database.
            name: The name that it got, or would have got.

        Raises:
            OperationError: the database is gone.
            asyncpg.PostgresError: the server refuses; nothing inside has changed.
        """
        if await databases.state(admin, name) is not None:
            await roles.end_connections(admin, self._role)
            await self._rename(admin, name, self._former)
        connection = await self._connect()
        try:
            # what changes first is its owner, unless tenants' owner owned it before: then all is done again
            if state["owner"] != self._owner and await self._owner_of(connection) == state["owner"]:
                return
            exists = await roles.exists(connection, self._role)
            wanted = [state["owner"], *state["owners"], *([self._role] if exists else [])]
            async with self._joined(connection, wanted):
                own, owner = quote_identifier(self._role), quote_identifier(state["owner"])
                async with connections.transaction(connection):
                    for statement in state["statements"]:
                        await connection.execute(statement)
                    if exists:
                        await connection.execute(f"REASSIGN OWNED BY {own} TO {owner}; DROP OWNED BY {own}")
        finally:
            await run_to_completion(connections.close(connection))


async def undo_takeover(
    services: ProvisioningServices, tenant: Tenant, place: Placement, state: Mapping[str, Any], *, actor: Actor
) -> bool:
    """Undo an interrupted takeover, and remove the tenant that it was for; see ``Provisioner.undo_takeover``.

    Args:
        services: Of provisioning.
        tenant: The tenant.
        place: As its row has it.
        state: What ``undo_statements`` has returned; empty where the takeover had not begun.
        actor: Who does this, for the audit log.

    Returns:
        False if another process does it, or the takeover is under way.
    """
    server, key = services.servers[place.server], tenant_key(tenant.id)
    try:
        connection = await services.admin_connections.connect(server)
        try:
            if not await locks.try_lock(connection, key):
                return False
            if not await services.registry.is_taken_over(tenant.id):
                raise OperationStateError(f"no database is being taken over for tenant {tenant.slug!r}")
            async with asyncio.timeout(services.config.provisioning.timeout * 10):
                await _refuse_older(services, connection, tenant, place, but=state.get("database"))
                if state:
                    taken = DatabaseTakeover(services, place.server, state["database"], place.role)
                    await taken.undo(state, connection, name=place.database)
                await removal.remove_role(connection, services.blockers(server), services.names, place.role)
                await services.registry.discard(tenant.id, step="takeover", error="interrupted; undone", actor=actor)
        finally:
            await run_to_completion(services.admin_connections.release(server, connection, key))
    except SERVER_FAILURES as exc:
        raise ProvisioningError(
            f"the takeover for tenant {tenant.slug!r} could not be undone ({describe(exc)}); try again",
            tenant=tenant.slug,
            step="takeover",
        ) from exc
    return True


async def _refuse_older(
    services: ProvisioningServices, connection: Connection, tenant: Tenant, place: Placement, *, but: str | None
) -> None:
    """Refuse to undo a takeover that was done before the control database was restored from a backup.

    Raises:
        OperationStateError: it was.
    """
    if await is_whole(services, connection, tenant.id, place):
        raise OperationStateError(
            f"database {place.database!r} has become tenant {tenant.slug!r} since the backup of the control "
            "database that its row is of; run: tenancy reconcile"
        )
    if (why := await find_another(services, connection, tenant.id, place, but=but)) is not None:
        raise OperationStateError(
            f"the row of tenant {tenant.slug!r} is of an older backup of the control database: {why}; run: "
            "tenancy rebuild --dry-run"
        )


__all__ = ["DatabaseTakeover", "Takeover", "TakeoverFacts", "undo_takeover"]
