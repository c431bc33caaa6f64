"""``tenancy servers``: the PostgreSQL servers that hold tenants."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Annotated

import typer

from ..audit.log import AuditLog
from ..control.database import ControlDatabase
from ..errors import ConfigurationError
from ..servers.rows import ServerRow, list_servers, set_maintenance_database
from ..tenancy import Tenancy
from .output import console, print_json, print_table
from .runtime import Json, Yes, confirm, exit_on_error, fail, load_tenancy, operator, run

app = typer.Typer(help="Show the servers that hold tenants; change a maintenance database.", no_args_is_help=True)


@app.command("list")
def show(as_json: Json = False) -> None:
    """List the servers, where each is administered, and how many tenants it holds."""

    async def command(tenancy: Tenancy) -> list[ServerRow]:
        return await list_servers(tenancy.internals.control)

    found = run(command)
    if as_json:
        print_json([asdict(row) for row in found])
        return
    columns = ("server", "address", "maintenance database", "accepts tenants", "tenants")
    rows = [
        (row.name, f"{row.host}:{row.port}", row.maintenance_database, row.accepts_tenants, row.tenants)
        for row in found
    ]
    print_table("servers", columns, rows)


@app.command("set-maintenance-database")
def change(
    server: Annotated[str, typer.Argument(help="The server's name.")],
    database: Annotated[str, typer.Argument(help="The database that its administrative URL names from now on.")],
    yes: Yes = False,
) -> None:
    """Let a server's administrative URL name another database. Stop every process first. Audited."""
    if not yes and not confirm("Is every process that uses this installation stopped?"):
        fail("nothing was changed")

    # without opening the Tenancy, which is refused where the URL names the new database already
    async def command() -> str | None:
        config = load_tenancy().config
        if config.is_embedded:
            raise ConfigurationError("an embedded server's maintenance database does not change")
        control = ControlDatabase(config.control_url, direct=config.listen_dsn)
        try:
            await control.open()
            return await set_maintenance_database(control, AuditLog(control), server, database, actor=operator())
        finally:
            await control.close()

    former = exit_on_error(lambda: asyncio.run(command()))
    console.print(f"the maintenance database of {server} was {former} and is {database}", highlight=False)
