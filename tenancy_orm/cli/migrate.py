"""``tenancy migrate``: upgrades and downgrades of every tenant's schema."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.progress import Progress as ProgressBar

from ..events import MigrationRunStarted
from ..migrations.selection import NO_TENANTS
from ..runs import FleetReport, Progress, TenantOutcome
from ..runs.busy import Order
from ..tenancy import Tenancy
from . import seed
from .output import console, failures_listed, note, print_json, print_table, progress_bar
from .runtime import EXIT_FAILED, Json, operator, run

app = typer.Typer(help="Upgrade and inspect all tenants' schemas.", no_args_is_help=True)

Only = Annotated[list[str] | None, typer.Option("--tenant", "-t", help="Only this tenant; repeatable.")]
Concurrency = Annotated[int, typer.Option(min=1, max=64, help="Tenants migrated at once.")]
SkipPreflight = Annotated[bool, typer.Option("--skip-preflight", help="Ask no check of a revision's preflight().")]
ServerConcurrency = Annotated[
    int | None,
    typer.Option(min=1, max=1024, help="Tenants migrated at once on one server, by all processes of the run."),
]
Stop = Annotated[bool, typer.Option("--stop-on-failure", help="Start no further tenant after a failure.")]


@app.command()
def upgrade(
    revision: Annotated[str, typer.Argument(help="An Alembic revision.")] = "head",
    tenant: Only = None,
    concurrency: Concurrency = 8,
    server_concurrency: ServerConcurrency = None,
    join: Annotated[bool, typer.Option("--join", help="Take part in such an upgrade that is running.")] = False,
    stop_on_failure: Stop = False,
    skip_preflight: SkipPreflight = False,
    order: Annotated[Order, typer.Option(help="Which tenants come first.")] = "created",
    as_json: Json = False,
) -> None:
    """Upgrade every tenant's database; one that fails does not stop the others."""

    async def command(tenancy: Tenancy, progress: Progress) -> FleetReport:
        return await tenancy.migrations.upgrade(
            revision,
            tenants=tenant,
            concurrency=concurrency,
            server_concurrency=server_concurrency,
            join=join,
            stop_on_failure=stop_on_failure,
            skip_preflight=skip_preflight,
            order=order,
            progress=progress,
            actor=operator(),
        )

    run_migration("upgrade", command, as_json)


@app.command()
def downgrade(
    revision: Annotated[str, typer.Argument(help="An Alembic revision, or -1.")],
    tenant: Only = None,
    concurrency: Concurrency = 8,
    stop_on_failure: Stop = False,
    as_json: Json = False,
) -> None:
    """Downgrade every tenant's database."""

    async def command(tenancy: Tenancy, progress: Progress) -> FleetReport:
        return await tenancy.migrations.downgrade(
            revision,
            tenants=tenant,
            concurrency=concurrency,
            stop_on_failure=stop_on_failure,
            progress=progress,
            actor=operator(),
        )

    run_migration("downgrade", command, as_json)


@app.command()
def stamp(
    revision: Annotated[str, typer.Argument(help="An Alembic revision.")],
    tenant: Only = None,
    concurrency: Concurrency = 8,
    as_json: Json = False,
) -> None:
    """Record a revision in every tenant's database without running migrations."""

    async def command(tenancy: Tenancy, progress: Progress) -> FleetReport:
        return await tenancy.migrations.stamp(
            revision, tenants=tenant, concurrency=concurrency, progress=progress, actor=operator()
        )

    run_migration("stamp", command, as_json)


@app.command()
def extensions(tenant: Only = None, concurrency: Concurrency = 8, as_json: Json = False) -> None:
    """Install the extensions of the setting `extensions` in tenants' databases that lack them. Upgrade does so too."""

    async def command(tenancy: Tenancy, progress: Progress) -> FleetReport:
        return await tenancy.migrations.install_extensions(
            tenants=tenant, concurrency=concurrency, progress=progress, actor=operator()
        )

    run_migration("install extensions", command, as_json)


@app.command()
def status(as_json: Json = False) -> None:
    """Show each tenant's revision and extensions; exit status 1 where one is not at head, or lacks an extension.

    Where seeds are configured, it shows those that are outstanding as well.
    """

    async def command(tenancy: Tenancy) -> Any:
        return await tenancy.migrations.status(), await seed.read_status(tenancy)

    revisions, seeds = run(command)
    if as_json:
        fields = ((asdict(x), seed.status_fields(seeds.get(x.slug))) for x in revisions)
        print_json([{**found, **more} for found, more in fields])
    elif not revisions:
        console.print(NO_TENANTS, highlight=False)
    else:
        shown = {True: "yes", False: "no", None: None}
        rows = [
            (x.slug, x.revision, shown[x.at_head], *map(", ".join, (x.missing_extensions, x.other_extensions)), x.error)
            for x in revisions
        ]
        columns = ("tenant", "revision", "at head", "lacks extensions", "not in the setting", "error")
        if seeds:
            lacking = [", ".join(seeds[x.slug].outstanding) if x.slug in seeds else None for x in revisions]
            columns = (*columns[:-1], "lacks seeds", "error")  # type: ignore[assignment]
            rows = [(*row[:-1], lacks, row[-1]) for row, lacks in zip(rows, lacking, strict=True)]
        print_table("schema revisions", columns, rows)
    if not all(x.is_complete for x in revisions):
        raise typer.Exit(EXIT_FAILED)


class _Bar:
    """Shows a run's progress as a bar."""

    def __init__(self, bar: ProgressBar, verb: str) -> None:
        self._bar = bar
        self._verb = verb
        self._task = bar.add_task(verb, total=None)

    def total(self, count: int) -> None:
        self._bar.update(self._task, total=count)

    def done(self, outcome: TenantOutcome) -> None:
        self._bar.update(self._task, advance=1, description=f"{self._verb} {outcome.slug}")


def run_migration(verb: str, migrate: Callable[[Tenancy, Progress], Awaitable[FleetReport]], as_json: bool) -> None:
    """Run a migration with a bar, print its report, and exit with status 1 where a tenant is not at the target."""
    with failures_listed(), progress_bar(shown=not as_json) as bar:

        async def command(tenancy: Tenancy) -> FleetReport:
            # first: others may join it, and go on with it if this process is killed
            tenancy.events.subscribe(MigrationRunStarted, lambda started: note(f"run {started.run}"))
            return await migrate(tenancy, _Bar(bar, verb))

        report = run(command)
    _show(report, as_json)
    if not report.ok:
        raise typer.Exit(EXIT_FAILED)


def _show(report: FleetReport, as_json: bool) -> None:
    if as_json:
        print_json(report)
        return
    console.print(report.summary(), highlight=False)
    if report.reasons:
        revisions = {outcome.slug: outcome.after for outcome in report.failures}
        rows = [(slug, revisions.get(slug), reason) for slug, reason in report.reasons.items()]
        print_table("failed", ("tenant", "revision", "error"), rows)
