"""``Rehearsal``: tries an upgrade on clones of some tenants, and reports what it would do to all of them."""

from __future__ import annotations

import asyncio
import ipaddress
import shutil
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..audit.actor import SYSTEM, Actor
from ..cancellation import run_to_completion
from ..drift.catalogue import Catalogue
from ..errors import ConfigurationError, MigrationError, ProvisioningError, TenancyError
from ..migrations import local
from ..migrations.connections import Connections, Health
from ..migrations.database import close, read_state
from ..migrations.failures import describe
from ..migrations.plan import Heads, Plan
from ..migrations.scripts import Environment
from ..migrations.selection import NO_TENANTS, Selection
from ..migrations.services import FleetServices
from ..operations.progress import StepProgress, silent
from ..postgres import connections as plain_connections
from ..postgres.failures import SERVER_FAILURES
from ..provisioning.copies.making import Content
from ..provisioning.server_objects import databases
from ..tenant import Tenant, TenantRef, placement_of
from .choice import Candidate, choose, is_behind
from .clone import CloneRehearsal, Findings
from .estimate import Sample, estimate
from .report import CloneReport, RehearsalReport

DEFAULT_CLONES = 3
_MARGIN = 1.2  # what a clone may need over the size of its source, and the migration's own


class Rehearsal:
    """Rehearses one upgrade.

    Clones are made and tried one after another: so each needs its space alone, and no clone slows another down.

    Args:
        services: The services of an open ``Tenancy``.
        connections: Their time limits are read from it.
        environment: The scripts.
        revision: The target.
        content: What of a tenant is cloned.
        downgrade: Whether each clone is downgraded and upgraded again.
        concurrency: How many tenants the real run would upgrade at once, for the estimate.
        progress: Called with each step that begins, in words.
        actor: Who does this, for the audit log.
    """

    def __init__(
        self,
        services: FleetServices,
        connections: Connections,
        environment: Environment,
        revision: str,
        *,
        content: Content = "data",
        downgrade: bool = True,
        concurrency: int = 8,
        progress: StepProgress | None = None,
        actor: Actor = SYSTEM,
    ) -> None:
        self._services = services
        self._connections = connections
        self._environment = environment
        self._revision = revision
        self._content = content
        self._downgrade = downgrade
        self._concurrency = concurrency
        self._progress = progress or silent
        self._actor = actor
        self._plan = Plan.of(environment, "upgrade", revision)
        self._notes: dict[str, None] = {}
        self._fresh: dict[str, Catalogue | TenancyError] = {}  # by server

    async def run(self, tenants: Iterable[TenantRef] | None, clones: int) -> RehearsalReport:
        """Rehearse on clones of ``tenants``; where None, of the largest, the oldest and others, ``clones`` in all.

        Raises:
            MigrationError: the revision does not exist, or no tenant is behind it.
            ConfigurationError: ``clones`` is no such number.
            TenantNotFoundError: one of ``tenants`` does not exist.
        """
        if clones < 1:
            raise ConfigurationError(f"clones must be at least 1, not {clones}")
        local.install()
        started = time.monotonic()
        behind = await self._behind()
        chosen = await self._choose(tenants, clones, behind)
        reports = [await self._rehearse(one) for one in chosen]
        samples = [
            # without connecting, and what the measurement itself took
            Sample(report.size, sum(revision.seconds for revision in report.upgrade.revisions))
            for report in reports
            if report.upgrade is not None and report.upgrade.error is None
        ]
        sizes = [one.size for one in behind if one.size is not None]
        found = estimate(samples, sizes, concurrency=self._concurrency) if self._content == "data" else None
        if found is not None:
            self._notes[
                "the estimate is of clones that were just restored, on their own: tenants under load, a cold cache and "
                f"{self._concurrency} at once on the same disks take longer"
            ] = None
        return RehearsalReport(
            target=self._plan.target,
            content=self._content,
            clones=tuple(reports),
            estimate=found,
            notes=tuple(self._notes),
            seconds=time.monotonic() - started,
        )

    # --- which tenants ----------------------------------------------------------------------------------------------

    async def _behind(self) -> list[Candidate]:
        """Return the tenants that the upgrade has something to do for, by the registry; with their sizes."""
        everyone = await Selection(self._services.registry).choose(None)
        if not everyone:
            raise MigrationError(NO_TENANTS)
        return await self._with_sizes([tenant for tenant in everyone if is_behind(self._plan, tenant)])

    async def _with_sizes(self, tenants: Sequence[Tenant]) -> list[Candidate]:
        by_server: dict[str, list[str]] = {}
        for tenant in tenants:
            place = placement_of(tenant)
            by_server.setdefault(place.server, []).append(place.database)
        sizes: dict[str, int] = {}
        for server, names in by_server.items():
            try:
                connection = await self._services.provisioner.connect_admin(server)
                try:
                    sizes |= await databases.sizes(connection, names)
                finally:
                    await run_to_completion(plain_connections.close(connection))
            except (TenancyError, *SERVER_FAILURES) as exc:
                self._notes[f"the sizes of tenants on server {server} are not known: {describe(exc)}"] = None
        return [Candidate(tenant, sizes.get(placement_of(tenant).database)) for tenant in tenants]

    async def _choose(
        self, tenants: Iterable[TenantRef] | None, clones: int, behind: Sequence[Candidate]
    ) -> list[Candidate]:
        if tenants is not None:
            return await self._with_sizes(await Selection(self._services.registry).choose(tenants))
        if not behind:
            raise MigrationError(f"every tenant is at {self._plan.target} already: there is nothing to rehearse")
        limit = self._services.config.rehearsal.max_bytes if self._content == "data" else None
        chosen = choose(behind, clones, max_bytes=limit)
        if limit is not None and (larger := [one for one in behind if one.size is not None and one.size > limit]):
            names = ", ".join(one.tenant.slug for one in larger[:5])
            self._notes[
                f"{len(larger)} of {len(behind)} tenants are larger than rehearsal.max_bytes ({limit}) and were not "
                f"cloned: {names}"
            ] = None
        if not chosen:
            raise MigrationError(
                f"every tenant is larger than rehearsal.max_bytes ({limit}); raise it, or clone without data"
            )
        return chosen

    # --- one clone --------------------------------------------------------------------------------------------------

    async def _rehearse(self, candidate: Candidate) -> CloneReport:
        tenant, place = candidate.tenant, placement_of(candidate.tenant)
        findings, error = Findings(revision=tenant.schema_revision), None
        copy_seconds: float | None = None
        left_out: tuple[str, ...] = ()
        limit = self._services.config.rehearsal.timeout
        try:
            await self._check_space(candidate)
            fresh = await self._build_fresh(tenant)
            self._progress(f"{tenant.slug}: copy")
            await self._services.registry.record(
                tenant.id, "tenant.copy", detail={"purpose": "rehearsal", "content": self._content}, actor=self._actor
            )
            async with self._services.provisioner.copies.open(
                tenant,
                content=self._content,
                extensions=self._services.config.extensions,
                timeout=limit,
                valid_for=limit,
            ) as copy:
                copy_seconds, left_out = copy.seconds, copy.left_out
                if self._content == "schema" and not copy.has_statistics:
                    self._notes[
                        f"server {copy.server} and pg_dump cannot copy statistics, which needs PostgreSQL 18: clones "
                        "have the schema alone"
                    ] = None
                clone = CloneRehearsal(
                    copy,
                    tenant,
                    self._environment,
                    self._connections,
                    lambda phase: self._progress(f"{tenant.slug}: {phase}"),
                )
                findings = clone.findings
                async with asyncio.timeout(limit):
                    if self._content == "schema":
                        await clone.stamp(await self._heads(tenant))
                    await clone.run(self._revision, fresh, downgrade=self._downgrade)
        except TimeoutError:
            error = f"not done within {limit:g} s; raise rehearsal.timeout"
        except (TenancyError, *SERVER_FAILURES) as exc:
            error = describe(exc)
        return CloneReport(
            slug=tenant.slug,
            server=place.server,
            size=candidate.size or 0,
            revision=findings.revision,
            copy_seconds=copy_seconds,
            phases=tuple(findings.phases),
            differences=tuple(findings.differences),
            idle_downgrades=findings.idle_downgrades,
            lost_values=findings.lost_values,
            left_out=left_out,
            error=error,
        )

    async def _heads(self, tenant: Tenant) -> Heads:
        target = self._connections.target(tenant, Health())
        connection = await target.connect()
        try:
            timeout = self._connections.limits.connect
            return (await read_state(connection, self._environment, target, timeout=timeout)).heads
        finally:
            await run_to_completion(close(connection))

    async def _build_fresh(self, tenant: Tenant) -> Catalogue:
        """Return the schema of a new database at the target, built in the same way as a clone; once for each server.

        Raises:
            MigrationError: it cannot be built.
        """
        server = placement_of(tenant).server
        if server not in self._fresh:
            self._progress(f"build of {self._plan.target} on server {server}")
            try:
                self._fresh[server] = await self._build(tenant)
            except TenancyError as exc:
                self._fresh[server] = MigrationError(f"a new database cannot be built: {describe(exc)}")
        found = self._fresh[server]
        if isinstance(found, TenancyError):
            raise found
        return found

    async def _build(self, tenant: Tenant) -> Catalogue:
        limit = self._services.config.rehearsal.timeout
        async with self._services.provisioner.copies.open(
            tenant, content="nothing", extensions=self._services.config.extensions, timeout=limit, valid_for=limit
        ) as copy:
            clone = CloneRehearsal(copy, tenant, self._environment, self._connections, self._progress)
            return await clone.build(self._revision)

    async def _check_space(self, candidate: Candidate) -> None:
        """Refuse to clone what is larger than allowed, or than what is free, where that can be known.

        Raises:
            ProvisioningError: it is.
        """
        if self._content != "data":
            return
        config, size, slug = self._services.config.rehearsal, candidate.size, candidate.tenant.slug
        if size is None:
            raise ProvisioningError(f"the size of tenant {slug!r} is not known", tenant=slug, step="copy")
        if size > config.max_bytes:
            raise ProvisioningError(
                f"the database has {size} bytes, and rehearsal.max_bytes is {config.max_bytes}; raise it, or clone "
                "without data",
                tenant=slug,
                step="copy",
            )
        server = placement_of(candidate.tenant).server
        free = await self._free_space(server)
        if free is None:
            self._notes[f"how much space is free on server {server} cannot be known from here"] = None
        elif free < size * _MARGIN:
            raise ProvisioningError(
                f"a clone needs up to {round(size * _MARGIN)} bytes, and server {server!r} has {free} free",
                tenant=slug,
                step="copy",
            )

    async def _free_space(self, server: str) -> int | None:
        """Return the free bytes of a server's disk if it is on this machine and says where; None otherwise."""
        if not _is_here(self._services.servers[server].host):
            return None
        connection = await self._services.provisioner.connect_admin(server)
        try:
            directory = await connection.fetchval("SHOW data_directory")
            return await asyncio.to_thread(lambda: shutil.disk_usage(Path(directory)).free)
        except (*SERVER_FAILURES, PermissionError):  # not allowed to know, or not on this machine after all
            return None
        finally:
            await run_to_completion(plain_connections.close(connection))


def _is_here(host: str) -> bool:
    if host == "localhost" or host.startswith("/"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


__all__ = ["DEFAULT_CLONES", "Rehearsal"]
