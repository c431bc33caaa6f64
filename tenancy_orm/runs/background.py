"""``BackgroundUpgrades``: brings the tenants that are behind to the code's head, the busiest first, a few at a time."""

from __future__ import annotations

import logging

from ..audit.actor import SYSTEM, Actor
from ..errors import RunMismatchError, RunStateError
from ..migrations.plan import format_revision
from .attempts import UpgradeAttempts
from .catch_up import CatchUp
from .migrator import FleetMigrator
from .recorded import RunOptions
from .records import RunRecord
from .report import FleetReport

logger = logging.getLogger("tenancy_orm.migrations")

_MARK = "background"  # in the plan of a run


class BackgroundUpgrades:
    """Upgrades tenants that are behind, in recorded runs; for ``tenancy worker``.

    It starts no run while another one goes on, is paused or was interrupted: that is an operator's affair. Its own run
    is resumed; or cancelled, if other code has begun it. As before a tenant's use, older code upgrades nothing, what an
    operator has moved back stays where it is, and a tenant with an upgrade that has failed is left alone for a while.

    Args:
        migrations: Starts the runs.
        catch_up: Knows which tenants may be upgraded by themselves.
        attempts: Knows which upgrades have failed.
    """

    def __init__(self, migrations: FleetMigrator, catch_up: CatchUp, attempts: UpgradeAttempts) -> None:
        self._migrations = migrations
        self._catch_up = catch_up
        self._attempts = attempts
        self._settings = migrations.services.config.migration

    async def run(self, *, actor: Actor = SYSTEM) -> FleetReport | None:
        """Upgrade what is behind now; None where nothing is, or is to be.

        Raises:
            MigrationError: the template of the new schema fails; no tenant was touched.
            ControlUnavailableError: the control database does not answer.
        """
        own = await self._unfinished()
        if own is None:
            return None
        report = await self._resume(own[0], actor) if own else None
        report = report or await self._start(actor)
        if report is not None:
            await self._note_results(report)
        return report

    async def _resume(self, run: RunRecord, actor: Actor) -> FleetReport | None:
        try:
            return await self._migrations.resume(run.id, concurrency=self._settings.background_concurrency, actor=actor)
        except RunMismatchError as exc:
            logger.info("run %d was started by other code, and is cancelled: %s", run.id, exc)
            await self._migrations.cancel(run.id, hold=False, actor=actor)
            return None

    async def _unfinished(self) -> list[RunRecord] | None:
        """Return the run of this kind that was interrupted, if there is one; None where another run goes on."""
        migrations = self._migrations
        found = [*await migrations.runs(state="running"), *await migrations.runs(state="paused")]
        own = [run for run in found if run.plan.get(_MARK) and run.is_interrupted]
        if len(own) < len(found):
            logger.info("no tenant is upgraded in the background while run %d is not finished", found[0].id)
            return None
        return own

    async def _start(self, actor: Actor) -> FleetReport | None:
        plan = await self._catch_up.plan()
        behind = await self._catch_up.all_upgradable()
        left = await self._attempts.waiting()
        tenants = [tenant for tenant in behind if tenant.id not in left]
        if not tenants:
            return None
        options = RunOptions(concurrency=self._settings.background_concurrency, order="busiest", more={_MARK: True})
        try:
            return await self._migrations.execute(plan, tenants, options=options, actor=actor)
        except RunStateError as exc:
            # it was paused since this looked
            logger.info("no tenant is upgraded in the background while run %d is not finished", exc.run)
            return None

    async def _note_results(self, report: FleetReport) -> None:
        """Leave those that have failed alone for a while, and record where the fleet is, once that is known."""
        head = format_revision((await self._catch_up.plan()).environment.script.revision_map._real_heads)
        if head is None:
            return
        for outcome in report.failures:
            await self._attempts.note_failure(outcome.tenant_id, head, outcome.error or "", outcome.sqlstate)
        registry = self._migrations.services.registry
        if report.ok and {revision for revision, _, _ in await registry.count_revisions()} == {head}:
            await registry.set_fleet_revision(head)


__all__ = ["BackgroundUpgrades"]
