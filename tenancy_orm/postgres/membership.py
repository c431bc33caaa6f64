"""An administrator who is no superuser gets the rights of a role for as long as necessary, to end its sessions too."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress

import asyncpg

from .connections import Connection, version
from .errors import CONCURRENT_UPDATE, INSUFFICIENT_PRIVILEGE, sqlstate_of
from .quoting import quote_identifier


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


__all__ = ["end_connections", "is_member", "is_superuser", "join", "joined", "leave"]
