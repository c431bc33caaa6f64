"""``tenancy migrate``: upgrades and downgrades of every tenant's schema."""

from __future__ import annotations

from typing import Annotated

import typer

from ..events import MigrationRunStarted
from ..runs import FleetReport, Progress
from ..runs.busy import Order
from ..runs.migrator import DEFAULT_CONCURRENCY
from ..tenancy import Tenancy
from . import migrate_drift, migrate_lint, migrate_rehearsal, migrate_status
from .migrate_processes import Processes
from .migrate_progress import run_shown
from .migrate_waves import (
    DryRun,
    GivenWaves,
    MaxFailures,
    PlannedConcurrency,
    PlanOption,
    SeedOption,
    Sql,
    WaveOption,
    look_ahead,
    refuse_both,
    say_ignored,
)
from .output import note
from .runtime import Json, operator

app = typer.Typer(help="Upgrade and inspect all tenants' schemas.", no_args_is_help=True)

Only = Annotated[list[str] | None, typer.Option("--tenant", "-t", help="Only this tenant; repeatable.")]
Concurrency = Annotated[int, typer.Option(min=1, max=64, help="Tenants migrated at once.")]
SkipPreflight = Annotated[bool, typer.Option("--skip-preflight", help="Skip the checks of revisions' preflight().")]
ServerConcurrency = Annotated[
    int | None,
    typer.Option(min=1, max=1024, help="Tenants migrated at once on one server, by all processes of the run."),
]
Beside = Annotated[
    bool,
    typer.Option("--beside", help="Start it beside a run that is paused with some of these tenants left."),
]
Stop = Annotated[bool, typer.Option("--stop-on-failure", help="Start no further tenant after a failure.")]


@app.command()
def upgrade(
    context: typer.Context,
    revision: Annotated[str, typer.Argument(help="An Alembic revision.")] = "head",
    tenant: Only = None,
    concurrency: PlannedConcurrency = None,
    server_concurrency: ServerConcurrency = None,
    join: Annotated[bool, typer.Option("--join", help="Take part in such an upgrade that is running.")] = False,
    stop_on_failure: Stop = False,
    skip_preflight: SkipPreflight = False,
    order: Annotated[Order, typer.Option(help="Which tenants come first.")] = "created",
    wave: WaveOption = None,
    plan: PlanOption = None,
    wave_seed: SeedOption = None,
    max_failures: MaxFailures = None,
    dry_run: DryRun = False,
    sql: Sql = False,
    refuse_drift: migrate_drift.Refuse = False,
    rehearse: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Try it on clones of N tenants, and change no tenant.")
    ] = None,
    beside: Beside = False,
    processes: Processes = None,
    as_json: Json = False,
) -> None:
    """Upgrade every tenant's database; one that fails does not stop the others."""
    refuse_both(rehearse is not None, dry_run or sql, "--rehearse, --dry-run and --sql")
    refuse_both(dry_run, sql, "--dry-run and --sql")
    if rehearse is not None:
        say_ignored(context, "--rehearse", "rehearse", "concurrency")
        migrate_rehearsal.show(revision, rehearse, tenant, False, True, concurrency or DEFAULT_CONCURRENCY, as_json)
        return
    given = GivenWaves.of(wave, plan, wave_seed, max_failures, concurrency)
    if dry_run or sql:
        look_ahead(context, "upgrade", revision, tenant, given, sql=sql, as_json=as_json)
        return

    def say_joined(started: MigrationRunStarted) -> None:
        note(
            f"run {started.run} was started: there was none to join" if started.is_new else f"joined run {started.run}"
        )

    async def command(tenancy: Tenancy, progress: Progress) -> FleetReport:
        if join:
            tenancy.events.subscribe(MigrationRunStarted, say_joined)
        return await tenancy.migrations.upgrade(
            revision,
            tenants=tenant,
            concurrency=given.concurrency,
            server_concurrency=server_concurrency,
            join=join,
            stop_on_failure=stop_on_failure,
            skip_preflight=skip_preflight,
            order=order,
            waves=given.waves,
            max_failures=given.max_failures,
            progress=progress,
            actor=operator(),
            refuse_drift=refuse_drift,
            beside=beside,
        )

    run_shown(command, as_json=as_json, processes=processes)


@app.command()
def downgrade(
    context: typer.Context,
    revision: Annotated[str, typer.Argument(help="An Alembic revision, or -1.")],
    tenant: Only = None,
    concurrency: PlannedConcurrency = None,
    stop_on_failure: Stop = False,
    wave: WaveOption = None,
    plan: PlanOption = None,
    wave_seed: SeedOption = None,
    max_failures: MaxFailures = None,
    dry_run: DryRun = False,
    sql: Sql = False,
    beside: Beside = False,
    processes: Processes = None,
    as_json: Json = False,
) -> None:
    """Downgrade every tenant's database."""
    refuse_both(dry_run, sql, "--dry-run and --sql")
    given = GivenWaves.of(wave, plan, wave_seed, max_failures, concurrency)
    if dry_run or sql:
        look_ahead(context, "downgrade", revision, tenant, given, sql=sql, as_json=as_json)
        return

    async def command(tenancy: Tenancy, progress: Progress) -> FleetReport:
        return await tenancy.migrations.downgrade(
            revision,
            tenants=tenant,
            concurrency=given.concurrency,
            stop_on_failure=stop_on_failure,
            waves=given.waves,
            max_failures=given.max_failures,
            progress=progress,
            actor=operator(),
            beside=beside,
        )

    run_shown(command, as_json=as_json, processes=processes)


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

    run_shown(command, as_json=as_json)


@app.command()
def extensions(tenant: Only = None, concurrency: Concurrency = 8, as_json: Json = False) -> None:
    """Install the extensions of the setting `extensions` in tenants' databases that lack them. Upgrade does so too."""

    async def command(tenancy: Tenancy, progress: Progress) -> FleetReport:
        return await tenancy.migrations.install_extensions(
            tenants=tenant, concurrency=concurrency, progress=progress, actor=operator()
        )

    run_shown(command, as_json=as_json)


app.command()(migrate_status.status)
app.command()(migrate_drift.drift)
app.command("rehearse")(migrate_rehearsal.rehearse)
app.command("lint")(migrate_lint.lint_revisions)
