"""``tenancy backup``: make, list, verify and remove backups."""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from ..backups import Backup, BackupReport, PruneReport, Verification, recover_control
from ..errors import BackupNotFoundError
from ..tenancy import Tenancy
from ..tenant import Tenant, parse_id
from .output import (
    Column,
    TenantBar,
    failures_listed,
    note,
    print_fields,
    print_json,
    print_table,
    progress_bar,
    size_text,
)
from .runtime import (
    EXIT_FAILED,
    TENANT_NAMES,
    Json,
    Yes,
    confirm,
    duration,
    exit_on_error,
    fail,
    load_tenancy,
    operator,
    run,
    run_stoppable,
)
from .schedule import parse_time
from .selection import All, Named, Selection, Statuses, Tiers

app = typer.Typer(name="backup", help="Encrypted backups of tenants and of the control database.", no_args_is_help=True)

_CONTROL = "control"  # names the control database where a tenant's slug or a backup's id is expected
Control = Annotated[bool, typer.Option("--control", help="The control database instead of tenants.")]

_LISTED = (
    Column("backup", keep=True),
    "tenant",
    Column("state", keep=True),
    Column("started", drop=1),
    "size",
    Column("revision", drop=3),
    Column("verified", drop=2),
    Column("error", drop=4),
)


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
        fail("--control cannot be combined with tenants", kind="ConfigurationError")
    if due and (control or tenants or tier or status or everyone or keep):
        fail("--due cannot be combined with tenants, --control or --keep", kind="ConfigurationError")
    selection = None if control or due else Selection.of(tenants, tier, status, everyone)

    async def command(tenancy: Tenancy) -> BackupReport:
        if control:
            made = await tenancy.backups.run_control(kept_until=until, actor=operator())
            return BackupReport((made,))
        with progress_bar(shown=not as_json) as shown:
            bar = TenantBar(shown, "backed up")

            def show(tenant: Tenant, outcome: Backup | str) -> None:
                bar.done(tenant)

            if selection is None:
                return await tenancy.backups.run_due(progress=show, actor=operator())
            chosen = await selection.find(tenancy)
            bar.total(len(chosen))
            return await tenancy.backups.run(chosen, kept_until=until, progress=show, actor=operator())

    with failures_listed():
        report = run_stoppable(command)
    _show_report(report, as_json)
    if report.reasons:
        raise typer.Exit(EXIT_FAILED)


