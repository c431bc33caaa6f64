"""``FleetMigrator``: migrates the databases of all tenants, several at once, in one process."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import Connection as SyncConnection

from ..audit.actor import SYSTEM, Actor
from ..config.revisions import Declared
from ..context import refuse_while_bound
from ..drift import DriftDetector, DriftProgress, DriftReport
from ..errors import ConfigurationError
from ..migrations import local
from ..migrations.commands import CommandResult, CommandRunner
from ..migrations.connections import Health
from ..migrations.database import close
from ..migrations.plan import Plan
from ..migrations.preflight import ChecksAsked, Preflight, PreflightReport
from ..migrations.scripts import Environment
from ..tenant import TenantRef
from .busy import Order
from .commands import DEFAULT_CONCURRENCY, check_concurrency
from .compatibility import load_compatibility
from .extensions import ExtensionWork
from .recorded import RunOptions
from .rehearsing import Rehearsing
from .report import FleetReport, Progress
from .served import CompatibilityReport, compatibility_report, with_declaration
from .single import bring
from .status import StatusReader, TenantRevision
from .waves import Waves
from .work import MigrationWork

_REFUSES_DRIFT = "refuse_drift"  # in the plan of a run that began after no tenant was found to drift


class FleetMigrator(Rehearsing):
    """Upgrades, downgrades, stamps and inspects the schemas of all tenants (``tenancy.migrations``).

    Only operators may do this: while a tenant is bound, everything here raises ``CrossTenantError``.

    Deleted tenants, which keep their data, are migrated as well: a restored tenant must fit the code. Tenants that are
    being created or purged are left alone.

    Args:
        services: The services of an open ``Tenancy``.
    """

    # --- commands ---------------------------------------------------------------------------------------------------

    async def upgrade(
        self,
        revision: str = "head",
        *,
        tenants: Iterable[TenantRef] | None = None,
        concurrency: int = DEFAULT_CONCURRENCY,
        stop_on_failure: bool = False,
        progress: Progress | None = None,
        x: Sequence[str] = (),
        skip_preflight: bool = False,
        server_concurrency: int | None = None,
        join: bool = False,
        order: Order = "created",
        waves: Waves | None = None,
        max_failures: int | None = None,
        actor: Actor = SYSTEM,
        refuse_drift: bool = False,
        beside: bool = False,
    ) -> FleetReport:
        """Upgrade tenants to ``revision``.

        In each tenant's database, the administrator first installs the extensions of the setting ``extensions`` that
        it lacks. An upgrade to head builds the template of the new schema first: if a migration fails there, no tenant
        was touched. If a tenant fails, the others go on; the failure is in the report, and its ``raise_for_failures``
        raises an error.

        Args:
            revision: As for ``alembic upgrade``: ``head``, ``heads``, a revision, or relative (``+1``).
            tenants: The tenants; all where None.
            concurrency: How many at once.
            stop_on_failure: Start no other tenant after a failure.
            progress: Called as the run proceeds.
            x: The arguments that ``context.get_x_argument`` returns to the revisions of these tenants, after the
                setting ``migration.x_arguments``. Templates do not get them.
            skip_preflight: Whether no check of a revision's ``preflight()`` is asked.
            server_concurrency: How many at once on one server, over all processes that take part in the run; as many
                as ``concurrency`` where None.
            join: Take part in the upgrade of all tenants to the same target that is running; start one if there is
                none. If it is paused, report that: it goes on with ``resume`` alone.
            order: Which come first: "created", in the order of their creation; or "busiest", those with connections,
                then by their number of transactions.
            waves: Which tenants go first, and what must hold before the others follow.
            max_failures: Start no other tenant after so many failures.
            actor: Who does this, for the records.
            refuse_drift: Change nothing if the schema of one of these tenants is not what its revision says, or cannot
                be compared; see ``drift``.
            beside: Start it even if a run that is paused has some of these tenants left.

        Raises:
            RunStateError: without ``beside``: it names such a run, and what to do with it; no tenant was touched.
            SchemaDriftError: with ``refuse_drift``: it names the tenants; nothing was changed.
            ConfigurationError: there is no migration directory, or its env.py cannot be used for a fleet; or ``join``
                is given with ``tenants``.
            PreflightError: a check does not pass for some tenants; no tenant was touched.
            RunConflictError: a run that is under way moves some of the tenants elsewhere; no tenant was touched.
            MigrationError: the revision does not exist, or fails on the template; no tenant was touched.
            TenantNotFoundError: one of ``tenants`` does not exist.
            ControlUnavailableError: the control database does not answer.
        """
        refuse_while_bound("migrating tenants")
        if join and tenants is not None:
            raise ConfigurationError("a run over all tenants can be joined; leave out either join or tenants")
        plan = Plan.of(await self.environment(x), "upgrade", revision)
        options = RunOptions(
            concurrency=concurrency,
            server_concurrency=server_concurrency,
            stop_on_failure=stop_on_failure,
            max_failures=max_failures,
            waves=waves,
            x=x,
            order=order,
        )
        return await self.execute(
            plan,
            tenants,
            options=options,
            join=join,
            beside=beside,
            refuse_drift=refuse_drift,
            progress=progress,
            actor=actor,
            checks="never" if skip_preflight else "ahead",
        )

    async def preflight(
        self,
        revision: str = "head",
        *,
        tenants: Iterable[TenantRef] | None = None,
        concurrency: int = DEFAULT_CONCURRENCY,
        x: Sequence[str] = (),
    ) -> PreflightReport:
        """Ask the checks of the revisions that an upgrade to ``revision`` would run, and change nothing.

        ``upgrade`` does this itself, before the first tenant is changed. A tenant that does not pass, or that could not
        be asked, is in the report; its ``raise_for_failures`` raises an error.

        Raises:
            ConfigurationError, MigrationError, TenantNotFoundError, ControlUnavailableError: as ``upgrade``.
        """
        refuse_while_bound("looking at all tenants' rows")
        check_concurrency(concurrency)
        plan = Plan.of(await self.environment(x), "upgrade", revision)
        asking = Preflight(
            plan,
            self._connections,
            self._selection,
            concurrency=concurrency,
            health=Health(),
            events=self.services.events,
        )
        return await asking.ask(await self._selection.choose(tenants))

    async def downgrade(
        self,
        revision: str,
        *,
        tenants: Iterable[TenantRef] | None = None,
        concurrency: int = DEFAULT_CONCURRENCY,
        stop_on_failure: bool = False,
        progress: Progress | None = None,
        x: Sequence[str] = (),
        server_concurrency: int | None = None,
        waves: Waves | None = None,
        max_failures: int | None = None,
        actor: Actor = SYSTEM,
        beside: bool = False,
    ) -> FleetReport:
        """Downgrade tenants to ``revision`` (``base``, a revision, or relative: ``-1``); otherwise as ``upgrade``."""
        refuse_while_bound("migrating tenants")
        plan = Plan.of(await self.environment(x), "downgrade", revision)
        options = RunOptions(
            concurrency=concurrency,
            server_concurrency=server_concurrency,
            stop_on_failure=stop_on_failure,
            max_failures=max_failures,
            waves=waves,
            x=x,
        )
        return await self.execute(plan, tenants, options=options, beside=beside, progress=progress, actor=actor)

    async def stamp(
        self,
        revision: str | Sequence[str],
        *,
        purge: bool = False,
        tenants: Iterable[TenantRef] | None = None,
        concurrency: int = DEFAULT_CONCURRENCY,
        stop_on_failure: bool = False,
        progress: Progress | None = None,
        actor: Actor = SYSTEM,
    ) -> FleetReport:
        """Write ``revision`` into tenants' version tables without running it; ``purge`` empties these first."""
        refuse_while_bound("migrating tenants")
        plan = Plan.of(await self.environment(), "stamp", revision, purge=purge)
        return await self.execute(
            plan, tenants, concurrency, stop_on_failure=stop_on_failure, progress=progress, actor=actor
        )

    async def install_extensions(
        self,
        *,
        tenants: Iterable[TenantRef] | None = None,
        concurrency: int = DEFAULT_CONCURRENCY,
        progress: Progress | None = None,
        actor: Actor = SYSTEM,
    ) -> FleetReport:
        """Install the extensions of the setting ``extensions`` that tenants lack, and run no migration.

        ``upgrade`` does this as well; an application without migrations needs this method. It also builds the template
        that has them.

        Raises:
            MigrationError: a server does not have an extension, or the template fails; no tenant was touched.
            TenancyError: as ``upgrade``.
        """
        refuse_while_bound("installing extensions")
        check_concurrency(concurrency)
        return await self._recorded.start(
            ExtensionWork(self.services, self._connections),
            tenants,
            RunOptions(concurrency=concurrency),
            command="extensions",
            target=", ".join(self.services.config.extensions) or "none",
            progress=progress,
            actor=actor,
        )

    async def status(
        self,
        *,
        verify: bool = False,
        tenants: Iterable[TenantRef] | None = None,
        concurrency: int = DEFAULT_CONCURRENCY,
        environment: Environment | None = None,
    ) -> list[TenantRevision]:
        """Return the revision of every tenant, in order of creation, as the registry has recorded it.

        Without a migration directory there are no revisions.

        Args:
            verify: Read the revision and the extensions from each tenant's database.
            tenants: The tenants; all where None.
            concurrency: How many databases are read at once.
            environment: The migrations; loaded where None.

        Raises:
            TenancyError: as ``upgrade``; a tenant that cannot be read is in the list, with the reason.
        """
        refuse_while_bound("looking at all tenants' schemas")
        reader = StatusReader(self.services, self._connections, environment or await self._environment_if_any())
        return await (reader.verified(tenants, concurrency) if verify else reader.recorded(tenants))

    async def drift(
        self,
        *,
        tenants: Iterable[TenantRef] | None = None,
        tiers: Collection[str] = (),
        servers: Collection[str] = (),
        concurrency: int = DEFAULT_CONCURRENCY,
        progress: DriftProgress | None = None,
    ) -> DriftReport:
        """Compare the schema of every tenant with what its revision says.

        One query reads each database. It changes nothing there; what tenants are compared with is a clone of the
        template, or, for those that are not at head, a database in which the revisions run. The setting
        ``migration.drift_ignore`` names objects that are left out.

        Args:
            tenants: The tenants; all where None.
            tiers: Only tenants of these tiers.
            servers: Only tenants on these servers.
            concurrency: How many databases are read at once.
            progress: Called as the search proceeds.

        Raises:
            TenancyError: as ``upgrade``. A tenant that cannot be compared is in the report's ``errors``.
            UnknownTierError, UnknownServerError: there is no such tier or server.
        """
        refuse_while_bound("looking at all tenants' schemas")
        check_concurrency(concurrency)
        environment = await self._environment_if_any()
        detector = DriftDetector(
            self.services, self._connections, environment, concurrency=concurrency, progress=progress
        )
        return await detector.run(tenants, tiers=tiers, servers=servers)

    async def compatibility(self, declared: Declared | None = None) -> CompatibilityReport:
        """Count the tenants by revision, and say which this code serves; it asks the control database alone.

        For a readiness check, a metric, or a gate before a release.

        Args:
            declared: In place of the setting ``compatible_revisions``: what another release declares. It need not have
                the head of this code's migrations.

        Raises:
            ConfigurationError: the declaration is malformed, or there are no migrations.
            ControlUnavailableError: the control database does not answer.
        """
        refuse_while_bound("counting tenants")
        compatibility = await load_compatibility(
            with_declaration(self.services.config, declared), is_own=declared is None
        )
        return await compatibility_report(self.services.registry, compatibility)

    # --- used by the commands and by env.py -------------------------------------------------------------------------

    async def execute(
        self,
        plan: Plan,
        tenants: Iterable[TenantRef] | None = None,
        concurrency: int = DEFAULT_CONCURRENCY,
        *,
        stop_on_failure: bool = False,
        options: RunOptions | None = None,
        join: bool = False,
        beside: bool = False,
        refuse_drift: bool = False,
        progress: Progress | None = None,
        checks: ChecksAsked = "ahead",
        actor: Actor = SYSTEM,
    ) -> FleetReport:
        """Apply ``plan`` to tenants, as a recorded run; the arguments are as for ``upgrade``, or in ``options``.

        ``checks`` says when checks of revisions are asked.
        """
        refuse_while_bound("migrating tenants")
        options = options or RunOptions(concurrency=concurrency, stop_on_failure=stop_on_failure, x=plan.environment.x)
        check_concurrency(options.concurrency)
        if refuse_drift:
            tenants = None if tenants is None else tuple(tenants)
            await self._refuse_drift(plan, tenants, options, join=join)
        local.install()
        given = plan.revision if isinstance(plan.revision, str) else list(plan.revision)
        more = {**options.more, "revision": given, "purge": plan.purges, "checks": checks}
        if refuse_drift:
            more[_REFUSES_DRIFT] = True
        return await self._recorded.start(
            MigrationWork(
                plan,
                self.services,
                self._connections,
                checks=checks,
                concurrency=options.concurrency,
                patience=self.services.config.migration.server_wait,
            ),
            tenants,
            replace(options, more=more),
            command=plan.command,
            target=plan.target,
            join=join,
            beside=beside,
            progress=progress,
            actor=actor,
        )

    async def bring(
        self,
        plan: Plan,
        tenants: Iterable[TenantRef],
        concurrency: int = DEFAULT_CONCURRENCY,
        *,
        checks: ChecksAsked = "in_place",
    ) -> FleetReport:
        """Apply ``plan`` to a few tenants, without a recorded run: for what happens by itself."""
        refuse_while_bound("migrating tenants")
        check_concurrency(concurrency)
        local.install()
        return await bring(plan, tenants, self.services, self._connections, concurrency, checks=checks)

    async def run_command(
        self,
        environment: Environment,
        options: dict[str, Any],
        tenants: Iterable[TenantRef] | None = None,
        concurrency: int = DEFAULT_CONCURRENCY,
    ) -> list[CommandResult]:
        """Run one of Alembic's commands, given by the ``options`` of its ``EnvironmentContext``, on each tenant."""
        refuse_while_bound("looking at all tenants' schemas")
        runner = CommandRunner(self._connections, self._selection, environment, options)
        return await runner.run(tenants, concurrency)

    async def run_on(self, server: str, database: str, function: Callable[[SyncConnection], None]) -> None:
        """Call ``function`` with a SQLAlchemy connection to ``database``, as the owner of all tenants' schemas."""
        refuse_while_bound("running a function on a database")
        connections = self._connections
        connection = await connections.connect(server, database, Health())
        try:
            async with connections.adapter(server).adapt(connection, connections.url(server, database)) as adapted:
                await adapted.run_sync(function)
        finally:
            await close(connection)

    async def _refuse_drift(
        self, plan: Plan, tenants: Iterable[TenantRef] | None, options: RunOptions, *, join: bool
    ) -> None:
        """Raise if a tenant drifts; not if there is a run to join that began after the same check."""

        async def is_checked() -> bool:
            found = await self._recorded.find_running(plan.command, plan.target, options.x) if join else None
            return found is not None and bool(found.plan.get(_REFUSES_DRIFT))

        if await is_checked():
            return
        report = await self.drift(tenants=tenants, concurrency=options.concurrency)
        # another process may have begun the run since: what it migrates cannot be compared
        if not report.ok and not await is_checked():
            report.raise_for_drift()

    async def _environment_if_any(self) -> Environment | None:
        return None if self.services.config.migrations is None else await self.environment()


__all__ = ["DEFAULT_CONCURRENCY", "FleetMigrator"]
