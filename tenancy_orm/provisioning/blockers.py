"""What keeps an administrative statement waiting: the locks of tenants' sessions, which end here.

PostgreSQL lets every role lock what administration needs: its own row in ``pg_authid`` (``BEGIN; ALTER ROLE
CURRENT_USER ...``), another role (``ALTER DEFAULT PRIVILEGES GRANT ... TO other``), another database (``ALTER ROLE
CURRENT_USER IN DATABASE other ...``). Nothing takes that right away. So a statement that waits longer than a moment is
watched from a second connection: what it waits for is ended, if it is a session or a prepared transaction of a tenant
of this installation. Nobody else's is touched.

A statement that is not kept waiting costs nothing more: the second connection is opened by a timer.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar

import asyncpg

from ..cancellation import settled
from ..control.names import Names
from ..errors import TenancyError
from ..postgres.failures import SERVER_FAILURES
from ..postgres.quoting import quote_identifier, quote_literal
from ..registry.registry import Registry
from ..routing.servers import Server
from . import databases
from .databases import Connection

logger = logging.getLogger("tenancy_orm.provisioning")

T = TypeVar("T")

PATIENCE_SECONDS = 0.1
POLL_SECONDS = 0.05

# How often work is repeated that lost a race, and after which failure the connections of its role are ended.
_ATTEMPTS = 100
_TOLERATED = 3
# "tuple concurrently updated", deadlock detected, lock_timeout
_RACES = frozenset({databases.CONCURRENT_UPDATE, "40P01", "55P03"})
_RETRY_SECONDS = 0.5  # after an error of the watching connection itself
_DOORS = 8

# Whoever keeps $1 waiting, and whoever keeps those waiting: a stranger's session may itself wait for a tenant's.
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
# pg_blocking_pids says 0 of every prepared transaction. Its locks have no pid either, but one virtual transaction in
# common, which after a restart of the server is another than before: so they meet by the lock on its own xid.
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
# A role that may not drop a database still queues for the lock on it, ahead of everybody who then wants to connect.
_IN_THE_DOOR = """
SELECT a.pid, a.usename::text AS role
FROM pg_locks l JOIN pg_stat_activity a USING (pid)
WHERE l.locktype = 'object' AND l.classid = 'pg_database'::regclass AND NOT l.granted
  AND l.mode = 'AccessExclusiveLock' AND starts_with(a.usename::text, $1)
