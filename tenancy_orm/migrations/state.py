"""What a migration reads of a database before and after it, and the lock that it holds in between."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import datetime

import asyncpg
from sqlalchemy.engine import URL

from ..cancellation import run_to_completion
from ..errors import MarkerMismatchError, MigrationError, TenancyError
from ..postgres import connections
from ..postgres.connections import Connection
from ..postgres.errors import INVALID_PARAMETER_VALUE, UNDEFINED_TABLE
from ..postgres.failures import SERVER_FAILURES
from ..tenant import Tenant
from .extensions import WantedExtensions
from .indexes import HAS_INVALID_INDEXES, MAY_HAVE_INVALID_INDEXES
from .plan import Heads
from .scripts import Environment
from .waits import holders_of

# Advisory locks are per database, so one key serves all tenants: "tenancy" in ASCII, and 2 for the tenants' schemas.
_LOCK = 0x74656E616E637902

_TRY_LOCK = f"pg_catalog.pg_try_advisory_lock({_LOCK})"
# Without it, the server notices only after the running statement that the migrating process has died. That may take
# hours, and the lock is held until then. The server's platform may not support the setting.
_DETECT_LOST_CLIENT = "pg_catalog.set_config('client_connection_check_interval', '2s', false)"


@dataclass(frozen=True, slots=True)
class Target:
    """One database to migrate. ``connect`` connects as the owner of its schema; ``marker`` is the expected marker.

    ``may_be_replaced`` accepts the marker of a database of the same tenant that another one has replaced as well. An
    upgrade installs ``extensions`` that the database lacks. ``connect_watch`` connects as the administrator, to look
    who holds a lock.
    """

    label: str
    url: URL
    connect: Callable[[], Awaitable[Connection]] = field(repr=False)
    tenant: Tenant | None = None
    marker: str | None = None
    may_be_replaced: bool = False
    extensions: WantedExtensions | None = None
    connect_watch: Callable[[], Awaitable[Connection]] | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class State:
    """What one SELECT reads of a database.

    Its heads and extensions; when its server was started; whether it has a version table, invalid indexes, and
    unfinished data migrations; whether the migration lock was taken with it; and whether other sessions are connected,
    which is read with the lock alone.
    """

    heads: Heads
    has_version_table: bool
    has_invalid_indexes: bool
    extensions: frozenset[str]
    has_data: bool = False
    is_locked: bool = False
    has_others: bool = True
    server_started: datetime | None = None


# A new session plans everything for the first time, and has no catalogue in its caches: each table that this names
# costs as much as the login of a small server.
_READ = (
    "SELECT {heads} AS heads, {extensions} AS extensions, d.datname AS database, "
    "(SELECT s.description FROM pg_catalog.pg_shdescription s "
    # of pg_database, as shobj_description looks it up; a number that is no oid would need an operator of its own
    "WHERE s.objoid = d.oid AND s.classoid = 1262::pg_catalog.oid) AS marker, "
    "{may_have_invalid_indexes} AS may_have_invalid_indexes, "
    "pg_catalog.to_regclass('tenancy_migration.data') IS NOT NULL AS has_data, "  # data_checkpoints.TABLE
    "pg_catalog.pg_postmaster_start_time() AS server_started"
    "{lock} FROM pg_catalog.pg_database d WHERE d.datname = pg_catalog.current_database()"
)
_HEADS = "ARRAY(SELECT version_num::text FROM {})"
_EXTENSIONS = "ARRAY(SELECT extname::text FROM pg_catalog.pg_extension)"
_NONE = "ARRAY[]::text[]"
_LOCKING = f", pg_catalog.pg_stat_get_db_numbackends(d.oid) AS sessions, {_TRY_LOCK} AS is_locked"
_DETECTING = f"{_LOCKING}, {_DETECT_LOST_CLIENT}"


async def read_state(
    connection: Connection,
    environment: Environment | None,
    target: Target,
    *,
    timeout: float,
    extensions: bool = True,
    locking: bool = False,
) -> State:
    """Read a database's state, and check in the same SELECT that it is the expected tenant's.

    Args:
        connection: To the database.
        environment: The migrations; without them there are no heads.
        target: The database.
        timeout: Seconds for the SELECT.
        extensions: Whether the extensions are read.
        locking: Try to take the migration lock as well. The state is from just before that: once the lock is there,
            read it again, in the same way.

    Raises:
        MarkerMismatchError: it is not.
    """
    row, has_version_table = await _fetch_state(
        connection, environment, timeout, extensions, _DETECTING if locking else ""
    )
    _check_marker(target, row["database"], row["marker"])
    invalid = row["may_have_invalid_indexes"]
    if invalid:
        invalid = await connection.fetchval(f"SELECT {HAS_INVALID_INDEXES}", timeout=timeout)
    return State(
        heads=frozenset(row["heads"]),
        has_version_table=has_version_table,
        has_invalid_indexes=invalid,
        extensions=frozenset(row["extensions"]),
        has_data=row["has_data"],
        is_locked=locking and row["is_locked"],
        has_others=not locking or row["sessions"] > 1,
        server_started=row["server_started"],
    )


async def _fetch_state(
    connection: Connection, environment: Environment | None, timeout: float, extensions: bool, locking: str
) -> tuple[asyncpg.Record, bool]:
    """Return the row, and whether there is a version table."""
    table = None if environment is None else environment.quoted_version_table
    while True:
        query = _READ.format(
            heads=_NONE if table is None else _HEADS.format(table),
            extensions=_EXTENSIONS if extensions else _NONE,
            may_have_invalid_indexes=MAY_HAVE_INVALID_INDEXES,
            lock=locking,
        )
        try:
            (row,) = await connection.fetch(query, timeout=timeout)
        except asyncpg.PostgresError as exc:
            if exc.sqlstate == UNDEFINED_TABLE and table is not None:
                table = None
            elif exc.sqlstate == INVALID_PARAMETER_VALUE and locking == _DETECTING:
                locking = _LOCKING
            else:
                raise
        else:
            return row, table is not None


def _check_marker(target: Target, database: str, found: str | None) -> None:
    is_replaced = target.may_be_replaced and (found or "").startswith(f"{target.marker}:")
    if is_replaced or target.marker in (None, found):
        return
    raise MarkerMismatchError(tenant=target.label, database=database, expected=target.marker, found=found)


async def lock(
    connection: Connection, *, timeout: float, connect_watch: Callable[[], Awaitable[Connection]] | None = None
) -> None:
    """Take the database's migration lock. Closing the connection releases it.

    ``connect_watch`` connects as a role that sees more of the session that has it.

    Raises:
        MigrationError: another run has held it for ``timeout`` seconds.
    """
    pause = 0.02
    try:
        async with asyncio.timeout(timeout):
            while not await try_lock(connection):
                await asyncio.sleep(random.uniform(0.5, 1.0) * pause)
                pause = min(0.5, pause * 1.5)
    except TimeoutError:
        holder = await _holder(connection, connect_watch)
        raise MigrationError(
            f"another run has been migrating it for {timeout:g} s; wait for that one to end{holder}"
        ) from None


async def _holder(connection: Connection, connect_watch: Callable[[], Awaitable[Connection]] | None) -> str:
    """Who has the lock, in words; empty if that cannot be seen."""
    try:
        if connect_watch is None:
            found = await holders_of(connection, _LOCK)
        else:
            watching = await connect_watch()
            try:
                found = await holders_of(watching, _LOCK)
            finally:
                await close(watching)
    except (TenancyError, *SERVER_FAILURES):
        return ""
    return f" ({found})" if found.holders else ""


async def try_lock(connection: Connection) -> bool:
    """Take the database's migration lock, as ``lock`` does; False if another session has it."""
    try:
        return bool(await connection.fetchval(f"SELECT {_TRY_LOCK}, {_DETECT_LOST_CLIENT}"))
    except asyncpg.PostgresError as exc:
        if exc.sqlstate != INVALID_PARAMETER_VALUE:
            raise
        return bool(await connection.fetchval(f"SELECT {_TRY_LOCK}"))


async def close(connection: Connection) -> None:
    """Close a connection, also when the caller is cancelled; cut its socket where the server does not answer."""
    await run_to_completion(connections.close(connection))


__all__ = ["State", "Target", "close", "lock", "read_state", "try_lock"]
