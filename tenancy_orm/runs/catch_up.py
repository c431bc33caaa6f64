"""``CatchUp``: upgrades tenants that older code created after all the others had been upgraded."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from alembic.util.exc import CommandError

from ..audit.actor import SYSTEM, Actor
from ..errors import MigrationError
from ..migrations.plan import Plan, format_revision
from ..provisioning.templates.building import SchemaSource
from ..tenant import Tenant
from .migrator import FleetMigrator
from .report import FleetReport

logger = logging.getLogger("tenancy_orm.migrations")


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
        self.migrations = migrations
        self.services = migrations.services
        self._schema = schema
        config = self.services.config
        self.enabled = config.migrations is not None and config.migration.catch_up
        """Whether tenants that older code created are upgraded by themselves."""
        self._plan: Plan | None = None

    async def run(self, *, actor: Actor = SYSTEM) -> CatchUpReport:
        """Upgrade every tenant that is behind; a failure does not stop the others.

        Raises:
            ControlUnavailableError: the control database does not answer.
        """
        behind = await self.behind(None) if self.enabled else None
        report = await self.upgrade(behind, actor) if behind else None
        if report is None:
            return CatchUpReport()
        done = tuple(outcome.slug for outcome in report.outcomes if outcome.ok)
        return CatchUpReport(done, tuple(f"{slug}: {reason}" for slug, reason in report.reasons.items()))

    async def behind(self, tenant_id: UUID | None) -> list[Tenant] | None:
        """Return the tenants to upgrade, or this one if it is to be; None if the fleet is not at this code's head."""
        registry = self.services.registry
        fleet = await registry.fleet_revision()
        if fleet is None or fleet != await asyncio.to_thread(self._schema.head):
            return None
        return await registry.created_behind(fleet, tenant_id)

    async def upgradable(self, tenant_id: UUID) -> Tenant | None:
        """Return a tenant that is behind, whoever has created it; None where it is not to be upgraded by itself.

        That is so where an operator has moved it back, and in code that is older than the fleet.
        """
        found = await self._upgradable(tenant_id)
        return found[0] if found else None

    async def all_upgradable(self) -> list[Tenant]:
        """Return the tenants that are behind and may be upgraded by themselves, as ``upgradable``."""
        plan = await self.plan()
        return [tenant for tenant in await self._upgradable(None) if _can_upgrade(plan, tenant)]

    async def _upgradable(self, tenant_id: UUID | None) -> list[Tenant]:
        head = await asyncio.to_thread(self._schema.head)
        fleet = await self.services.registry.fleet_revision()
        if head is None or (fleet is not None and not _knows(await self.plan(), fleet)):
            return []
        return await self.services.registry.behind(head, tenant_id)

    async def upgrade(
        self, tenants: Sequence[Tenant], actor: Actor, action: str = "tenant.catch_up"
    ) -> FleetReport | None:
        """Upgrade tenants to this code's head; None where this code has no way for any of them.

        Args:
            tenants: The tenants, as they are now.
            actor: Who does it, for the audit log.
            action: What the audit log calls it.
        """
        plan = await self.plan()
        known = [tenant for tenant in tenants if _can_upgrade(plan, tenant)]
        if not known:
            return None
        # a tenant that does not pass is not to stop the others
        report = await self.migrations.bring(plan, known, checks="in_place")
        await self._record(report, {tenant.id: tenant for tenant in known}, actor, action)
        return report

    async def plan(self) -> Plan:
        """Return the plan of an upgrade to this code's head."""
        head = await asyncio.to_thread(self._schema.head)
        if self._plan is None or format_revision(self._plan.environment.script.revision_map._real_heads) != head:
            self._plan = Plan.of(await self.migrations.environment(), "upgrade", "heads")
        return self._plan

    async def _record(self, report: FleetReport, known: dict[UUID, Tenant], actor: Actor, action: str) -> None:
        for outcome in report.changed:
            logger.info("tenant %s was behind the fleet, and is at %s now", outcome.slug, outcome.after)
            await self.services.registry.record(
                outcome.tenant_id,
                action,
                detail={"before": known[outcome.tenant_id].schema_revision, "after": outcome.after},
                actor=actor,
            )


def _knows(plan: Plan, revision: str) -> bool:
    try:
        plan.environment.script.get_revisions(revision.split(","))
    except CommandError:
        return False
    return True


def _can_upgrade(plan: Plan, tenant: Tenant) -> bool:
    """Whether this code knows the tenant's revision; newer code's is none of its business."""
    try:
        plan.path_from(frozenset((tenant.schema_revision or "").split(",")))
    except MigrationError as exc:
        logger.info("tenant %s is not upgraded: %s", tenant.slug, exc)
        return False
    return True


__all__ = ["CatchUp", "CatchUpReport"]
