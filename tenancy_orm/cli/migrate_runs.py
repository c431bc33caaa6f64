"""``tenancy migrate runs``, ``show``, ``join``, ``resume``, ``retry`` and ``cancel``: the recorded runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC
from typing import Annotated, Any

import typer

from ..runs import FleetReport, ProcessRecord, Progress, RunRecord, TenantRecord, Waves
from ..tenancy import Tenancy
from .migrate_processes import Processes
from .migrate_progress import run_shown
from .output import Column, console, note, print_fields, print_json, print_table
from .runtime import Json, operator, run

Number = Annotated[int, typer.Argument(help="The run's number.", metavar="RUN")]
OwnConcurrency = Annotated[int | None, typer.Option(min=1, max=64, help="Tenants that this process migrates at once.")]
Arguments = Annotated[
    list[str] | None, typer.Option("-x", help="An argument that the run was started with by -x; repeatable.")
]

_SHOWN = 50  # tenants that "show" lists by default


def runs(
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many.")] = 20,
    before: Annotated[int | None, typer.Option(help="Only runs before this one.")] = None,
    as_json: Json = False,
) -> None:
    """List the recorded runs, the newest first."""
    found = run(lambda tenancy: tenancy.migrations.runs(limit=limit, before=before))
    if as_json:
        print_json([_fields(one) for one in found])
        return
    columns = (
        Column("run", keep=True),
        "command",
        "target",
        "state",
        Column("tenants", drop=2),
        Column("failed", drop=1),
        Column("started", drop=3),
        Column("by", drop=4),
    )
    rows = [
        (
            one.id,
            one.command,
            one.target,
            _state(one),
            sum(one.tenants.values()),
            one.tenants["failed"],
            one.created_at,
            one.actor.id or one.actor.kind,
        )
        for one in found
    ]
    print_table("runs", columns, rows)


def show(
    number: Number,
    failed: Annotated[bool, typer.Option("--failed", help="Only tenants that failed.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="How many tenants are listed.")] = _SHOWN,
    as_json: Json = False,
) -> None:
    """Show a run: its plan, who started it, and each tenant's state; failed tenants first."""

    async def command(tenancy: Tenancy) -> Any:
        migrations = tenancy.migrations
        record = await migrations.get_run(number)
        state = "failed" if failed else None
        tenants = await migrations.run_tenants(number, state=state, limit=None if as_json else limit)  # type: ignore[arg-type]
        if not failed and not as_json and record.tenants["failed"]:
            first = await migrations.run_tenants(number, state="failed", limit=limit)
            known = {one.tenant_id for one in first}
            tenants = [*first, *(one for one in tenants if one.tenant_id not in known)][:limit]
        return record, tenants, await migrations.run_processes(number)

    record, tenants, processes = run(command)
    if as_json:
        details = {"processes": [asdict(one) for one in processes], "tenants_by_state": record.tenants}
        listed = [{**asdict(one), "wave": one.wave + 1} for one in tenants]
        print_json({**_fields(record), **details, "tenants": listed})
        return
    waves = Waves.from_json(record.plan)
    _print_run(record, waves, processes)
    if not tenants:
        return
    console.print()
    _print_tenants(tenants, has_waves=len(waves) > 1)
    total = record.tenants["failed"] if failed else sum(record.tenants.values())
    if total > len(tenants):
        note(f"{len(tenants)} of {total} tenants; --limit shows more, and --json all")


def _print_run(record: RunRecord, waves: Waves, processes: Sequence[ProcessRecord]) -> None:
    fields = {
        **_fields(record),
        "plan": _plan(record),
        "wave": _wave(record, waves),
        "fingerprint": None,
        **_waves(waves),
    }
    values = {name: value for name, value in fields.items() if value is not None}
    values["tenants"] = ", ".join(f"{number} {state}" for state, number in record.tenants.items() if number)
    values["processes"] = [f"{one.host}:{one.pid} ({_presence(one)})" for one in processes]
    print_fields(f"run {record.id}", values)
    if record.is_interrupted:
        note(f"no process takes part any more; continue with: tenancy migrate resume {record.id}")


def _print_tenants(tenants: Sequence[TenantRecord], *, has_waves: bool) -> None:
    columns: tuple[str | Column, ...] = (
        "tenant",
        "state",
        *([Column("wave", drop=5)] if has_waves else []),
        Column("server", drop=3),
        Column("before", drop=1),
        Column("after", drop=1),
        Column("seconds", drop=2),
        Column("attempts", drop=4),
        "sqlstate",
        *(["data"] if any("data" in one.detail for one in tenants) else []),
        "error",
    )
    rows = [
        (
            one.slug,
            one.state,
            *([one.wave + 1] if has_waves else []),
            one.server,
            one.revision_before,
            one.revision_after,
            _seconds(one.seconds),
            one.attempts,
            one.sqlstate,
            *([_data(one.detail)] if "data" in columns else []),
            one.error,
        )
        for one in tenants
    ]
    print_table("tenants", columns, rows)


