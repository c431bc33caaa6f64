"""The preparation of a server before it can hold tenants: the owner role, and databases without rights for PUBLIC."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Final

import asyncpg

from ...cancellation import run_to_completion
from ...errors import DatabaseExistsError
from ...postgres import connections, locks
from ...postgres.connections import Connection
from ...postgres.errors import sqlstate_of
from ...servers.identity import ensure_identity
from ...servers.server import Server
from ..rights import public_access, role_settings
from ..rights.public_access import RACES, Closing, SharedDatabases
from ..rights.role_settings import RoleSettings
from ..rights.tenant_rights import TenantRights
from ..server_objects import roles
from ..server_objects.admin_connections import AdminConnections

logger = logging.getLogger("tenancy_orm.provisioning")

LOCK: Final = "prepare"
"""What the advisory lock is on that one preparation of a server holds at a time."""


async def prepare(
    server: Server,
    admin_connections: AdminConnections,
    *,
    owner: str,
    shared: SharedDatabases,
    revoke_public: bool,
    configured: Mapping[str, str | None],
    rights: TenantRights,
    timeout: float,
) -> RoleSettings:
    """Bring ``server`` into the state that provisioning relies on. It reads first, so repeating it writes nothing.

    - The role ``owner`` exists, and an administrator who is not a superuser is a member of it.
    - PUBLIC has no rights on ``postgres``, ``template1``, the database of the administrator's URL, and the control
      database if it is on this server. If the administrator may not revoke these, a warning has the statement that a
      superuser must run. Without ``revoke_public`` nothing is revoked, and a warning names these databases.

    Returns:
        The settings of tenants' roles on this server, by ``configured``, which is ``role_settings`` of the
        configuration. A warning names those that the administrator may not set.

    Raises:
        ConfigurationError: PostgreSQL refuses a value of ``configured``, or does not have one of the ``rights``; or a
            role would lose access to a database, and nothing was changed.
        TimeoutError: another preparation did not finish within ``timeout`` seconds.
        asyncpg.InsufficientPrivilegeError: the administrator may not create roles.
        ServerUnavailableError: the server does not answer.
    """
    key = locks.lock_key(LOCK)
    connection = await admin_connections.acquire(server, key, timeout=timeout)
    try:
        rights.check_version(server.name, connections.version(connection))
        async with asyncio.timeout(timeout):
            closings = await shared.closings(connection, server.name)
            if revoke_public:
                public_access.refuse_loss(closings)
            await _prepare_owner(connection, owner)
            await _retry(partial(ensure_identity, connection, owner))
            for closing in closings:
                if revoke_public:
                    await public_access.close(connection, closing)
                else:
                    _tell_open(closing)
            settings = await role_settings.resolve(connection, configured)
            await role_settings.warn(connection, server.name, settings)
            await role_settings.verify(connection, server.name, settings)
            return settings
    finally:
        await run_to_completion(admin_connections.release(server, connection, key))


async def _prepare_owner(connection: Connection, owner: str) -> None:
    if not await roles.exists(connection, owner):
        with suppress(DatabaseExistsError):  # another process was faster; this role alone is shared
            await roles.create_owner(connection, owner)
    if not await roles.is_member(connection, owner):
        await _retry(partial(roles.join, connection, owner))


def _tell_open(closing: Closing) -> None:
    logger.warning(
        "provisioning.revoke_public is off: every role, a tenant's too, can connect to database %s on server %s, make "
        "temporary tables, take advisory locks and see what PUBLIC may see there; tenants' own databases stay closed",
        closing.database,
        closing.server,
    )


async def _retry(work: Callable[[], Awaitable[None]], *, attempts: int = 50) -> None:
    for remaining in reversed(range(attempts)):
        try:
            await work()
        except asyncpg.PostgresError as exc:
            if sqlstate_of(exc) not in RACES or not remaining:
                raise
            await asyncio.sleep(connections.POLL_SECONDS)
        else:
            return
