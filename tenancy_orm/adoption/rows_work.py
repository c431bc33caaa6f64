"""The work of an adoption by rows, which single adoptions and fleets share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..audit.actor import Actor
from ..cancellation import run_to_completion
from ..config.placement import PlacementRequest
from ..drift.policy import RevisionPolicy
from ..errors import AdoptionError, ConfigurationError
from ..migrations.connections import Connections
from ..migrations.plan import Plan, format_revision
from ..migrations.scripts import Environment
from ..operations import Operation
from ..operations.progress import StepProgress
from ..postgres import connections
from ..postgres.failures import SERVER_FAILURES
from ..postgres.login import reason_of
from ..provisioning.copies.empty_databases import InstalledExtension
from ..provisioning.creation.new_databases import NewDatabase
from ..provisioning.rights.grants import CHECKPOINTS_SCHEMA
from ..provisioning.rights.tenant_rights import RECORD_SCHEMA
from ..runs import FleetMigrator
from ..servers.placement import Placer
from ..tenant import Tenant
from .frame import KEY_SHOWN, AdoptionFrame, Steps
from .looking import Looking
from .mapping import RowsMapping
from .reach import Reach
from .refusals import open_adoptable
from .relations import Relation, read_relations
from .rows_copy import RowsCopy
from .rows_report import RowsReport, TableRows
from .selection import Selection, Transferred, pair
from .source import OpenSource, Source

GivenMapping = RowsMapping | Mapping[str, Any] | Path | None
"""A mapping, the values of one, or its file."""


_OTHERS = """
SELECT 'foreign table' AS what, n.nspname || '.' || c.relname AS name
  FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace WHERE c.relkind = 'f'
UNION ALL SELECT 'large object', min(oid::bigint)::text || ' (of ' || count(*)::text || ')'
  FROM pg_catalog.pg_largeobject_metadata HAVING count(*) > 0 ORDER BY 1, 2
"""


@dataclass(frozen=True, slots=True)
class Building:
    """The schema that rows are brought into.

    Attributes:
        looking: Makes it.
        plain: Connects to databases.
        environment: The migrations.
        target: The revision, as the caller names it.
        revision: The revision, as one text.
        pending: The revision that follows; None without one.
        server: Where it was looked at.
        relations: Its tables.
    """

    looking: Looking
    plain: Connections
    environment: Environment
    target: str
    revision: str | None
    pending: str | None
    server: str
    relations: tuple[Relation, ...]

    @property
    def version_table(self) -> str:
        """The name of Alembic's own table."""
        return str(self.environment.options.get("version_table", "alembic_version"))


@dataclass(frozen=True, slots=True)
class RowsLook:
    """What was found of one customer in one snapshot."""

    reach: Reach
    selection: Selection
    pairs: tuple[Transferred, ...]
    tables: tuple[TableRows, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]


