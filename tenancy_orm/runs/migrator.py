"""``FleetMigrator``: migrates the databases of all tenants, several at once, in one process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from sqlalchemy import Connection as SyncConnection

from ..config.revisions import Declared
from ..context import refuse_while_bound
from ..errors import ConfigurationError
from ..migrations import local
from ..migrations.commands import CommandResult, CommandRunner
from ..migrations.concurrency import map_concurrently
from ..migrations.configuration import alembic_config
from ..migrations.connections import Connections, Health, placement_of
from ..migrations.database import State, close, read_state
from ..migrations.failures import describe
from ..migrations.plan import Heads, Plan, format_revision
from ..migrations.preflight import ChecksAsked, Preflight, PreflightReport
from ..migrations.scripts import Environment, load
from ..migrations.selection import Selection
from ..migrations.services import FleetServices
from ..tenant import Tenant, TenantRef
from .compatibility import load_compatibility
from .extensions import ExtensionRun
from .report import FleetReport, Progress
from .run import Run
from .served import CompatibilityReport, compatibility_report, with_declaration
from .status import TenantRevision

DEFAULT_CONCURRENCY = 8


class FleetMigrator:
    """Upgrades, downgrades, stamps and inspects the schemas of all tenants (``tenancy.migrations``).

    Only operators may do this: while a tenant is bound, everything here raises ``CrossTenantError``.

    Deleted tenants, which keep their data, are migrated as well: a restored tenant must fit the code. Tenants that are
    being created or purged are left alone.

    Args:
        services: The services of an open ``Tenancy``.
    """

    def __init__(self, services: FleetServices) -> None:
        self.services = services
        self._connections = Connections(services)
        self._selection = Selection(services.registry)

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

        Raises:
            ConfigurationError: there is no migration directory, or its env.py cannot be used for a fleet.
            PreflightError: a check does not pass for some tenants; no tenant was touched.
            MigrationError: the revision does not exist, or fails on the template; no tenant was touched.
            TenantNotFoundError: one of ``tenants`` does not exist.
            ControlUnavailableError: the control database does not answer.
        """
        refuse_while_bound("migrating tenants")
        plan = Plan.of(await self.environment(x), "upgrade", revision)
        return await self.execute(
            plan,
            tenants,
            concurrency,
            stop_on_failure=stop_on_failure,
            progress=progress,
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
        _check_concurrency(concurrency)
        plan = Plan.of(await self.environment(x), "upgrade", revision)
        asking = Preflight(plan, self._connections, self._selection, concurrency=concurrency, health=Health())
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
    ) -> FleetReport:
        """Downgrade tenants to ``revision`` (``base``, a revision, or relative: ``-1``); otherwise as ``upgrade``."""
        refuse_while_bound("migrating tenants")
        plan = Plan.of(await self.environment(x), "downgrade", revision)
        return await self.execute(plan, tenants, concurrency, stop_on_failure=stop_on_failure, progress=progress)

    async def stamp(
        self,
        revision: str | Sequence[str],
        *,
        purge: bool = False,
        tenants: Iterable[TenantRef] | None = None,
        concurrency: int = DEFAULT_CONCURRENCY,
        stop_on_failure: bool = False,
        progress: Progress | None = None,
    ) -> FleetReport:
        """Write ``revision`` into tenants' version tables without running it; ``purge`` empties these first."""
        refuse_while_bound("migrating tenants")
        plan = Plan.of(await self.environment(), "stamp", revision, purge=purge)
        return await self.execute(plan, tenants, concurrency, stop_on_failure=stop_on_failure, progress=progress)

    async def install_extensions(
        self,
        *,
        tenants: Iterable[TenantRef] | None = None,
        concurrency: int = DEFAULT_CONCURRENCY,
        progress: Progress | None = None,
    ) -> FleetReport:
        """Install the extensions of the setting ``extensions`` that tenants lack, and run no migration.

        ``upgrade`` does this as well; an application without migrations needs this method. It also builds the template
        that has them.

        Raises:
            MigrationError: a server does not have an extension, or the template fails; no tenant was touched.
            TenancyError: as ``upgrade``.
        """
        refuse_while_bound("installing extensions")
        _check_concurrency(concurrency)
        run = ExtensionRun(self.services, self._connections, concurrency=concurrency, progress=progress)
        return await run.execute(tenants)

    async def status(
        self,
        *,
        tenants: Iterable[TenantRef] | None = None,
        concurrency: int = DEFAULT_CONCURRENCY,
        environment: Environment | None = None,
    ) -> list[TenantRevision]:
        """Read the revision and the extensions of every tenant from its database, in order of creation.

        Without a migration directory there are no revisions.

        Raises:
            TenancyError: as ``upgrade``; a tenant that cannot be read is in the list, with the reason.
        """
        refuse_while_bound("looking at all tenants' schemas")
        if environment is None and self.services.config.migrations is not None:
            environment = await self.environment()
        heads = frozenset(() if environment is None else environment.script.revision_map._real_heads)
        health = Health()

        async def read(tenant: Tenant) -> TenantRevision:
            return await self._status(tenant, environment, heads, health)

        return await map_concurrently(read, await self._selection.choose(tenants), concurrency)

    async def compatibility(self, declared: Declared | None = None) -> CompatibilityReport:
        """Count the tenants by revision, and say which this code serves; it asks the control database alone.

        For a readiness check, a metric, or a gate before a release.

        Args:
            declared: In place of the setting ``compatible_revisions``: what another release declares.

        Raises:
            ConfigurationError: the declaration is malformed, or there are no migrations.
            ControlUnavailableError: the control database does not answer.
        """
        refuse_while_bound("counting tenants")
        compatibility = await load_compatibility(with_declaration(self.services.config, declared))
        return await compatibility_report(self.services.registry, compatibility)

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

    # --- used by the commands and by env.py -------------------------------------------------------------------------

    async def execute(
        self,
        plan: Plan,
        tenants: Iterable[TenantRef] | None = None,
        concurrency: int = DEFAULT_CONCURRENCY,
        *,
        stop_on_failure: bool = False,
        progress: Progress | None = None,
        checks: ChecksAsked = "ahead",
    ) -> FleetReport:
        """Apply ``plan`` to tenants; the arguments are as for ``upgrade``. ``checks`` says when to ask checks."""
        refuse_while_bound("migrating tenants")
        _check_concurrency(concurrency)
        local.install()
        run = Run(
            plan,
            self.services,
            self._connections,
            concurrency=concurrency,
            stop_on_failure=stop_on_failure,
            progress=progress,
            checks=checks,
        )
        return await run.execute(tenants)

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

    async def _status(
        self, tenant: Tenant, environment: Environment | None, heads: Heads, health: Health
    ) -> TenantRevision:
        found: State | None = None
        error = None
        configured = self.services.config.extensions
        try:
            target = self._connections.target(tenant, health)
            connection = await target.connect()
            try:
                timeout = self._connections.limits.connect
                found = await read_state(connection, environment, target, timeout=timeout)
            finally:
                await close(connection)
        except Exception as exc:  # noqa: BLE001 - any error is reported for this tenant
            error = describe(exc)
        return TenantRevision(
            tenant_id=tenant.id,
            slug=tenant.slug,
            server=placement_of(tenant).server,
            revision=None if found is None else format_revision(found.heads),
            recorded=tenant.schema_revision,
            at_head=None if found is None else found.heads == heads,
            error=error,
            missing_extensions=() if found is None else tuple(x for x in configured if x not in found.extensions),
            # every database has plpgsql
            other_extensions=() if found is None else tuple(sorted(found.extensions - {*configured, "plpgsql"})),
        )


def _check_concurrency(concurrency: int) -> None:
    if concurrency < 1:
        raise ConfigurationError(f"concurrency must be at least 1, not {concurrency}")


__all__ = ["DEFAULT_CONCURRENCY", "FleetMigrator"]
