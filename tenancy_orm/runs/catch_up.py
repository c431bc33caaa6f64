"""``CatchUp``: upgrades tenants that older code created after all the others had been upgraded."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Sequence
from contextvars import Context
from dataclasses import dataclass
from uuid import UUID

from ..audit.actor import SYSTEM, Actor
from ..errors import MigrationError, TenantProvisioningError
from ..migrations.failures import describe
from ..migrations.plan import Plan, format_revision
from ..provisioning.templates import SchemaSource
from ..tenant import Status, Tenant
from .migrator import FleetMigrator
from .report import FleetReport

logger = logging.getLogger("tenancy_orm.migrations")

WAIT_SECONDS = 10.0
"""How long after its beginning the uses of a tenant wait for its upgrade; later ones are refused at once."""

_FAILED_SECONDS = 60.0  # for how long a tenant is used as it is after its upgrade has failed, or is not to be done
_IDLE_SECONDS = 5.0  # for how long no tenant is looked at after the fleet was found at another revision
_SERVED = frozenset({Status.TRIAL, Status.ACTIVE})


@dataclass(frozen=True, slots=True)
class CatchUpReport:
    """What ``CatchUp.run`` did; ``report.chores["catch_up"]`` of housekeeping.

    ``upgraded`` has the slugs of the tenants that were upgraded, ``errors`` a line for each that failed.
    """

    upgraded: tuple[str, ...] = ()
    errors: tuple[str, ...] = ()


class CatchUp:
    """Upgrades tenants that are behind a fleet that was upgraded before.

    In a rolling deploy older code goes on to create tenants at the former revision, after the fleet's migration has
    ended. Only tenants that no migration has ever changed are upgraded here, and only by code with the head that the
    last successful migration of the whole fleet brought about. So older code does nothing, a new release migrates no
    fleet by being started, and a tenant that was downgraded on purpose stays as it is.

    Args:
        migrations: Migrates tenants.
        schema: The schema of the code that runs.
    """

    def __init__(self, migrations: FleetMigrator, schema: SchemaSource) -> None:
        self._migrations = migrations
        self._services = migrations.services
        self._schema = schema
        self._enabled = self._services.config.migrations is not None and self._services.config.migration.catch_up
        self._head: str | None = None
        self._plan: Plan | None = None
        self._slots = asyncio.Semaphore(self._services.config.provisioning.concurrency)
        self._running: dict[UUID, tuple[asyncio.Task[None], float]] = {}  # until when a use waits for it
        self._settled: dict[UUID, float] = {}  # until when a tenant is used as it is
        self._idle_until = 0.0  # until when every tenant is

    async def run(self, *, actor: Actor = SYSTEM) -> CatchUpReport:
        """Upgrade every tenant that is behind; a failure does not stop the others.

        Raises:
            ControlUnavailableError: the control database does not answer.
        """
        if not self._enabled:
            return CatchUpReport()
        return await self._upgrade(await self._behind(None) or (), actor)

    def before_use(self, tenant: Tenant) -> Awaitable[None] | None:
        """Return what upgrades a tenant before it is used; None if it can be used at once, as in the common case.

        Concurrent calls share one upgrade, which a cancellation of the caller does not end. If it fails, the tenant is
        used as it is.

        Awaiting it raises:
            TenantProvisioningError: the upgrade takes longer than ``WAIT_SECONDS``; it goes on.
        """
        if not self._enabled or tenant.schema_revision is None or tenant.status not in _SERVED:
            return None
        if tenant.schema_revision == self._head:
            return None
        if time.monotonic() < max(self._idle_until, self._settled.get(tenant.id, 0.0)):
            return None
        return self._wait(tenant)

    async def _wait(self, tenant: Tenant) -> None:
        task, until = self._running.get(tenant.id) or self._begin(tenant)
        # from its beginning: requests for a tenant with a long upgrade must not pile up
        await asyncio.wait({task}, timeout=max(0.0, until - time.monotonic()))
        if not task.done() or task.cancelled():
            raise TenantProvisioningError(tenant.slug, reason="its schema is being upgraded")

    def _begin(self, tenant: Tenant) -> tuple[asyncio.Task[None], float]:
        # unbound: the upgrade is an operator's work, whoever runs now
        task = asyncio.get_running_loop().create_task(self._upgrade_one(tenant), context=Context())
        task.add_done_callback(lambda _: self._running.pop(tenant.id, None))
        self._running[tenant.id] = begun = task, time.monotonic() + WAIT_SECONDS
        return begun

    async def close(self) -> None:
        """End the upgrades that run; whatever they have not committed is rolled back."""
        tasks = [task for task, _ in self._running.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _upgrade_one(self, tenant: Tenant) -> None:
        try:
            # in a thread: it reads every revision
            self._head = self._head or await asyncio.to_thread(self._schema.head)
            if tenant.schema_revision == self._head:
                return
            behind = await self._behind(tenant.id)
            if behind is None:
                self._idle_until = time.monotonic() + _IDLE_SECONDS
                return
            # as many at once as there are creations: each needs an administrative connection
            async with self._slots:
                if (await self._upgrade(behind, SYSTEM)).upgraded:
                    return
        except Exception as exc:  # noqa: BLE001 - env.py and revisions may raise anything, and no request fails for it
            logger.warning("tenant %s is not upgraded before its use: %s", tenant.slug, describe(exc))
        self._settle(tenant.id)

    def _settle(self, tenant_id: UUID) -> None:
        now = time.monotonic()
        self._settled = {known: until for known, until in self._settled.items() if until > now}
        self._settled[tenant_id] = now + _FAILED_SECONDS

    async def _behind(self, tenant_id: UUID | None) -> list[Tenant] | None:
        """Return the tenants to upgrade; None if the fleet is not at the head of the code that runs."""
        registry = self._services.registry
        fleet = await registry.fleet_revision()
        if fleet is None or fleet != await asyncio.to_thread(self._schema.head):
            return None
        return await registry.created_behind(fleet, tenant_id)

    async def _upgrade(self, tenants: Sequence[Tenant], actor: Actor) -> CatchUpReport:
        if not tenants:
            return CatchUpReport()
        plan = await self._load_plan()
        known = [tenant for tenant in tenants if _can_upgrade(plan, tenant)]
        if not known:
            return CatchUpReport()
        # a tenant that does not pass is not to stop the others
        report = await self._migrations.execute(plan, known, checks="in_place")
        await self._record(report, {tenant.id: tenant for tenant in known}, actor)
        done = tuple(outcome.slug for outcome in report.outcomes if outcome.ok)
        return CatchUpReport(done, tuple(f"{slug}: {reason}" for slug, reason in report.reasons.items()))

    async def _load_plan(self) -> Plan:
        head = await asyncio.to_thread(self._schema.head)
        if self._plan is None or format_revision(self._plan.environment.script.revision_map._real_heads) != head:
            self._plan = Plan.of(await self._migrations.environment(), "upgrade", "heads")
        return self._plan

    async def _record(self, report: FleetReport, known: dict[UUID, Tenant], actor: Actor) -> None:
        for outcome in report.changed:
            logger.info("tenant %s was behind the fleet, and is at %s now", outcome.slug, outcome.after)
            await self._services.registry.record(
                outcome.tenant_id,
                "tenant.catch_up",
                detail={"before": known[outcome.tenant_id].schema_revision, "after": outcome.after},
                actor=actor,
            )


def _can_upgrade(plan: Plan, tenant: Tenant) -> bool:
    """Whether this code knows the tenant's revision; newer code's is none of its business."""
    try:
        plan.path_from(frozenset((tenant.schema_revision or "").split(",")))
    except MigrationError as exc:
        logger.info("tenant %s is left as it is: %s", tenant.slug, exc)
        return False
    return True


__all__ = ["CatchUp", "CatchUpReport"]