class RowsWork:
    """Makes tables, looks at rows, and creates the tenants that are made of them.

    Args:
        migrations: Has the services and the migrations.
        frame: Creates the tenants.
        placer: Chooses the servers.
    """

    def __init__(self, migrations: FleetMigrator, frame: AdoptionFrame, placer: Placer) -> None:
        self._migrations = migrations
        self.services = migrations.services
        self._frame = frame
        self._placer = placer

    async def former(self, slug: str, described: Source, said: RowsMapping, *, actor: Actor) -> RowsReport | None:
        """Remove what a process that died has left; return the report where the tenant is complete already."""
        started = time.monotonic()
        found = await self._frame.clean_up_former(slug, _source_text(described, said), actor=actor)
        return None if found is None else _recorded(*found, described, said, started)

    async def choose(self, slug: str, server: str | None, region: str | None, tier: str | None) -> str:
        """Return the server that the tenant would be on."""
        request = PlacementRequest(tier=tier or self.services.config.default_tier, region=region, slug=slug)
        return await self._placer.choose(request, server=server)

    async def build(self, server: str, at: str | None, progress: StepProgress) -> Building:
        """Run the revisions in a short-lived database, and read the tables that they make."""
        if self.services.config.migrations is None:
            raise ConfigurationError("rows are copied into the tables that migrations make: configure migrations")
        environment = await self._migrations.environment()
        target = at or "heads"
        plan = Plan.of(environment, "upgrade", target)
        if target == "base" or plan.is_relative:
            raise ConfigurationError(f"{target!r} has no tables: name the revision that the rows fit to")
        reached = plan.path_from(frozenset()).end
        end = Plan.of(environment, "upgrade", "heads").path_from(reached).end
        plain = Connections(self.services)
        looking = Looking(self.services, plain, environment)
        progress("make the tables")
        seconds = self.services.config.adoption.timeout
        extensions = [InstalledExtension(name) for name in self.services.config.extensions]
        scratch = self.services.provisioner.scratch_databases
        try:
            async with (
                asyncio.timeout(seconds),
                scratch.open(server, extensions=extensions, seconds=seconds) as database,
            ):
                await looking.build(database.login, server, target, tenant=None)
                connection = await looking.connect(database.login)
                try:
                    relations = tuple(await read_relations(connection))
                finally:
                    await run_to_completion(connections.close(connection))
        except SERVER_FAILURES as exc:
            raise AdoptionError(f"the tables cannot be made on server {server!r}: {reason_of(exc)}") from exc
        pending = format_revision(end) if end != reached else None
        return Building(looking, plain, environment, target, format_revision(reached), pending, server, relations)

    async def look(
        self,
        opened: OpenSource,
        said: RowsMapping,
        building: Building,
        progress: StepProgress,
        totals: dict[int, tuple[int, int]] | None = None,
    ) -> RowsLook:
        """Look at one customer's rows; ``totals`` is shared by the customers of one snapshot.

        Raises:
            AdoptionError: the mapping does not fit the source, a table cannot be read, or it takes too long.
        """
        seconds = self.services.config.adoption.timeout
        try:
            # in a savepoint: the snapshot of a fleet goes on after what PostgreSQL refuses for one customer
            async with asyncio.timeout(seconds), opened.connection.transaction():
                return await _look_at(opened, said, building, progress, totals)
        except TimeoutError as exc:
            raise AdoptionError(
                f"the rows of {opened.source} where {said.where} cannot be counted and checked within {seconds:g} s; "
                "index the columns of its references, or raise adoption.timeout"
            ) from exc

    async def create(
        self,
        slug: str,
        described: Source,
        said: RowsMapping,
        building: Building,
        server: str,
        *,
        values: Mapping[str, Any],
        progress: StepProgress,
        actor: Actor,
    ) -> RowsReport:
        """Create one tenant; see ``RowsAdoption.adopt``."""
        started = time.monotonic()
        async with open_adoptable(self.services, described) as opened:
            look = await self.look(opened, said, building, progress)
            report = report_of(slug, opened, said, building, server, look, started)
            if report.problems:
                raise AdoptionError(
                    f"the rows of {slug!r} cannot be taken out of {described}: {'; '.join(report.problems)}"
                )
            notes: list[str] = []

            async def work(new: NewDatabase, steps: Steps) -> None:
                notes.extend(await _copy(opened, said, look, building, new, steps))

            created, operation = await self._frame.create(
                slug,
                work,
                server=server,
                policy=RevisionPolicy(self.services, building.plain, building.environment),
                detail=_detail(report, described, said),
                values=values,
                progress=progress,
                actor=actor,
            )
        await self.services.registry.record(created.tenant.id, "tenant.adopt", detail=operation.detail, actor=actor)
        return replace(
            report,
            tenant=created.tenant,
            api_key=created.api_key,
            operation=operation.id,
            notes=(*report.notes, *notes),
            seconds=time.monotonic() - started,
        )