"""


@dataclass(frozen=True, slots=True)
class PreparedTransaction:
    """A prepared transaction: its identifier, and the role and database that it belongs to."""

    gid: str
    role: str
    database: str


class Blockers:
    """Ends what of this installation's tenants delays administration of one server.

    Args:
        server: The server.
        names: Tell a tenant's role from everybody else's.
        registry: Knows databases to log in by, where tenants block the ones for administration.
    """

    def __init__(self, server: Server, names: Names, registry: Registry) -> None:
        self._server = server
        self._names = names
        self._registry = registry

    def may_end(self, role: str) -> bool:
        """Whether what this role does may be ended: it is a tenant's, or the owner of their databases."""
        return self._names.parse(role) is not None or role == self._names.owner

    async def run(self, connection: Connection, work: Callable[[], Awaitable[T]], *, role: str | None = None) -> T:
        """Do one piece of work, end what keeps it waiting, and repeat it where a change at the same time defeats it.

        Args:
            connection: What the work is done by.
            work: What to do; it must bear repetition. The caller sets the deadline.
            role: The tenant's role that the work concerns. Its connections are ended if it goes on interfering.
        """
        failures = 0
        while True:
            try:
                async with self.ending(connection):
                    return await work()
            except asyncpg.PostgresError as exc:
                failures += 1
                if databases.sqlstate(exc) not in _RACES or failures == _ATTEMPTS:
                    raise
            if role is None or failures < _TOLERATED:
                await asyncio.sleep(POLL_SECONDS)
            else:
                # at once after this: whoever logs in again is too late
                await databases.end_connections(connection, role)

    @asynccontextmanager
    async def ending(self, connection: Connection, *, patience: float = PATIENCE_SECONDS) -> AsyncIterator[None]:
        """While the body runs, end what keeps ``connection`` waiting for longer than ``patience`` seconds."""
        pid = connection.get_server_pid()
        async with _later(patience, lambda: self._watch(pid)):
            yield

    async def connect(
        self,
        database: str | None = None,
        *,
        role: str | None = None,
        settings: Mapping[str, str] = MappingProxyType({}),
    ) -> Connection:
        """Log in as ``Server.connect_admin`` does, and end what keeps that waiting.

        Raises:
            ServerUnavailableError, asyncpg.PostgresError: as there.
        """
        async with _later(PATIENCE_SECONDS, self._open_the_door):
            return await self._server.connect_admin(database, role=role, settings=settings)

    async def roll_back(self, transaction: PreparedTransaction) -> None:
        """Roll back a prepared transaction. Does nothing where it has ended.

        PostgreSQL asks that of its role or a superuser, in its database.
        """
        connection = await self.connect(transaction.database)
        try:
            async with databases.joined(connection, transaction.role):
                if not await databases.is_superuser(connection):
                    await connection.execute(f"SET ROLE {quote_identifier(transaction.role)}")
                try:
                    await connection.execute(f"ROLLBACK PREPARED {quote_literal(transaction.gid)}")
                except asyncpg.UndefinedObjectError:
                    return
                finally:
                    if not connection.is_closed():
                        await connection.execute("RESET ROLE")
            logger.warning("prepared transaction %r of role %s was rolled back", transaction.gid, transaction.role)
        finally:
            await databases.close(connection)

    async def clear_doors(self, connection: Connection) -> None:
        """End the sessions of tenants that wait to drop or rename a database, which they may not do.

        Until such a session ends, everybody else who wants to connect to that database waits behind it.

        Args:
            connection: To any database of the server.
        """
        await self._end_sessions(connection, await connection.fetch(_IN_THE_DOOR, self._names.tenant_stem))

    # --- watching ---------------------------------------------------------------------------------------------------

    async def _watch(self, pid: int) -> None:
        """End what keeps the backend ``pid`` waiting, until cancelled."""
        while True:
            try:
                connection = await self.connect()
                try:
                    while True:
                        await self._end_blockers(connection, pid)
                        await asyncio.sleep(POLL_SECONDS)
                finally:
                    await databases.close(connection)
            except (TenancyError, *SERVER_FAILURES) as exc:
                # another administrator may have ended it first, or left a role that this one has just joined
                logger.warning("ending what keeps a statement waiting failed: %s: %s", type(exc).__name__, exc)
                await asyncio.sleep(_RETRY_SECONDS)

    async def _end_blockers(self, connection: Connection, pid: int) -> None:
        await self._end_sessions(connection, await connection.fetch(_SESSIONS, pid, self._names.tenant_stem))
        for gid, role, database in await connection.fetch(_PREPARED, pid, self._names.tenant_stem):
            await settled(_in_time(self.roll_back(PreparedTransaction(gid, role, database))))

    async def _end_sessions(self, connection: Connection, found: list[asyncpg.Record]) -> None:
        pids: dict[str, list[int]] = {}
        for pid, role in found:
            pids.setdefault(role, []).append(pid)
        for role, of_role in pids.items():
            logger.warning("role %s keeps administration waiting: ending %d of its connections", role, len(of_role))
            await settled(_in_time(databases.end_connections(connection, role, of_role)))

    # --- logging in -------------------------------------------------------------------------------------------------

    async def _open_the_door(self) -> None:
        """End what keeps a login waiting, from a database that is not blocked, until cancelled."""
        try:
            connection = await self._enter_anywhere()
            try:
                while True:
                    await self.clear_doors(connection)
                    await asyncio.sleep(POLL_SECONDS)
            finally:
                await databases.close(connection)
        except (TenancyError, *SERVER_FAILURES) as exc:
            logger.warning("no login to server %s: %s: %s", self._server.name, type(exc).__name__, exc)

    async def _enter_anywhere(self) -> Connection:
        """Log in to whichever database admits the administrator first: a tenant can block only a few."""
        try:
            known = sorted(await self._registry.placements(self._server.name))
        except TenancyError:
            known = []  # the control database is on the same server, perhaps, and blocked as well
        doors = [None, "postgres", "template1", *random.sample(known, min(len(known), _DOORS))]
        attempts = {asyncio.ensure_future(self._server.connect_admin(door)) for door in doors}
        waiting = set(attempts)
        entered: Connection | None = None
        try:
            while waiting and entered is None:
                ended, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                entered = next((attempt.result() for attempt in ended if attempt.exception() is None), None)
        finally:
            for attempt in attempts:
                _abandon(attempt, keep=entered)
        if entered is None:
            raise ConnectionError("no database admits the administrator")
        return entered


@asynccontextmanager
async def _later(seconds: float, work: Callable[[], Coroutine[Any, Any, None]]) -> AsyncIterator[None]:
    """Have a task do ``work`` beside the body, from some seconds on until the body ends."""
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


def _abandon(login: asyncio.Future[Connection], *, keep: Connection | None = None) -> None:
    """Give up a login, or close at once what it has led to."""

    def close(done: asyncio.Future[Connection]) -> None:
        if not done.cancelled() and done.exception() is None and done.result() is not keep:
            done.result().terminate()

    login.cancel()
    login.add_done_callback(close)


async def _in_time(work: Awaitable[object]) -> None:
    """Bound work that a cancellation does not cut in half."""
    async with asyncio.timeout(databases.CLOSE_SECONDS):
        await work