@app.command("list")
def list_backups(
    tenant: Annotated[str | None, typer.Argument(help=f"{TENANT_NAMES}; control is the control database.")] = None,
    control: Control = False,
    pruned: Annotated[bool, typer.Option("--pruned", help="Those that were removed too.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 100,
    as_json: Json = False,
) -> None:
    """List backups of tenants, or of the control database, the newest first."""
    if tenant == _CONTROL:  # as verify and extract name it
        tenant, control = None, True

    async def command(tenancy: Tenancy) -> tuple[Backup, ...]:
        states: Any = ("running", "done", "failed", *(["pruned"] if pruned else []))
        return await tenancy.backups.list(tenant, control=control, states=states, limit=limit)

    found = run(command)
    if as_json:
        print_json([backup_fields(one) for one in found])
        return
    print_table("backups", _LISTED, map(_row, found))


@app.command("status")
def show_status(as_json: Json = False) -> None:
    """Show how old the newest good backups are. Exit status 1 if one is overdue: for an alarm."""
    found = run(lambda tenancy: tenancy.backups.status())
    ages = ("oldest_seconds", "oldest_verified_seconds", "control_seconds")
    fields = asdict(found) | {name: None if (age := getattr(found, name)) is None else round(age, 1) for name in ages}
    if as_json:
        print_json({**fields, "errors": list(found.errors)})
    else:
        print_fields("backups", {name: value for name, value in fields.items() if value not in (None, [], ())})
        for error in found.errors:
            note(error)
    if found.errors:
        raise typer.Exit(EXIT_FAILED)


@app.command("verify")
def verify_backups(
    backups: Annotated[
        list[str], typer.Argument(metavar="BACKUP", help="Ids of backups, or slugs: the newest backup of each.")
    ],
    restore: Annotated[
        bool, typer.Option("--restore/--quick", help="Restore it into a scratch database; or read it alone.")
    ] = True,
    server: Annotated[str | None, typer.Option("--server", help="The server of the scratch database.")] = None,
    as_json: Json = False,
) -> None:
    """Verify backups: signature, checksums, and what a restore makes of them. Exit status 1 if one is bad."""

    async def command(tenancy: Tenancy) -> list[Verification]:
        found = [await find_backup(tenancy, name) for name in backups]
        return [await tenancy.backups.verify(one, restore=restore, server=server, actor=operator()) for one in found]

    results = run_stoppable(command)
    if as_json:
        print_json([_verification_fields(one) for one in results])
    else:
        columns = ("tenant", Column("backup", keep=True), "restored", "tables", "rows", "seconds", "result")
        print_table("verified", columns, map(_verification_row, results))
    if not all(one.is_good for one in results):
        raise typer.Exit(EXIT_FAILED)


@app.command("prune")
def prune_backups(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be removed, and remove nothing.")] = False,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Remove the backups that the retention policy (backup.keep_*) does not keep."""

    async def command(tenancy: Tenancy) -> PruneReport:
        planned = await tenancy.backups.prune(dry_run=True, actor=operator())
        if dry_run:
            return planned
        count = len(planned.pruned)
        if count and not yes and not confirm(f"remove {count} backup{'s' * (count != 1)}?"):
            fail("nothing was removed")
        return await tenancy.backups.prune(actor=operator())

    report = run(command)
    if as_json:
        pruned = [backup_fields(one) for one in report.pruned]
        print_json({"pruned": pruned, "freed_bytes": report.freed_bytes, "errors": list(report.errors)})
    else:
        print_table("would be removed" if dry_run else "removed", _LISTED, map(_row, report.pruned))
        note(f"{size_text(report.freed_bytes)} {'would be freed' if dry_run else 'freed'}")
        for error in report.errors:
            note(error)
    if report.errors:
        raise typer.Exit(EXIT_FAILED)


@app.command("keep")
def keep_backup(
    backup: Annotated[str, typer.Argument(help="The id of a backup.")],
    keep_for: Annotated[str | None, typer.Option("--for", help="For how long, from now on, such as 90d.")] = None,
    as_json: Json = False,
) -> None:
    """Keep a backup for some time whatever the retention policy says; without --for, as the policy says."""
    until = None if (kept := duration(keep_for)) is None else datetime.now(UTC) + kept
    if (backup_id := parse_id(backup)) is None:
        fail(f"{backup!r} is not the id of a backup", kind="BackupNotFoundError")
    found = run(lambda tenancy: tenancy.backups.keep(backup_id, until, actor=operator()))
    if as_json:
        print_json(backup_fields(found))
    else:
        print_table("backups", _LISTED, [_row(found)])


@app.command("scan")
def scan_store(as_json: Json = False) -> None:
    """Find backups in the store that the control database does not know: after an older one of it was restored."""
    report = run(lambda tenancy: tenancy.backups.scan(actor=operator()))
    if as_json:
        print_json({"found": [backup_fields(one) for one in report.found], "errors": list(report.errors)})
    else:
        print_table("found", _LISTED, map(_row, report.found))
        for error in report.errors:
            note(error)
    if report.errors:
        raise typer.Exit(EXIT_FAILED)


@app.command("extract")
def extract_backup(
    backup: Annotated[str, typer.Argument(help="The id of a backup, or a slug: its newest backup.")],
    directory: Annotated[Path, typer.Argument(help="A new directory, which pg_restore reads.")],
    from_store: Annotated[
        bool,
        typer.Option("--from-store", help="Of the control database, which is lost: connect to nothing but the store."),
    ] = False,
    installation: Annotated[
        str | None, typer.Option("--installation", help="With --from-store: its id, if the store has several.")
    ] = None,
    not_before: Annotated[
        str | None,
        typer.Option(
            "--not-before",
            help="With --from-store: refuse a backup that is older than this time, such as 2027-01-31T00:00+00:00.",
        ),
    ] = None,
    accept_older: Annotated[
        bool,
        typer.Option(
            "--accept-older", help="With --from-store: take it although what may be a newer one cannot be read."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Decrypt a backup into a directory, for pg_restore. What is in it is not encrypted."""
    if directory.exists():
        fail(f"{directory} exists already: name a new directory", kind="ConfigurationError")
    if from_store:
        since = None if not_before is None else exit_on_error(lambda: parse_time(not_before))
        _recover(backup, directory, installation, since, accept_older, as_json)
        return

    async def command(tenancy: Tenancy) -> Backup:
        found = await find_backup(tenancy, backup)
        async with tenancy.backups.open(found) as opened:
            # beside it first: a directory of this name is complete
            beside = directory.with_name(f".{directory.name}.part")
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True, mode=0o700)
            try:
                for file in opened.directory.iterdir():
                    await asyncio.to_thread(shutil.move, file, beside / file.name)
                beside.rename(directory)
            finally:
                shutil.rmtree(beside, ignore_errors=True)
        return found

    found = run_stoppable(command)
    if as_json:
        print_json({**backup_fields(found), "directory": str(directory)})
    else:
        print(directory)


def _recover(
    backup: str,
    directory: Path,
    installation: str | None,
    not_before: datetime | None,
    accept_older: bool,
    as_json: bool,
) -> None:
    if backup != _CONTROL:
        fail("--from-store is for the control database: tenancy backup extract control DIRECTORY --from-store")
    named = None if installation is None else parse_id(installation)
    if installation is not None and named is None:
        fail(f"{installation!r} is not the id of an installation")
    config = load_tenancy().config
    recovered = exit_on_error(
        lambda: asyncio.run(
            recover_control(config, directory, installation=named, not_before=not_before, accept_older=accept_older)
        )
    )
    manifest = recovered.manifest
    if as_json:
        passed_over = [asdict(one) for one in recovered.passed_over]
        print_json({"directory": str(directory), "passed_over": passed_over, **manifest.to_fields()})
    else:
        print(directory)
        for one in recovered.passed_over:
            note(f"passed over: {one}")
        note(f"the control database at {manifest.snapshot_at:%Y-%m-%d %H:%M:%S} UTC, schema {manifest.revision}")


async def find_backup(tenancy: Tenancy, name: str) -> Backup:
    """Return the backup of an id, or the newest one of a slug.

    Raises:
        BackupNotFoundError: there is none.
        TenantNotFoundError: there is no such tenant.
    """
    if (backup_id := parse_id(name)) is not None:
        return await tenancy.backups.get(backup_id)
    is_control = name == _CONTROL
    found = await tenancy.backups.list(None if is_control else name, control=is_control, states=("done",), limit=1)
    if not found:
        option = "--control" if is_control else name
        raise BackupNotFoundError(f"there is no backup of {name!r}; make one with: tenancy backup run {option}")
    return found[0]


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


def _show_report(report: BackupReport, as_json: bool) -> None:
    if as_json:
        done = [backup_fields(one) for one in report.done]
        print_json({"done": done, "failed": report.reasons, "skipped": list(report.skipped)})
        return
    rows: list[tuple[Any, ...]] = [
        (one.slug or "(control)", one.id, _size(one), _seconds(one), "done") for one in report.done
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
        _size(backup),
        None if backup.manifest is None else backup.manifest.revision,
        verified,
        backup.error or backup.verify_error,
    )


def _verification_row(found: Verification) -> tuple[Any, ...]:
    backup = found.backup
    compared = (found.tables, found.rows) if found.restored else (None, None)
    seconds = f"{found.seconds:.1f}"
    return (
        backup.slug or "(control)",
        backup.id,
        "yes" if found.restored else "no",
        *compared,
        seconds,
        found.error or "good",
    )


def _verification_fields(found: Verification) -> dict[str, Any]:
    return {
        **backup_fields(found.backup),
        "good": found.is_good,
        "verify_error": found.error,
        "restored": found.restored,
        "seconds": found.seconds,
    }


def _seconds(backup: Backup) -> str | None:
    return None if backup.ended_at is None else f"{(backup.ended_at - backup.started_at).total_seconds():.1f}"


def _size(backup: Backup) -> str | None:
    return None if backup.bytes is None else size_text(backup.bytes)


__all__ = ["app", "backup_fields", "find_backup"]
