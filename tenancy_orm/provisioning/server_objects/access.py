"""Blocking and unblocking the logins of a tenant's role, by two rights: without either, the role cannot log in.

These are the right to log in (LOGIN), and the right to connect to its database (CONNECT). A tenant can lock the
catalogue row of either, but only while it is connected. So its connections are ended first. If a change does not
succeed at once, its blockers are ended and it is repeated, until the deadline.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from functools import partial

import asyncpg

from ...control.names import login_stem
from ...errors import ProvisioningError
from ...postgres.connections import Connection
from ...postgres.quoting import quote_identifier
from . import roles
from .blockers import Blockers
from .deadlines import timeout_before
from .replaced_databases import refuse_replaced


async def block(connection: Connection, blockers: Blockers, *, database: str, role: str, deadline: float) -> None:
    """Block a role's logins, and end its connections. This works even if the database is already dropped.

    Its temporary logins are ended with it, and do not work again once it is unblocked.

    Args:
        connection: An administrative one.
        blockers: Of its server.
        database: The tenant's database.
        role: The tenant's role.
        deadline: When all must be done, by the clock of the event loop.

    Raises:
        ProvisioningError: the role is missing.
        TimeoutError: the deadline has passed; the message says what was not done.
    """
    left = ["right to connect", "login", "connections"]
    try:
        async with timeout_before(deadline):
            # this releases the role's locks; if it reconnects before its logins are blocked, the blockers end it again
            await roles.end_connections(connection, role)
            await blockers.run(connection, partial(_revoke_connect, connection, database, role), role=role)
            left.remove("right to connect")
            await roles.end_connections(connection, role)
            await blockers.run(connection, partial(roles.set_login, connection, role, False), role=role)
            left.remove("login")
            await _end_temporary_logins(connection, blockers, role, deadline)
            await roles.terminate(connection, role, timeout=max(deadline - asyncio.get_running_loop().time(), 0))
    except TimeoutError as exc:
        raise TimeoutError(f"the role's {', '.join(left)} could not be ended in time") from exc


async def _end_temporary_logins(connection: Connection, blockers: Blockers, role: str, deadline: float) -> None:
    """End the temporary logins for a tenant's role for good, and their connections; ``reconcile`` drops the roles."""
    for name in await roles.states(connection, login_stem(role)):
        await roles.end_connections(connection, name)
        with suppress(ProvisioningError):  # another process has dropped it
            await blockers.run(connection, partial(roles.expire, connection, name), role=name)
        await roles.terminate(connection, name, timeout=max(deadline - asyncio.get_running_loop().time(), 0))


async def unblock(connection: Connection, blockers: Blockers, *, database: str, role: str) -> None:
    """Let a role log in to its own database again.

    Raises:
        ProvisioningError: the role or the database is missing, or another database has replaced it.
    """
    await blockers.run(connection, partial(_grant_connect, connection, database, role), role=role)
    await blockers.run(connection, partial(roles.set_login, connection, role, True), role=role)


async def close_database(connection: Connection, blockers: Blockers, *, database: str, role: str) -> None:
    """Let a role connect to a database no more; its sessions there go on. Does nothing if there is no such database.

    Raises:
        ProvisioningError: the role is missing.
    """
    await blockers.run(connection, partial(_revoke_connect, connection, database, role), role=role)


async def open_database(connection: Connection, blockers: Blockers, *, database: str, role: str) -> None:
    """Let a role connect to a database.

    Raises:
        ProvisioningError: the role or the database is missing, or another database has replaced it.
    """
    await blockers.run(connection, partial(_grant_connect, connection, database, role), role=role)


async def _grant_connect(connection: Connection, database: str, role: str) -> None:
    await refuse_replaced(connection, database)
    try:
        await connection.execute(f"GRANT CONNECT ON DATABASE {quote_identifier(database)} TO {quote_identifier(role)}")
    except (asyncpg.UndefinedObjectError, asyncpg.InvalidCatalogNameError) as exc:
        raise ProvisioningError(f"role or database {role!r} does not exist; run: tenancy reconcile") from exc


async def _revoke_connect(connection: Connection, database: str, role: str) -> None:
    revoke = f"REVOKE CONNECT ON DATABASE {quote_identifier(database)} FROM {quote_identifier(role)}"
    try:
        await connection.execute(revoke)
    except asyncpg.InvalidCatalogNameError:
        return
    except asyncpg.UndefinedObjectError as exc:
        raise ProvisioningError(f"role {role!r} does not exist; run: tenancy reconcile") from exc
