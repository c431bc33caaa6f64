"""PostgreSQL extensions of the setting ``extensions``: in templates, and in the databases of existing tenants.

The administrator installs them, since most extensions need a superuser. So they belong to the administrator, and
everybody may use their types and functions, as their scripts grant it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

import asyncpg

from ...cancellation import run_to_completion
from ...config import TenancyConfig
from ...context import refuse_while_bound
from ...errors import ExtensionUnavailableError, ProvisioningError
from ...postgres import connections
from ...postgres.connections import Connection
from ...postgres.quoting import quote_identifier
from ...servers.server import Server
from ..server_objects.blockers import Blockers


class Extensions:
    """The configured extensions on servers and in existing databases.

    Args:
        config: The configuration.
        servers: The servers, by name.
        blockers: Returns the ``Blockers`` of a server.
    """

    def __init__(
        self, config: TenancyConfig, servers: Mapping[str, Server], blockers: Callable[[Server], Blockers]
    ) -> None:
        self._config = config
        self._servers = servers
        self._blockers = blockers

    async def check(self, server: str) -> None:
        """Check that a server has the configured extensions. Without any configured, it is not asked.

        Raises:
            ExtensionUnavailableError: it lacks one.
            UnknownServerError, ServerUnavailableError: as ``Provisioner.connect_admin``.
        """
        refuse_while_bound("looking at a server's extensions")
        if not self._config.extensions:
            return
        connection = await self._blockers(self._servers[server]).connect()
        try:
            await check_available(connection, self._config.extensions, server=server)
        finally:
            await run_to_completion(connections.close(connection))

    async def install(self, server: str, database: str, names: Sequence[str]) -> None:
        """Install extensions in an existing database, as administrator, as a template has them.

        Raises:
            TimeoutError: it took longer than ``provisioning.timeout``.
            asyncpg.PostgresError: the server refuses.
        """
        refuse_while_bound("installing extensions")
        blockers = self._blockers(self._servers[server])
        lock_timeout = self._config.migration.lock_timeout
        settings = {"lock_timeout": f"{round(lock_timeout * 1000)}ms", "statement_timeout": "0"}
        async with asyncio.timeout(self._config.provisioning.timeout):
            connection = await blockers.connect(database, settings=settings, purpose="tenancy-migration")
            try:
                async with blockers.ending(connection):
                    await install(connection, names, server=server)
            finally:
                await run_to_completion(connections.close(connection))


async def check_available(connection: Connection, names: Sequence[str], *, server: str) -> None:
    """Check that a server has the files of these extensions.

    Args:
        connection: To any database of the server.
        names: The extensions.
        server: The server's name, for the error.

    Raises:
        ExtensionUnavailableError: it lacks one.
    """
    if not names:
        return
    query = "SELECT name::text FROM pg_catalog.pg_available_extensions WHERE name::text = ANY($1::text[])"
    found = {row["name"] for row in await connection.fetch(query, list(names))}
    if lacking := [name for name in names if name not in found]:
        raise ExtensionUnavailableError(lacking, server=server)


async def install(connection: Connection, names: Sequence[str], *, server: str) -> None:
    """Install extensions in the database of ``connection``, which is an administrative one, with those they need.

    Args:
        connection: The administrator's.
        names: The extensions.
        server: The server's name, for the error.

    Raises:
        ProvisioningError: the administrator may not create one of them.
    """
    for name in names:
        try:
            await connection.execute(f"CREATE EXTENSION IF NOT EXISTS {quote_identifier(name)} SCHEMA public CASCADE")
        except asyncpg.InsufficientPrivilegeError as exc:
            raise ProvisioningError(
                f"the administrator of server {server!r} may not create extension {name!r} ({exc.args[0]}, 42501); it "
                "must be a superuser, "
                "or the role that a managed service has in place of one",
                step="extensions",
            ) from exc
