"""``PreparedServers``: the servers that this process has prepared for tenants, and the settings of new roles there."""

from __future__ import annotations

import asyncio
from collections import defaultdict

from ...config import TenancyConfig
from ...context import refuse_while_bound
from ...control.database import ControlDatabase
from ...control.names import Names
from ...errors import ProvisioningError, TenancyError
from ...loops import HomeLoop
from ...postgres import errors as postgres_errors
from ...postgres.errors import describe, sqlstate_of
from ...postgres.failures import SERVER_FAILURES
from ...servers import Server, Servers
from ..rights.public_access import SharedDatabases, read_control
from ..rights.role_settings import RoleSettings
from ..rights.tenant_rights import TenantRights
from ..server_objects.admin_connections import AdminConnections
from .steps import prepare


class PreparedServers:
    """Prepares each server before its first use in this process, and again after its row has changed.

    Args:
        config: ``provisioning`` is read from it.
        control: The control database. PUBLIC loses its rights on it if it is on one of the servers.
        servers: The servers by name.
        names: Of this installation.
        admin_connections: Holds the lock of a server while it is prepared.
    """

    def __init__(
        self,
        config: TenancyConfig,
        control: ControlDatabase,
        servers: Servers,
        names: Names,
        admin_connections: AdminConnections,
    ) -> None:
        self._config = config
        self._control = control
        self._servers = servers
        self._names = names
        self._admin_connections = admin_connections
        self._home = HomeLoop()
        # by server: the settings of new roles
        self._settings: dict[str, RoleSettings] = {}
        # by server: held while it is prepared
        self._preparing: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        servers.on_change(self._forget)

    async def server(self, name: str) -> Server:
        """Return a server; it is prepared if this process has not done so.

        Raises:
            TenancyError: as ``Provisioner.prepare_server``.
        """
        self._home.check()
        if name not in self._settings:
            await self.prepare(name)
        return self._servers[name]

    async def settings(self, name: str) -> RoleSettings:
        """Return the settings of new roles on a server.

        Raises:
            TenancyError: as ``server``.
        """
        # its row may have changed since it was prepared
        while (settings := self._settings.get(name)) is None:
            await self.prepare(name)
        return settings

    async def with_settings(self, name: str) -> tuple[Server, RoleSettings]:
        """Return a server, prepared, and the settings of new roles there.

        Raises:
            TenancyError: as ``server``.
        """
        return await self.server(name), await self.settings(name)

    async def prepare(self, name: str) -> None:
        """Prepare a server now, also if this process has done so before; see ``Provisioner.prepare_server``."""
        refuse_while_bound("preparing a server")
        self._home.check()
        server = self._servers[name]
        async with self._preparing[name]:
            settings = await self._prepare(server)
            if self._servers.get(name) is server:
                self._settings[name] = settings

    async def prepare_unknown(self, server: Server) -> None:
        """Prepare a server that has no row yet; see ``Provisioner.prepare_server``."""
        refuse_while_bound("preparing a server")
        await self._prepare(server)

    async def _prepare(self, server: Server) -> RoleSettings:
        config = self._config
        try:
            return await prepare(
                server,
                self._admin_connections,
                owner=self._names.owner,
                shared=SharedDatabases(config.name_prefix, await read_control(self._control, config)),
                revoke_public=config.provisioning.revoke_public,
                configured=config.provisioning.role_settings,
                rights=TenantRights.of(config, self._names.owner),
                timeout=config.provisioning.timeout,
            )
        except TenancyError:
            raise
        except SERVER_FAILURES as exc:
            raise ProvisioningError(
                f"server {server.name!r} could not be prepared ({describe(exc)}){_remedy(server, exc)}", step="prepare"
            ) from exc

    def _forget(self, name: str) -> None:
        """Prepare a server again before the next creation on it: its row has changed."""
        self._settings.pop(name, None)


def _remedy(server: Server, error: BaseException) -> str:
    match sqlstate_of(error):
        case postgres_errors.INSUFFICIENT_PRIVILEGE:
            return (
                "; its administrator needs CREATEDB and CREATEROLE on PostgreSQL 16 and later, or must be a superuser"
            )
        case postgres_errors.INVALID_PASSWORD | postgres_errors.INVALID_AUTHORIZATION:
            return (
                "; correct the administrator's login: in the configuration, or, for a server with addresses of its own "
                f"in the control database: tenancy servers update {server.name} --admin ... --password-stdin"
            )
    return ""


__all__ = ["PreparedServers"]
