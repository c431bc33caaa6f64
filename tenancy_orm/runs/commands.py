"""``RunCommands``: what operators do with recorded runs; part of ``FleetMigrator``."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from uuid import UUID

from ..audit.actor import SYSTEM, Actor
from ..context import refuse_while_bound
from ..errors import ConfigurationError
from ..migrations import local
from ..migrations.configuration import alembic_config
from ..migrations.connections import Connections
from ..migrations.plan import Plan
from ..migrations.scripts import Environment, load
from ..migrations.selection import Selection
from ..migrations.services import FleetServices
from .extensions import ExtensionWork
from .recorded import RecordedRuns, check_number
from .records import ProcessRecord, RunRecord, RunState, TenantRecord, TenantRunState
from .report import FleetReport, Progress
from .work import MigrationWork, RunWork, UndoWork

DEFAULT_CONCURRENCY = 8


class RunCommands:
    """What operators do with recorded runs.

    Args:
        services: The services of an open ``Tenancy``.
    """

    def __init__(self, services: FleetServices) -> None:
        self.services = services
        self._connections = Connections(services)
        self._selection = Selection(services.registry)
        self._recorded = RecordedRuns(services)

    async def environment(self, x: Sequence[str] = ()) -> Environment:
        """Load the migration directory.

        Raises:
            ConfigurationError: there is none, or its env.py cannot be used for a fleet.
        """
        config = self.services.config
        directory = config.migrations
        if directory is None:
            raise ConfigurationError("TenancyConfig.migrations names no directory; make one with: tenancy init")
        # in a thread: env.py imports the application's models
        return await asyncio.to_thread(lambda: load(alembic_config(directory, config.migration, x=x), x=tuple(x)))

    async def join(
        self,
        run: int,
        *,
        concurrency: int | None = None,
        x: Sequence[str] = (),
        progress: Progress | None = None,
        actor: Actor = SYSTEM,
    ) -> FleetReport:
        """Take part in a run that another process has started, until it ends or pauses; return the whole run's report.

        Args:
            run: Its number.
            concurrency: How many tenants this process migrates at once; as many as the first one where None. How many
                are migrated at once on one server holds over all processes.
            x: The ``-x`` arguments that the run was started with; their values are not recorded.
            progress: Called as the run proceeds.
            actor: Who does this, for the records.

        Raises:
            RunNotFoundError: there is no run of that number.
            RunMismatchError: this process has other revisions, options or ``-x`` arguments than the run.
            ControlUnavailableError: the control database does not answer.
        """
        refuse_while_bound("migrating tenants")
        return await self._recorded.join(
            run, self._maker(x), concurrency=_checked(concurrency), x=x, progress=progress, actor=actor
        )

    async def resume(
        self,
        run: int,
        *,
        concurrency: int | None = None,
        skip_checks: bool = False,
        x: Sequence[str] = (),
        progress: Progress | None = None,
        actor: Actor = SYSTEM,
    ) -> FleetReport:
        """Go on with a run that was interrupted, cancelled or paused: with the tenants that were not migrated.

        Those that have failed stay so; ``retry`` is for them. The arguments are those of ``join``. With ``skip_checks``
        the next wave begins, whatever the checks after the one that runs now say. A run that is done stays as it is,
        and is reported.

        Raises:
            TenancyError: as ``join``.
        """
        refuse_while_bound("migrating tenants")
        return await self._recorded.reopen(
            run,
            self._maker(x),
            skip_checks=skip_checks,
            concurrency=_checked(concurrency),
            x=x,
            progress=progress,
            actor=actor,
        )

    async def retry(
        self,
        run: int,
        *,
        concurrency: int | None = None,
        x: Sequence[str] = (),
        progress: Progress | None = None,
        actor: Actor = SYSTEM,
    ) -> FleetReport:
        """Try the failed tenants of a run again, and no others. The arguments are those of ``join``.

        A run that is done stays as it is, and is reported.

        Raises:
            RunStateError: it is still running.
            TenancyError: as ``join``.
        """
        refuse_while_bound("migrating tenants")
        return await self._recorded.reopen(
            run, self._maker(x), retry=True, concurrency=_checked(concurrency), x=x, progress=progress, actor=actor
        )

    async def runs(
        self, *, state: RunState | None = None, limit: int = 20, before: int | None = None
    ) -> list[RunRecord]:
        """Return recorded runs, the newest first; ``before`` continues after the last one of the previous page."""
        refuse_while_bound("looking at runs")
        return await self._recorded.records.latest(state=state, limit=limit, before=before)

    async def get_run(self, run: int) -> RunRecord:
        """Return a recorded run.

        Raises:
            RunNotFoundError: there is no run of that number.
        """
        refuse_while_bound("looking at runs")
        return await self._recorded.records.get(run)

    async def run_tenants(
        self,
        run: int,
        *,
        state: TenantRunState | Iterable[TenantRunState] | None = None,
        limit: int | None = None,
        after: UUID | None = None,
    ) -> list[TenantRecord]:
        """Return what a run has recorded of its tenants, in order of their creation.

        Args:
            run: Its number.
            state: Only tenants in this state, or these.
            limit: The largest number of tenants.
            after: Continue after the tenant of this id: the last of the previous page.
        """
        refuse_while_bound("looking at runs")
        return await self._recorded.records.tenants(run, state=state, limit=limit, after=after)

    async def run_processes(self, run: int) -> list[ProcessRecord]:
        """Return the processes that take part in a run, or did, in the order in which they joined."""
        refuse_while_bound("looking at runs")
        return await self._recorded.records.processes(run)

    def _maker(self, x: Sequence[str]) -> Callable[[RunRecord], Awaitable[RunWork]]:
        async def make(record: RunRecord) -> RunWork:
            return await self._work(record, x)

        return make

    async def _work(self, record: RunRecord, x: Sequence[str]) -> RunWork:
        """Return what a recorded run does."""
        if record.command == "extensions":
            return ExtensionWork(self.services, self._connections)
        local.install()
        given = record.plan
        if record.command == "undo":
            how = {name: given[name] for name in ("stamps", "stamp_irreversible", "everyone", "holds", "whole")}
            return UndoWork(await self.environment(x), self.services, self._connections, **how)
        plan = Plan.of(await self.environment(x), record.command, given["revision"], purge=given["purge"])
        return MigrationWork(
            plan,
            self.services,
            self._connections,
            checks=given["checks"],
            concurrency=given["concurrency"],
            patience=self.services.config.migration.server_wait,
        )


def _checked(concurrency: int | None) -> int | None:
    check_concurrency(concurrency)
    return concurrency


def check_concurrency(concurrency: int | None) -> None:
    """Refuse a number of tenants below 1."""
    check_number("concurrency", concurrency)


__all__ = ["DEFAULT_CONCURRENCY", "RunCommands", "check_concurrency"]
