"""Ending tenants' sessions that would stop a server for the others.

For a single role, PostgreSQL does not bound the locks that a session holds (the whole server has one lock table), how
long a transaction stays open, or how long a listening session keeps the notification queue from being emptied. A role's
settings bound well-behaved programs; a tenant's own SQL may change them in its session.

If the lock table is full, nobody can log in. So the watchdog keeps its connections open between two runs, each with a
reserve of locks that it releases then: only existing connections work at that time. A session that goes on taking locks
may take the reserve first; so a connection also remembers what it needs to end a session without a lock. A process that
connects for a single run, such as a timer's, may be too late.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Final
from uuid import UUID

import asyncpg

from ..audit.actor import SYSTEM, Actor
from ..cancellation import run_to_completion
from ..config import TenancyConfig
from ..context import refuse_while_bound
from ..errors import ServerUnavailableError, TenancyError
from ..events import SessionTerminated
from ..loops import HomeLoop
from ..postgres import connections
from ..postgres.connections import Connection
from ..postgres.errors import describe
from ..postgres.failures import SERVER_FAILURES
from ..postgres.quoting import quote_identifier
from ..servers.server import Server
from .creation.pipeline import ProvisioningServices
from .server_objects import roles
from .server_objects.blockers import Blockers, PreparedTransaction

logger = logging.getLogger("tenancy_orm.provisioning")

RESERVE: Final = 400
"""How many locks a watchdog's connection reserves, for its own work when the lock table is full."""
TENANT_FACTOR: Final = 2
"""How many times ``max_session_locks`` all sessions of one tenant may hold together."""
LISTENER_SECONDS: Final = 2.0
"""A session that blocks a full notification queue has had a transaction open for at least this long."""

_END_SECONDS: Final = 5.0  # how long an ended session may take to go
_FULL: Final = "53"  # the SQLSTATE class of a server that has no room for another connection
_SETTINGS: Final = {"lock_timeout": "5s", "statement_timeout": "20s", "idle_session_timeout": "0"}

# The SIReadLocks of SERIALIZABLE transactions are in a table of their own: they take no room, and block nobody.
_SESSIONS: Final = """
SELECT a.pid, r.oid, r.rolname AS role, coalesce(l.locks, 0) AS locks,
       extract(epoch FROM clock_timestamp() - a.xact_start)::float8 AS open_seconds,
       CASE WHEN a.state LIKE 'idle in transaction%' AND a.xact_start IS NOT NULL
            THEN extract(epoch FROM clock_timestamp() - a.state_change)::float8 END AS idle_seconds
  FROM pg_stat_activity a JOIN pg_roles r ON r.oid = a.usesysid
  LEFT JOIN (SELECT pid, count(*) AS locks FROM pg_locks WHERE mode <> 'SIReadLock' GROUP BY pid) l ON l.pid = a.pid
 WHERE starts_with(r.rolname::text, $1)
"""
# The same by functions alone: reading tables would need locks.
_LOCKS: Final = """
SELECT a.pid, a.usesysid AS oid, l.locks FROM pg_stat_get_activity(NULL) a
  JOIN (SELECT pid, count(*) AS locks FROM pg_lock_status() WHERE mode <> 'SIReadLock' GROUP BY pid) l ON l.pid = a.pid
"""
_PREPARED: Final = """
SELECT p.gid, p.owner AS role, p.database, extract(epoch FROM clock_timestamp() - p.prepared)::float8 AS open_seconds,
       (SELECT count(*) FROM pg_locks own JOIN pg_locks l USING (virtualtransaction)
         WHERE own.transactionid = p.transaction AND own.pid IS NULL AND l.pid IS NULL
           AND l.mode <> 'SIReadLock') AS locks
  FROM pg_prepared_xacts p WHERE starts_with(p.owner::text, $1)
"""
_ABILITIES: Final = """
SELECT rolname AS name, rolsuper AS superuser, pg_has_role(oid, 'pg_read_all_stats', 'USAGE') AS sees,
       rolsuper OR pg_has_role(oid, 'pg_signal_backend', 'USAGE') AS ends
  FROM pg_roles WHERE rolname = current_user
"""
# What PostgreSQL looks up of a role before it ends its session. Roles are in tables of the whole server, which take a
# lock in the shared table: what is in the connection's cache takes none.
_REMEMBER: Final = """
SELECT count(pg_get_userbyid(r.oid)), count(pg_has_role(r.oid, 'USAGE')), pg_has_role('pg_signal_backend', 'USAGE')
  FROM unnest($1::oid[]) AS r (oid)
"""
# each watchdog has keys of its own: if two share a lock, releasing it once makes no room
_TAKE_RESERVE: Final = "SELECT count(pg_try_advisory_lock(pg_backend_pid(), n)) FROM generate_series(1, $1::int) AS n"
_GIVE_RESERVE: Final = "SELECT pg_advisory_unlock_all()"


