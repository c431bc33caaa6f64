"""``ExtensionWork``: a run that installs the extensions that tenants lack, and migrates nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence

from ..migrations.connections import Connections, prepare_servers
from ..migrations.data_batches import DataObserver
from ..migrations.database import State, Target, close, install, lock, read_state
from ..migrations.failures import describe
from ..migrations.logs import TENANT_FAILED, labelled, logger
from ..migrations.selection import Selection
from ..migrations.services import FleetServices
from ..postgres.errors import sqlstate_of
from ..tenant import Tenant
from .claims import Claimed
from .outages import Outages
from .records import RunRecord, TenantRecord
from .report import TenantOutcome
from .tenant_migration import Begin, MigrationResult
from .work import RunWork


class ExtensionWork(RunWork):
    """What a run that installs extensions does in one process.

    Args:
        services: The services of an open ``Tenancy``.
        connections: Connects to the databases.
    """

    def __init__(self, services: FleetServices, connections: Connections) -> None:
        self._services = services
        self._connections = connections
        self._selection = Selection(services.registry)
        self.outages = Outages(connections, services.config.migration.server_wait)

    holds = False

    async def prepare(self, servers: Iterable[str]) -> None:
        """Check that the servers have the extensions, and build the template on each."""
        names = dict.fromkeys(servers) or dict.fromkeys(self._services.servers)
        await prepare_servers(names, self._prepare_server, self.outages.health)

    async def _prepare_server(self, name: str) -> None:
        await self._services.provisioner.extensions.check(name)
        self.outages.health.answered(name)
        # tenants that are created during the run get the extensions from it
        await self._services.provisioner.template(name)

    async def open(self, record: RunRecord, tenants: Callable[[], Awaitable[Sequence[Tenant]]]) -> None:
        """Do nothing."""

    async def close(self, record: RunRecord, outcomes: Callable[[], Awaitable[list[TenantRecord]]]) -> None:
        """Do nothing."""

    def emit(self, outcome: TenantOutcome) -> None:
        """Log a failure."""
        if outcome.error is not None:
            logger.error(TENANT_FAILED, outcome.slug, outcome.error)

    async def migrate(self, claimed: Claimed, begin: Begin, observe_data: DataObserver) -> MigrationResult:
        """Install what one tenant lacks."""
        tenant, started = claimed.tenant, time.monotonic()
        if tenant.placement is None:
            return MigrationResult(outcome=None)
        installed: tuple[str, ...] = ()
        error: Exception | None = None
        states: list[State] = []
        with labelled(tenant.slug):
            try:
                installed = await self._install_missing(self._connections.target(tenant, self.outages.health), states)
            except asyncio.CancelledError:
                return MigrationResult(outcome=None, is_interrupted=True)
            except Exception as exc:  # noqa: BLE001 - any error is reported for this tenant
                if await self._selection.is_gone(tenant, exc):
                    return MigrationResult(outcome=None)
                # to install what is there already does nothing
                server_started = states[-1].server_started if states else None
                if await self.outages.waits(tenant, exc, since=started, server_started=server_started):
                    return MigrationResult(
                        outcome=None, is_interrupted=True, error=describe(exc), is_lost=server_started is not None
                    )
                error = exc
        outcome = TenantOutcome(
            tenant_id=tenant.id,
            slug=tenant.slug,
            server=tenant.placement.server,
            before=tenant.schema_revision,
            after=tenant.schema_revision,
            changed=bool(installed),
            seconds=time.monotonic() - started,
            error=None if error is None else describe(error),
            sqlstate=None if error is None else sqlstate_of(error),
            extensions=installed,
        )
        return MigrationResult(outcome=outcome)

    async def _install_missing(self, target: Target, states: list[State]) -> tuple[str, ...]:
        limits, wanted = self._connections.limits, target.extensions
        connection = await target.connect()
        try:
            state = await read_state(connection, None, target, timeout=limits.connect)
            states.append(state)
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
