"""``FleetAdoption``: a whole fleet is taken out of shared databases, several tenants at once."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import asyncpg

from ..audit.actor import SYSTEM, Actor
from ..context import refuse_while_bound
from ..errors import AdoptionError, TenancyError
from ..migrations.services import FleetServices
from ..operations.progress import silent
from ..postgres.errors import describe, without_detail
from ..postgres.failures import SERVER_FAILURES
from ..postgres.login import reason_of
from .contents import first_of
from .fleet_plan import AdoptionPlan, PlannedTenant
from .refusals import open_adoptable
from .report import AdoptionReport
from .rows_report import RowsReport
from .rows_work import Building, RowsWork, read_mapping, report_of
from .source import Source, open_source

logger = logging.getLogger("tenancy_orm.adoption")

State = Literal["adopted", "skipped", "checked", "failed"]
FleetProgress = Callable[["FleetOutcome"], None]
"""Called with each tenant once it is done."""

AdoptDatabase = Callable[..., Awaitable[AdoptionReport]]
"""``AdoptionManager.check`` or ``adopt``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetOutcome:
    """What was done for one tenant.

    Attributes:
        slug: Its slug.
        state: adopted, skipped (it is complete already), checked (of a dry run), or failed.
        rows: How many rows it has.
        error: Why it failed.
        api_key: Its first API key, which is shown once.
        seconds: How long it took.
    """

    slug: str
    state: State
    rows: int = 0
    error: str | None = None
    api_key: str | None = field(default=None, repr=False)
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetTable:
    """A table of a shared database, over all tenants of a plan.

    Attributes:
        source: The table, as ``schema.table``.
        total: How many rows it has.
        claimed: How many rows the plan's tenants have, in all.
        nobodys: How many rows have no customer.
        way: "owned", "shared" (every tenant gets all of it), or "left out".
    """

    source: str
    total: int
    claimed: int
    nobodys: int
    way: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetReport:
    """What was done for a plan, or would be; ``tenancy adopt --plan``.

    Attributes:
        tenants: The tenants, in the order of the plan.
        tables: The tables of the shared databases, of a dry run.
        problems: Rows that no tenant of the plan has, or two of them, of a dry run.
        notes: What else is worth knowing, and the differences that are accepted, with the tenants that have them.
    """

    tenants: tuple[FleetOutcome, ...]
    tables: tuple[FleetTable, ...] = ()
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def failures(self) -> tuple[FleetOutcome, ...]:
        """The tenants that failed."""
        return tuple(one for one in self.tenants if one.state == "failed")

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return not self.failures and not self.problems


