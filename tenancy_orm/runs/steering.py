"""``Steering``: looks ahead at runs, watches and pauses them, and takes them back; a part of ``FleetMigrator``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Iterable, Sequence
from dataclasses import replace
from uuid import UUID

from ..audit.actor import SYSTEM, Actor
from ..context import refuse_while_bound
from ..migrations import local
from ..migrations.failures import describe
from ..migrations.logs import logger
from ..migrations.plan import Plan
from ..migrations.scripts import Environment
from ..tenant import TenantRef
from .checks import require_checks
from .commands import DEFAULT_CONCURRENCY, RunCommands
from .notices import NoticeReport, Notices
from .preview import Preview, WavePreview, preview, preview_waves
from .progress import ProgressReader, RunProgress
from .recorded import RunOptions
from .records import RunRecord
from .report import FleetReport, Progress
from .status import StatusReader, TenantRevision
from .undo import Undo, UndoPlan, refuse
from .waves import Waves
from .work import UndoWork


class Steering(RunCommands):
    """What operators do before, during and after a run; part of ``FleetMigrator``.

    Args:
        services: The services of an open ``Tenancy``.
    """

    # --- before -----------------------------------------------------------------------------------------------------

    async def preview(
        self,
        command: str,
        revision: str,
        *,
        tenants: Iterable[TenantRef] | None = None,
        waves: Waves | None = None,
        x: Sequence[str] = (),
        sql: bool = False,
    ) -> Preview:
        """Compute what ``upgrade``, ``downgrade`` or ``stamp`` would do, without a change.

        No tenant's database is asked: tenants start from the revisions that the control database has recorded.

        Args:
            command: "upgrade", "downgrade" or "stamp".
            revision: The target, as for the command.
            tenants: The tenants; all where None.
            waves: The waves.
            x: As for the command.
            sql: Also render the SQL that would be executed. It is that of the tenant, where there is one.

        Raises:
            TenancyError: as the command, before it touches a tenant.
        """
        refuse_while_bound("migrating tenants")
        plan = Plan.of(await self.environment(x), command, revision)
        waves = self._checked(waves)
        chosen = await self._selection.choose(tenants)
        return await asyncio.to_thread(preview, plan, chosen, waves, sql=sql)

    def _checked(self, waves: Waves | None) -> Waves:
        waves = waves or Waves()
        waves.check(tiers=self.services.config.tiers, servers=tuple(self.services.servers))
        require_checks(waves)
        return waves

    # --- during -----------------------------------------------------------------------------------------------------

    async def progress(self, run: int) -> RunProgress:
        """Return how far a run is, on all machines that take part.

        Raises:
            RunNotFoundError: there is no run of that number.
        """
        refuse_while_bound("looking at runs")
        return await ProgressReader(self.services.control).read(run)

    async def watch(self, run: int, *, every: float = 1.0) -> AsyncIterator[RunProgress]:
        """Yield how far a run is every so many seconds, until it does not run any more.

        Raises:
            RunNotFoundError: there is no run of that number.
        """
        refuse_while_bound("looking at runs")
        async for progress in ProgressReader(self.services.control).watch(run, every=every):
            yield progress

    async def pause(self, run: int, *, actor: Actor = SYSTEM) -> RunRecord:
        """Pause a run. Every process finishes the tenants that it is migrating; ``resume`` goes on.

        Raises:
            RunNotFoundError: there is no run of that number.
            RunStateError: it is not running.
        """
        refuse_while_bound("migrating tenants")
        return await self._recorded.records.pause(run, actor=actor)

    async def cancel(self, run: int, *, hold: bool = True, actor: Actor = SYSTEM) -> RunRecord:
        """Skip the tenants of a run that wait. Every process finishes those that it is migrating, and claims no others.

        Those that a killed process has begun stay at the revision that they have, see ``clear_notices``.

        Args:
            run: Its number.
            hold: Whether the tenants that an upgrade has not reached are upgraded by operators alone from now on, and
                by no process before their use or in the background; until the next upgrade of an operator.
            actor: Who does this, for the records.

        Raises:
            RunNotFoundError: there is no run of that number.
            RunStateError: it has ended.
        """
        refuse_while_bound("migrating tenants")
        record = await self._recorded.records.cancel(run, hold=hold, actor=actor)
        try:
            await self.clear_notices()
        except Exception as exc:  # noqa: BLE001 - env.py may raise anything, and the run is cancelled
            logger.warning(
                "run %d is cancelled; tenants of killed processes are left to housekeeping: %s", run, describe(exc)
            )
        return record

    # --- after ------------------------------------------------------------------------------------------------------

    async def clear_notices(self) -> NoticeReport:
        """Record the revisions of tenants with a migration that was killed; they are served at these again.

        A killed process leaves its notice, with which only code that works with the target serves the tenant. Tenants
        that are being migrated, on any machine, are left alone. Housekeeping does this, and ``cancel``.

        Raises:
            ConfigurationError: the migrations cannot be loaded.
            ControlUnavailableError: the control database does not answer.
        """
        refuse_while_bound("migrating tenants")
        if self.services.config.migrations is None or not await self.services.registry.with_notice():
            return NoticeReport()
        return await Notices(self.services, self._connections, await self.environment()).clear()

    async def plan_undo(
        self,
        run: int,
        *,
        tenants: Iterable[TenantRef] | None = None,
        include_new: bool = False,
        new_revision: str | None = None,
        waves: Waves | None = None,
    ) -> UndoPlan:
        """Compute what ``undo`` would do, with the same arguments, without a change. It reads tenants' databases.

        Raises:
            TenancyError: as ``undo``; what has to be decided is in the plan.
        """
        refuse_while_bound("migrating tenants")
        undo = await self._undo(await self._recorded.records.get(run), await self.environment())
        plan, targets = await undo.plan(tenants, include_new=include_new, new_target=new_revision)
        return replace(plan, waves=await self._waves_of(targets, waves))

    async def undo(
        self,
        run: int,
        *,
        tenants: Iterable[TenantRef] | None = None,
        include_new: bool = False,
        new_revision: str | None = None,
        stamp_irreversible: bool = False,
        leave_moved: bool = False,
        concurrency: int = DEFAULT_CONCURRENCY,
        stop_on_failure: bool = False,
        waves: Waves | None = None,
        max_failures: int | None = None,
        x: Sequence[str] = (),
        progress: Progress | None = None,
        actor: Actor = SYSTEM,
        beside: bool = False,
    ) -> FleetReport:
        """Bring every tenant back to the revision that it had before a run, as a run of its own.

        Tenants that the run has not changed stay as they are. A paused run is cancelled.

        Args:
            run: The number of the run to undo.
            tenants: Only these; all that it has changed where None.
            include_new: Also bring back tenants that were created since, to the revision that the others had.
            new_revision: That revision, where the others had different ones.
            stamp_irreversible: Do not refuse revisions without a downgrade: take them out of the version table, and
                leave what they did to the schema.
            leave_moved: Do not refuse where later runs have moved tenants on: leave these tenants as they are.
            concurrency: How many at once.
            stop_on_failure: Start no other tenant after a failure.
            waves: The waves.
            max_failures: Start no other tenant after so many failures.
            x: The arguments that ``context.get_x_argument`` returns to the revisions.
            progress: Called as the undo proceeds.
            actor: Who does this, for the records.
            beside: Start it even if another run that is paused has some of these tenants left.

        Raises:
            UndoRefusedError: revisions cannot be taken back, or later runs have moved tenants; no tenant was touched.
            RunNotFoundError: there is no run of that number.
            RunStateError: it is still running; or, without ``beside``, another one is paused.
            MigrationError: it installed extensions; or this code does not know a revision that it has to take back.
            ControlUnavailableError: the control database does not answer.
        """
        refuse_while_bound("migrating tenants")
        record = await self._recorded.records.get(run)
        environment = await self.environment(x)
        local.install()
        undo = await self._undo(record, environment)
        tenants = None if tenants is None else list(tenants)
        plan, targets = await undo.plan(tenants, include_new=include_new, new_target=new_revision)
        refuse(plan, stamp_irreversible=stamp_irreversible, leave_moved=leave_moved)
        everyone = bool(record.plan["all"] or record.plan.get("everyone")) and tenants is None
        how = {
            "stamps": undo.stamps,
            "stamp_irreversible": stamp_irreversible,
            "everyone": everyone,
            "holds": undo.holds,
            "whole": tenants is None,
        }
        # what cannot be is known before the run is cancelled
        await self._waves_of(targets, waves)
        if not beside:
            await self._recorded.records.check_paused("undo", targets, undoes=run)
        if record.state in ("running", "paused"):
            await self._recorded.records.cancel(run, to_undo=True, actor=actor)
        return await self._recorded.start(
            UndoWork(environment, self.services, self._connections, **how),
            list(targets),
            RunOptions(
                concurrency=concurrency,
                stop_on_failure=stop_on_failure,
                max_failures=max_failures,
                waves=waves,
                x=x,
                more=how,
            ),
            command="undo",
            target=f"run {run}",
            beside=beside,
            undoes=run,
            targets=targets,
            progress=progress,
            actor=actor,
        )

    async def _undo(self, record: RunRecord, environment: Environment) -> Undo:
        rows = await self._recorded.records.tenants(record.id)

        async def read(tenants: Iterable[TenantRef]) -> list[TenantRevision]:
            reader = StatusReader(self.services, self._connections, environment)
            return await reader.verified(tenants, DEFAULT_CONCURRENCY)

        return Undo(self.services, environment, read, record, rows)

    async def _waves_of(self, targets: Collection[UUID], waves: Waves | None) -> tuple[WavePreview, ...]:
        """Return the waves of an undo.

        Raises:
            ConfigurationError: there are no such waves.
        """
        waves = self._checked(waves)
        chosen = [tenant for tenant in await self._selection.choose(None) if tenant.id in targets]
        return tuple(preview_waves(chosen, waves))


__all__ = ["Steering"]
