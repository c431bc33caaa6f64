"""``Switch``: exchanges a tenant's database for another one, while its sessions wait.

PostgreSQL holds the barrier, not the processes: all roles but administrators lose CONNECT on the old database and their
sessions there end, before the last row is copied. A process that has received no notification is refused, looks the
tenant up, and waits like the others.

The row of the tenant is the truth. Where the process dies, ``align`` lets the role connect to the database that the row
names; whoever resumes the operation closes the other one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import datetime
from functools import partial
from typing import Any
from uuid import UUID

from ..audit.actor import SYSTEM, Actor
from ..cancellation import run_to_completion
from ..context import refuse_other_tenant
from ..errors import OperationError, TenancyError, TenantNotFoundError
from ..postgres import connections
from ..postgres.connections import Connection
from ..postgres.errors import describe
from ..postgres.failures import SERVER_FAILURES
from ..provisioning.checks.differences import enumeration
from ..provisioning.creation.pipeline import ProvisioningServices, tenant_key
from ..provisioning.logins import guests
from ..provisioning.logins.standbys import end_in_database_on_replicas
from ..provisioning.server_objects import access, databases, roles
from ..provisioning.server_objects.blockers import Blockers
from ..provisioning.server_objects.replaced_databases import refuse_replaced
from ..registry.lifecycle import LOGIN_BLOCKED
from ..tenant import Placement, Status, Tenant

logger = logging.getLogger("tenancy_orm.operations")

PAUSE_SECONDS = 30.0
"""How long a pause may last, by default: after that it is given up."""
DRAIN_SECONDS = 1.0
"""For how long transactions that are open go on, by default, before their sessions are ended."""

_IDLE_SECONDS = 0.25  # how long sessions without a transaction are left to the processes that have them
_POLL_SECONDS = 0.01

# A session that logs in holds this lock from before PostgreSQL looks whether it may connect until it is listed as one.
_LOGGING_IN = """
SELECT EXISTS (SELECT FROM pg_locks l JOIN pg_database d ON d.oid = l.objid
                WHERE l.locktype = 'object' AND l.classid = 'pg_catalog.pg_database'::regclass AND d.datname = $1
                  AND l.mode = 'RowExclusiveLock' AND l.pid <> pg_backend_pid())
"""
_MAY_CONNECT = """
SELECT has_database_privilege(r.oid, d.oid, 'CONNECT') FROM pg_database d, pg_roles r
 WHERE d.datname = $1 AND r.rolname = $2
