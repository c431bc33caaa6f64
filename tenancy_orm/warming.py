"""``Warming``: after an opening, connects to the tenants that seem to be busy before their first requests come."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Final
from uuid import UUID

from .authentication.directory import Directory
from .control.database import ControlDatabase
from .control.names import Names
from .errors import TenancyError
from .postgres.failures import SERVER_FAILURES
from .postgres.login import reason_of
from .registry.lifecycle import check_usable
from .routing import Router
from .routing.sessions import warm
from .servers import Servers
from .servers.activity import read_activity
from .tenant import Tenant

logger = logging.getLogger("tenancy_orm")

_AT_ONCE: Final = 4  # tenants that are connected to at the same moment
_PAUSE: Final = 0.1  # seconds until it looks again whether requests wait
_LONGEST: Final = 60.0  # seconds: by then the busy ones have connections of their own

_USABLE = """
    SELECT id, server, database_name FROM tenancy.tenants
    WHERE status IN ('trial', 'active') AND server = $1 AND database_name = ANY($2::text[])
    """


class Warming:
    """Looks the busiest tenants up and opens a connection for each, where that takes nothing from anybody.

    It opens no connection while requests wait for one, closes none to make room, and leaves half of the process's
    connections to a server free. What fails is logged, and otherwise left to the tenants' first requests.

    Args:
        control: The control database.
        servers: The servers.
        names: How this installation's databases are named.
        directory: Looks the tenants up, and keeps them.
        router: Has their connections.
        count: How many tenants.
    """

    def __init__(
        self,
        *,
        control: ControlDatabase,
        servers: Servers,
        names: Names,
        directory: Directory,
        router: Router,
        count: int,
    ) -> None:
        self._control = control
        self._servers = servers
        self._names = names
        self._directory = directory
        self._router = router
        self._count = count
        self._found = 0
        self._connected = 0
        self._failed = 0
        self._full: set[str] = set()  # servers to which no further connection is opened

    async def run(self) -> None:
        """Do it once, for a minute at most, and log how many tenants have a connection then."""
        try:
            async with asyncio.timeout(_LONGEST):
                await self._run()
        except TimeoutError:
            logger.info("warming tenants took more than %g s, and ends", _LONGEST)
        except Exception:
            # the application works without
            logger.exception("tenants could not be warmed")
        logger.info(
            "%d of %d busy tenants have a connection before their first request; %d could not be reached",
            self._connected,
            self._found,
            self._failed,
        )

    async def _run(self) -> None:
        ranked: dict[UUID, tuple[tuple[bool, int], str]] = {}
        for found in await asyncio.gather(*map(self._busy, list(self._servers))):
            ranked.update(found)
        busiest = sorted(ranked, key=lambda tenant_id: ranked[tenant_id][0], reverse=True)[: self._count]
        self._found = len(busiest)
        remaining = iter(busiest)

        async def work() -> None:
            for tenant_id in remaining:
                await self._warm(tenant_id, ranked[tenant_id][1])

        async with asyncio.TaskGroup() as group:
            for _ in range(_AT_ONCE):
                group.create_task(work())

    async def _busy(self, server: str) -> Mapping[UUID, tuple[tuple[bool, int], str]]:
        """Return the usable tenants of a server with how busy each seems to be, and the server."""
        try:
            # more than are wanted: some are suspended or deleted
            activity = await read_activity(self._servers[server], self._names.tenant_stem, most=4 * self._count + 100)
            rows = await self._control.fetch(_USABLE, server, list(activity))
        except (TenancyError, *SERVER_FAILURES) as exc:
            logger.warning("the tenants of server %s are not warmed: %s", server, reason_of(exc))
            return {}
        return {row.id: (activity[row.database_name], server) for row in rows}

    async def _warm(self, tenant_id: UUID, server: str) -> None:
        try:
            tenant = await self._directory.tenant(tenant_id)
            check_usable(tenant)
            while server not in self._full:
                outcome = await warm(self._router, tenant)
                if outcome == "full":
                    self._full.add(server)
                elif outcome == "connected":
                    self._connected += 1
                    return
                else:
                    await asyncio.sleep(_PAUSE)
        except (TenancyError, *SERVER_FAILURES) as exc:
            self._failed += 1
            logger.debug("a tenant could not be warmed: %s", reason_of(exc))


class NewTenantConnections:
    """Keeps the connection that proves a new tenant's login for its first request.

    Args:
        servers: The servers.
        router: Has the tenants' connections.
    """

    def __init__(self, servers: Servers, router: Router) -> None:
        self._servers = servers
        self._router = router

    async def open(self, tenant: Tenant) -> bool:
        """Log in as the tenant and verify its marker, as a session does; False if that would take from others.

        Raises:
            TenancyError: as a session's first statement.
        """
        # a creation proves the login to PostgreSQL itself, not to a pooler in front of it
        if tenant.placement is None or self._servers[tenant.placement.server].is_pooled:
            return False
        return await warm(self._router, tenant, ask=False) == "connected"

    def forget(self, tenant_id: UUID) -> None:
        """Close what is kept for a tenant: its database will be dropped."""
        self._router.retire(tenant_id)


__all__ = ["NewTenantConnections", "Warming"]
