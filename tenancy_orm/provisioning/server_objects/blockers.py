"""Ending blockers: sessions and prepared transactions of tenants that keep an administrative statement waiting.

PostgreSQL lets every role lock what administration needs: its own row in ``pg_authid`` (``BEGIN; ALTER ROLE
CURRENT_USER ...``), another role (``ALTER DEFAULT PRIVILEGES GRANT ... TO other``), another database (``ALTER ROLE
CURRENT_USER IN DATABASE other ...``). These rights cannot be revoked. So when a statement waits for longer than a
moment, a second connection finds its blockers, and ends those that belong to a tenant of this installation. It touches
nobody else's.

A statement that does not wait costs nothing more: a timer opens the second connection.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar

import asyncpg

from ...cancellation import run_to_completion
from ...control.names import Names
from ...errors import ProvisioningError, TenancyError
from ...postgres import connections
from ...postgres.connections import Connection
from ...postgres.errors import CONCURRENT_UPDATE, DEADLOCK_DETECTED, LOCK_NOT_AVAILABLE, describe, sqlstate_of
from ...postgres.failures import SERVER_FAILURES
from ...postgres.poolers import backend_pid
from ...postgres.quoting import quote_identifier, quote_literal
from ...registry.registry import Registry
from ...servers.server import Server
from . import roles

logger = logging.getLogger("tenancy_orm.provisioning")

T = TypeVar("T")

PATIENCE_SECONDS = 0.1
LOGIN_PATIENCE_SECONDS = 0.5
POLL_SECONDS = 0.05

# How often work that lost a race is repeated, and from which failure on the connections of its role are ended.
_ATTEMPTS = 100
_TOLERATED = 3
_RACES = frozenset({CONCURRENT_UPDATE, DEADLOCK_DETECTED, LOCK_NOT_AVAILABLE})
_RETRY_SECONDS = 0.5  # after an error of the second connection itself
# How many databases the administrator tries to connect to at first, and in all; the others after so many seconds.
_FIRST_DATABASES = 3
_MAX_DATABASES = 11
_FIRST_SECONDS = 1.0

# The sessions that block $1, and those that block them: a session that is not a tenant's may wait for a tenant's.
_CHAIN = """
WITH RECURSIVE chain (pid) AS (
    SELECT $1::int
    UNION
    SELECT blocking FROM chain, unnest(pg_blocking_pids(chain.pid)) AS blocking WHERE chain.pid <> 0
)
"""
_SESSIONS = (
    _CHAIN
    + """
SELECT a.pid, a.usename::text AS role FROM chain JOIN pg_stat_activity a USING (pid)
WHERE a.pid <> $1 AND starts_with(a.usename::text, $2)
"""
)
# pg_blocking_pids reports every prepared transaction as 0. Its locks have no pid either, but they share one virtual
# transaction, which changes when the server restarts. The lock on its own xid is what connects them.
_PREPARED = (
    _CHAIN
    + """
SELECT DISTINCT x.gid, x.owner::text AS role, x.database::text AS database
FROM chain
JOIN pg_locks wanted ON wanted.pid = chain.pid AND NOT wanted.granted
JOIN pg_locks held ON held.pid IS NULL AND held.granted AND
    (held.locktype, held.database, held.relation, held.page, held.tuple, held.virtualxid, held.transactionid,
     held.classid, held.objid, held.objsubid) IS NOT DISTINCT FROM
    (wanted.locktype, wanted.database, wanted.relation, wanted.page, wanted.tuple, wanted.virtualxid,
     wanted.transactionid, wanted.classid, wanted.objid, wanted.objsubid)
JOIN pg_locks own ON own.pid IS NULL AND own.virtualtransaction = held.virtualtransaction
    AND own.locktype = 'transactionid'
JOIN pg_prepared_xacts x ON x.transaction = own.transactionid
WHERE starts_with(x.owner::text, $2)
"""
)
# A role that may not drop a database still queues for the lock on it, ahead of everybody who then wants to connect. It
# waits for another lock on that database, which a role has no good reason to hold unless the database is its own.
# Object 0 is not a database: commits that send notifications lock it, and wait for one another.
_LOGIN_BLOCKERS = """
WITH database_locks AS MATERIALIZED (
    SELECT pid, objid, mode, granted FROM pg_locks
    WHERE locktype = 'object' AND classid = 'pg_database'::regclass AND objid <> 0
)
SELECT a.pid, a.usename::text AS role,
       (SELECT count(*) FROM pg_locks l WHERE l.pid = a.pid AND l.mode <> 'SIReadLock') AS locks,
       extract(epoch FROM clock_timestamp() - a.xact_start)::float8 AS open_seconds
FROM pg_stat_activity a
WHERE starts_with(a.usename::text, $1) AND EXISTS (
    SELECT FROM database_locks d WHERE d.pid = a.pid AND (
        (NOT d.granted AND d.mode = 'AccessExclusiveLock')
        OR (d.granted AND d.objid <> a.datid
            AND EXISTS (SELECT FROM database_locks w WHERE w.objid = d.objid AND NOT w.granted))))
