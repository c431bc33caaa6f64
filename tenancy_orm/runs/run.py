"""One run of a plan over the fleet: which tenants, in what order, and the result for each."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from uuid import UUID

from ..cancellation import run_to_completion
from ..errors import (
    ControlUnavailableError,
    MigrationError,
    NotOpenError,
    TenancyError,
)
from ..events import TenantMigrated, TenantMigrationFailed
from ..migrations.concurrency import interleave, map_concurrently
from ..migrations.connections import Connections, Health, placement_of, prepare_servers
from ..migrations.database import DatabaseMigration, close
from ..migrations.failures import describe
from ..migrations.logs import TENANT_FAILED, logger, warning_once
from ..migrations.plan import Plan, format_revision
from ..migrations.preflight import ChecksAsked, Preflight
from ..migrations.selection import Selection
from ..migrations.services import FleetServices
from ..postgres.errors import sqlstate_of
from ..tenant import Tenant, TenantRef
from .report import FleetReport, Progress, TenantOutcome

_PASSES = 10  # how often a run looks for tenants that were created during it


class Run:
    """One run of a plan over the fleet.

    Args:
        plan: The plan.
        services: The services of an open ``Tenancy``.
        connections: Connects to the databases.
        concurrency: How many tenants at once.
        stop_on_failure: Start no other tenant after a failure.
        progress: Called as the run proceeds.
        checks: When checks of revisions are asked: of all tenants before the first is changed, of each right before a
            revision runs, or never.
    """

    def __init__(
        self,
        plan: Plan,
        services: FleetServices,
        connections: Connections,
        *,
        concurrency: int,
        stop_on_failure: bool,
        progress: Progress | None,
        checks: ChecksAsked = "ahead",
    ) -> None:
        self.plan = plan
        self.services = services
        self.connections = connections
        self.selection = Selection(services.registry)
        self.concurrency = concurrency
        self.stop_on_failure = stop_on_failure
        self.progress = progress
        self.health = Health()
        self.outcomes: dict[UUID, TenantOutcome] = {}
        self.order: dict[UUID, str] = {}  # every tenant this run has seen, with its slug
        self.gone: set[UUID] = set()
        self.stopped = False
        self.checks = checks
        self.deferred: Mapping[UUID, frozenset[str]] = {}  # by tenant: the revisions with checks that are still to ask

    async def execute(self, tenants: Iterable[TenantRef] | None) -> FleetReport:
        """Apply the plan to ``tenants``, or to all, and return the report."""
        with warning_once():
            return await self._execute(tenants)

    async def _execute(self, tenants: Iterable[TenantRef] | None) -> FleetReport:
        started = time.monotonic()
        pending = await self.selection.choose(tenants)
        await self._prepare(pending)
        if self.checks == "ahead":
            preflight = Preflight(
                self.plan, self.connections, self.selection, concurrency=self.concurrency, health=self.health
            )
            self.deferred = await preflight.before_run(pending)
        if tenants is None and self.plan.command != "upgrade":
            # until it has ended nobody knows where the fleet is, and no tenant may be upgraded by itself
            await self.services.registry.set_fleet_revision(None)
        for _ in range(_PASSES):
            await self._migrate_all(pending)
            if tenants is not None or self.stopped or self.plan.is_relative:
                break
            # tenants that older code cloned from its template after the list was made
            pending = [t for t in await self.selection.choose(None) if t.id not in self.order]
            if not pending:
                break
        report = self._report(time.monotonic() - started)
        if tenants is None and report.ok:
            await self._record_fleet(report)
        return report

    async def _record_fleet(self, report: FleetReport) -> None:
        try:
            await self.services.registry.set_fleet_revision(self._reached(report))
        except ControlUnavailableError as exc:
            logger.error("the fleet's revision could not be recorded, so run this command again: %s", exc)

    def _reached(self, report: FleetReport) -> str | None:
        """The revision that all tenants are at now; None if they are not all at the same one."""
        if self.plan.reaches_head:
            return format_revision(self.plan.environment.script.revision_map._real_heads)
        found = {outcome.after for outcome in report.outcomes}
        return found.pop() if len(found) == 1 else None

    def _report(self, seconds: float) -> FleetReport:
        done = self.outcomes
        skipped = (slug for key, slug in self.order.items() if key not in done and key not in self.gone)
        return FleetReport(
            command=self.plan.command,
            target=self.plan.target,
            outcomes=tuple(done[key] for key in self.order if key in done),
            seconds=seconds,
            skipped=tuple(skipped),
        )

    async def _prepare(self, tenants: list[Tenant]) -> None:
        """Check which servers answer, and build the template on each, before a tenant is touched."""
        names = dict.fromkeys(placement_of(t).server for t in tenants) or dict.fromkeys(self.services.servers)
        await prepare_servers(names, self._prepare_server, self.health)

    async def _prepare_server(self, name: str) -> None:
        if self.plan.command == "upgrade":
            await self.services.provisioner.extensions.check(name)
        if self.plan.reaches_head:
            await self.services.provisioner.template(name)
        else:
            await close(await self.connections.connect(name, None, self.health))

    async def _migrate_all(self, tenants: list[Tenant]) -> None:
        for tenant in tenants:
            self.order[tenant.id] = tenant.slug
        if self.progress is not None:
            self.progress.total(len(self.order))
        await map_concurrently(self._migrate, interleave(tenants), self.concurrency, proceed=lambda: not self.stopped)

    async def _migrate(self, tenant: Tenant) -> None:
        started = time.monotonic()
        migration = DatabaseMigration(
            self.plan,
            self.connections.target(tenant, self.health),
            adapter=self.connections.adapter(placement_of(tenant).server),
            limits=self.connections.limits,
            announce=lambda: self._announce(tenant, migration),
            checks=frozenset() if self.checks == "never" else self.deferred.get(tenant.id),
        )
        error: Exception | None = None
        try:
            await migration.run()
            if migration.changed:
                await self.services.provisioner.apply_grants(tenant)
        except Exception as exc:  # noqa: BLE001 - a revision may raise anything; it is reported for this tenant
            if await self.selection.is_gone(tenant, exc):
                self.gone.add(tenant.id)
                return
            logger.debug("tenant %s failed", tenant.slug, exc_info=exc)
            error = exc
        except BaseException:
            # interrupted: without this, processes would go on to prepare every statement again
            if migration.announced:
                await run_to_completion(self._record_end(tenant))
            raise
        unrecorded = await self._record(tenant, migration)
        self._done(tenant, migration, error or unrecorded, time.monotonic() - started)

    async def _announce(self, tenant: Tenant, migration: DatabaseMigration) -> None:
        """Tell every process that the schema changes now, so that open connections prepare their statements again."""
        try:
            await self.services.registry.announce_migration(
                tenant.id, target=migration.target_revision, seconds=self.services.config.migration.timeout
            )
        except ControlUnavailableError as exc:
            logger.warning("open connections cannot be told that the schema changes: %s", exc)

    async def _record_end(self, tenant: Tenant) -> None:
        """Tell every process that the migration has ended, at whichever revision."""
        try:
            await self.services.registry.announce_migration(tenant.id, ended=True)
        except (ControlUnavailableError, NotOpenError) as exc:
            logger.warning("open connections cannot be told that the migration has ended: %s", exc)

    async def _record(self, tenant: Tenant, migration: DatabaseMigration) -> Exception | None:
        """Record the tenant's revision in the registry; return the error if that failed."""
        if migration.after is None:
            return None
        if format_revision(migration.after) == tenant.schema_revision and not migration.announced:
            return None
        try:
            held = self.plan.command != "upgrade"
            await self.services.registry.set_revision(tenant.id, format_revision(migration.after), held=held)
        except TenancyError as exc:
            return MigrationError(
                f"it is at {format_revision(migration.after) or 'base'}, but the registry could not record that: {exc}"
            )
        return None

    def _done(self, tenant: Tenant, migration: DatabaseMigration, error: Exception | None, seconds: float) -> None:
        after = None if migration.after is None else format_revision(migration.after)
        outcome = TenantOutcome(
            tenant_id=tenant.id,
            slug=tenant.slug,
            server=placement_of(tenant).server,
            before=None if migration.before is None else format_revision(migration.before),
            after=after,
            changed=migration.changed,
            seconds=seconds,
            error=None if error is None else describe(error),
            sqlstate=None if error is None else sqlstate_of(error),
            extensions=migration.installed,
        )
        self.outcomes[tenant.id] = outcome
        events = self.services.events
        if outcome.error is None:
            events.emit(
                TenantMigrated(
                    tenant_id=tenant.id, slug=tenant.slug, revision=after, changed=outcome.changed, seconds=seconds
                )
            )
        else:
            logger.error(TENANT_FAILED, tenant.slug, outcome.error)
            events.emit(TenantMigrationFailed(tenant_id=tenant.id, slug=tenant.slug, error=outcome.error))
            self.stopped = self.stopped or self.stop_on_failure
        if self.progress is not None:
            self.progress.done(outcome)
