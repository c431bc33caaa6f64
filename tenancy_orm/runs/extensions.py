"""A run over the fleet that installs the extensions that tenants lack, and migrates nothing."""

from __future__ import annotations

import time
from collections.abc import Iterable
from uuid import UUID

from ..migrations.concurrency import interleave, map_concurrently
from ..migrations.connections import Connections, Health, placement_of, prepare_servers
from ..migrations.database import Target, close, install, lock, read_state
from ..migrations.failures import describe
from ..migrations.logs import labelled, logger
from ..migrations.selection import Selection
from ..migrations.services import FleetServices
from ..postgres.errors import sqlstate_of
from ..tenant import Tenant, TenantRef
from .report import FleetReport, Progress, TenantOutcome


class ExtensionRun:
    """One run over the fleet.

    Args:
        services: The services of an open ``Tenancy``.
        connections: Connects to the databases.
        concurrency: How many tenants at once.
        progress: Called as the run proceeds.
    """

    def __init__(
        self, services: FleetServices, connections: Connections, *, concurrency: int, progress: Progress | None
    ) -> None:
        self._services = services
        self._connections = connections
        self._concurrency = concurrency
        self._progress = progress
        self._selection = Selection(services.registry)
        self._health = Health()
        self._outcomes: dict[UUID, TenantOutcome] = {}

    async def execute(self, tenants: Iterable[TenantRef] | None) -> FleetReport:
        """Install what ``tenants``, or all, lack, and return the report."""
        started = time.monotonic()
        chosen = await self._selection.choose(tenants)
        names = dict.fromkeys(placement_of(t).server for t in chosen) or dict.fromkeys(self._services.servers)
        await prepare_servers(names, self._prepare_server, self._health)
        if self._progress is not None:
            self._progress.total(len(chosen))
        await map_concurrently(self._install, interleave(chosen), self._concurrency)
        return FleetReport(
            command="install extensions",
            target=", ".join(self._services.config.extensions) or "none",
            outcomes=tuple(self._outcomes[t.id] for t in chosen if t.id in self._outcomes),
            seconds=time.monotonic() - started,
        )

    async def _prepare_server(self, name: str) -> None:
        await self._services.provisioner.extensions.check(name)
        # tenants that are created during the run get the extensions from it
        await self._services.provisioner.template(name)

    async def _install(self, tenant: Tenant) -> None:
        started = time.monotonic()
        installed: tuple[str, ...] = ()
        error: Exception | None = None
        with labelled(tenant.slug):
            try:
                installed = await self._install_missing(self._connections.target(tenant, self._health))
            except Exception as exc:  # noqa: BLE001 - any error is reported for this tenant
                if await self._selection.is_gone(tenant, exc):
                    return
                logger.error("tenant %s: %s", tenant.slug, describe(exc))
                error = exc
        outcome = self._outcomes[tenant.id] = TenantOutcome(
            tenant_id=tenant.id,
            slug=tenant.slug,
            server=placement_of(tenant).server,
            before=tenant.schema_revision,
            after=tenant.schema_revision,
            changed=bool(installed),
            seconds=time.monotonic() - started,
            error=None if error is None else describe(error),
            sqlstate=None if error is None else sqlstate_of(error),
            extensions=installed,
        )
        if self._progress is not None:
            self._progress.done(outcome)

    async def _install_missing(self, target: Target) -> tuple[str, ...]:
        limits, wanted = self._connections.limits, target.extensions
        connection = await target.connect()
        try:
            state = await read_state(connection, None, target, timeout=limits.connect)
            if wanted is None or not wanted.missing(state.extensions):
                return ()
            await lock(connection, timeout=limits.wait)
            # read again: another run may have installed some
            state = await read_state(connection, None, target, timeout=limits.connect)
            if missing := wanted.missing(state.extensions):
                await install(wanted, missing)
            return missing
        finally:
            await close(connection)