"""


@dataclass(frozen=True, slots=True)
class LoginBlocker:
    """A session that was ended, since it kept others from connecting to a database."""

    pid: int
    role: str
    locks: int
    open_seconds: float | None


@dataclass(frozen=True, slots=True)
class PreparedTransaction:
    """A prepared transaction: its identifier, its role and its database."""

    gid: str
    role: str
    database: str


class Blockers:
    """Ends sessions and prepared transactions of this installation's tenants that delay administration of a server.

    Args:
        server: The server.
        names: Tells tenants' roles from others.
        registry: Knows further databases to connect to, if tenants block logins to the administrative ones.
    """

    def __init__(self, server: Server, names: Names, registry: Registry) -> None:
        self._server = server
        self._names = names
        self._registry = registry

    @property
    def stream_stem(self) -> str:
        """The prefix of the names of slots and subscriptions by which this installation moves tenants."""
        return self._names.stream_stem

    def may_end(self, role: str) -> bool:
        """Whether this role's sessions may be ended: it is a tenant's, or the owner of their databases."""
        return self._names.role_of(role) is not None or role == self._names.owner

    async def run(self, connection: Connection, work: Callable[[], Awaitable[T]], *, role: str | None = None) -> T:
        """Await ``work``, end its blockers, and repeat it if it fails because of a concurrent change.

        Args:
            connection: The connection that the work uses.
            work: What to do; it may be repeated. The caller sets the deadline.
            role: The tenant's role that the work changes. If the conflicts go on, its connections are ended.
        """
        failures = 0
        while True:
            try:
                async with self.ending(connection):
                    return await work()
            except (asyncpg.PostgresError, ProvisioningError) as exc:
                failures += 1
                if sqlstate_of(exc) not in _RACES or failures == _ATTEMPTS:
                    raise
            if role is None or failures < _TOLERATED:
                await asyncio.sleep(POLL_SECONDS)
            else:
                # repeated without a pause, before the role can log in again
                await roles.end_connections(connection, role)

    @asynccontextmanager
    async def ending(self, connection: Connection, *, patience: float = PATIENCE_SECONDS) -> AsyncIterator[None]:
        """While the body runs, end the blockers of ``connection`` once it has waited for ``patience`` seconds."""
        pid = await backend_pid(connection)
        async with _after_delay(patience, lambda: self._watch(pid)):
            yield

    async def connect(
        self,
        database: str | None = None,
        *,
        role: str | None = None,
        settings: Mapping[str, str] = MappingProxyType({}),
        timeout: float | None = None,
        purpose: str = "tenancy-admin",
        always: bool = False,
    ) -> Connection:
        """Log in as ``Server.connect_admin`` does, and end login blockers.

        Raises:
            ServerUnavailableError, asyncpg.PostgresError: as ``Server.connect_admin``.
        """
        async with self.ending_login_blockers():
            return await self._server.connect_admin(
                database, role=role, settings=settings, timeout=timeout, purpose=purpose, always=always
            )

    @asynccontextmanager
    async def ending_login_blockers(self) -> AsyncIterator[None]:
        """While the body logs in to this server, as any role, end login blockers."""
        async with _after_delay(LOGIN_PATIENCE_SECONDS, self._end_login_blockers_repeatedly):
            yield

    async def roll_back(
        self, transaction: PreparedTransaction, *, settings: Mapping[str, str] = MappingProxyType({})
    ) -> bool:
        """Roll back a prepared transaction; return False if it had ended before.

        Only its role or a superuser may do that, in its database.

        Args:
            transaction: The prepared transaction.
            settings: Server settings of the connection that this opens.
        """
        connection = await self.connect(transaction.database, settings=settings)
        try:
            async with roles.joined(connection, transaction.role):
                if not await roles.is_superuser(connection):
                    await connection.execute(f"SET ROLE {quote_identifier(transaction.role)}")
                try:
                    await connection.execute(f"ROLLBACK PREPARED {quote_literal(transaction.gid)}")
                except asyncpg.UndefinedObjectError:
                    return False
                finally:
                    if not connection.is_closed():
                        await connection.execute("RESET ROLE")
            logger.warning("prepared transaction %r of role %s was rolled back", transaction.gid, transaction.role)
            return True
        finally:
            await run_to_completion(connections.close(connection))

    async def end_login_blockers(self, connection: Connection) -> list[LoginBlocker]:
        """End the sessions of tenants that wait to drop or rename a database, which they may not do; return them.

        Until such a session ends, everybody who wants to connect to that database waits behind it. If it waits for
        another tenant's lock on that database, that session is ended as well: the next one would wait again.

        Args:
            connection: To any database of the server.
        """
        rows = await connection.fetch(_LOGIN_BLOCKERS, self._names.tenant_stem)
        ended = await self._end_sessions(connection, [(row["pid"], row["role"]) for row in rows])
        return [LoginBlocker(**row) for row in rows if row["role"] in ended]

    # --- ending blockers --------------------------------------------------------------------------------------------

    async def _watch(self, pid: int) -> None:
        """End the blockers of the backend ``pid``, again and again until cancelled."""
        while True:
            try:
                connection = await self.connect()
                try:
                    while True:
                        await self._end_blockers(connection, pid)
                        await asyncio.sleep(POLL_SECONDS)
                finally:
                    await connections.close(connection)
            except (TenancyError, *SERVER_FAILURES) as exc:
                # another administrator may have ended it first, or left a role that this one has just joined
                logger.warning("ending the blockers of a statement failed: %s", describe(exc))
                await asyncio.sleep(_RETRY_SECONDS)

    async def _end_blockers(self, connection: Connection, pid: int) -> None:
        await self._end_sessions(connection, await connection.fetch(_SESSIONS, pid, self._names.tenant_stem))
        for gid, role, database in await connection.fetch(_PREPARED, pid, self._names.tenant_stem):
            await run_to_completion(_with_timeout(self.roll_back(PreparedTransaction(gid, role, database))))

    async def _end_sessions(self, connection: Connection, found: Iterable[tuple[int, str]]) -> set[str]:
        """End sessions, each given by its pid and role; return the roles of those that were ended."""
        pids: dict[str, list[int]] = {}
        ended: set[str] = set()
        for pid, role in found:
            pids.setdefault(role, []).append(pid)
        for role, of_role in pids.items():
            logger.warning("role %s blocks administration: ending %d of its connections", role, len(of_role))
            if await run_to_completion(_with_timeout(roles.end_connections(connection, role, of_role))):
                ended.add(role)
        return ended

    # --- logging in -------------------------------------------------------------------------------------------------

    async def _end_login_blockers_repeatedly(self) -> None:
        """End login blockers over a connection to a database that is not blocked, until cancelled."""
        try:
            connection = await self._connect_anywhere()
            try:
                while True:
                    await self.end_login_blockers(connection)
                    await asyncio.sleep(POLL_SECONDS)
            finally:
                await connections.close(connection)
        except (TenancyError, *SERVER_FAILURES) as exc:
            logger.warning("ending login blockers on server %s failed: %s", self._server.name, describe(exc))

    async def _connect_anywhere(self) -> Connection:
        """Return the first connection that succeeds, of several databases: a tenant can block only a few."""
        try:
            known = sorted(await self._registry.database_names(self._server.name))
        except TenancyError:
            known = []  # the control database may be on the same server, and blocked as well
        # a random one comes first: an attacker cannot expect it
        sample = random.sample(known, min(len(known), _MAX_DATABASES - 3))
        candidates = [*sample[:1], "postgres", None, "template1", *sample[1:]]
        waiting: set[asyncio.Future[Connection]] = set()
        attempts: list[asyncio.Future[Connection]] = []
        connected: Connection | None = None
        try:
            for tried, seconds in (
                (candidates[:_FIRST_DATABASES], _FIRST_SECONDS),
                (candidates[_FIRST_DATABASES:], None),
            ):
                begun = [
                    asyncio.ensure_future(self._server.connect_admin(candidate, always=True)) for candidate in tried
                ]
                attempts.extend(begun)
                connected, waiting = await _first_connected(waiting.union(begun), seconds)
                if connected is not None:
                    return connected
        finally:
            for attempt in attempts:
                _discard_login(attempt, keep=connected)
        raise ConnectionError("the administrator can connect to no database")


async def _first_connected(
    attempts: set[asyncio.Future[Connection]], seconds: float | None
) -> tuple[Connection | None, set[asyncio.Future[Connection]]]:
    """Return the first connection that succeeds, None if none does in ``seconds``, and the attempts under way."""
    ends = None if seconds is None else asyncio.get_running_loop().time() + seconds
    while attempts:
        left = None if ends is None else max(ends - asyncio.get_running_loop().time(), 0)
        ended, attempts = await asyncio.wait(attempts, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        for attempt in ended:
            if attempt.exception() is None:
                return attempt.result(), attempts
        if not ended:
            break
    return None, attempts


@asynccontextmanager
async def _after_delay(seconds: float, work: Callable[[], Coroutine[Any, Any, None]]) -> AsyncIterator[None]:
    """Run ``work`` in a task beside the body, from ``seconds`` on until the body ends."""
    loop = asyncio.get_running_loop()
    begun: list[asyncio.Task[None]] = []
    timer = loop.call_later(seconds, lambda: begun.append(loop.create_task(work())))
    try:
        yield
    finally:
        timer.cancel()
        for task in begun:
            task.cancel()
            await asyncio.wait((task,))


def _discard_login(login: asyncio.Future[Connection], *, keep: Connection | None = None) -> None:
    """Cancel a login, or close the connection that it has opened."""

    def close(done: asyncio.Future[Connection]) -> None:
        if not done.cancelled() and done.exception() is None and done.result() is not keep:
            done.result().terminate()

    login.cancel()
    login.add_done_callback(close)


async def _with_timeout(work: Awaitable[T]) -> T:
    """Await ``work`` for a limited time: a cancellation does not end it."""
    async with asyncio.timeout(connections.CLOSE_SECONDS):
        return await work
