"""``tenancy operations``: restores, clones, adoptions, moves, exports and erasures, and how far they have come."""

from __future__ import annotations

import os
from dataclasses import asdict, is_dataclass
from typing import Annotated, Any, cast, get_args

import typer

from ..operations import Operation, OperationKind, OperationState
from ..restores.manager import READ_ONLY
from ..tenancy import Tenancy
from .output import Column, note, print_fields, print_json, print_table
from .psql import exit_with_psql, run_psql
from .runtime import TENANT_NAMES, Json, Yes, confirm, fail, operator, run

app = typer.Typer(
    name="operations", help="Restores, moves and other operations on single tenants.", no_args_is_help=True
)

Number = Annotated[int, typer.Argument(help="The operation's number.", metavar="OPERATION")]


@app.command("list")
def list_operations(
    tenant: Annotated[str | None, typer.Argument(help=f"{TENANT_NAMES}.")] = None,
    kind: Annotated[list[str] | None, typer.Option(help="Only this kind; repeatable.")] = None,
    state: Annotated[list[str] | None, typer.Option(help="Only in this state; repeatable.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many.")] = 20,
    before: Annotated[int | None, typer.Option(help="Only operations before this one.")] = None,
    as_json: Json = False,
) -> None:
    """List operations, the newest first."""
    _check("kind", kind, get_args(OperationKind))
    _check("state", state, get_args(OperationState))

    async def command(tenancy: Tenancy) -> tuple[Operation, ...]:
        return await tenancy.operations.list(
            tenant,
            kinds=cast("list[OperationKind] | None", kind),
            states=cast("list[OperationState] | None", state),
            limit=limit,
            before=before,
        )

    found = run(command)
    if as_json:
        print_json({"items": [_fields(one) for one in found]})
        return
    columns = (
        Column("operation", keep=True),
        "kind",
        "tenant",
        "state",
        "step",
        Column("begun", drop=2),
        Column("by", drop=3),
        Column("error", drop=1),
    )
    rows = [
        (one.id, one.kind, one.slug, _state(one), one.step, one.created_at, one.actor.id or one.actor.kind, one.error)
        for one in found
    ]
    print_table("operations", columns, rows)


@app.command()
def show(number: Number, as_json: Json = False) -> None:
    """Show an operation: what it has found, how far it has come, and who does it."""
    found = run(lambda tenancy: tenancy.operations.get(number))
    if as_json:
        print_json(_fields(found))
        return
    fields = {**_fields(found), "state": _state(found), "detail": None}
    values = {name: value for name, value in fields.items() if value is not None}
    print_fields(f"operation {found.id}", {**values, **{f"detail.{name}": x for name, x in found.detail.items()}})
    if found.state == "waiting" or found.is_abandoned:
        note(_advice(found))


@app.command()
def resume(number: Number, as_json: Json = False) -> None:
    """Go on with an operation that waits, or that no process does any more."""

    async def command(tenancy: Tenancy) -> Any:
        found = await tenancy.operations.get(number)
        report: Any = None
        match found.kind:
            case "restore":
                report = await tenancy.restores.resume(number, actor=operator())
            case "adopt":
                report = await tenancy.adoption.resume(number, actor=operator())
            case "move" if found.state != "waiting":
                report = await tenancy.moves.resume(number, actor=operator())
            case _:
                fail(_refusal(found))
        return report

    _print(run(command), number, as_json)


@app.command()
def undo(number: Number, yes: Yes = False, as_json: Json = False) -> None:
    """End an operation that waits, or that no process does any more, and remove what it has made."""
    if not yes and not confirm(f"Remove what operation {number} has made?"):
        fail("nothing was changed")

    async def command(tenancy: Tenancy) -> Operation:
        found = await tenancy.operations.get(number)
        match found.kind:
            case "restore":
                await tenancy.restores.discard(number, actor=operator())
            case "adopt":
                await tenancy.adoption.discard(number, actor=operator())
            case _:
                fail(_refusal(found))
        return await tenancy.operations.get(number)

    found = run(command)
    fields = {"operation": number, "kind": found.kind, "tenant": found.slug, "state": _state(found)}
    if as_json:
        print_json(fields)
    else:
        print_fields(f"operation {number}", fields)


@app.command()
def psql(
    number: Number,
    arguments: Annotated[list[str] | None, typer.Argument(help="Arguments for psql, after --.")] = None,
) -> None:
    """Open psql, read-only, on the database of a restore that waits for its swap."""

    async def command(tenancy: Tenancy) -> int:
        async with tenancy.restores.look(number) as login:
            settings = " ".join(f"-c {name}={value}" for name, value in READ_ONLY.items())
            environment = {**os.environ, **login.environment()}
            environment["PGOPTIONS"] = f"{environment.get('PGOPTIONS', '')} {settings}".strip()
            return await run_psql(arguments or (), environment)

    exit_with_psql(command)


def _refusal(operation: Operation) -> str:
    """Return why a command is not for an operation of this kind, or in this state."""
    is_over = operation.state not in ("running", "waiting")
    what = f"operation {operation.id} ({operation.kind} of {operation.slug!r})"
    return f"{what}: it is {operation.state}" if is_over else f"{what}: {_advice(operation)}"


def _advice(operation: Operation) -> str:
    """Return which command goes on with an operation that waits or is interrupted, and which one ends it."""
    number, slug = operation.id, operation.slug
    if operation.kind == "move":
        if operation.state == "waiting":
            return f"keep it with: tenancy move {slug} --confirm; or go back with: tenancy move {slug} --rollback"
        return f"finish it, or undo it before its switch, with: tenancy operations resume {number}"
    if operation.kind == "export":
        return f"repeat the command with --resume: tenancy export {slug} --to FILE --resume"
    if operation.kind not in ("restore", "adopt"):
        return "housekeeping continues it, or removes what it has made"
    return f"continue with: tenancy operations resume {number}; or end it with: tenancy operations undo {number}"


def _print(report: Any, number: int, as_json: bool) -> None:
    fields = asdict(report) if is_dataclass(report) and not isinstance(report, type) else {"operation": number}
    if as_json:
        print_json(fields)
    else:
        print_fields(f"operation {number}", {name: value for name, value in fields.items() if value not in (None, ())})


def _check(name: str, given: list[str] | None, known: tuple[str, ...]) -> None:
    if wrong := [one for one in given or () if one not in known]:
        fail(f"there is no {name} {wrong[0]!r}: give {', '.join(known)}", kind="ConfigurationError")


def _state(operation: Operation) -> str:
    return "interrupted" if operation.is_abandoned else operation.state


def _fields(operation: Operation) -> dict[str, Any]:
    return {
        "operation": operation.id,
        "kind": operation.kind,
        "tenant": operation.slug,
        "tenant_id": str(operation.tenant_id),
        "state": operation.state,
        "step": operation.step,
        "detail": dict(operation.detail),
        "actor": operation.actor.id or operation.actor.kind,
        "host": operation.host,
        "pid": operation.pid,
        "claimed": operation.is_claimed,
        "error": operation.error,
        "created_at": operation.created_at,
        "ended_at": operation.ended_at,
    }
