"""Statements on roles, one function each, on an administrative asyncpg connection: tenants' roles and the owner role.

An existing role is never adopted: creating over one raises ``DatabaseExistsError``. Dropping is idempotent.

The administrator need not be a superuser: CREATEDB and CREATEROLE are enough from PostgreSQL 16 on, if it is a member
of the owner role (``join``).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from types import MappingProxyType

import asyncpg

from ..errors import DatabaseExistsError, ProvisioningError
from ..postgres.connections import POLL_SECONDS, Connection, execute_unflushed, version
from ..postgres.errors import CONCURRENT_UPDATE, DUPLICATE_OBJECT, INSUFFICIENT_PRIVILEGE, UNIQUE_VIOLATION, sqlstate_of
from ..postgres.quoting import quote_identifier, quote_literal

REFUSED_ATTRIBUTES: Mapping[str, str] = MappingProxyType(
    {
        "SUPERUSER": "rolsuper",
        "CREATEDB": "rolcreatedb",
        "CREATEROLE": "rolcreaterole",
        "INHERIT": "rolinherit",
        "REPLICATION": "rolreplication",
        "BYPASSRLS": "rolbypassrls",
    }
)
"""The attributes that a tenant's role never has, and their columns in ``pg_roles``."""

_TENANT_ROLE = " ".join(["LOGIN", *(f"NO{name}" for name in REFUSED_ATTRIBUTES)])


_OWNER_ROLE = "NOLOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION NOBYPASSRLS"


@dataclass(frozen=True, slots=True)
class RoleState:
    """A role's state in ``pg_roles`` and ``pg_database``."""

    can_login: bool
    connection_limit: int
    connected: bool  # whether it has a connection now
    connect_granted_on: frozenset[str] = frozenset()  # the databases on which it was granted CONNECT itself


async def create(
    connection: Connection, name: str, *, verifier: str, connection_limit: int, settings: Sequence[str] = ()
) -> None:
    """Create a tenant's login role.

    The commit is not flushed to disk: CREATE DATABASE, which follows, flushes everything before it.

    Args:
        connection: To any database of the server.
        name: The role.
        verifier: The result of ``scram_verifier`` for its password.
        connection_limit: How many connections it may have at once.
        settings: Statements that give it its settings, in the same transaction.

    Raises:
        DatabaseExistsError: a role of that name exists.
    """
    await _create(
        connection,
        name,
        f"{_TENANT_ROLE} CONNECTION LIMIT {int(connection_limit)} PASSWORD {quote_literal(verifier)}",
        *settings,
    )


async def create_owner(connection: Connection, name: str) -> None:
    """Create the NOLOGIN role that owns tenants' databases and their tables.

    Raises:
        DatabaseExistsError: a role of that name exists.
    """
    await _create(connection, name, _OWNER_ROLE)


async def _create(connection: Connection, name: str, attributes: str, *settings: str) -> None:
    try:
        await execute_unflushed(connection, f"CREATE ROLE {quote_identifier(name)} {attributes}", *settings)
    except asyncpg.PostgresError as exc:
        if sqlstate_of(exc) in (DUPLICATE_OBJECT, UNIQUE_VIOLATION):
            raise DatabaseExistsError(f"role {name!r} exists already, and is not adopted") from exc
        raise


async def drop(connection: Connection, name: str) -> None:
    """Drop a role, after its database was dropped. Does nothing if there is no such role.

    Raises:
        asyncpg.DependentObjectsStillExistError: it has rights in a database that still exists (2BP01).
    """
    await connection.execute(f"DROP ROLE IF EXISTS {quote_identifier(name)}")


async def exists(connection: Connection, name: str) -> bool:
    """Whether a role of that name exists."""
    return await connection.fetchval("SELECT 1 FROM pg_roles WHERE rolname = $1", name) is not None


async def states(connection: Connection, stem: str) -> dict[str, RoleState]:
    """Return the state of every role with a name that begins with ``stem``, by name."""
    rows = await connection.fetch(
        "SELECT rolname, rolcanlogin, rolconnlimit, "
        "EXISTS (SELECT FROM pg_stat_activity WHERE usesysid = pg_roles.oid) AS connected, "
        "coalesce(granted_on.names, '{}') AS connect_granted_on FROM pg_roles LEFT JOIN ("
        "SELECT granted.grantee, array_agg(datname::text) AS names FROM pg_database, aclexplode(datacl) AS granted "
        "WHERE granted.privilege_type = 'CONNECT' GROUP BY 1) AS granted_on ON granted_on.grantee = oid "
        "WHERE starts_with(rolname::text, $1) ORDER BY rolname",
        stem,
    )
    return {
        row["rolname"]: RoleState(
            row["rolcanlogin"], row["rolconnlimit"], row["connected"], frozenset(row["connect_granted_on"])
        )
        for row in rows
    }


