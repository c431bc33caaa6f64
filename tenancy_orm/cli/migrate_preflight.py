"""``tenancy migrate preflight``: the checks of pending revisions, and nothing else."""

from __future__ import annotations

from typing import Annotated

import typer

from ..migrations.preflight import PreflightReport
from ..tenancy import Tenancy
from .migrate import Concurrency, Only
from .output import console, print_json, print_table
from .runtime import EXIT_FAILED, Json, run


def preflight(
    revision: Annotated[str, typer.Argument(help="An Alembic revision.")] = "head",
    tenant: Only = None,
    concurrency: Concurrency = 8,
    as_json: Json = False,
) -> None:
    """Ask every tenant the checks of the revisions ahead, and change nothing. Exit status 1 where one does not pass."""

    async def command(tenancy: Tenancy) -> PreflightReport:
        return await tenancy.migrations.preflight(revision, tenants=tenant, concurrency=concurrency)

    report = run(command)
    if as_json:
        print_json(report)
    else:
        console.print(report.summary(), highlight=False)
        rows: list[tuple[str | None, ...]] = [
            (one.slug, finding.revision, finding.check, finding.found)
            for one in report.failures
            for finding in one.findings
        ]
        rows += [(one.slug, None, None, one.error) for one in report.failures if one.error is not None]
        if rows:
            print_table("failed", ("tenant", "revision", "check", "found"), rows)
    if not report.ok:
        raise typer.Exit(EXIT_FAILED)