@dataclass(frozen=True, slots=True)
class EndedSession:
    """A session, or a prepared transaction, that was ended.

    Args:
        tenant_id: The tenant of its role.
        server: The server.
        reason: "locks", "transaction", "idle_in_transaction", "notify_queue", "prepared_transaction" or
            "login_blocker": it waited to drop a database that is not its own, or locked one that others waited for.
        locks: How many locks it held.
        seconds: How long its transaction was open; None where that is unknown.
    """

    tenant_id: UUID
    server: str
    reason: str
    locks: int
    seconds: float | None


@dataclass(frozen=True, slots=True)
class WatchReport:
    """The sessions that one run has ended, on every server, and its errors."""

    ended: tuple[EndedSession, ...] = ()
    errors: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Session:
    """A session of a tenant's role. The seconds are None if the administrator may not see them."""

    pid: int
    oid: int
    role: str
    locks: int
    open_seconds: float | None = None
    idle_seconds: float | None = None


def excessive(found: Iterable[Session], config: TenancyConfig) -> dict[int, tuple[Session, str]]:
    """Return the sessions that exceed a bound, by pid, each with the bound's name."""
    above: dict[int, tuple[Session, str]] = {}
    by_role: defaultdict[str, list[Session]] = defaultdict(list)
    for session in found:
        by_role[session.role].append(session)
        for reason, value, bound in (
            ("locks", session.locks, config.watchdog.max_session_locks),
            ("idle_in_transaction", session.idle_seconds, config.watchdog.max_idle_transaction_seconds),
            ("transaction", session.open_seconds, config.watchdog.max_transaction_seconds),
        ):
            if bound and value is not None and value > bound:
                above.setdefault(session.pid, (session, reason))
    if config.watchdog.max_session_locks:
        # many sessions with few locks each can fill the table as well
        for own in by_role.values():
            own.sort(key=lambda session: session.locks)
            while sum(session.locks for session in own) > TENANT_FACTOR * config.watchdog.max_session_locks:
                session = own.pop()
                above.setdefault(session.pid, (session, "locks"))
    return above


@dataclass(slots=True)
class _WatchedServer:
    """What the watchdog knows of one server, and its connection there."""

    server: Server
    blockers: Blockers
    connection: Connection | None = None
    roles: dict[int, str] = field(default_factory=dict)  # names of tenants' roles by oid
    may_end: bool | None = None  # whether the administrator may end every session; None until asked
    busy: asyncio.Lock = field(default_factory=asyncio.Lock)
    ended: list[EndedSession] = field(default_factory=list)  # of the run under way, and so are the errors
    errors: list[str] = field(default_factory=list)


