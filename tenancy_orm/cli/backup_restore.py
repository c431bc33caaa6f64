"""``tenancy backup restore`` and ``undo-restore``: bring one tenant's database back."""

from __future__ import annotations

from datetime import UTC
from typing import Annotated, Any

import typer

from ..errors import ContentsRefusedError
from ..operations.progress import StepProgress
from ..restores import BackupSource, RestoreReport, RestoreSource
from ..tenancy import Tenancy
from ..tenant import parse_id
from .output import note, print_fields, print_json
from .runtime import Json, TenantArgument, Yes, confirm, fail, given_url, operator, run, run_stoppable

_LATEST = "latest"


def restore(
    tenant: TenantArgument,
    backup: Annotated[
        str | None, typer.Argument(help="A backup's id, or latest; see: tenancy backup list TENANT.")
    ] = None,
    to: Annotated[
        str | None,
        typer.Option("--to", help="A time with its offset, such as 2026-11-28T14:03+00, in place of a backup."),
    ] = None,
    recovered_server: Annotated[
        str | None,
        typer.Option(
            "--recovered-server", help="The URL of a server that was recovered already; $NAME reads a variable."
        ),
    ] = None,
    as_slug: Annotated[
        str | None,
        typer.Option("--as", help="Make another tenant of it, with this slug; the first one is not touched."),
    ] = None,
    server: Annotated[
        str | None, typer.Option("--server", help="With --as: the server to place the new tenant on.")
    ] = None,
    inspect: Annotated[
        bool, typer.Option("--inspect", help="Stop before the swap, and say how to look into the restored database.")
    ] = False,
    accept_differences: Annotated[
        bool,
        typer.Option("--accept-differences", help="Accept functions, triggers and views that no revision makes."),
    ] = False,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Restore a tenant's database beside the one in use, and swap the two. The old one is kept for a time."""
    given = sum(one is not None for one in (backup, to)) + (to is None and recovered_server is not None)
    if given != 1:
        fail("give a backup, or --to, or --recovered-server", kind="ConfigurationError")
    if as_slug is not None and inspect:
        fail("--as and --inspect cannot be combined: look at the other tenant by its own login")
    if server is not None and as_slug is None:
        fail("--server needs --as: a restore of the tenant itself stays on its server")
    if as_slug is None and not inspect and not yes:
        backup = _ask(tenant, backup, to)

    async def command(tenancy: Tenancy) -> RestoreReport:
        source = await _source(tenancy, tenant, backup, to, recovered_server)
        if not as_json:
            note(f"from {_chosen(source, to)}")
        if as_slug is not None:
            return await tenancy.restores.restore_as(
                as_slug,
                source,
                server=server,
                accept=accept_differences,
                progress=_progress(as_json),
                actor=operator(),
            )
        return await tenancy.restores.restore(
            tenant, source, inspect=inspect, accept=accept_differences, progress=_progress(as_json), actor=operator()
        )

    _print(run_stoppable(_listing_findings(command)), as_json)


def undo_restore(tenant: TenantArgument, yes: Yes = False, as_json: Json = False) -> None:
    """Swap back to the database that the last restore of a tenant has replaced, while it is kept."""
    if not yes and not confirm(f"Swap back? What tenant {tenant!r} has written since is kept in the other database."):
        fail("nothing was changed")

    async def command(tenancy: Tenancy) -> RestoreReport:
        return await tenancy.restores.undo(tenant, progress=_progress(as_json), actor=operator())

    _print(run_stoppable(command), as_json)


def register(app: typer.Typer) -> None:
    """Add the commands to ``tenancy backup``."""
    app.command("restore")(restore)
    app.command("undo-restore")(undo_restore)


async def _source(
    tenancy: Tenancy, tenant: str, backup: str | None, to: str | None, recovered_server: str | None
) -> RestoreSource:
    if backup is None:
        url = None if recovered_server is None else given_url(recovered_server)
        return await tenancy.recovery.source(tenant, to, recovered_server=url)
    if backup == _LATEST:
        found = await tenancy.backups.list(tenant, states=("done",))
        good = next((one for one in found if one.is_good), None)
        if good is None:
            bad = f"; each of the {len(found)} was found to be bad; name one by its id" if found else ""
            fail(f"tenant {tenant!r} has no good backup{bad}; make one with: tenancy backup run {tenant}")
        return BackupSource(tenancy.backups, good)
    if (backup_id := parse_id(backup)) is None:
        fail(f"{backup!r} is not the id of a backup; list them with: tenancy backup list {tenant}")
    return BackupSource(tenancy.backups, await tenancy.backups.get(backup_id))


def _ask(tenant: str, backup: str | None, to: str | None) -> str | None:
    """Ask whether to go on, and return the id of the backup: ``latest`` stays the one that the question has named."""
    chosen = "what the recovered server has" if to is None else f"what it had at {to}"
    if backup is not None:

        async def lookup(tenancy: Tenancy) -> RestoreSource:
            return await _source(tenancy, tenant, backup, to, None)

        source = run(lookup)  # ends before the question, so that Ctrl-C ends the command there
        chosen = _chosen(source, to)
        backup = str(source.backup.id) if isinstance(source, BackupSource) else backup
    kept = "Its present database is kept, and undo-restore swaps back."
    if not confirm(f"Replace the database of tenant {tenant!r} by {chosen}? {kept}"):
        fail("nothing was changed")
    return backup


def _chosen(source: RestoreSource, to: str | None) -> str:
    if isinstance(source, BackupSource):
        return f"backup {source.backup.id} of {source.backup.started_at.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"
    return "what the recovered server has" if to is None else f"what it had at {to}"


def _listing_findings(command: Any) -> Any:
    """Print everything that was refused, a line each, before the error."""

    async def listing(tenancy: Tenancy) -> RestoreReport:
        try:
            report: RestoreReport = await command(tenancy)
        except ContentsRefusedError as exc:
            for finding in exc.findings:
                note(f"refused: {finding}")
            raise
        return report

    return listing


def _progress(as_json: bool) -> StepProgress | None:
    return None if as_json else lambda step: note(f"{step} ...")


def _print(report: RestoreReport, as_json: bool) -> None:
    fields: dict[str, Any] = {
        "operation": report.operation,
        "tenant": report.slug,
        "tenant_id": str(report.tenant_id),
        "state": report.state,
        "server": report.server,
        "database": report.database,
        "revision": report.revision,
        "replaced": report.replaced,
        "kept_until": report.kept_until,
        "differences": list(report.differences),
        "left_out": list(report.left_out),
        "seconds": round(report.seconds, 3),
        "pause_seconds": round(report.pause_seconds, 3),
    }
    if report.api_key is not None:
        fields["api_key"] = report.api_key
    if as_json:
        print_json(fields)
        return
    shown = {name: value for name, value in fields.items() if value not in (None, []) and name != "pause_seconds"}
    if report.state == "done" and report.replaced is not None:
        shown["pause_seconds"] = fields["pause_seconds"]
    print_fields("restore", shown)
    if report.state == "waiting":
        note(f"look into it with: tenancy operations psql {report.operation}")
        note(f"swap with: tenancy operations resume {report.operation}")
        note(f"or drop it with: tenancy operations undo {report.operation}")
    elif report.api_key is not None:
        note("the API key is not shown again")
    elif report.replaced is not None and report.kept_until is not None:
        until = report.kept_until.astimezone(UTC)
        note(f"swap back until {until:%Y-%m-%d %H:%M} UTC with: tenancy backup undo-restore {report.slug}")


__all__ = ["register"]
