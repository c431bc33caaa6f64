"""The preparation of a server before it can hold tenants: the owner role, and databases without rights for PUBLIC."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from functools import partial

import asyncpg
from sqlalchemy import text

from ..cancellation import run_to_completion
from ..control.database import ControlDatabase
from ..errors import DatabaseExistsError
from ..postgres import connections, locks
from ..postgres.connections import Connection
from ..postgres.errors import CONCURRENT_UPDATE, DUPLICATE_OBJECT, UNIQUE_VIOLATION, sqlstate_of
from ..postgres.quoting import quote_identifier
from ..routing.servers import Server
from . import databases, role_settings, roles
from .blockers import Blockers
from .role_settings import RoleSettings
from .tenant_rights import TenantRights

logger = logging.getLogger("tenancy_orm.provisioning")

_LOCK = "prepare"

# The errors of two installations that prepare the same server at the same time.
_RACES = (CONCURRENT_UPDATE, DUPLICATE_OBJECT, UNIQUE_VIOLATION)


async def prepare(
    server: Server,
    blockers: Blockers,
    *,
    owner: str,
    control: ControlDatabase,
    configured: Mapping[str, str | None],
    rights: TenantRights,
    timeout: float,
) -> RoleSettings:
    """Bring ``server`` into the state that provisioning relies on. It reads first, so repeating it writes nothing.

    - The role ``owner`` exists, and an administrator who is not a superuser is a member of it.
    - PUBLIC has no rights on ``postgres``, ``template1``, the database of the administrator's URL, and the control
      database if it is on this server. If the administrator may not revoke these, a warning has the statement that a
      superuser must run.

    Returns:
        The settings of tenants' roles on this server, by ``configured``, which is ``role_settings`` of the
        configuration. A warning names those that the administrator may not set.

    Raises:
        ConfigurationError: PostgreSQL refuses a value of ``configured``, or does not have one of the ``rights``.
        TimeoutError: another preparation did not finish within ``timeout`` seconds.
        asyncpg.InsufficientPrivilegeError: the administrator may not create roles.
        ServerUnavailableError: the server does not answer.
    """
    connection = await blockers.connect()
    try:
        rights.check_version(server.name, connections.version(connection))
        await locks.lock(connection, locks.lock_key(_LOCK), timeout=timeout)
        async with asyncio.timeout(timeout):
            await _prepare_owner(connection, owner)
            for name, users in (await _databases_to_close(connection, control)).items():
                await _retry(partial(_close, connection, server.name, name, users))
            settings = await role_settings.resolve(connection, configured)
            await role_settings.warn(connection, server.name, settings)
            await role_settings.verify(connection, server.name, settings)
            return settings
    finally:
        await run_to_completion(connections.close(connection))


async def _prepare_owner(connection: Connection, owner: str) -> None:
    if not await roles.exists(connection, owner):
        with suppress(DatabaseExistsError):  # another process was faster; this role alone is shared
            await roles.create_owner(connection, owner)
    if not await roles.is_member(connection, owner):
        await _retry(partial(roles.join, connection, owner))


async def _databases_to_close(connection: Connection, control: ControlDatabase) -> dict[str, set[str]]:
    """The databases that PUBLIC must not connect to, each with the roles (not superusers) that must be able to."""
    found: dict[str, set[str]] = {"postgres": set(), "template1": set()}
    maintenance, administrator, started = await connection.fetchrow(
        "SELECT current_database(), current_user, pg_postmaster_start_time()"
    )
    found.setdefault(maintenance, set())
    if not await roles.is_superuser(connection):
        found[maintenance].add(administrator)
    query = text(
        "SELECT current_database(), current_user, pg_postmaster_start_time(), "
        "(SELECT rolsuper FROM pg_roles WHERE rolname = current_user)"
    )
    async with control.connect() as registry:
        name, user, registry_started, is_superuser = (await registry.execute(query)).one()
    # A server can have many host names. Its start time, in microseconds, identifies it.
    if registry_started == started:
        found.setdefault(name, set()).update(() if is_superuser else (user,))
    return found


async def _close(connection: Connection, server: str, name: str, users: set[str]) -> None:
    if not await databases.is_open_to_public(connection, name):
        return
    with suppress(asyncpg.InsufficientPrivilegeError):  # logged below, as when PostgreSQL only warns
        await databases.close_to_public(connection, name, but=sorted(users))
    if await databases.is_open_to_public(connection, name):
        logger.warning(
            "every role can connect to database %s on server %s, and its administrator may not change that; "
            "run as a superuser: REVOKE ALL ON DATABASE %s FROM PUBLIC",
            name,
            server,
            quote_identifier(name),
        )


async def _retry(work: Callable[[], Awaitable[None]], *, attempts: int = 50) -> None:
    for remaining in reversed(range(attempts)):
        try:
            await work()
        except asyncpg.PostgresError as exc:
            if sqlstate_of(exc) not in _RACES or not remaining:
                raise
            await asyncio.sleep(connections.POLL_SECONDS)
        else:
            return