"""


class Paused:
    """A tenant in a pause: nobody but administrators can connect to its database.

    Attributes:
        tenant: The tenant, with the placement that it had.
        connection: An administrative one to its server; it has the tenant's lock.
        began: When the pause began, by ``time.monotonic``.
        ended_sessions: How many sessions were ended in the middle of something.
        switched: The tenant as it is after ``to``.
    """

    def __init__(self, services: ProvisioningServices, tenant: Tenant, connection: Connection) -> None:
        self._services = services
        self.tenant = tenant
        self.connection = connection
        self.began = time.monotonic()
        self.ended_sessions = 0
        self.switched: Tenant | None = None

    async def to(
        self,
        placement: Placement,
        *,
        action: str,
        revision: str | None,
        kept_until: datetime | None,
        operation: int | None = None,
        claim: UUID | None = None,
        detail: Mapping[str, Any] | None = None,
        actor: Actor = SYSTEM,
    ) -> Tenant:
        """Make another database the one in use. Its role may connect to it from then on, and nobody to the former one.

        Args:
            placement: The new placement. Its database has a row, is the tenant's by its marker, and is closed.
            action: The action, for the audit log.
            revision: The revision of the new database's schema.
            kept_until: When the former database is dropped; None: when somebody decides so.
            operation: The operation's number.
            claim: Who must have claimed it.
            detail: Further facts for the audit log.
            actor: Who does this.

        Raises:
            OperationError: the former database is not closed any more, or the lock on it is lost.
            TenancyError: as ``Registry.switch_database``; then nothing has changed.
        """
        await self._check_closed()
        self.switched = await run_to_completion(
            self._services.registry.switch_database(
                self.tenant,
                placement,
                action=action,
                revision=revision,
                kept_until=kept_until,
                operation=operation,
                claim=claim,
                detail=detail,
                actor=actor,
            )
        )
        return self.switched

    async def _check_closed(self) -> None:
        """Refuse to leave a database that somebody can write to: what is written there now would be lost.

        Whoever holds the tenant's lock may open it, as ``reconcile`` does; so the connection that has it is asked.
        """
        place = self.tenant.placement
        assert place is not None  # noqa: S101 - for the type checker: it is paused in it
        try:
            may = await guests.who_may_connect(self.connection, self._services.names, place.database)
            # also where it is a member of one that is no guest
            if await self.connection.fetchval(_MAY_CONNECT, place.database, place.role):
                may.append(place.role)
        except SERVER_FAILURES as exc:
            raise OperationError(
                f"server {place.server!r} has ended the session that kept tenant {self.tenant.slug!r} closed "
                f"({describe(exc)}); try again"
            ) from exc
        if may:
            raise OperationError(
                f"tenant {self.tenant.slug!r} cannot be switched: {enumeration(name or 'PUBLIC' for name in may)} can "
                f"connect to its database {place.database!r} in the pause; run: tenancy reconcile, and try again"
            )


class Switch:
    """Pauses tenants and exchanges their databases.

    Args:
        services: The objects of provisioning.
    """

    def __init__(self, services: ProvisioningServices) -> None:
        self._services = services

    @asynccontextmanager
    async def pause(
        self, tenant: Tenant, *, seconds: float = PAUSE_SECONDS, drain: float = DRAIN_SECONDS
    ) -> AsyncIterator[Paused]:
        """Have all sessions of a tenant wait for the body, in every process; its database is closed in it.

        At the end the tenant's role can connect to the database that its row names then: to the new one after
        ``Paused.to``, else to the old one. A tenant with a role that may not log in, as while it is suspended, keeps
        that.

        Args:
            tenant: The tenant, with its present placement.
            seconds: How long all of it may take. Then the body is cancelled, and the old database stays in use.
            drain: For how long open transactions go on before their sessions are ended.

        Raises:
            OperationError: it took longer, or the tenant has another database by now.
            ProvisioningError: another database has replaced the one that its row names.
            TenantNotFoundError: the tenant has been purged.
            ServerUnavailableError, ControlUnavailableError: a server does not answer.
            CrossTenantError: another tenant is bound.
        """
        refuse_other_tenant(tenant)
        services, place = self._services, tenant.placement
        if place is None:
            raise TenantNotFoundError(tenant.slug)
        server, key = services.servers[place.server], tenant_key(tenant.id)
        timeout = services.config.provisioning.timeout
        try:
            connection = await services.admin_connections.acquire(server, key, timeout=timeout)
        except TimeoutError as exc:
            raise OperationError(
                f"tenant {tenant.slug!r} is being changed by another process, which did not end within {timeout:g} s"
            ) from exc
        try:
            current = await services.registry.get(tenant.id)
            if current.placement is None or current.status is Status.PROVISIONING:
                raise OperationError(
                    f"tenant {tenant.slug!r} is {current.status.value}, and has no database to exchange"
                )
            if (current.placement.server, current.placement.database) != (place.server, place.database):
                raise OperationError(f"tenant {tenant.slug!r} was moved or restored in the meantime; look it up again")
            await refuse_replaced(connection, place.database)
            paused = Paused(services, current, connection)
            try:
                try:
                    async with asyncio.timeout(seconds):
                        await services.registry.pause(tenant.id, seconds=seconds)
                        await self._close(paused, current.placement, drain)
                        yield paused
                except TimeoutError as exc:
                    raise OperationError(
                        f"the pause of tenant {tenant.slug!r} did not end within {seconds:g} s, and was given up"
                    ) from exc
            finally:
                await run_to_completion(self._resume(paused, current))
        finally:
            await run_to_completion(services.admin_connections.release(server, connection, key))

    async def close_kept(self, placement: Placement, *, mark: str | None = None) -> None:
        """Let nobody but administrators connect to a database that is not in use, and end its sessions.

        Those on replicas of its server as well: who was not told of the switch would read there what does not change.

        Args:
            placement: The database and its role.
            mark: The marker that it gets, if it exists; it keeps the one that it has where None.
        """
        server, names = self._services.servers[placement.server], self._services.names
        blockers = self._services.blockers(server)
        connection = await blockers.connect(purpose="tenancy-switch")
        try:
            if mark is not None and await databases.state(connection, placement.database) is not None:
                work = partial(databases.set_marker, connection, placement.database, mark)
                await blockers.run(connection, work, role=placement.role)
            await guests.shut_out(connection, blockers, names, database=placement.database, role=placement.role)
            if await roles.exists(connection, placement.role):
                await access.close_database(connection, blockers, database=placement.database, role=placement.role)
            await guests.end_sessions(connection, names, placement.database)
        finally:
            await run_to_completion(connections.close(connection))
        await end_in_database_on_replicas(server, names, placement.role, placement.database)

    async def let_guests_in(self, placement: Placement) -> None:
        """Let those in again whom a pause has shut out of the database in use, where its process did not do so."""
        blockers = self._services.blockers(self._services.servers[placement.server])
        connection = await blockers.connect(purpose="tenancy-switch")
        try:
            await guests.let_in(connection, blockers, database=placement.database, role=placement.role)
        finally:
            await run_to_completion(connections.close(connection))

    async def _close(self, paused: Paused, place: Placement, drain: float) -> None:
        """Close the old database to all but administrators, and wait until their sessions have ended."""
        connection, names = paused.connection, self._services.names
        blockers = self._services.blockers(self._services.servers[place.server])
        await guests.shut_out(connection, blockers, names, database=place.database, role=place.role)
        await access.close_database(connection, blockers, database=place.database, role=place.role)
        began = time.monotonic()
        while True:
            # first: who has logged in by then is among the sessions, and who begins later is refused
            logging_in = await connection.fetchval(_LOGGING_IN, place.database)
            found = await guests.sessions(connection, names, place.database)
            waited = time.monotonic() - began
            due = [row for row in found if waited >= drain or (not row["busy"] and waited >= min(_IDLE_SECONDS, drain))]
            for row in due:
                paused.ended_sessions += bool(row["busy"])
                await roles.end_connections(connection, row["role"], [int(row["pid"])])
            if not found and not logging_in:
                break
            if found and waited >= drain + connections.CLOSE_SECONDS:
                raise OperationError(
                    f"sessions of {enumeration(row['role'] for row in found)} in the database of tenant "
                    f"{paused.tenant.slug!r} do not end; end them, or grant pg_signal_backend to the administrator of "
                    f"server {place.server!r}"
                )
            await asyncio.sleep(_POLL_SECONDS)
        if paused.ended_sessions:
            logger.warning(
                "tenant %s: %d sessions with a transaction were ended, since it was longer than %g s",
                paused.tenant.slug,
                paused.ended_sessions,
                drain,
            )

    async def _resume(self, paused: Paused, before: Tenant) -> None:
        """Open the database that the tenant has now, then let those who wait go on."""
        try:
            current = await self._current(paused, before)
            if current.placement is not None:
                await self._open(paused, current, current.placement)
        except (TenancyError, *SERVER_FAILURES) as exc:
            logger.error(
                "the database of tenant %s could not be opened after a pause (%s); run: tenancy reconcile",
                before.slug,
                describe(exc),
            )
            raise
        finally:
            await self._services.registry.end_pause(before.id)

    async def _current(self, paused: Paused, before: Tenant) -> Tenant:
        """Return the tenant as its row is; a switch has ended by then, even one with a commit in doubt."""
        if paused.switched is not None:
            return paused.switched
        return await self._services.registry.get_after_pending_commits(before.id)

    async def _open(self, paused: Paused, current: Tenant, place: Placement) -> None:
        former = paused.tenant.placement
        blockers = self._services.blockers(self._services.servers[place.server])
        if former is not None and former.server == place.server and await connections.is_alive(paused.connection):
            await self._let_in(paused.connection, blockers, current, place)
            return
        connection = await blockers.connect(purpose="tenancy-switch")
        try:
            await self._let_in(connection, blockers, current, place)
        finally:
            await run_to_completion(connections.close(connection))

    @staticmethod
    async def _let_in(connection: Connection, blockers: Blockers, current: Tenant, place: Placement) -> None:
        if current.status not in LOGIN_BLOCKED:
            await access.open_database(connection, blockers, database=place.database, role=place.role)
        await guests.let_in(connection, blockers, database=place.database, role=place.role)


__all__ = ["DRAIN_SECONDS", "PAUSE_SECONDS", "Paused", "Switch"]