async def _look_at(
    opened: OpenSource,
    said: RowsMapping,
    building: Building,
    progress: StepProgress,
    totals: dict[int, tuple[int, int]] | None,
) -> RowsLook:
    progress("count rows")
    found = await read_relations(opened.connection, left_out=(CHECKPOINTS_SCHEMA, RECORD_SCHEMA))
    # the revision is that of the tables here
    relations = [one for one in found if one.name not in ("alembic_version", building.version_table)]
    if closed := [one.label for one in relations if not one.readable and one.label not in said.exclude]:
        raise AdoptionError(
            f"role {opened.role!r} may not read {', '.join(closed[:5])}; grant it SELECT, or exclude it"
        )
    reach = Reach(relations, said)
    pairs, problems, notes = pair(reach, building.relations)
    selection = Selection(opened, reach, pairs, totals)
    await selection.check_conditions()
    tables = await selection.count()
    progress("check references")
    problems += await selection.problems(tables)
    for reached, one in zip(reach, tables, strict=True):
        if one.nobodys:
            what = f"have no {said.column}" if reached.relation.has(said.column) else "refer to no row"
            notes.append(
                f"{one.nobodys} rows of {one.source} {what}" + (", and belong to nobody" if one.target else "")
            )
    if not any(one.rows for one in tables if not one.shared):
        notes.append(f"no row of the source belongs to this customer: is the condition right? {said.where}")
    filled = {one.target for one in tables}
    notes += [
        f"table {one.label} of the tenant's database gets no rows of the source"
        for one in building.relations
        if one.label not in filled and one.name != building.version_table
    ]
    notes += [f"{row['what']} {row['name']} is not copied" for row in await opened.connection.fetch(_OTHERS)]
    return RowsLook(reach, selection, tuple(pairs), tuple(tables), tuple(problems), tuple(notes))


async def _copy(
    opened: OpenSource, said: RowsMapping, look: RowsLook, building: Building, new: NewDatabase, steps: Steps
) -> list[str]:
    """Make the tables, copy the rows, verify them, and run the missing revisions."""
    looking = building.looking
    await steps.begin("make tables")
    await looking.build(new.login, new.server, building.target, tenant=steps.tenant)
    connection = await looking.connect(new.login)
    try:
        pairs, problems, _ = pair(look.reach, await read_relations(connection))
        if problems:
            raise AdoptionError(f"the rows do not fit: {'; '.join(problems)}")
        await steps.begin("copy")
        expected = {one.source: one.rows for one in look.tables}
        notes = await RowsCopy(opened, look.selection, pairs, expected).run(connection, steps.progress)
    finally:
        await run_to_completion(connections.close(connection))
    if building.pending is not None:
        await steps.begin("upgrade")
        assert steps.tenant is not None  # noqa: S101 - the frame sets it
        await looking.upgrade(new.login, new.server, steps.tenant)
    return notes


def read_mapping(mapping: GivenMapping, where: str | None) -> RowsMapping:
    """Return what the caller's mapping says.

    Raises:
        ConfigurationError: it is malformed.
    """
    match mapping:
        case RowsMapping():
            return mapping if where is None else replace(mapping, where=where)
        case Path():
            return RowsMapping.read(mapping, where=where)
    return RowsMapping.parse(mapping or {}, where=where)


def _source_text(described: Source, said: RowsMapping) -> str:
    return f"{described} where {said.where}"


def report_of(
    slug: str,
    opened: OpenSource,
    said: RowsMapping,
    building: Building,
    server: str,
    look: RowsLook,
    started: float,
) -> RowsReport:
    """Return the report of a look."""
    return RowsReport(
        slug=slug,
        source=str(opened.source),
        where=said.where,
        server=server,
        revision=building.revision,
        pending=building.pending,
        customer=look.selection.customer,
        tables=look.tables,
        problems=look.problems,
        notes=look.notes,
        seconds=time.monotonic() - started,
    )


def _detail(report: RowsReport, described: Source, said: RowsMapping) -> dict[str, Any]:
    coming = [one for one in report.tables if one.target is not None]
    return {
        "source": _source_text(described, said),
        "server": report.server,
        "revision": report.revision,
        "in_place": False,
        "rows": report.rows,
        # one more would make the record long, and the rows are compared with the snapshot anyway
        "tables": {one.source: [one.target, one.rows, one.total, one.shared] for one in coming[:1_000]},
    }


def _recorded(tenant: Tenant, operation: Operation, described: Source, said: RowsMapping, started: float) -> RowsReport:
    detail = operation.detail
    return RowsReport(
        slug=tenant.slug,
        source=str(described),
        where=said.where,
        server=detail["server"],
        revision=detail["revision"],
        pending=None,
        tables=tuple(
            TableRows(source=source, target=target, rows=rows, total=total, how="done already", shared=shared)
            for source, (target, rows, total, shared) in detail["tables"].items()
        ),
        notes=(f"tenant {tenant.slug!r} has been made of these rows already, {KEY_SHOWN}",),
        seconds=time.monotonic() - started,
        tenant=tenant,
        operation=operation.id,
    )


__all__ = ["Building", "GivenMapping", "RowsLook", "RowsWork", "read_mapping", "report_of"]
