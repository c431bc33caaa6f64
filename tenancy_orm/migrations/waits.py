"""Who holds the locks that a migration waits for.

PostgreSQL tells it only while the migration waits, and to another session. So from the second attempt on a watch
looks, over a connection of its own; a migration that gets its locks at once costs nothing more. A blocker is named by
its process id, its application_name, its state and its age, and never by its query, which may hold values.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from ..errors import MigrationError, TenancyError
from ..postgres import connections
from ..postgres.connections import Connection
from ..postgres.errors import DEADLOCK_DETECTED, LOCK_NOT_AVAILABLE, QUERY_CANCELED, sqlstate_of
from ..postgres.failures import SERVER_FAILURES
from .failures import describe
from .logs import logger

_PATIENCE_SECONDS = 0.05  # a statement that waits no longer needs no explanation
_POLL_SECONDS = 0.25
_SHOWN = 3

# the errors that a lock of another session may have caused
_BLOCKED = frozenset({LOCK_NOT_AVAILABLE, DEADLOCK_DETECTED, QUERY_CANCELED})

# a session of a role that the administrator may not look at has no name, state or age
_FIELDS = (
    "a.pid, a.application_name AS application, a.state, "
    "extract(epoch FROM pg_catalog.clock_timestamp() - a.xact_start)::float8 AS transaction_seconds, "
    "extract(epoch FROM pg_catalog.clock_timestamp() - a.state_change)::float8 AS state_seconds"
)
# a prepared transaction is 0
_BLOCKERS = f"""
SELECT blocking AS pid, application, state, transaction_seconds, state_seconds
FROM pg_catalog.unnest(pg_catalog.pg_blocking_pids($1)) AS blocking
LEFT JOIN (SELECT {_FIELDS} FROM pg_catalog.pg_stat_activity a) AS known ON known.pid = blocking
ORDER BY transaction_seconds DESC NULLS LAST, blocking
"""  # noqa: S608 - constants
_HOLDERS = f"""
SELECT {_FIELDS} FROM pg_catalog.pg_locks l JOIN pg_catalog.pg_stat_activity a ON a.pid = l.pid
WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1
    AND l.database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database())
    AND (l.classid::bigint << 32 | l.objid::bigint) = $1
"""  # noqa: S608 - constants


@dataclass(frozen=True, slots=True)
class LockHolder:
    """A session that others wait for. ``pid`` is 0 for a prepared transaction."""

    pid: int
    application: str | None = None
    state: str | None = None
    transaction_seconds: float | None = None
    state_seconds: float | None = None

    def __str__(self) -> str:
        """Return it in words."""
        if self.pid == 0:
            return "a prepared transaction"
        facts = [] if not self.application else [f"application {self.application!r}"]
        if self.state:
            since = "" if self.state_seconds is None else f" for {self.state_seconds:.0f} s"
            facts.append(f"{self.state}{since}")
        if self.transaction_seconds is not None:
            facts.append(f"transaction of {self.transaction_seconds:.0f} s")
        return f"pid {self.pid}" + (f" ({', '.join(facts)})" if facts else "")


@dataclass(slots=True)
class LockWatch:
    """What a watch has seen: the holders that the session waited for when it was last looked at."""

    holders: tuple[LockHolder, ...] = field(default=())

    def __str__(self) -> str:
        """Return them in words; empty if none was seen."""
        if not self.holders:
            return ""
        more = ", ..." if len(self.holders) > _SHOWN else ""
        return f"blocked by {', '.join(map(str, self.holders[:_SHOWN]))}{more}"


@asynccontextmanager
async def naming_blockers(
    connection: Connection, connect: Callable[[], Awaitable[Connection]] | None
) -> AsyncIterator[None]:
    """Add to an error of the body who held the lock that ``connection`` waited for.

    ``connect`` opens the connection that looks; None looks at nothing.

    Raises:
        MigrationError: the body's error, with the names.
    """
    if connect is None:
        yield
        return
    async with watched(connection.get_server_pid(), connect) as watch:
        try:
            yield
        except Exception as exc:
            if watch.holders and sqlstate_of(exc) in _BLOCKED:
                raise MigrationError(f"{describe(exc)}, {watch}") from exc
            raise


@asynccontextmanager
async def watched(pid: int, connect: Callable[[], Awaitable[Connection]]) -> AsyncIterator[LockWatch]:
    """While the body runs, look who blocks the backend ``pid``."""
    watch = LockWatch()
    task = asyncio.create_task(_look(watch, pid, connect), name="tenancy-lock-watch")
    try:
        yield watch
    finally:
        task.cancel()
        await asyncio.wait((task,))


async def _look(watch: LockWatch, pid: int, connect: Callable[[], Awaitable[Connection]]) -> None:
    try:
        await asyncio.sleep(_PATIENCE_SECONDS)
        connection = await connect()
        try:
            while True:
                # each at a time of its own: in a transaction, the activity would not change
                if found := await connection.fetch(_BLOCKERS, pid, timeout=connections.CLOSE_SECONDS):
                    watch.holders = tuple(LockHolder(**dict(row)) for row in found)
                await asyncio.sleep(_POLL_SECONDS)
        finally:
            await connections.close(connection)
    except (TenancyError, *SERVER_FAILURES) as exc:
        logger.debug("the holder of the lock cannot be found out: %s", type(exc).__name__)


async def holders_of(connection: Connection, key: int) -> LockWatch:
    """Return who holds the advisory lock ``key`` in this database."""
    rows = await connection.fetch(_HOLDERS, key, timeout=connections.CLOSE_SECONDS)
    return LockWatch(tuple(LockHolder(**dict(row)) for row in rows))
