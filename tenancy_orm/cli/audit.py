"""``tenancy audit``: read the audit log and verify it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..control.checkpoints import Checkpoint
from ..errors import ConfigurationError
from ..tenancy import Tenancy
from .output import console, print_json, print_table
from .runtime import EXIT_FAILED, Json, guarded, run

app = typer.Typer(help="Read the audit log and verify it.", no_args_is_help=True)


@app.command("list")
def list_events(
    tenant: Annotated[str | None, typer.Option("--tenant", "-t", help="Only this tenant's.")] = None,
    action: Annotated[str | None, typer.Option(help="Only this action; tenant. stands for all that begin so.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1_000, help="How many at most.")] = 50,
    as_json: Json = False,
) -> None:
    """List entries, newest first."""

    async def command(tenancy: Tenancy) -> Any:
        return await tenancy.audit.events(tenant=tenant, action=action, limit=limit)

    events = run(command)
    if as_json:
        print_json([_fields(event) for event in events])
        return
    rows = [(e.sequence, e.occurred_at, e.action, e.slug, e.actor.id or e.actor.kind, e.after) for e in events]
    print_table("audit log", ("number", "time", "action", "tenant", "actor", "after"), rows)


@app.command()
def verify(
    checkpoint: Annotated[list[Path] | None, typer.Option(help="A checkpoint exported earlier; repeatable.")] = None,
    as_json: Json = False,
) -> None:
    """Recompute the chain; exit status 1 where an entry does not hold, or a checkpoint contradicts the log."""
    checkpoints = guarded(lambda: [_read(path) for path in checkpoint or ()])

    async def command(tenancy: Tenancy) -> Any:
        return await tenancy.audit.verify(checkpoints)

    report = run(command)
    if as_json:
        print_json(
            {"ok": report.ok, "entries": report.entries, "first_bad": report.first_bad, "problem": report.problem}
        )
    elif report.ok:
        console.print(f"{report.entries} entries verified, {len(checkpoints)} checkpoints confirmed", highlight=False)
    else:
        console.print(f"entry {report.first_bad}: {report.problem}", highlight=False)
    if not report.ok:
        raise typer.Exit(EXIT_FAILED)


@app.command("checkpoint")
def export_checkpoint() -> None:
    """Print a signed checkpoint as JSON; keep it where the database's operators cannot change it."""

    async def command(tenancy: Tenancy) -> str:
        return (await tenancy.audit.export_checkpoint()).to_json()

    print(run(command))


def _read(path: Path) -> Checkpoint:
    try:
        return Checkpoint.from_json(path.read_text())
    except OSError as exc:
        raise ConfigurationError(f"checkpoint {str(path)!r} cannot be read: {exc.strerror}") from exc


def _fields(event: Any) -> dict[str, Any]:
    return {
        "sequence": event.sequence,
        "occurred_at": event.occurred_at,
        "action": event.action,
        "tenant_id": event.tenant_id,
        "slug": event.slug,
        "actor": event.actor,
        "before": event.before,
        "after": event.after,
        "detail": event.detail,
        "hash": event.hash.hex(),
    }
