"""``AdoptionManager``: makes tenants of databases and schemas that exist already."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..audit.actor import SYSTEM, Actor
from ..cancellation import run_to_completion
from ..config.placement import PlacementRequest
from ..context import refuse_while_bound
from ..drift.policy import RevisionPolicy
from ..errors import AdoptionDifferencesError, AdoptionError, ConfigurationError, OperationStateError, TenancyError
from ..jobs.claims import Claimant
from ..migrations.connections import Connections
from ..migrations.plan import format_revision
from ..migrations.scripts import Environment
from ..operations import Operation, Operations
from ..operations.progress import StepProgress, silent
from ..postgres import connections
from ..provisioning.creation.new_databases import NewDatabase
from ..runs import FleetMigrator
from ..servers.placement import Placer
from ..tenant import Status
from ..tenants.manager import TenantManager
from .fleet import FleetAdoption
from .frame import AdoptionFrame, Steps
from .in_place import InPlace, InPlaceLook
from .looking import Look, Looking, extensions_of, place_of
from .refusals import open_adoptable
from .report import AdoptionReport, copy_report, former_report, in_place_report, record_of
from .rows import RowsAdoption
from .rows_work import RowsWork
from .source import OpenSource, Source
from .verification import verify


class AdoptionManager:
    """Makes tenants of what exists already: databases, and schemas of a shared database; ``tenancy.adoption``.

    The source is only read. What is made of it is all or nothing.

    Args:
        migrations: Has the services and the migrations.
        tenants: Creates the tenants.
        operations: The records of adoptions.
        placer: Chooses the servers.

    Attributes:
        rows: Makes tenants of the rows of a shared database.
        fleet: Makes many tenants by a plan.
    """

    def __init__(
        self, migrations: FleetMigrator, tenants: TenantManager, operations: Operations, placer: Placer
    ) -> None:
        self._migrations = migrations
        self._services = migrations.services
        self._tenants = tenants
        self._operations = operations
        self._placer = placer
        self._frame = AdoptionFrame(self._services, tenants, operations)
        work = RowsWork(migrations, self._frame, placer)
        self.rows = RowsAdoption(work)
        self.fleet = FleetAdoption(self.check, self.adopt, work, self._services)

    async def check(
        self,
        slug: str,
        url: str,
        *,
        schema: str | None = None,
        with_shared: Sequence[str] = (),
        without: Sequence[str] = (),
        at: str | None = None,
        in_place: bool = False,
        server: str | None = None,
        region: str | None = None,
        tier: str | None = None,
        progress: StepProgress | None = None,
    ) -> AdoptionReport:
        """Look at what would become a tenant, compare it with its revision, and count its rows. Nothing is changed.

        Args:
            slug: The slug that the tenant would have.
            url: Of the database. Its password is neither stored nor shown.
            schema: A schema of it; the whole database where None.
            with_shared: Tables of other schemas that come along, as ``schema.table``.
            without: Tables that do not come along, as ``schema.table``.
            at: The revision that it is at, where it has no version table of Alembic; "base" for none.
            in_place: As for ``adopt``.
            server: The server to place it on; chosen as for a new tenant where None.
            region: Where its data has to stay.
            tier: The tenant's tier.
            progress: Called with each step that begins, in words.

        Raises:
            AdoptionError: the source cannot be read, or cannot become a tenant whatever is accepted.
            ConfigurationError: an argument is malformed.
            MigrationError: the migrations do not have the revision.
            PlacementError: no server takes the tenant.
            ControlUnavailableError, ServerUnavailableError: a server does not answer.
        """
        refuse_while_bound("adopting a database")
        started = time.monotonic()
        described = Source.parse(url, schema=schema, shared=with_shared, without=without, at=at)
        looking, plain, environment = await self._looking()
        async with open_adoptable(self._services, described) as opened:
            if in_place:
                place = await InPlace(self._services, plain, environment, looking).look(opened, progress or silent)
                return in_place_report(slug, opened, place, started)
            chosen = await self._choose(slug, server, region, tier)
            look = await looking.look(opened, chosen, progress or silent)
            return copy_report(slug, opened, look, started)

    async def adopt(
        self,
        slug: str,
        url: str,
        *,
        schema: str | None = None,
        with_shared: Sequence[str] = (),
        without: Sequence[str] = (),
        at: str | None = None,
        accept_differences: bool = False,
        in_place: bool = False,
        revoke: bool = False,
        server: str | None = None,
        region: str | None = None,
        tier: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        key_name: str = "default",
        scopes: Sequence[str] = (),
        progress: StepProgress | None = None,
        actor: Actor = SYSTEM,
    ) -> AdoptionReport:
        """Make a tenant of an existing database or schema: of a copy, or of a whole database in place.

        Its schema is compared with that of its revision first. The copy is one snapshot. A login that may do nothing
        else restores it and runs the missing revisions; then references, sequences and numbers of rows are verified,
        and the copy becomes the tenant's. If anything fails, nothing remains of it. If the process dies, call this
        again with the same arguments; where the tenant is complete already, this returns its report.

        Args:
            slug: The tenant's slug.
            url: Of the database. Its password is neither stored nor shown.
            schema: A schema of it; the whole database where None.
            with_shared: Tables of other schemas that come along, as ``schema.table``.
            without: Tables that do not come along, as ``schema.table``.
            at: The revision that it is at, where it has no version table of Alembic; "base" for none.
            accept_differences: Adopt it although tables and columns differ from its revision's. Functions, triggers,
                views and the like must be those of the revision all the same: they would run with the owner's rights.
            in_place: Let the database itself become the tenant's: it is on one of the installation's servers, and gets
                another owner and another name. Until the tenant is active, a failure brings back how it was. Missing
                revisions run afterwards.
            revoke: In place: take the rights of roles other than its owner away, which are refused otherwise.
            server: The server to place it on; chosen as for a new tenant where None.
            region: Where its data has to stay.
            tier: The tenant's tier.
            metadata: A JSON object, kept with the tenant.
            key_name: The name of its first API key.
            scopes: The key's scopes.
            progress: Called with each step that begins, in words.
            actor: Who does this, for the audit log.

        Raises:
            AdoptionDifferencesError: its schema is not that of its revision; nothing was changed.
            AdoptionError: the source cannot be read, or cannot become a tenant; nothing remains.
            TenancyError: as ``TenantManager.create``, and ``check``.
        """
        refuse_while_bound("adopting a database")
        started, progress = time.monotonic(), progress or silent
        described = Source.parse(url, schema=schema, shared=with_shared, without=without, at=at)
        if (former := await self._frame.clean_up_former(slug, str(described), actor=actor)) is not None:
            return await self._finished(former_report(*former, started), progress, actor)
        looking, plain, environment = await self._looking()
        values = {"tier": tier, "region": region, "metadata": metadata, "key_name": key_name, "scopes": scopes}
        if in_place:
            if server is not None:
                raise ConfigurationError("a database in place stays on its server: leave the server out")
            place = InPlace(self._services, plain, environment, looking)
            return await self._take(
                slug, described, place, accept_differences, revoke, values=values, progress=progress, actor=actor
            )
        chosen = await self._choose(slug, server, region, tier)
        policy = RevisionPolicy(self._services, plain, environment)
        return await self._copy(
            slug,
            described,
            looking,
            policy,
            accept_differences,
            server=chosen,
            values=values,
            progress=progress,
            actor=actor,
            started=started,
        )

    async def resume(self, operation: int, *, actor: Actor = SYSTEM) -> Operation:
        """End the record of an adoption that was interrupted after the tenant became active.

        Any other one goes on by ``adopt`` with the same arguments: the source's URL is stored nowhere.

        Args:
            operation: The operation's number.
            actor: Who does this, for the audit log.

        Raises:
            OperationNotFoundError: there is no such operation.
            OperationStateError: it has ended, a process does it now, or it needs its URL.
        """
        refuse_while_bound("resuming an adoption")
        found = await self._operations.get(operation)
        tenant = await self._services.registry.get(found.tenant_id)
        if found.kind != "adopt" or tenant.status is Status.PROVISIONING:
            raise OperationStateError(
                f"operation {operation} needs the URL of its source, which is stored nowhere: repeat tenancy adopt "
                f"{tenant.slug}, or end it with: tenancy operations undo {operation}"
            )
        claimant = Claimant()
        await self._operations.finish(await self._operations.claim(operation, claimant), claimant, "done")
        return await self._operations.get(operation)

    async def discard(self, operation: int, *, actor: Actor = SYSTEM) -> None:
        """Remove what an interrupted adoption has made; a database in place is brought back to how it was.

        Args:
            operation: The operation's number.
            actor: Who does this, for the audit log.

        Raises:
            OperationNotFoundError: there is no such operation.
            OperationStateError: its tenant is complete.
            AdoptionError: a process does it now.
        """
        refuse_while_bound("discarding an adoption")
        found = await self._operations.get(operation)
        tenant = await self._services.registry.get(found.tenant_id)
        if found.kind != "adopt" or tenant.status is not Status.PROVISIONING:
            raise OperationStateError(
                f"operation {operation} has made tenant {tenant.slug!r}, which is {tenant.status.value}: delete that"
            )
        await self._frame.clean_up(tenant, found, actor=actor)

    async def _copy(
        self,
        slug: str,
        described: Source,
        looking: Looking,
        policy: RevisionPolicy,
        accepted: bool,
        *,
        server: str,
        values: Mapping[str, Any],
        progress: StepProgress,
        actor: Actor,
        started: float,
    ) -> AdoptionReport:
        """Make a tenant of a copy."""
        async with open_adoptable(self._services, described) as opened:
            look = await looking.look(opened, server, progress)
            _refuse(slug, opened, look, accepted)
            notes: list[str] = []

            async def work(new: NewDatabase, steps: Steps) -> None:
                notes.extend(await _fill(looking, opened, look, new, steps))

            created, operation = await self._frame.create(
                slug,
                work,
                server=server,
                policy=policy,
                detail=record_of(copy_report(slug, opened, look, started)),
                extensions=extensions_of(look.contents),
                values=values,
                progress=progress,
                actor=actor,
            )
            report = copy_report(slug, opened, look, started)
        await self._services.registry.record(created.tenant.id, "tenant.adopt", detail=operation.detail, actor=actor)
        return replace(
            report,
            tenant=created.tenant,
            api_key=created.api_key,
            operation=operation.id,
            notes=(*report.notes, *notes),
            seconds=time.monotonic() - started,
        )

    async def _take(
        self,
        slug: str,
        described: Source,
        place: InPlace,
        accepted: bool,
        revoke: bool,
        *,
        values: Mapping[str, Any],
        progress: StepProgress,
        actor: Actor,
    ) -> AdoptionReport:
        """Take a database over, and run the missing revisions."""
        started = time.monotonic()
        async with open_adoptable(self._services, described) as opened:
            look = await place.look(opened, progress)
            _refuse(slug, opened, look, accepted)
            if look.foreign_rights and not revoke:
                raise AdoptionError(
                    f"roles other than its owner have rights in {opened.source}, which a tenant's database does not "
                    f"give: {'; '.join(look.foreign_rights)}; take them away with --revoke (revoke=True in Python)"
                )
            report = in_place_report(slug, opened, look, started)
        created, operation = await place.take(
            slug,
            look,
            self._tenants,
            self._operations,
            detail=record_of(report),
            values=values,
            progress=progress,
            actor=actor,
        )
        detail = {name: value for name, value in operation.detail.items() if name != "undo"}
        await self._services.registry.record(created.tenant.id, "tenant.adopt", detail=detail, actor=actor)
        report = replace(report, tenant=created.tenant, api_key=created.api_key, operation=operation.id)
        return replace(await self._finished(report, progress, actor), seconds=time.monotonic() - started)

    async def _finished(self, report: AdoptionReport, progress: StepProgress, actor: Actor) -> AdoptionReport:
        """Run the revisions that a database in place lacks; the tenant is active, whatever becomes of them."""
        looking, _, environment = await self._looking()
        tenant = report.tenant
        if not report.in_place or environment is None or tenant is None:
            return report
        heads = frozenset((tenant.schema_revision or "").split(",")) - {""}
        if (end := looking.end(heads)) == heads:
            return report
        pending = format_revision(end)
        progress("upgrade")
        try:
            done = await self._migrations.upgrade("heads", tenants=[tenant.id], actor=actor)
            errors = [str(one.error) for one in done.failures]
            tenant = await self._services.registry.get(tenant.id)
        except TenancyError as exc:
            errors = [str(exc)]
        notes = [f"not brought to {pending}, run tenancy migrate upgrade: {error}" for error in errors]
        return replace(report, tenant=tenant, pending=pending, notes=(*report.notes, *notes))

    async def _choose(self, slug: str, server: str | None, region: str | None, tier: str | None) -> str:
        config = self._services.config
        request = PlacementRequest(tier=tier or config.default_tier, region=region, slug=slug)
        return await self._placer.choose(request, server=server)

    async def _looking(self) -> tuple[Looking, Connections, Environment | None]:
        environment = None
        if self._services.config.migrations is not None:
            environment = await self._migrations.environment()
        plain = Connections(self._services)
        return Looking(self._services, plain, environment), plain, environment


def _refuse(slug: str, opened: OpenSource, look: Look | InPlaceLook, accepted: bool) -> None:
    """Refuse what is not as its revision makes it."""
    if look.differences and not accepted:
        raise AdoptionDifferencesError(slug, str(opened.source), look.revision, [one.text for one in look.differences])
    if look.refused:
        raise AdoptionError(
            f"{opened.source} has code that revision {look.revision or 'base'} does not make, and that would run with "
            f"the rights of the owner of all tenants' databases: {', '.join(look.refused)}; add it to a revision, or "
            "remove it from the source"
        )


async def _fill(looking: Looking, opened: OpenSource, look: Look, new: NewDatabase, steps: Steps) -> Sequence[str]:
    """Bring the source in, verify it, and run the missing revisions."""
    await steps.begin("copy")
    await looking.bring(opened, look, new.login)
    stamp = look.heads if look.stamp else frozenset[str]()
    await looking.finish(new.login, look.server, opened, look.contents, look.schema, stamp, tenant=steps.tenant)
    await steps.begin("verify")
    former = opened.source.schema
    connection = await looking.connect(new.login)
    try:
        notes = await verify(connection, look.contents, lambda table: place_of(table, former, look.schema))
    finally:
        await run_to_completion(connections.close(connection))
    assert steps.tenant is not None  # noqa: S101 - the frame sets it
    if look.end != look.heads:
        await steps.begin("upgrade")
        await looking.upgrade(new.login, look.server, steps.tenant)
    return notes


__all__ = ["AdoptionManager"]