class Watchdog:
    """Checks the tenants' sessions on every server, and ends those that exceed a bound.

    Args:
        services: Of provisioning.
    """

    def __init__(self, services: ProvisioningServices) -> None:
        self._services = services
        self._config = services.config
        self._home = HomeLoop()
        self._watched: dict[str, _WatchedServer] = {}

    async def run(self, *, actor: Actor = SYSTEM) -> WatchReport:
        """Check all servers once, at the same time. This works without the control database.

        Args:
            actor: Who does this, for the audit log, which is written if the control database answers.

        Raises:
            CrossTenantError: a tenant is bound.
            WrongEventLoopError: this is another event loop or thread than that of the connections.
        """
        self._home.check()
        refuse_while_bound("ending sessions")
        reports = await asyncio.gather(*(self._attempt(watched) for watched in await self._watch_present()))
        ended = await self._with_ids(tuple(one for report in reports for one in report.ended))
        for one in ended:
            self._services.events.emit(
                SessionTerminated(
                    tenant_id=one.tenant_id, server=one.server, reason=one.reason, locks=one.locks, seconds=one.seconds
                )
            )
        await self._record(ended, actor)
        return WatchReport(ended, tuple(error for report in reports for error in report.errors))

    async def watch(self, *, every: float, actor: Actor = SYSTEM) -> None:
        """Call ``run`` every ``every`` seconds, until cancelled. Failures are logged.

        Raises:
            CrossTenantError, WrongEventLoopError: as ``run``.
        """
        while True:
            await self.run(actor=actor)
            await asyncio.sleep(every)

    async def close(self) -> None:
        """Close the connections that are kept open between two runs.

        Raises:
            WrongEventLoopError: as ``run``.
        """
        self._home.check()
        await asyncio.gather(*(_disconnect(watched) for watched in self._watched.values()))

    async def _watch_present(self) -> list[_WatchedServer]:
        """Return the servers that there are now; the connections to those that were replaced or removed are closed."""
        present = dict(self._services.servers)
        for name, watched in list(self._watched.items()):
            if present.get(name) is not watched.server:
                async with watched.busy:
                    self._watched.pop(name, None)
                    await _disconnect(watched)
        for name, server in present.items():
            if name not in self._watched:
                self._watched[name] = _WatchedServer(server, self._services.blockers(server))
        return list(self._watched.values())

    async def _with_ids(self, ended: tuple[EndedSession, ...]) -> tuple[EndedSession, ...]:
        """The ended sessions with the tenants' ids, which are not in the names of databases from the warm pool."""
        found: list[EndedSession] = []
        try:
            async with asyncio.timeout(self._config.pool.connect_timeout):
                for one in ended:
                    name = self._services.names.tenant(one.tenant_id)
                    tenant_id = await self._services.registry.id_by_database(name)
                    found.append(replace(one, tenant_id=tenant_id or one.tenant_id))
        except (TenancyError, *SERVER_FAILURES) as exc:
            # the control database may be on the affected server
            logger.warning("the tenants of ended sessions are known by their roles' names only: %s", describe(exc))
        return (*found, *ended[len(found) :])

    async def _record(self, ended: Iterable[EndedSession], actor: Actor) -> None:
        for one in ended:
            detail = {"server": one.server, "reason": one.reason, "locks": one.locks, "seconds": one.seconds}
            try:
                async with asyncio.timeout(self._config.pool.connect_timeout):
                    await self._services.registry.record(one.tenant_id, "session.terminate", detail=detail, actor=actor)
            except (TenancyError, *SERVER_FAILURES) as exc:
                # it is in the application's log, and the control database may be on the affected server
                logger.warning("the end of a session is not in the audit log: %s", describe(exc))
                return

    # --- one server -------------------------------------------------------------------------------------------------

    async def _attempt(self, watched: _WatchedServer) -> WatchReport:
        async with watched.busy:
            watched.ended, watched.errors = [], []
            try:
                async with asyncio.timeout(self._config.provisioning.timeout), _connected(watched) as connection:
                    await self._check_server(watched, connection)
            except (TenancyError, *SERVER_FAILURES) as exc:
                watched.errors.append(f"{watched.server.name}: {describe(exc)}")
            for error in watched.errors:
                logger.error("watching the tenants' sessions: %s", error)
            return WatchReport(tuple(watched.ended), tuple(watched.errors))

    async def _check_server(self, watched: _WatchedServer, connection: Connection) -> None:
        await self._make_room(watched, connection)
        await self._check_abilities(watched, connection)
        for session, reason in excessive(await self._sessions(watched, connection), self._config).values():
            await self._end(watched, connection, session, reason)
        await self._end_listeners(watched, connection)
        await self._end_prepared(watched, connection)
        # a session that waits to drop a database, without the right to, keeps all others from connecting to it
        for one in await watched.blockers.end_login_blockers(connection):
            self._report(watched, one.role, "login_blocker", one.locks, one.open_seconds)
        await connection.fetchval(_TAKE_RESERVE, RESERVE)
        await connection.fetchrow(_REMEMBER, list(watched.roles))

    async def _make_room(self, watched: _WatchedServer, connection: Connection) -> None:
        """End sessions that fill the lock table, without taking locks; then release the reserve for what follows."""
        rows = await connection.fetch(_LOCKS)
        # other roles are not tenants', or have logged in since the last run
        known = [
            Session(row["pid"], row["oid"], watched.roles[row["oid"]], row["locks"])
            for row in rows
            if row["oid"] in watched.roles
        ]
        for session, reason in excessive(known, self._config).values():
            try:
                await self._end_by_reserve(watched, connection, session, reason)
            except asyncpg.OutOfMemoryError:
                break  # others have taken the room; what follows tries again
        await connection.execute(_GIVE_RESERVE)

    async def _end_by_reserve(
        self, watched: _WatchedServer, connection: Connection, session: Session, reason: str
    ) -> None:
        """Release the reserve and end a session in one message, so that nobody takes the room in between."""
        role = quote_identifier(session.role)
        found = f"pg_stat_get_activity({session.pid:d}) WHERE usesysid = {session.oid:d}"
        kill = f"SELECT pg_terminate_backend(pid) FROM {found}"  # noqa: S608 - two numbers
        statements = [_GIVE_RESERVE, kill]
        if not watched.may_end:
            # as in ``roles.end_connections``
            options = " WITH INHERIT TRUE, SET TRUE" if connections.version(connection) >= 16 else ""
            statements[1:] = [f"GRANT {role} TO CURRENT_USER{options}", kill, f"REVOKE {role} FROM CURRENT_USER"]
        await connection.execute("; ".join(statements))
        await self._confirm(watched, connection, session, reason)

    async def _check_abilities(self, watched: _WatchedServer, connection: Connection) -> None:
        if watched.may_end is not None:
            return
        able = await connection.fetchrow(_ABILITIES)
        if not able["sees"]:
            logger.warning(
                "the administrator of server %s cannot see how long tenants' transactions are open: only their locks "
                "are bounded; run as a superuser: GRANT pg_monitor TO %s",
                watched.server.name,
                quote_identifier(able["name"]),
            )
        watched.may_end = able["ends"]

    async def _sessions(self, watched: _WatchedServer, connection: Connection) -> list[Session]:
        rows = await connection.fetch(_SESSIONS, self._services.names.tenant_stem)
        watched.roles.update((row["oid"], row["role"]) for row in rows)
        return [Session(**row) for row in rows]

    async def _end_listeners(self, watched: _WatchedServer, connection: Connection) -> None:
        """End listeners until the notification queue is below its bound.

        PostgreSQL cannot remove what the slowest listener has not read, and does not tell which one that is. A listener
        reads nothing while its transaction is open. So the tenants' sessions with the oldest transactions are ended,
        one by one.
        """
        bound = self._config.watchdog.max_notify_queue
        if not bound or (usage := await _queue_usage(connection)) <= bound:
            return
        found = [one for one in await self._sessions(watched, connection) if (one.open_seconds or 0) > LISTENER_SECONDS]
        for session in sorted(found, key=lambda one: one.open_seconds or 0, reverse=True):
            await self._end(watched, connection, session, "notify_queue")
            if (usage := await _queue_usage(connection)) <= bound:
                return
        watched.errors.append(
            f"{watched.server.name}: the notification queue is at {usage:.0%}, and no transaction of a tenant that has "
            f"been open for {LISTENER_SECONDS:g} s keeps it there"
        )

    async def _end(self, watched: _WatchedServer, connection: Connection, session: Session, reason: str) -> None:
        if await roles.end_connections(connection, session.role, [session.pid]):
            await self._confirm(watched, connection, session, reason)

    async def _confirm(self, watched: _WatchedServer, connection: Connection, session: Session, reason: str) -> None:
        """Wait until a session has ended, and report it."""
        if not await _has_ended(connection, session):
            watched.errors.append(
                f"{watched.server.name}: session {session.pid} of {session.role} was ended, but is still there"
            )
        self._report(watched, session.role, reason, session.locks, session.open_seconds)

    def _report(self, watched: _WatchedServer, role: str, reason: str, locks: int, seconds: float | None) -> None:
        own = self._services.names.role_of(role)
        number = None if own is None else self._services.names.parse(own)
        logger.error(
            "a session of role %s on server %s was ended (%s): it held %d locks, and its transaction was open for %s s",
            role,
            watched.server.name,
            reason,
            locks,
            "?" if seconds is None else round(seconds, 1),
        )
        if number is not None:
            watched.ended.append(EndedSession(number, watched.server.name, reason, locks, seconds))

    # --- prepared transactions --------------------------------------------------------------------------------------

    async def _end_prepared(self, watched: _WatchedServer, connection: Connection) -> None:
        """Roll back prepared transactions above a bound: they hold locks without a session, even after a restart."""
        config = self._config
        for row in await connection.fetch(_PREPARED, self._services.names.tenant_stem):
            too_old = 0 < config.watchdog.max_transaction_seconds < row["open_seconds"]
            if too_old or 0 < config.watchdog.max_session_locks < row["locks"]:
                transaction = PreparedTransaction(row["gid"], row["role"], row["database"])
                if await watched.blockers.roll_back(transaction, settings=_SETTINGS):
                    self._report(watched, row["role"], "prepared_transaction", row["locks"], row["open_seconds"])


