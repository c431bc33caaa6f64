"""Ending single sessions of a tenant's role, and working on a role in spite of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import asyncpg

from . import databases
from .databases import Connection

LOCK_NOT_AVAILABLE = "55P03"
_WAIT = "1s"  # how long a statement waits for a row that the role's own session may hold

_END = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = $1 AND pid = ANY($2::int[])"
# what holds a lock on a row of a role has opened the table for writing, until its transaction ends
_WRITERS = """
SELECT DISTINCT a.pid FROM pg_locks l JOIN pg_stat_activity a USING (pid)
 WHERE a.usename = $1 AND l.granted AND l.mode = 'RowExclusiveLock' AND l.database = 0
   AND l.relation IN ('pg_authid'::regclass, 'pg_db_role_setting'::regclass, 'pg_auth_members'::regclass)
"""


@asynccontextmanager
async def joined(connection: Connection, role: str) -> AsyncIterator[None]:
    """Be a member of ``role`` for the body: an administrator who is no superuser may end its sessions only so.

    It is one only while it must be: with thousands of memberships PostgreSQL would get slow for it.
    """
    await databases.join_role(connection, role)
    try:
        yield
    finally:
        await databases.leave_role(connection, role)


async def end(connection: Connection, role: str, pids: Sequence[int]) -> int:
    """End those sessions of ``role``, and return how many there were. They may take a moment to go."""
    try:
        return len(await connection.fetch(_END, role, pids))
    except asyncpg.InsufficientPrivilegeError:
        async with joined(connection, role):
            return len(await connection.fetch(_END, role, pids))


async def insist(connection: Connection, role: str, work: Callable[[], Awaitable[object]], *, timeout: float) -> None:
    """Do ``work`` on a role, and end the sessions of that role that keep it from being done.

    A role may hold its own row locked: ``BEGIN; ALTER ROLE CURRENT_USER ...``, and nothing more.

    Args:
        connection: The administrator's, in no transaction.
        role: The tenant's role.
        work: Statements on it; done again from the beginning where they had to wait.
        timeout: Seconds for all of it.

    Raises:
        TimeoutError: it resisted for longer.
    """
    async with asyncio.timeout(timeout):
        await connection.execute(f"SET lock_timeout = '{_WAIT}'")
        try:
            while not await _done(work):
                pids = [row["pid"] for row in await connection.fetch(_WRITERS, role)]
                if not await end(connection, role, pids):
                    await asyncio.sleep(databases.POLL_SECONDS)
        finally:
            if not connection.is_closed():
                await connection.execute("RESET lock_timeout")


async def _done(work: Callable[[], Awaitable[object]]) -> bool:
    try:
        await work()
    except asyncpg.PostgresError as exc:
        if databases.sqlstate(exc) not in (LOCK_NOT_AVAILABLE, databases.CONCURRENT_UPDATE):
            raise
        return False
    return True
