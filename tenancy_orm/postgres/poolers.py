"""Connections that must lead to PostgreSQL itself, and not to a pooler such as PgBouncer.

Behind a pooler in transaction mode a session's advisory locks stay on a connection that other clients get next, and
LISTEN receives nothing. Two signs tell a pooler:

- It refuses a startup parameter that it does not know, as PgBouncer does (08P01), or drops it. PostgreSQL takes any
  parameter with a dot in its name. This sign decides for administration.
- The process id at the login is not that of the backend. PgBouncer sends a random one, with which it finds the client
  of a request to cancel. So does a proxy that has a backend for each client, as managed servers have, which is none.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any
from weakref import WeakKeyDictionary

import asyncpg

from ..errors import PoolerError
from . import login
from .connections import Connection
from .dsn import Dsn
from .errors import PROTOCOL_VIOLATION
from .login import clear_tracebacks, reason_of

_pids: WeakKeyDictionary[Connection, int] = WeakKeyDictionary()

LISTEN_NEEDS_A_SESSION = (
    "a connection pooler answers tenants of this server, and LISTEN receives nothing through it; poll a table, or "
    "listen on a connection to the server's own address"
)
"""Why a listener is refused."""

_PARAMETER = "tenancy.direct"
_DROPPED = (
    "a parameter of the login is not that of the session (a proxy that is not a pooler must pass startup parameters "
    "on; Neon's does with options=neon_proxy_params_compat:true in the URL of the direct endpoint)"
)
_PROOF = "SELECT WHERE pg_catalog.current_setting('{parameter}', true) OPERATOR(pg_catalog.=) '{token}'"


async def connect_directly(
    dsn: Dsn, *, timeout: float, refusal: str, settings: Mapping[str, str] = MappingProxyType({}), **options: Any
) -> Connection:
    """Open a connection as ``login.connect`` does, and prove that it leads to PostgreSQL itself.

    It takes one round trip more. At a pooler it leaves nothing behind.

    Args:
        dsn: Where to.
        timeout: Seconds that the login may take, and the proof again.
        refusal: The error's text; ``{address}`` and ``{reason}`` in it are replaced.
        settings: Further settings of the server.
        options: Further arguments of ``login.connect``.

    Raises:
        PoolerError: a pooler answers. The connection is closed.
        ConfigurationError, asyncpg.PostgresError, asyncpg.InterfaceError, OSError: as ``login.connect``.
    """
    token = secrets.token_hex(8)
    try:
        connection: Connection = await login.connect(
            dsn, timeout=timeout, settings={**settings, _PARAMETER: token}, **options
        )
    except asyncpg.ProtocolViolationError as exc:
        raise _refused(refusal, dsn, reason_of(exc)) from clear_tracebacks(exc)
    try:
        async with asyncio.timeout(timeout):
            # without parameters and rows, so that no statement is prepared: the command's tag is the answer
            if await connection.execute(_PROOF.format(parameter=_PARAMETER, token=token)) == "SELECT 1":
                return connection
    except BaseException:
        connection.terminate()
        raise
    connection.terminate()
    raise _refused(refusal, dsn, _DROPPED)


async def is_direct(connection: Connection) -> bool:
    """Whether an open connection has the process id of its backend: behind a pooler it has another."""
    # without parameters and rows, as above
    same = f"SELECT WHERE pg_catalog.pg_backend_pid() OPERATOR(pg_catalog.=) {connection.get_server_pid():d}"
    return bool(await connection.execute(same) == "SELECT 1")


async def check_transactions(connection: Connection, address: str) -> None:
    """Check that a pooler lets a transaction go on over several statements. Two round trips; nothing is left behind.

    Raises:
        PoolerError: it does not: PgBouncer in statement mode. It has closed the connection.
    """
    try:
        await connection.execute("BEGIN")
        await connection.execute("ROLLBACK")
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as exc:
        # it closes the connection after its error, which asyncpg then has as the cause of its own
        if PROTOCOL_VIOLATION not in (getattr(exc, "sqlstate", None), getattr(exc.__cause__, "sqlstate", None)):
            raise
        connection.terminate()
        reason = reason_of(exc.__cause__ or exc)
        raise PoolerError(
            f"the pooler at {address} refuses transactions: {reason}; set pool_mode = transaction in it"
        ) from exc


async def backend_pid(connection: Connection) -> int:
    """Return the process id of a direct connection's backend, also behind a proxy that tells clients another."""
    if (known := _pids.get(connection)) is None:
        known = _pids[connection] = int(await connection.fetchval("SELECT pg_catalog.pg_backend_pid()"))
    return known


def _refused(refusal: str, dsn: Dsn, reason: str) -> PoolerError:
    return PoolerError(refusal.format(address=dsn, reason=reason))


__all__ = ["LISTEN_NEEDS_A_SESSION", "backend_pid", "check_transactions", "connect_directly", "is_direct"]
