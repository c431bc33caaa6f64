"""``tenancy drill``: prove that a tenant could be brought back, for a monthly timer."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..backups import DrillReport
from ..tenancy import Tenancy
from .output import print_fields, print_json
from .runtime import EXIT_FAILED, TENANT_NAMES, Json, duration, operator, run_stoppable


def drill(
    tenant: Annotated[str | None, typer.Argument(help=f"{TENANT_NAMES}; a random tenant if not given.")] = None,
    max_age: Annotated[
        str | None, typer.Option("--max-age", help="Fail if the newest backup is older, such as 26h.")
    ] = None,
    server: Annotated[str | None, typer.Option("--server", help="The server of the scratch database.")] = None,
    as_json: Json = False,
) -> None:
    """Restore a tenant's newest backup into a scratch database, and compare; exit status 1 if that fails."""
    oldest = duration(max_age)

    async def command(tenancy: Tenancy) -> DrillReport:
        seconds = None if oldest is None else oldest.total_seconds()
        return await tenancy.backups.drill(tenant, server=server, max_age=seconds, actor=operator())

    report = run_stoppable(command)
    found = report.verification
    fields: dict[str, Any] = {
        "tenant": report.slug,
        "tenant_id": str(report.tenant_id),
        "good": report.is_good,
        "error": report.error,
        "backup": None if found is None else str(found.backup.id),
        "age_seconds": None if report.age_seconds is None else round(report.age_seconds, 1),
        "tables": None if found is None else found.tables,
        "rows": None if found is None else found.rows,
        "seconds": None if found is None else round(found.seconds, 3),
    }
    if as_json:
        print_json(fields)
    else:
        print_fields("drill", {name: value for name, value in fields.items() if value is not None})
    if not report.is_good:
        raise typer.Exit(EXIT_FAILED)


__all__ = ["drill"]