async def is_superuser(connection: Connection) -> bool:
    """Whether the connection's role is a superuser."""
    return bool(await connection.fetchval("SELECT rolsuper FROM pg_roles WHERE rolname = current_user"))


async def is_member(connection: Connection, name: str) -> bool:
    """Whether the administrator has the rights of the role ``name`` and may SET ROLE to it."""
    can_set = "SET" if version(connection) >= 16 else "MEMBER"
    query = "SELECT pg_has_role(current_user, $1::name, 'USAGE') AND pg_has_role(current_user, $1::name, $2)"
    return bool(await connection.fetchval(query, name, can_set))


async def join(connection: Connection, name: str) -> None:
    """Make the administrator a member of ``name``, with its rights and SET ROLE. A superuser need not be one."""
    options = " WITH INHERIT TRUE, SET TRUE" if version(connection) >= 16 else ""
    await connection.execute(f"GRANT {quote_identifier(name)} TO CURRENT_USER{options}")


async def leave(connection: Connection, name: str) -> None:
    """Undo ``join``. The right to administer the role, which its creator has, is another grant, and stays."""
    await connection.execute(f"REVOKE {quote_identifier(name)} FROM CURRENT_USER")


async def set_login(connection: Connection, name: str, allowed: bool) -> None:
    """Give a role LOGIN or NOLOGIN. Its open connections stay, see ``terminate``.

    Raises:
        ProvisioningError: there is no such role.
    """
    await _alter(connection, name, "LOGIN" if allowed else "NOLOGIN")


async def expire(connection: Connection, name: str) -> None:
    """End a temporary login: neither its password nor LOGIN is left. Its open connections stay.

    Raises:
        ProvisioningError: there is no such role.
    """
    await _alter(connection, name, "NOLOGIN PASSWORD NULL VALID UNTIL '-infinity'")


async def set_password(connection: Connection, name: str, *, verifier: str) -> None:
    """Change a role's password. Its open connections stay.

    Args:
        connection: To any database of the server.
        name: The role.
        verifier: The result of ``scram_verifier`` for the password.

    Raises:
        ProvisioningError: there is no such role.
    """
    await _alter(connection, name, f"PASSWORD {quote_literal(verifier)}")


async def set_connection_limit(connection: Connection, name: str, limit: int) -> None:
    """Set how many connections a role may have at once. Its open connections stay.

    Raises:
        ProvisioningError: there is no such role.
    """
    await _alter(connection, name, f"CONNECTION LIMIT {int(limit)}")


async def _alter(connection: Connection, name: str, attributes: str) -> None:
    try:
        await connection.execute(f"ALTER ROLE {quote_identifier(name)} {attributes}")
    except asyncpg.UndefinedObjectError as exc:
        raise ProvisioningError(f"role {name!r} does not exist; run: tenancy reconcile") from exc


@asynccontextmanager
async def joined(connection: Connection, *names: str) -> AsyncIterator[None]:
    """Run the body with the rights of these roles. A superuser has them anyway.

    An administrator who is not a superuser is a member of a tenant's role only for as long as necessary: PostgreSQL
    becomes slow for a role with thousands of memberships.
    """
    wanted = () if await is_superuser(connection) else names
    try:
        for name in wanted:
            await join(connection, name)
        yield
    finally:
        for name in wanted:
            if not connection.is_closed():
                with suppress(asyncpg.UndefinedObjectError):  # the body has dropped or renamed it
                    await leave(connection, name)


async def terminate(connection: Connection, role: str, *, timeout: float) -> None:
    """End every connection of ``role``, after its logins were blocked, and wait until none is left.

    Raises:
        TimeoutError: some are left after ``timeout`` seconds.
    """
    async with asyncio.timeout(timeout):
        # a login that succeeded just before appears among the connections a moment later: check again
        looks_left = 2
        while looks_left:
            looks_left = 2 if await end_connections(connection, role) else looks_left - 1
            if looks_left:
                await asyncio.sleep(POLL_SECONDS)


async def end_connections(connection: Connection, role: str, pids: Sequence[int] | None = None) -> bool:
    """End the present connections of ``role``, or those with these ``pids``; return whether there were any."""
    query = (
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE usename = $1 AND ($2::text[] IS NULL OR pid = ANY ($2::text[]::int[]))"
    )
    # asyncpg knows the type text[], and would ask the server for int[], which takes 10 ms
    texts = None if pids is None else [str(pid) for pid in pids]
    try:
        return bool(await connection.fetch(query, role, texts))
    except asyncpg.InsufficientPrivilegeError:
        try:
            async with joined(connection, role):
                return bool(await connection.fetch(query, role, texts))
        except asyncpg.PostgresError as exc:
            if sqlstate_of(exc) not in (INSUFFICIENT_PRIVILEGE, CONCURRENT_UPDATE):
                raise
            return True  # another administrator has just left the role: there may be some, the caller checks again
