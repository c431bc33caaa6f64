"""``tenancy migrate undo`` and ``pause``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..errors import counted
from ..runs import FleetReport, Progress
from ..runs.undo import UndoPlan, nothing_to_undo, refuse
from ..tenancy import Tenancy
from .migrate import Beside, Only, Stop, app
from .migrate_processes import Processes
from .migrate_progress import run_shown
from .migrate_waves import (
    DryRun,
    GivenWaves,
    MaxFailures,
    PlannedConcurrency,
    PlanOption,
    SeedOption,
    WaveOption,
    print_waves,
    say_ignored,
)
from .output import console, print_json, print_table
from .runtime import Json, exit_on_error, operator, run

RunArgument = Annotated[int, typer.Argument(metavar="RUN", help="The run's number.")]


@app.command()
def undo(
    context: typer.Context,
    number: RunArgument,
    tenant: Only = None,
    include_new: Annotated[
        bool, typer.Option("--include-new", help="Also bring back tenants that were created since.")
    ] = False,
    new_revision: Annotated[
        str | None, typer.Option("--new-revision", help="Where those go, if the others had different revisions.")
    ] = None,
    stamp_irreversible: Annotated[
        bool,
        typer.Option(
            "--stamp-irreversible", help="Take revisions without a downgrade out of the version table, and run nothing."
        ),
    ] = False,
    leave_moved: Annotated[
        bool, typer.Option("--leave-moved", help="Leave tenants as they are that later runs have moved on.")
    ] = False,
    concurrency: PlannedConcurrency = None,
    stop_on_failure: Stop = False,
    wave: WaveOption = None,
    plan: PlanOption = None,
    wave_seed: SeedOption = None,
    max_failures: MaxFailures = None,
    dry_run: DryRun = False,
    beside: Beside = False,
    processes: Processes = None,
    as_json: Json = False,
) -> None:
    """Bring every tenant back to the revision that it had before a run."""
    given = GivenWaves.of(wave, plan, wave_seed, max_failures, concurrency)
    which: dict[str, Any] = {"tenants": tenant, "include_new": include_new, "new_revision": new_revision}
    if dry_run:
        decides = ("include_new", "new_revision", "stamp_irreversible", "leave_moved")
        say_ignored(context, "--dry-run", "dry_run", "wave", "plan", "wave_seed", *decides)
        found = run(lambda tenancy: tenancy.migrations.plan_undo(number, **which, waves=given.waves))
        decided = {"stamp_irreversible": stamp_irreversible, "leave_moved": leave_moved}
        _show(found, as_json=as_json, **decided)
        if found.tenants or not found.passes(**decided):
            exit_on_error(lambda: refuse(found, **decided))
        return

    async def command(tenancy: Tenancy, progress: Progress) -> FleetReport:
        return await tenancy.migrations.undo(
            number,
            **which,
            stamp_irreversible=stamp_irreversible,
            leave_moved=leave_moved,
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
def pause(number: RunArgument, as_json: Json = False) -> None:
    """Pause a run: tenants that are being migrated are finished, and no others begun until it is resumed."""
    found = run(lambda tenancy: tenancy.migrations.pause(number, actor=operator()))
    if as_json:
        print_json({"run": found.id, "state": found.state})
    else:
        console.print(f"run {number} is paused; continue with: tenancy migrate resume {number}")


def _show(plan: UndoPlan, *, stamp_irreversible: bool, leave_moved: bool, as_json: bool) -> None:
    if as_json:
        print_json(plan)
    else:
        passes = plan.passes(stamp_irreversible=stamp_irreversible, leave_moved=leave_moved)
        what = f"{counted(len(plan.tenants))} go back" if passes else "would be refused, no tenant would go back"
        console.print(f"undo run {plan.run}: {what}, nothing is changed", highlight=False)
        if passes and not plan.tenants:
            console.print(nothing_to_undo(plan), highlight=False)
        rows = [(one.slug, one.server, one.revision or "base", one.target or "base", one.error) for one in plan.tenants]
        print_table("go back" if passes else "to go back", ("tenant", "server", "from", "to", "error"), rows)
        if len(plan.waves) > 1:
            print_waves(plan.waves)
        for title, names in (("stay as they are", plan.untouched), ("were created since, and stay", plan.new)):
            if names:
                console.print(f"{title}: {', '.join(names)}", markup=False)
        if plan.moved:
            print_table("not certain", ("tenant", "reason"), plan.moved.items())
        if plan.irreversible:
            title = "stamped, nothing runs" if stamp_irreversible else "cannot go back"
            print_table(title, ("revision", "reason"), plan.irreversible.items())
