"""``ScratchDatabases``: empty databases for a short time, which a login of their own fills: to try a backup, say."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from ...cancellation import run_to_completion
from ...config import TenancyConfig
from ...context import refuse_while_bound
from ...control.names import Names
from ...loops import HomeLoop
from ...postgres import connections, locks
from ...postgres.connections import Connection
from ...servers import Server
from ..copies.empty_databases import InstalledExtension, create_for_login
from ..logins.copy_logins import CopyLogin, end_login
from ..preparation.prepared_servers import PreparedServers
from ..server_objects import removal
from ..server_objects.admin_connections import AdminConnections
from ..server_objects.blockers import Blockers


@dataclass(frozen=True, slots=True)
class ScratchDatabase:
    """A database for a short time: its server's name, the server's major version, and the login that fills it."""

    server: str
    server_version: int
    login: CopyLogin


class ScratchDatabases:
    """Makes scratch databases (``tenancy.internals.provisioner.scratch_databases``).

    Args:
        config: ``provisioning.timeout`` is read from it.
        prepared: The servers, with their owner roles.
        names: Of this installation.
        admin_connections: Holds the lock of a database while that is used.
        blockers: Returns the ``Blockers`` of a server.
    """

    def __init__(
        self,
        config: TenancyConfig,
        prepared: PreparedServers,
        names: Names,
        admin_connections: AdminConnections,
        blockers: Callable[[Server], Blockers],
    ) -> None:
        self._config = config
        self._prepared = prepared
        self._names = names
        self._admin_connections = admin_connections
        self._blockers = blockers
        self._home = HomeLoop()

    @asynccontextmanager
    async def open(
        self, server: str, *, extensions: Iterable[InstalledExtension] = (), seconds: float
    ) -> AsyncIterator[ScratchDatabase]:
        """Make a database for the body; it is dropped at the end. If the process dies, ``reconcile`` drops it.

        Args:
            server: The server's name.
            extensions: The extensions that it has.
            seconds: For how long its login is valid.

        Raises:
            UnknownServerError: there is no such server.
            ProvisioningError: the server refused.
            ServerUnavailableError: the server does not answer.
            asyncpg.PostgresError, OSError, TimeoutError: it refused, or was too slow.
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("making a scratch database")
        self._home.check()
        found = await self._prepared.server(server)
        blockers = self._blockers(found)
        name = self._names.scratch(secrets.token_hex(8))
        timeout = self._config.provisioning.timeout
        # its lock tells reconcile that the database is in use
        connection = await self._admin_connections.acquire(found, locks.lock_key(name), timeout=timeout)
        try:
            async with asyncio.timeout(timeout):
                login = await create_for_login(
                    connection,
                    blockers,
                    found,
                    self._names,
                    database=name,
                    login=name,
                    seconds=timeout + seconds,
                    extensions=extensions,
                )
            yield ScratchDatabase(server, connections.version(connection), login)
        finally:
            await run_to_completion(self._remove(connection, found, name))

    async def _remove(self, connection: Connection, server: Server, name: str) -> None:
        """Drop everything, over another connection if the first one was lost."""
        blockers = self._blockers(server)
        try:
            async with asyncio.timeout(self._config.provisioning.timeout):
                if not await connections.is_alive(connection):
                    connection.terminate()
                    connection = await blockers.connect(purpose="tenancy-scratch")
                # first: who is no superuser cannot drop a database with sessions of others
                await end_login(connection, blockers, name)
                await removal.drop_database(connection, blockers, name)
                await removal.drop_retired(connection, blockers, self._names, name)
        finally:
            await self._admin_connections.release(server, connection, locks.lock_key(name))


__all__ = ["ScratchDatabase", "ScratchDatabases"]