async def _queue_usage(connection: Connection) -> float:
    return float(await connection.fetchval("SELECT pg_notification_queue_usage()"))


async def _has_ended(connection: Connection, session: Session) -> bool:
    """Wait for a session that was ended; return whether it ends in time."""
    query = "SELECT count(*) FROM pg_stat_get_activity($1) WHERE usesysid = $2"
    try:
        async with asyncio.timeout(_END_SECONDS):
            while await connection.fetchval(query, session.pid, session.oid):  # noqa: ASYNC110 - it is another process
                await asyncio.sleep(connections.POLL_SECONDS)
    except TimeoutError:
        return False
    return True


@asynccontextmanager
async def _connected(watched: _WatchedServer) -> AsyncIterator[Connection]:
    """The connection to a watched server. It stays open; a lost one is replaced as soon as the server has room."""
    if watched.connection is None or not await connections.is_alive(watched.connection):
        await _disconnect(watched)
        watched.connection = await _connect(watched.blockers)
    yield watched.connection


async def _connect(blockers: Blockers) -> Connection:
    while True:
        try:
            return await blockers.connect(settings=_SETTINGS, purpose="tenancy-watchdog", always=True)
        except ServerUnavailableError as exc:
            if not (exc.sqlstate or "").startswith(_FULL):
                raise
            await asyncio.sleep(connections.POLL_SECONDS)


async def _disconnect(watched: _WatchedServer) -> None:
    connection, watched.connection = watched.connection, None
    if connection is not None:
        await run_to_completion(connections.close(connection))