class FleetAdoption:
    """Takes fleets out of shared databases; ``tenancy.adoption.fleet``.

    Args:
        check: Looks at a database or a schema.
        adopt: Adopts one.
        rows: Does what adopting rows is.
        services: The services of an open ``Tenancy``.
    """

    def __init__(self, check: AdoptDatabase, adopt: AdoptDatabase, rows: RowsWork, services: FleetServices) -> None:
        self._check_database = check
        self._adopt_database = adopt
        self._rows = rows
        self._services = services

    async def check(self, plan: AdoptionPlan, *, progress: FleetProgress | None = None) -> FleetReport:
        """Look at every tenant of a plan, and compare the sum of their rows with the source's. Nothing is changed.

        The rows of one source are counted in one snapshot. A row of a table that is neither shared nor excluded has
        to be exactly one tenant's, unless the mapping says ``strays = "leave"`` for rows that have no customer.

        Args:
            plan: The plan.
            progress: Called with each tenant once it is done.

        Raises:
            AdoptionError: the query fails, or a source cannot be read.
            ConfigurationError: the plan is malformed.
        """
        refuse_while_bound("adopting a fleet")
        tenants = await self._tenants(plan)
        outcomes: dict[str, FleetOutcome] = {}
        reports: dict[str, list[RowsReport]] = {}

        def keep(outcome: FleetOutcome) -> None:
            outcomes[outcome.slug] = outcome
            if progress is not None:
                progress(outcome)

        said: defaultdict[str, list[str]] = defaultdict(list)
        sources: defaultdict[str, list[PlannedTenant]] = defaultdict(list)
        for one in tenants:
            if one.where is not None:
                sources[one.source].append(one)
            else:
                keep(await self._guarded(one, lambda one=one: self._check_schema(one, said)))  # type: ignore[misc]
        for source, members in sources.items():
            reports[source] = await self._check_rows(plan, source, members, keep)
        tables: list[FleetTable] = []
        problems: list[str] = []
        notes = [f"{first_of(slugs)}: {text}" for text, slugs in said.items()]
        for found in reports.values():
            problems += _same_customers(found)
            for table in _summed(found):
                tables.append(table)
                mapped = read_mapping(plan.mapping, "true = true" if not found else found[0].where).of(table.source)
                _judge(table, mapped.strays == "leave", problems, notes)
        return FleetReport(
            tenants=tuple(outcomes[one.slug] for one in tenants),
            tables=tuple(tables),
            problems=tuple(problems),
            notes=tuple(notes),
        )

    async def adopt(
        self, plan: AdoptionPlan, *, progress: FleetProgress | None = None, actor: Actor = SYSTEM
    ) -> FleetReport:
        """Make the tenants of a plan, ``plan.concurrency`` at once; a failure of one leaves the others alone.

        Call it again after a failure, or if the process dies: tenants that are complete are skipped, and the others
        begin again.

        Args:
            plan: The plan.
            progress: Called with each tenant once it is done.
            actor: Who does this, for the audit log.

        Raises:
            AdoptionError: the query fails.
            ConfigurationError: the plan is malformed.
        """
        refuse_while_bound("adopting a fleet")
        tenants = await self._tenants(plan)
        slots, buildings = asyncio.Semaphore(plan.concurrency), _Buildings(self._rows)

        async def make(one: PlannedTenant) -> FleetOutcome:
            async with slots:
                outcome = await self._guarded(one, lambda: self._adopt(plan, one, buildings, actor))
            if progress is not None:
                progress(outcome)
            return outcome

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(make(one)) for one in tenants]
        return FleetReport(tenants=tuple(task.result() for task in tasks))

    async def tenants(self, plan: AdoptionPlan) -> tuple[PlannedTenant, ...]:
        """Return the tenants of a plan, with those that its query yields.

        Raises:
            AdoptionError: the query fails.
            ConfigurationError: two tenants have the same slug, or are the same.
        """
        refuse_while_bound("adopting a fleet")
        return await self._tenants(plan)

    async def _tenants(self, plan: AdoptionPlan) -> tuple[PlannedTenant, ...]:
        if plan.query is None or plan.defaults is None:
            return plan.tenants
        described = Source.parse(plan.defaults.source)
        async with open_source(described, timeout=self._services.config.pool.connect_timeout) as opened:
            try:
                found = await opened.connection.fetch(plan.query)
            except asyncpg.PostgresError as exc:
                raise AdoptionError(f"the query of the plan fails: {reason_of(exc)}") from exc
        if any(len(row) != 2 or row[0] is None or row[1] is None for row in found):
            raise AdoptionError("the query of the plan yields two columns, slug and key, and no NULL")
        return plan.with_keys([(str(row[0]), str(row[1])) for row in found])

    async def _guarded(self, one: PlannedTenant, work: Callable[[], Awaitable[FleetOutcome]]) -> FleetOutcome:
        started = time.monotonic()
        try:
            return await work()
        except (TenancyError, *SERVER_FAILURES) as exc:
            error = describe(exc)
        except Exception as exc:  # whatever env.py and revisions raise is this tenant's alone
            logger.exception("the adoption of tenant %s failed", one.slug, exc_info=without_detail(exc))
            error = describe(exc)
        return FleetOutcome(slug=one.slug, state="failed", error=error, seconds=time.monotonic() - started)

    async def _check_schema(self, one: PlannedTenant, said: defaultdict[str, list[str]]) -> FleetOutcome:
        report = await self._check_database(
            one.slug,
            one.source,
            schema=one.schema,
            with_shared=one.with_shared,
            without=one.without,
            at=one.at,
            server=one.server,
            region=one.region,
            tier=one.tier,
        )
        differences = [found.text for found in report.differences]
        accepted = [f"accepted: {text}" for text in differences] if one.accept_differences else []
        for text in (*accepted, *report.notes):
            said[text].append(one.slug)
        problems = [*([] if accepted else differences), *report.refused]
        return _outcome(report, "failed" if problems else "checked", "; ".join(problems[:5]) or None)

    async def _check_rows(
        self, plan: AdoptionPlan, source: str, members: Sequence[PlannedTenant], keep: FleetProgress
    ) -> list[RowsReport]:
        reports: list[RowsReport] = []
        totals: dict[int, tuple[int, int]] = {}
        buildings = _Buildings(self._rows)
        described = Source.parse(source)
        async with open_adoptable(self._services, described) as opened:

            async def look(one: PlannedTenant) -> FleetOutcome:
                started = time.monotonic()
                said = read_mapping(plan.mapping, one.where)
                server = await self._rows.choose(one.slug, one.server, one.region, one.tier)
                building = await buildings.get(server, one.at)
                found = await self._rows.look(opened, said, building, silent, totals)
                report = report_of(one.slug, opened, said, building, server, found, started)
                reports.append(report)
                failed = "; ".join(report.problems[:5]) or None
                return _outcome(report, "failed" if failed else "checked", failed)

            for one in members:
                keep(await self._guarded(one, lambda one=one: look(one)))  # type: ignore[misc]
        return reports

    async def _adopt(self, plan: AdoptionPlan, one: PlannedTenant, buildings: _Buildings, actor: Actor) -> FleetOutcome:
        if one.where is None:
            found = await self._adopt_database(
                one.slug,
                one.source,
                schema=one.schema,
                with_shared=one.with_shared,
                without=one.without,
                at=one.at,
                accept_differences=one.accept_differences,
                server=one.server,
                region=one.region,
                tier=one.tier,
                actor=actor,
            )
            # a tenant that was complete already has no key to show
            return _outcome(found, "adopted" if found.api_key is not None else "skipped")
        described, said = Source.parse(one.source), read_mapping(plan.mapping, one.where)
        if (former := await self._rows.former(one.slug, described, said, actor=actor)) is not None:
            return _outcome(former, "skipped")
        server = await self._rows.choose(one.slug, one.server, one.region, one.tier)
        building = await buildings.get(server, one.at)
        values = {"tier": one.tier, "region": one.region}
        made = await self._rows.create(
            one.slug, described, said, building, server, values=values, progress=silent, actor=actor
        )
        return _outcome(made, "adopted")


