"""``Steering``: looks ahead at runs, watches and pauses them, and takes them back; a part of ``FleetMigrator``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import replace
from uuid import UUID

from ..audit.actor import SYSTEM, Actor
from ..context import refuse_while_bound
from ..migrations import local
from ..migrations.connections import Connections, Health, prepare_servers
from ..migrations.data_batches import DataObserver
from ..migrations.database import close
from ..migrations.plan import Plan
from ..migrations.scripts import Environment
from ..migrations.selection import Selection
from ..migrations.services import FleetServices
from ..tenant import Tenant, TenantRef
from .checks import require_checks
from .claims import Claimed
from .commands import RunCommands
from .notices import NoticeReport, Notices
from .preview import Preview, WavePreview, preview, preview_waves
from .progress import ProgressReader, RunProgress
from .recorded import RunOptions
from .records import RunRecord, TenantRecord
from .report import FleetReport, Progress, TenantOutcome
from .reversal import return_to
from .status import TenantRevision
from .tenant_migration import Begin, MigrationResult, TenantMigration
from .undo import Undo, UndoPlan, refuse
from .waves import Waves

DEFAULT_CONCURRENCY = 8


class UndoWork:
    """What a run that brings each tenant back to a revision of its own does in one process.

    Args:
        environment: The scripts.
        services: The services of an open ``Tenancy``.
        connections: Connects to the databases.
        stamps: Whether no revision runs.
        stamp_irreversible: Whether those without a downgrade are left out.
        everyone: Whether it is the undo of a run over all tenants.
        holds: Whether it moves them back, so that none of them is upgraded by itself afterwards.
    """

    def __init__(
        self,
        environment: Environment,
        services: FleetServices,
        connections: Connections,
        *,
        stamps: bool,
        stamp_irreversible: bool,
        everyone: bool,
        holds: bool,
    ) -> None:
        self._environment = environment
        self._services = services
        self._connections = connections
        self._stamps = stamps
        self._stamp_irreversible = stamp_irreversible
        self._everyone = everyone
        self._holds = holds
        self._plans: dict[str, Plan] = {}
        self._health = Health()
        self._migration = TenantMigration(services, connections, self._health)

    @property
    def holds(self) -> bool:
        """Whether it moves tenants back."""
        return self._holds

    async def prepare(self, servers: Iterable[str]) -> None:
        """Check which servers answer."""
        await prepare_servers(dict.fromkeys(servers), self._prepare_server, self._health)

    async def _prepare_server(self, name: str) -> None:
        await close(await self._connections.connect(name, None, self._health))

    async def open(self, record: RunRecord, tenants: Callable[[], Awaitable[Sequence[Tenant]]]) -> None:
        """Forget where the fleet is: no tenant may be upgraded by itself now, and none that is undone later."""
        if self._everyone:
            await self._services.registry.set_fleet_revision(None)

    async def migrate(self, claimed: Claimed, begin: Begin, observe_data: DataObserver) -> MigrationResult:
        """Bring one tenant back."""
        target = claimed.target or "base"
        if target not in self._plans:
            self._plans[target] = return_to(
                self._environment, target, stamp=self._stamps, stamp_irreversible=self._stamp_irreversible
            )
        return await self._migration.run(self._plans[target], claimed.tenant, begin, observe_data=observe_data)

    def emit(self, outcome: TenantOutcome) -> None:
        """Log a failure, and emit the event of a migration."""
        self._migration.emit(outcome)

    async def close(self, record: RunRecord, outcomes: Callable[[], Awaitable[list[TenantRecord]]]) -> None:
        """Record the revision that the fleet is at now, if all tenants are at one."""
        if not self._everyone:
            return
        found = {tenant.schema_revision for tenant in await Selection(self._services.registry).choose(None)}
        await self._services.registry.set_fleet_revision(found.pop() if len(found) == 1 else None)


class Steering(RunCommands):
    """What operators do before, during and after a run; part of ``FleetMigrator``.

    Args:
        services: The services of an open ``Tenancy``.
    """

    def __init__(self, services: FleetServices) -> None:
        super().__init__(services)
        self._connections = Connections(services)
        self._selection = Selection(services.registry)

    async def environment(self, x: Sequence[str] = ()) -> Environment:
        """Load the migration directory."""
        raise NotImplementedError

    async def status(
        self,
        *,
        verify: bool = False,
        tenants: Iterable[TenantRef] | None = None,
        concurrency: int = DEFAULT_CONCURRENCY,
        environment: Environment | None = None,
    ) -> list[TenantRevision]:
        """Read the revisions of tenants; ``verify``: from their databases."""
        raise NotImplementedError

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

    # --- after ------------------------------------------------------------------------------------------------------

    async def settle_notices(self) -> NoticeReport:
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
        return await Notices(self.services, self._connections, await self.environment()).settle()

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
            return await self.status(verify=True, tenants=tenants, environment=environment)

        return Undo(self.services, environment, read, record, rows)

    async def _waves_of(self, targets: Collection[UUID], waves: Waves | None) -> tuple[WavePreview, ...]:
        """Return the waves of an undo.

        Raises:
            ConfigurationError: there are no such waves.
        """
        waves = self._checked(waves)
        chosen = [tenant for tenant in await self._selection.choose(None) if tenant.id in targets]
        return tuple(preview_waves(chosen, waves))

    async def _undo_work(self, record: RunRecord, x: Sequence[str]) -> UndoWork:
        given = record.plan
        return UndoWork(
            await self.environment(x),
            self.services,
            self._connections,
            stamps=given["stamps"],
            stamp_irreversible=given["stamp_irreversible"],
            everyone=given["everyone"],
            holds=given["holds"],
        )


__all__ = ["DEFAULT_CONCURRENCY", "Steering", "UndoWork"]
