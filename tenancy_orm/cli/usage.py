"""``tenancy usage``: the export of usage records to billing."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..tenancy import Tenancy
from .output import Column, console, print_json, print_report, print_table
from .runtime import Json, run

app = typer.Typer(help="Send usage to billing, by TenancyConfig.metering.usage_sender.", no_args_is_help=True)


@app.command()
def export(as_json: Json = False) -> None:
    """Close the periods that have ended, and send their records. Housekeeping does it too."""

    async def command(tenancy: Tenancy) -> Any:
        return await tenancy.internals.usage_exporter.run()

    report = run(command)
    print_report("usage", report, as_json=as_json)
    if report.failed:
        raise typer.Exit(1)


@app.command()
def failures(
    limit: Annotated[int, typer.Option(help="How many at most, the newest first.")] = 100, as_json: Json = False
) -> None:
    """List the records that were given up, each with its error."""

    async def command(tenancy: Tenancy) -> Any:
        return await tenancy.internals.usage_exporter.failures(limit=limit)

    found = run(command)
    rows = [
        {
            "id": record.id,
            "slug": record.slug,
            "resource": record.resource,
            "quantity": record.quantity,
            "period_start": record.period_start,
            "period_end": record.period_end,
            "error": error,
        }
        for record, error in found
    ]
    if as_json:
        print_json(rows)
    else:
        columns = ("id", "tenant", "resource", "quantity", Column("from", drop=2), Column("to", drop=1), "error")
        print_table("records given up", columns, (row.values() for row in rows))


@app.command()
def retry(
    record_ids: Annotated[list[int], typer.Argument(help="Ids of records that were given up.")], as_json: Json = False
) -> None:
    """Retry records that were given up, at the next export."""

    async def command(tenancy: Tenancy) -> int:
        return await tenancy.internals.usage_exporter.retry(record_ids)

    due = run(command)
    if as_json:
        print_json({"due": due})
    else:
        console.print(f"{due} due again", highlight=False)
