"""``Notices``: ends the notices of migrations that were killed, once the databases say what they have left."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

from ..migrations.concurrency import map_concurrently
from ..migrations.connections import Connections, Health
from ..migrations.database import close, read_state, try_lock
from ..migrations.failures import describe
from ..migrations.logs import logger
from ..migrations.plan import format_revision
from ..migrations.scripts import Environment
from ..migrations.services import FleetServices
from ..tenant import Tenant

_CONCURRENCY = 8


@dataclass(frozen=True, slots=True)
class NoticeReport:
    """What ``clear_notices`` did: ``cleared`` has the slugs of tenants, ``errors`` a line for each that failed."""

    cleared: tuple[str, ...] = ()
    errors: tuple[str, ...] = ()


class Notices:
    """Reads the revision of tenants with the notice of a migration that no process runs any more, and records it.

    Whoever migrates a tenant gives notice under the lock in the tenant's database. So where that lock is free, the
    migration has ended, and what the database says holds until the lock is given back.

    Args:
        services: The services of an open ``Tenancy``.
        connections: Connects to the databases.
        environment: The migrations.
    """

    def __init__(self, services: FleetServices, connections: Connections, environment: Environment) -> None:
        self._services = services
        self._connections = connections
        self._environment = environment
        self._health = Health()

    async def clear(self) -> NoticeReport:
        """Do so for every tenant with a notice; a failure does not stop the others."""
        noticed = await self._services.registry.with_notice()
        held = {tenant.id: was_moved for tenant, was_moved in noticed}
        cleared: list[str] = []
        errors: list[str] = []

        async def one(tenant: Tenant) -> None:
            try:
                if await self._clear(tenant, held):
                    cleared.append(tenant.slug)
            except Exception as exc:  # noqa: BLE001 - any error is reported for this tenant
                logger.warning("tenant %s: how its migration has ended is not known: %s", tenant.slug, describe(exc))
                errors.append(f"{tenant.slug}: {describe(exc)}")

        await map_concurrently(one, [tenant for tenant, _ in noticed], _CONCURRENCY)
        return NoticeReport(tuple(sorted(cleared)), tuple(sorted(errors)))

    async def _clear(self, tenant: Tenant, held: dict[UUID, bool]) -> bool:
        target = self._connections.target(tenant, self._health)
        connection = await target.connect()
        try:
            if not await try_lock(connection):
                return False  # it is being migrated
            state = await read_state(connection, self._environment, target, timeout=self._connections.limits.connect)
            revision = format_revision(state.heads)
            if revision != tenant.schema_revision:
                await self._services.provisioner.apply_grants(tenant)
            await self._services.registry.set_revision(tenant.id, revision, held=held[tenant.id])
        finally:
            await close(connection)
        logger.info("tenant %s: a migration was killed, and has left it at %s", tenant.slug, revision or "base")
        return True


__all__ = ["NoticeReport", "Notices"]
