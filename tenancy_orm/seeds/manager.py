"""``SeedManager``: brings seeds and reference data to existing tenants, and says which tenants lack some."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from uuid import UUID

from ..audit.actor import SYSTEM, Actor
from ..config import ReferenceTable
from ..context import refuse_while_bound
from ..errors import ConfigurationError, UnknownTierError
from ..events import TenantSeeded, TenantSeedingFailed
from ..migrations.concurrency import interleave, map_concurrently
from ..migrations.connections import Connections, Health, prepare_servers
from ..migrations.database import close, lock
from ..migrations.failures import describe
from ..migrations.logs import TENANT_FAILED
from ..migrations.selection import Selection
from ..migrations.services import FleetServices
from ..postgres.connections import Connection
from ..postgres.errors import sqlstate_of, without_detail
from ..registry.lifecycle import LOGIN_BLOCKED
from ..routing import Router
from ..routing.marker import marker_text
from ..tenant import Status, Tenant, TenantRef, placement_of
from . import records, reference, running
from .definition import Seed
from .failures import describe_without
from .loading import SeedSet
from .records import Applied
from .report import SeedOutcome, SeedProgress, SeedReport, SeedStatus
from .source import Reference, ReferenceRows, version_of

logger = logging.getLogger("tenancy_orm.seeds")

DEFAULT_CONCURRENCY = 8


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What a run is about."""

    references: tuple[ReferenceRows, ...]
    seeds: tuple[Seed, ...]
    force: bool = False

    def outstanding(self, found: Applied) -> tuple[list[ReferenceRows], list[Seed]]:
        """What of it a database lacks."""
        rows = [one for one in self.references if self.force or found.reference.get(one.name) != one.digest]
        seeds = [one for one in self.seeds if self.force or found.seeds.get(one.name, 0) < one.version]
        return rows, seeds


@dataclass(slots=True)
class _Work:
    """What was done for one tenant so far."""

    applied: dict[str, int | str]
    kept: dict[str, tuple[str, ...]]
    skipped: tuple[str, ...] = ()


class _ElsewhereError(Exception):
    """The tenant has another database by now, by a move or a restore; this one was not changed."""


