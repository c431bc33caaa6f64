"""``tenancy warm-pool``: databases that are ready before their tenants come."""

from __future__ import annotations

from typing import Annotated

import typer

from ..provisioning import WarmReport, WarmStatus
from ..tenancy import Tenancy
from .output import Column, console, note, print_json, print_table
from .runtime import EXIT_FAILED, Json, run

app = typer.Typer(help="Show, fill and empty the pool of databases for new tenants.", no_args_is_help=True)

Servers = Annotated[list[str] | None, typer.Option("--server", "-s", help="Only this server; repeatable.")]


@app.command()
def show(server: Servers = None, as_json: Json = False) -> None:
    """Show how many databases are ready on each server, and how many there should be."""

    async def command(tenancy: Tenancy) -> list[WarmStatus]:
        return await tenancy.warm_pool.status(servers=server)

    found = run(command)
    if as_json:
        print_json(found)
        return
    columns = (
        Column("server"),
        Column("ready"),
        Column("target"),
        Column("incomplete", drop=2),
        Column("of others", drop=1),
        Column("oldest", drop=3),
    )
    rows = [(one.server, one.ready, one.target, one.incomplete, one.others, one.oldest) for one in found]
    print_table("warm pool", columns, rows)


@app.command()
def refill(
    server: Servers = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Drop at once what belongs to other releases or settings.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make the databases that are missing, unless creations or requests wait, and drop those that nobody asks for."""

    async def command(tenancy: Tenancy) -> WarmReport:
        return await tenancy.warm_pool.refill(servers=server, replace=replace)

    _report(run(command), as_json)


@app.command()
def drain(server: Servers = None, as_json: Json = False) -> None:
    """Drop every database of the pool. Set provisioning.warm_pool to 0 first, or others are made."""

    async def command(tenancy: Tenancy) -> WarmReport:
        return await tenancy.warm_pool.drain(servers=server)

    _report(run(command), as_json)


def _report(report: WarmReport, as_json: bool) -> None:
    if as_json:
        print_json(report)
    else:
        console.print(f"made {len(report.made)}, dropped {len(report.dropped)}", highlight=False)
    if report.errors:
        for error in report.errors:
            note(error)
        raise typer.Exit(EXIT_FAILED)
