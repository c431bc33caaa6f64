"""``tenancy backup``: make, list, verify and remove backups."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Annotated, Any, TypeVar
from uuid import UUID

import typer

from ..backups import Backup, BackupReport
from ..tenancy import Tenancy
from ..tenant import Tenant
from .output import Column, TenantBar, failures_listed, note, print_json, print_table, progress_bar
from .runtime import EXIT_FAILED, Json, duration, fail, operator, run
from .selection import All, Named, Selection, Statuses, Tiers

T = TypeVar("T")

app = typer.Typer(name="backup", help="Encrypted backups of tenants and of the control database.", no_args_is_help=True)

Control = Annotated[bool, typer.Option("--control", help="The control database instead of tenants.")]

_UNITS = ("bytes", "kB", "MB", "GB", "TB")


@app.command("run")
def run_backups(
    tenants: Named = None,
    tier: Tiers = None,
    status: Statuses = None,
    everyone: All = False,
    due: Annotated[
        bool, typer.Option("--due", help="The tenants that are due, and the control database: for a timer.")
    ] = False,
    control: Control = False,
    keep: Annotated[
        str | None, typer.Option("--keep", help="Keep it for that long, whatever the policy says, such as 90d.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Back tenants up, or the control database. Exit status 1 if one failed."""
    until = None if (kept := duration(keep)) is None else datetime.now(UTC) + kept
    if control and (tenants or tier or status or everyone):
        fail("--control is for the control database alone: name no tenants", kind="ConfigurationError")
    selection = None if control or due else Selection.of(tenants, tier, status, everyone)

    async def command(tenancy: Tenancy) -> BackupReport:
        if control:
            made = await tenancy.backups.run_control(kept_until=until, actor=operator())
            return BackupReport((made,))
        assert selection is not None  # noqa: S101 - for the type checker
        chosen = await selection.find(tenancy)
        with progress_bar(shown=not as_json) as shown:
            bar = TenantBar(shown, "backed up")
            bar.total(len(chosen))

            def tell(tenant: Tenant, outcome: Backup | str) -> None:
                bar.done(tenant)

            return await tenancy.backups.run(chosen, kept_until=until, progress=tell, actor=operator())

    with failures_listed():
        report = run_stoppable(command)
    _show_report(report, as_json)
    if report.reasons:
        raise typer.Exit(EXIT_FAILED)


@app.command("list")
def list_backups(
    tenant: Annotated[str | None, typer.Argument(help="A slug or an id.")] = None,
    control: Control = False,
    pruned: Annotated[bool, typer.Option("--pruned", help="Those that were removed too.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 100,
    as_json: Json = False,
) -> None:
    """List backups, the newest first."""

    async def command(tenancy: Tenancy) -> tuple[Backup, ...]:
        states: Any = ("running", "done", "failed", *(["pruned"] if pruned else []))
        return await tenancy.backups.list(tenant, control=control, states=states, limit=limit)

    found = run(command)
    if as_json:
        print_json([backup_fields(one) for one in found])
        return
    columns = (
        Column("backup", keep=True),
        "tenant",
        Column("state", keep=True),
        Column("started", drop=1),
        "size",
        Column("revision", drop=3),
        Column("verified", drop=2),
        Column("error", drop=4),
    )
    print_table("backups", columns, map(_row, found))


def run_stoppable(command: Callable[[Tenancy], Awaitable[T]]) -> T:
    """Run a command; SIGTERM and SIGHUP stop it as Ctrl-C does, with what it has to clear away."""

    async def stoppable(tenancy: Tenancy) -> T:
        main = asyncio.current_task()
        assert main is not None  # noqa: S101 - for the type checker
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGHUP):
            # once: a second cancellation would interrupt the clean-up that the first one has started
            loop.add_signal_handler(number, lambda: main.cancelling() or main.cancel())
        return await command(tenancy)

    try:
        return run(stoppable)
    except asyncio.CancelledError:
        note("stopped")
        raise typer.Exit(128 + signal.SIGTERM) from None


def backup_fields(backup: Backup) -> dict[str, Any]:
    """Return a backup as JSON values."""
    manifest = backup.manifest
    return {
        "id": str(backup.id),
        "tenant_id": None if backup.tenant_id is None else str(backup.tenant_id),
        "slug": backup.slug,
        "server": backup.server,
        "state": backup.state,
        "store": backup.store,
        "path": backup.path,
        "key_id": backup.key_id,
        "started_at": backup.started_at,
        "ended_at": backup.ended_at,
        "bytes": backup.bytes,
        "revision": None if manifest is None else manifest.revision,
        "lsn": None if manifest is None else manifest.lsn,
        "snapshot_at": None if manifest is None else manifest.snapshot_at,
        "tables": None if manifest is None else len(manifest.tables),
        "rows": None if manifest is None else manifest.rows,
        "error": backup.error,
        "verified_at": backup.verified_at,
        "verify_error": backup.verify_error,
        "kept_until": backup.kept_until,
        "pruned_at": backup.pruned_at,
    }


def parse_id(text: str) -> UUID | None:
    """Return a backup's id, or None where the text is none."""
    try:
        return UUID(text)
    except ValueError:
        return None


def _show_report(report: BackupReport, as_json: bool) -> None:
    if as_json:
        done = [backup_fields(one) for one in report.done]
        print_json({"done": done, "failed": report.reasons, "skipped": list(report.skipped)})
        return
    rows: list[tuple[Any, ...]] = [
        (one.slug or "(control)", one.id, size(one.bytes), _seconds(one), "done") for one in report.done
    ]
    rows += [(slug, None, None, None, reason) for slug, reason in report.reasons.items()]
    columns = ("tenant", Column("backup", keep=True), "size", Column("seconds", drop=1), "result")
    print_table("backups", columns, rows)


def _row(backup: Backup) -> tuple[Any, ...]:
    verified = backup.verified_at if backup.verify_error is None else "bad"
    return (
        backup.id,
        backup.slug or "(control)",
        backup.state,
        backup.started_at,
        size(backup.bytes),
        None if backup.manifest is None else backup.manifest.revision,
        verified,
        backup.error or backup.verify_error,
    )


def _seconds(backup: Backup) -> str | None:
    return None if backup.ended_at is None else f"{(backup.ended_at - backup.started_at).total_seconds():.1f}"


def size(number: int | None) -> str | None:
    """Return a size for people."""
    if number is None:
        return None
    value, unit = float(number), 0
    while value >= 1_000 and unit < len(_UNITS) - 1:
        value, unit = value / 1_000, unit + 1
    return f"{value:.{0 if unit == 0 else 1}f} {_UNITS[unit]}"


__all__ = ["app", "backup_fields", "run_stoppable"]