class SeedManager:
    """Brings seeds and reference data to existing tenants (``tenancy.seeds``).

    Only operators may do this: while a tenant is bound, everything here raises ``CrossTenantError``.

    Args:
        services: The services of an open ``Tenancy``.
        seeds: The seeds and reference tables.
        router: Gives sessions of tenants.
    """

    def __init__(self, services: FleetServices, seeds: SeedSet, router: Router) -> None:
        self._services = services
        self._seeds = seeds
        self._router = router
        self._connections = Connections(services)
        self._selection = Selection(services.registry)
        self._timeout = services.config.provisioning.seed_timeout

    def configured(self) -> Mapping[str, Seed | ReferenceTable]:
        """Return the reference tables and the seeds by name, in the order in which they are applied.

        Raises:
            ConfigurationError: a seed cannot be loaded.
        """
        return {name: one if isinstance(one, Seed) else one.settings for name, one in self._known().items()}

    async def apply(
        self,
        tenants: Iterable[TenantRef] | None = None,
        *,
        tier: str | Iterable[str] = (),
        status: Status | str | Iterable[Status | str] = (),
        only: str | Iterable[str] | None = None,
        force: bool = False,
        dry_run: bool = False,
        concurrency: int = DEFAULT_CONCURRENCY,
        progress: SeedProgress | None = None,
        actor: Actor = SYSTEM,
    ) -> SeedReport:
        """Bring each tenant what it lacks: reference data, then seeds, each once for each version.

        The template is built first: where a seed fails there, no tenant was touched. Each seed and each table is a
        transaction of its own, with its record. So a run can be repeated after any end, and two can run at once. If a
        tenant fails, the others go on; the failure is in the report.

        Args:
            tenants: The tenants; all where None, also suspended and deleted ones.
            tier: Only tenants of these tiers.
            status: Only tenants with these statuses.
            only: Only the seeds and reference tables of these names.
            force: Apply what ``only`` names even to tenants that have it.
            dry_run: Change nothing; the report says what would be applied.
            concurrency: How many tenants at once.
            progress: Called as the run proceeds.
            actor: Who does this, for the audit log.

        Raises:
            ConfigurationError: a seed or a source cannot be loaded, ``only`` names none, or ``force`` lacks ``only``.
            SeedError, ReferenceDataError, MigrationError: it fails on the template; no tenant was touched.
            TenantNotFoundError, UnknownTierError: one of ``tenants``, or a tier, does not exist.
            ControlUnavailableError: the control database does not answer.
        """
        refuse_while_bound("seeding tenants")
        started = time.monotonic()
        if concurrency < 1:
            raise ConfigurationError(f"concurrency must be at least 1, not {concurrency}")
        wanted = await self._wanted(only, force)
        chosen = await self._choose(tenants, tier, status)
        health = Health()
        if wanted.references or wanted.seeds:
            if not dry_run:
                names = dict.fromkeys(placement_of(tenant).server for tenant in chosen)
                await prepare_servers(names, self._build_template, health)
        else:
            chosen = []
        if progress is not None:
            progress.total(len(chosen))
        outcomes: dict[UUID, SeedOutcome] = {}

        async def bring(tenant: Tenant) -> None:
            outcome = await self._bring(tenant, wanted, health, dry_run=dry_run, actor=actor)
            if outcome is not None:
                outcomes[tenant.id] = outcome
                if progress is not None:
                    progress.done(outcome)

        await map_concurrently(bring, interleave(chosen), concurrency)
        return SeedReport(
            outcomes=tuple(outcomes[tenant.id] for tenant in chosen if tenant.id in outcomes),
            seconds=time.monotonic() - started,
            dry_run=dry_run,
        )

    async def status(
        self,
        tenants: Iterable[TenantRef] | None = None,
        *,
        tier: str | Iterable[str] = (),
        status: Status | str | Iterable[Status | str] = (),
        concurrency: int = DEFAULT_CONCURRENCY,
    ) -> list[SeedStatus]:
        """Read what every tenant's database has and lacks, in order of creation. A function of rows is called once.

        Args:
            tenants: The tenants; all where None.
            tier: Only tenants of these tiers.
            status: Only tenants with these statuses.
            concurrency: How many at once.

        Raises:
            TenancyError: as ``apply``; a tenant that cannot be read is in the list, with the reason.
        """
        refuse_while_bound("looking at all tenants' seeds")
        wanted = await self._wanted(None, False)
        health = Health()
        if not (wanted.references or wanted.seeds):
            return []

        async def read(tenant: Tenant) -> SeedStatus:
            fields = {"tenant_id": tenant.id, "slug": tenant.slug, "server": placement_of(tenant).server}
            try:
                connection = await self._connect(tenant, health)
                try:
                    found = await self._read(connection, tenant)
                finally:
                    await close(connection)
            except Exception as exc:  # noqa: BLE001 - any error is reported for this tenant
                return SeedStatus(**fields, error=describe(exc))  # type: ignore[arg-type]
            rows, seeds = wanted.outstanding(found)
            versions = {name: version_of(digest) for name, digest in found.reference.items()}
            outstanding = (*(one.name for one in rows), *(one.name for one in seeds))
            return SeedStatus(**fields, applied={**versions, **found.seeds}, outstanding=outstanding)  # type: ignore[arg-type]

        return await map_concurrently(read, interleave(await self._choose(tenants, tier, status)), concurrency)

    # --- which ------------------------------------------------------------------------------------------------------

    def _known(self) -> dict[str, Seed | Reference]:
        everything: list[Seed | Reference] = [*self._seeds.references, *self._seeds.for_template()]
        return {one.name: one for one in (*everything, *self._seeds.for_tenants())}

    async def _wanted(self, only: str | Iterable[str] | None, force: bool) -> _Wanted:
        names = None if only is None else {only} if isinstance(only, str) else set(only)
        if force and not names:
            raise ConfigurationError("pass only= with the seeds to apply again")
        known = self._known()
        if unknown := sorted((names or set()) - set(known)):
            listed = ", ".join(known) or "none is configured"
            raise ConfigurationError(f"there is no seed and no reference table {unknown[0]!r}; there are: {listed}")
        chosen = [one for name, one in known.items() if names is None or name in names]
        sources = [await one.load() for one in chosen if isinstance(one, Reference)]
        return _Wanted(tuple(sources), tuple(one for one in chosen if isinstance(one, Seed)), force)

    async def _choose(
        self,
        tenants: Iterable[TenantRef] | None,
        tier: str | Iterable[str],
        status: Status | str | Iterable[Status | str],
    ) -> list[Tenant]:
        one = isinstance(tenants, (str, UUID, Tenant))
        found = await self._selection.choose([tenants] if one else tenants)  # type: ignore[list-item]
        tiers = {tier} if isinstance(tier, str) else set(tier)
        if unknown := sorted(tiers - set(self._services.config.tiers)):
            raise UnknownTierError(unknown[0], tuple(self._services.config.tiers))
        try:
            statuses = {Status(name) for name in ((status,) if isinstance(status, str) else status)}
        except ValueError as exc:
            raise ConfigurationError(f"{exc}; statuses: {', '.join(Status)}") from None
        return [
            tenant
            for tenant in found
            if (not tiers or tenant.tier in tiers) and (not statuses or tenant.status in statuses)
        ]

    async def _build_template(self, server: str) -> None:
        # tenants that are created during the run are cloned from it
        await self._services.provisioner.template(server)

    # --- one tenant -------------------------------------------------------------------------------------------------

    async def _connect(self, tenant: Tenant, health: Health) -> Connection:
        place = placement_of(tenant)
        return await self._connections.connect(place.server, place.database, health, tenant=tenant.slug)

    async def _read(self, connection: Connection, tenant: Tenant) -> Applied:
        marker = marker_text(self._services.names.installation, tenant.id)
        return await records.read(connection, marker=marker, tenant=tenant.slug)

    async def _bring(
        self, tenant: Tenant, wanted: _Wanted, health: Health, *, dry_run: bool, actor: Actor
    ) -> SeedOutcome | None:
        """Bring one tenant what it lacks; None if it has been purged since the list was made."""
        started = time.monotonic()
        work = _Work({}, {})
        error: Exception | None = None
        try:
            await self._apply(tenant, wanted, health, work, dry_run=dry_run)
        except Exception as exc:
            if isinstance(exc, _ElsewhereError) or await self._selection.is_elsewhere(tenant, exc):
                now = await self._services.registry.get(tenant.id)
                if now.placement is None:
                    return None
                return await self._bring(now, wanted, health, dry_run=dry_run, actor=actor)
            if await self._selection.is_gone(tenant, exc):
                return None
            logger.debug("tenant %s failed", tenant.slug, exc_info=without_detail(exc))
            error = exc
        if work.applied and not dry_run:
            error = await self._record(tenant, work, actor) or error
        outcome = SeedOutcome(
            tenant_id=tenant.id,
            slug=tenant.slug,
            server=placement_of(tenant).server,
            seconds=time.monotonic() - started,
            applied=work.applied,
            kept=work.kept,
            skipped=work.skipped,
            error=None if error is None else describe_without(error, tenant.slug),
            sqlstate=None if error is None else sqlstate_of(error),
        )
        self._announce(outcome, dry_run=dry_run)
        return outcome

    async def _apply(self, tenant: Tenant, wanted: _Wanted, health: Health, work: _Work, *, dry_run: bool) -> None:
        connection = await self._connect(tenant, health)
        try:
            found = await self._read(connection, tenant)
            rows, seeds = wanted.outstanding(found)
            if tenant.status in LOGIN_BLOCKED:
                work.skipped = tuple(seed.name for seed in seeds if not seed.template)
                seeds = [seed for seed in seeds if seed.template]
            if dry_run:
                work.applied |= {one.name: one.version for one in rows}
                work.applied |= {one.name: one.version for one in seeds}
                return
            if not (rows or seeds):
                return
            # A move and a restore hold it until the tenant has another database; and no migration runs beside this.
            await lock(connection, timeout=self._connections.limits.wait)
            if not await self._services.registry.is_placed_as(tenant):
                raise _ElsewhereError
            if not found.has_tables:
                await records.create_tables(connection, placement_of(tenant).role)
            await self._apply_as_owner(connection, tenant, rows, seeds, wanted.force, work)
        finally:
            await close(connection)
        for seed in seeds:
            if not seed.template and await running.run_for_tenant(
                self._router, tenant, seed, timeout=self._timeout, force=wanted.force
            ):
                work.applied[seed.name] = seed.version

    async def _apply_as_owner(
        self,
        connection: Connection,
        tenant: Tenant,
        rows: Iterable[ReferenceRows],
        seeds: Iterable[Seed],
        force: bool,
        work: _Work,
    ) -> None:
        place = placement_of(tenant)
        for one in rows:
            change = await reference.bring(
                connection, one, timeout=self._timeout, role=place.role, tenant=tenant.slug, force=force
            )
            if change is not None:
                work.applied[one.name] = one.version
                if change.kept:
                    work.kept[one.name] = change.kept
        of_template = [seed for seed in seeds if seed.template]
        if not of_template:
            return
        adapter, url = self._connections.adapter(place.server), self._connections.url(place.server, place.database)
        async with adapter.adapt(connection, url) as adapted:
            for seed in of_template:
                if await running.run_as_owner(adapted, seed, timeout=self._timeout, force=force, tenant=tenant.slug):
                    work.applied[seed.name] = seed.version

    async def _record(self, tenant: Tenant, work: _Work, actor: Actor) -> Exception | None:
        """Write to the audit log what was applied; return the error if that failed."""
        detail = {"applied": work.applied, **({"kept": work.kept} if work.kept else {})}
        try:
            await self._services.registry.record(tenant.id, "tenant.seed", detail=detail, actor=actor)
        except Exception as exc:  # noqa: BLE001 - it is applied, which the report must say as well
            logger.error("the audit log lacks what was applied to tenant %s: %s", tenant.slug, describe(exc))
            return exc
        return None

    def _announce(self, outcome: SeedOutcome, *, dry_run: bool) -> None:
        if outcome.error is not None:
            logger.error(TENANT_FAILED, outcome.slug, outcome.error)
        if dry_run:
            return
        names = {"tenant_id": outcome.tenant_id, "slug": outcome.slug}
        if outcome.applied:
            self._services.events.emit(TenantSeeded(**names, names=tuple(outcome.applied)))  # type: ignore[arg-type]
        if outcome.error is not None:
            self._services.events.emit(TenantSeedingFailed(**names, error=outcome.error))  # type: ignore[arg-type]


__all__ = ["DEFAULT_CONCURRENCY", "SeedManager"]
