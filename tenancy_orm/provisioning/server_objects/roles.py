"""Statements on roles, one function each, on an administrative asyncpg connection: tenants' roles and the owner role.

An existing role is never adopted: creating over one raises ``DatabaseExistsError``. Dropping is idempotent.

The administrator need not be a superuser: CREATEDB and CREATEROLE are enough from PostgreSQL 16 on, if it is a member
of the owner role (``join``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import asyncpg

from ...errors import DatabaseExistsError, ProvisioningError
from ...postgres.connections import POLL_SECONDS, Connection, execute_unflushed
from ...postgres.errors import DUPLICATE_OBJECT, UNIQUE_VIOLATION, sqlstate_of
from ...postgres.membership import end_connections, is_member, is_superuser, join, joined, leave
from ...postgres.quoting import quote_identifier, quote_literal

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

_UNFINISHED = "tenancy: being created"

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


async def create_sealed(connection: Connection, name: str, *, settings: Sequence[str] = ()) -> None:
    """Create the role of a warm database: as ``create``, but it has no password, and cannot log in.

    Raises:
        DatabaseExistsError: a role of that name exists.
    """
    await _create(connection, name, f"NO{_TENANT_ROLE} CONNECTION LIMIT 0", *settings)


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


def unfinished_statement(name: str) -> str:
    """Return the statement that says of a role that its database, even with its marker, is not whole yet."""
    return f"COMMENT ON ROLE {quote_identifier(name)} IS {quote_literal(_UNFINISHED)}"


async def unfinished(connection: Connection, stem: str) -> list[str]:
    """Return the roles with names that begin with ``stem`` that have what ``unfinished_statement`` says."""
    query = (
        "SELECT rolname::text FROM pg_roles WHERE starts_with(rolname::text, $1) "
        "AND shobj_description(oid, 'pg_authid') = $2 ORDER BY 1"
    )
    return [row[0] for row in await connection.fetch(query, stem, _UNFINISHED)]


async def set_finished(connection: Connection, name: str) -> None:
    """Take back what ``unfinished_statement`` says."""
    await connection.execute(f"COMMENT ON ROLE {quote_identifier(name)} IS NULL")


async def is_unfinished(connection: Connection, name: str) -> bool:
    """Whether a role has what ``unfinished_statement`` says."""
    return name in await unfinished(connection, name)


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


__all__ = [
    "REFUSED_ATTRIBUTES",
    "RoleState",
    "create",
    "create_owner",
    "create_sealed",
    "drop",
    "end_connections",
    "exists",
    "expire",
    "is_member",
    "is_superuser",
    "is_unfinished",
    "join",
    "joined",
    "leave",
    "set_connection_limit",
    "set_finished",
    "set_login",
    "set_password",
    "states",
    "terminate",
    "unfinished",
    "unfinished_statement",
]