def join(
    number: Number,
    concurrency: OwnConcurrency = None,
    x: Arguments = None,
    processes: Processes = None,
    as_json: Json = False,
) -> None:
    """Take part in a run that another machine has started, until it ends."""

    async def command(tenancy: Tenancy, progress: Progress) -> FleetReport:
        return await tenancy.migrations.join(
            number, concurrency=concurrency, x=x or (), progress=progress, actor=operator()
        )

    run_shown(command, as_json=as_json, processes=processes, x=x or ())


def resume(
    number: Number,
    concurrency: OwnConcurrency = None,
    skip_checks: Annotated[
        bool, typer.Option("--skip-checks", help="Begin the next wave, whatever the checks of this one say.")
    ] = False,
    x: Arguments = None,
    processes: Processes = None,
    as_json: Json = False,
) -> None:
    """Go on with a run that was interrupted, cancelled or paused."""

    async def command(tenancy: Tenancy, progress: Progress) -> FleetReport:
        await _say_done(tenancy, number, "resume")
        return await tenancy.migrations.resume(
            number,
            concurrency=concurrency,
            skip_checks=skip_checks,
            x=x or (),
            progress=progress,
            actor=operator(),
        )

    run_shown(command, as_json=as_json, processes=processes, x=x or ())


def retry(
    number: Number,
    concurrency: OwnConcurrency = None,
    x: Arguments = None,
    processes: Processes = None,
    as_json: Json = False,
) -> None:
    """Try the failed tenants of a run again, and no others."""

    async def command(tenancy: Tenancy, progress: Progress) -> FleetReport:
        await _say_done(tenancy, number, "retry")
        return await tenancy.migrations.retry(
            number, concurrency=concurrency, x=x or (), progress=progress, actor=operator()
        )

    run_shown(command, as_json=as_json, processes=processes, x=x or ())


def cancel(number: Number, as_json: Json = False) -> None:
    """Skip the tenants of a run that wait; those that are being migrated are finished."""
    record = run(lambda tenancy: tenancy.migrations.cancel(number, actor=operator()))
    if as_json:
        print_json(_fields(record))
        return
    # its machines give back what they have claimed within a second or two
    words = {"waiting": "to be skipped", "running": "being finished"}
    counts = ", ".join(f"{number} {words.get(state, state)}" for state, number in record.tenants.items() if number)
    console.print(f"run {record.id} is cancelled: {counts or 'no tenants'}", highlight=False)


async def _say_done(tenancy: Tenancy, number: int, command: str) -> None:
    if (await tenancy.migrations.get_run(number)).state == "done":
        note(f"run {number} is done; nothing to {command}")


def _fields(record: RunRecord) -> dict[str, Any]:
    return {
        "run": record.id,
        "command": record.command,
        "target": record.target,
        "undoes": record.undoes,
        "state": _state(record),
        "reason": record.reason,
        "by": record.actor.id or record.actor.kind,
        "host": record.host,
        "package_version": record.package_version,
        "code_version": record.code_version,
        "fingerprint": record.fingerprint,
        "plan": {name: value for name, value in record.plan.items() if name != "seal"},
        # from 1, as progress and checks count
        "wave": record.wave + 1 if record.wave >= 0 else None,
        "started": record.created_at,
        "ended": record.ended_at,
        "tenants": dict(record.tenants),
    }


def _plan(record: RunRecord) -> str:
    """The options of a run, without its waves."""
    given = {name: value for name, value in record.plan.items() if name not in ("seal", "waves", "wave_seed")}
    parts = [
        name if value is True else f"{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"
        for name, value in given.items()
        if value not in (None, False, [], "")
    ]
    return ", ".join(parts)


def _waves(waves: Waves) -> dict[str, str]:
    """Each wave of several, with what comes after it."""
    if len(waves) == 1:
        return {}
    return {
        f"wave {number + 1}": wave.name + (f": {wave.gate()}" if number < waves.last or wave.has_checks else "")
        for number, wave in enumerate(waves.waves)
    }


def _wave(record: RunRecord, waves: Waves) -> str | None:
    if len(waves) <= 1:
        return None
    if record.wave < 0:
        return "none yet: the run is prepared"
    number = min(record.wave, waves.last)
    return f"{number + 1} of {len(waves)} ({waves[number].name})"


def _state(record: RunRecord) -> str:
    return "interrupted" if record.is_interrupted else record.state


def _seconds(value: float | None) -> str | None:
    return None if value is None else f"{value:.2f}"


def _data(detail: Mapping[str, Any]) -> str | None:
    """How far data migrations have come: those that are under way, or all if they are done."""
    found = detail.get("data", {})
    under_way = {label: one for label, one in found.items() if not one["done"]}
    texts = []
    for label, one in (under_way or found).items():
        waits = f", waits: {one['waits_for']}" if "waits_for" in one else ""
        texts.append(f"{label}: {one['rows']:,} of {max(one['estimate'], one['rows']):,} rows{waits}")
    return "; ".join(texts) or None


def _presence(process: ProcessRecord) -> str:
    if process.is_lost:
        return "lost"
    if process.left_at is not None:
        return f"until {process.left_at.astimezone(UTC):%H:%M:%S}"
    return "alive" if process.is_alive else "has not renewed its claim"


def register(app: typer.Typer) -> None:
    """Add the commands to ``tenancy migrate``."""
    for command in (runs, show, join, resume, retry, cancel):
        app.command()(command)