class _Buildings:
    """The tables of each revision on each server, which are made once."""

    def __init__(self, rows: RowsWork) -> None:
        self._rows = rows
        self._lock = asyncio.Lock()
        self._made: dict[tuple[str, str | None], Building] = {}

    async def get(self, server: str, at: str | None) -> Building:
        async with self._lock:
            if (server, at) not in self._made:
                self._made[server, at] = await self._rows.build(server, at, silent)
            return self._made[server, at]


def _outcome(report: RowsReport | AdoptionReport, state: State, error: str | None = None) -> FleetOutcome:
    return FleetOutcome(
        slug=report.slug, state=state, rows=report.rows, error=error, api_key=report.api_key, seconds=report.seconds
    )


def _same_customers(reports: Sequence[RowsReport]) -> list[str]:
    """Tenants of the same rows: a sum does not show them, where another customer has as many and is missing."""
    slugs: dict[str, str] = {}
    found = []
    for report in reports:
        if report.customer is None:
            continue
        if (other := slugs.setdefault(report.customer, report.slug)) != report.slug:
            found.append(
                f"tenants {other!r} and {report.slug!r} are made of the rows of one customer, {report.customer}"
            )
    return found


def _summed(reports: Sequence[RowsReport]) -> list[FleetTable]:
    """The tables of one source, over all reports of one snapshot."""
    claimed: dict[str, int] = defaultdict(int)
    for report in reports:
        for table in report.tables:
            claimed[table.source] += table.rows
    found = []
    for table in reports[0].tables if reports else ():
        way = "shared" if table.shared else "owned" if table.target is not None else "left out"
        rows = table.total if table.shared else claimed[table.source]
        found.append(FleetTable(source=table.source, total=table.total, claimed=rows, nobodys=table.nobodys, way=way))
    return found


def _judge(table: FleetTable, leave: bool, problems: list[str], notes: list[str]) -> None:
    """Say what the sum of a table means."""
    if table.way != "owned":
        return
    if (missing := table.total - table.claimed) < 0:
        problems.append(f"{-missing} rows of {table.source} would be copied more than once")
    elif missing:
        of_nobody = f" ({table.nobodys} have no customer)" if table.nobodys else ""
        said = f"{missing} of {table.total} rows of {table.source} belong to no tenant of the plan{of_nobody}"
        if leave and missing <= table.nobodys:
            notes.append(said)
        else:
            problems.append(said)


__all__ = ["FleetAdoption", "FleetOutcome", "FleetReport", "FleetTable"]
