"""``tenancy audit``: read the audit log and verify it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..audit.chain import VerifyReport
from ..audit.checkpoints import Checkpoint, Verifier
from ..errors import ConfigurationError
from ..tenancy import Tenancy
from .output import Column, cell, console, print_json, print_table
from .runtime import EXIT_FAILED, Json, exit_on_error, run

app = typer.Typer(help="Read the audit log and verify it.", no_args_is_help=True)


@app.command("list")
def list_events(
    tenant: Annotated[str | None, typer.Option("--tenant", "-t", help="Only this tenant's.")] = None,
    action: Annotated[
        str | None, typer.Option(help="Only this action, or a prefix such as tenant. (with the dot).")
    ] = None,
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
    rows = [
        (e.sequence, e.occurred_at, e.action, e.slug, e.actor.id or e.actor.kind, _pairs(e.detail), e.after)
        for e in events
    ]
    columns = (
        "number",
        "time",
        Column("action", keep=True),
        "tenant",
        "actor",
        Column("detail", drop=1),
        Column("after", drop=2),
    )
    print_table("audit log", columns, rows)


@app.command()
def verify(
    checkpoint: Annotated[list[Path] | None, typer.Option(help="A checkpoint exported earlier; repeatable.")] = None,
    since: Annotated[Path | None, typer.Option(help="A checkpoint to start from, instead of the first entry.")] = None,
    public_keys: Annotated[
        Path | None, typer.Option(help="Check signatures with these keys only, as printed by audit public-keys.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Recompute the hash chain; exit status 1 where an entry or a checkpoint does not match."""
    checkpoints = exit_on_error(lambda: [_checkpoint(path) for path in checkpoint or ()])
    origin = exit_on_error(lambda: _checkpoint(since) if since else None)
    verifier = exit_on_error(lambda: read_verifier(public_keys) if public_keys else None)

    async def command(tenancy: Tenancy) -> VerifyReport:
        return await tenancy.audit.verify(checkpoints, since=origin, verifier=verifier)

    report = run(command)
    if as_json:
        fields = ("ok", "entries", "first_bad", "problem", "confirmed", "removed", "skipped")
        print_json({name: getattr(report, name) for name in fields})
    else:
        console.print(_summary(report), highlight=False, soft_wrap=True)
    if not report.ok:
        raise typer.Exit(EXIT_FAILED)


@app.command("checkpoint")
def export_checkpoint() -> None:
    """Print a signed checkpoint as JSON. Store it where the database's operators cannot change it."""

    async def command(tenancy: Tenancy) -> str:
        return (await tenancy.audit.export_checkpoint()).to_json()

    print(run(command))


@app.command("public-keys")
def print_public_keys() -> None:
    """Print the public keys of checkpoints as JSON, retired ones included. Store them with the checkpoints."""

    async def command(tenancy: Tenancy) -> Verifier:
        return await tenancy.audit.verifier()

    print_json(run(command).public_keys)


def _pairs(detail: Mapping[str, Any] | None) -> str:
    """What is known besides, such as why something was refused: ``reason=issuer count=1``."""
    known = [(name, value) for name, value in (detail or {}).items() if value is not None]
    # a narrow terminal cuts the end off
    known.sort(key=lambda pair: (pair[0] != "reason", pair[0] == "count"))
    return " ".join(f"{name}={cell(value)}" for name, value in known)


def _summary(report: VerifyReport) -> str:
    if not report.ok:
        return f"entry {report.first_bad}: {report.problem}"
    summary = f"{report.entries} entries verified, {len(report.confirmed)} checkpoints confirmed"
    if report.removed:
        summary += f"; not compared, since retention has removed their entries: {_numbers(report.removed)}"
    if report.skipped:
        summary += f"; not compared, since they are before the start: {_numbers(report.skipped)}"
    return summary


def _numbers(sequences: Sequence[int]) -> str:
    return ", ".join(map(str, sequences))


def _checkpoint(path: Path) -> Checkpoint:
    return Checkpoint.from_json(_read(path))


def read_verifier(path: Path) -> Verifier:
    """Read public keys, as ``audit public-keys`` prints them.

    Raises:
        ConfigurationError: the file has none.
    """
    text = _read(path)
    try:
        keys = json.loads(text)
    except ValueError as exc:
        raise ConfigurationError(f"{str(path)!r} is not JSON") from exc
    if not isinstance(keys, dict) or not all(isinstance(key, str) for key in keys.values()):
        raise ConfigurationError(f"{str(path)!r} must be an object of public keys by id")
    return Verifier(keys)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as exc:
        raise ConfigurationError(f"{str(path)!r} cannot be read: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise ConfigurationError(f"{str(path)!r} cannot be read: it is not UTF-8") from exc


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
