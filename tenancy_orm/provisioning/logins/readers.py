"""``Readers``: logins of limited time that read one tenant's whole database, for dumps of it."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import MappingProxyType

from ...cancellation import run_to_completion
from ...config import TenancyConfig
from ...context import refuse_while_bound
from ...control.names import Names
from ...loops import HomeLoop
from ...postgres import connections, locks
from ...postgres.connections import Connection
from ...postgres.failures import SERVER_FAILURES
from ...postgres.quoting import quote_identifier, quote_literal
from ...servers import Server, Servers
from ...tenant import Tenant, placement_of
from ..server_objects import removal
from ..server_objects.admin_connections import AdminConnections
from ..server_objects.blockers import Blockers
from ..server_objects.replaced_databases import refuse_replaced
from .copy_logins import CopyLogin, create_reader, end_login, see_all_rows

_END = """
SELECT pg_catalog.pg_terminate_backend(pid) FROM pg_catalog.pg_stat_activity WHERE usename = {literal};
DROP ROLE IF EXISTS {name}
"""


@dataclass(frozen=True, slots=True)
class Reader:
    """A login that reads one tenant's database.

    Attributes:
        login: The login.
    """

    login: CopyLogin
    _connection: Connection = field(repr=False)

    def environment(self) -> dict[str, str]:
        """Return libpq's variables for a program, the password included."""
        return self.login.environment()

    async def connect(
        self, *, timeout: float, settings: Mapping[str, str] = MappingProxyType({}), purpose: str = "tenancy-reader"
    ) -> Connection:
        """Open a connection; the caller closes it.

        Raises:
            asyncpg.PostgresError, asyncpg.InterfaceError, OSError: the server refuses, or does not answer.
            CrossTenantError: a tenant is bound.
        """
        return await self.login.connect(timeout=timeout, settings=settings, purpose=purpose)

    async def see_all_rows(self) -> None:
        """Let the login read rows that row security hides from owners as well (FORCE ROW LEVEL SECURITY).

        Raises:
            ProvisioningError: the administrator may not do that.
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("reading a tenant's whole database")
        await see_all_rows(self._connection, self.login.role)


class Readers:
    """Makes logins that read a tenant's database (``tenancy.internals.provisioner.readers``).

    Such a login is a member of the owner of tenants' databases, and of the tenant's role if that owns something. It is
    no administrator, expires, and is dropped at the end. ``reconcile`` drops what a killed process leaves.

    Args:
        config: ``provisioning.timeout`` is read from it.
        servers: The servers by name.
        names: Of this installation.
        admin_connections: Holds the lock of a login while that is used.
        blockers: Returns the ``Blockers`` of a server.
    """

    def __init__(
        self,
        config: TenancyConfig,
        servers: Servers,
        names: Names,
        admin_connections: AdminConnections,
        blockers: Callable[[Server], Blockers],
    ) -> None:
        self._config = config
        self._servers = servers
        self._names = names
        self._admin_connections = admin_connections
        self._blockers = blockers
        self._home = HomeLoop()

    @asynccontextmanager
    async def open(self, tenant: Tenant, *, seconds: float) -> AsyncIterator[Reader]:
        """Make a login for the body.

        Args:
            tenant: The tenant.
            seconds: For how long it is valid.

        Raises:
            TenantNotFoundError: the tenant has been purged.
            ProvisioningError: another database has replaced the one that the tenant's row names.
            ServerUnavailableError: the server does not answer.
            asyncpg.PostgresError, OSError, TimeoutError: the server refuses.
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("reading a tenant's whole database")
        self._home.check()
        place = placement_of(tenant)
        server, timeout = self._servers[place.server], self._config.provisioning.timeout
        name = self._names.scratch(secrets.token_hex(8))
        # its lock tells reconcile that the login is in use
        connection = await self._admin_connections.acquire(server, locks.lock_key(name), timeout=timeout)
        try:
            async with asyncio.timeout(timeout):
                await refuse_replaced(connection, place.database)
                login = await create_reader(connection, server.dsn, self._names, name, place, seconds=seconds)
            yield Reader(login, connection)
        finally:
            await run_to_completion(self._remove(connection, server, name))

    async def _remove(self, connection: Connection, server: Server, name: str) -> None:
        """Drop the login, over another connection if the first one was lost."""
        blockers = self._blockers(server)
        try:
            async with asyncio.timeout(self._config.provisioning.timeout):
                try:
                    # mostly enough, in one round trip
                    await connection.execute(_END.format(literal=quote_literal(name), name=quote_identifier(name)))
                    return
                except SERVER_FAILURES:
                    if not await connections.is_alive(connection):
                        connection.terminate()
                        connection = await blockers.connect(purpose="tenancy-reader")
                await end_login(connection, blockers, name)
                await removal.drop_retired(connection, blockers, self._names, name)
        finally:
            await self._admin_connections.release(server, connection, locks.lock_key(name))


__all__ = ["Reader", "Readers"]
