"""``tenancy migrate compatible``: which tenants the code serves at their revisions."""

from __future__ import annotations

from typing import Annotated

import typer

from ..runs.served import CompatibilityReport
from ..tenancy import Tenancy
from .output import console, print_json, print_table
from .runtime import EXIT_FAILED, Json, run


def compatible(
    revisions: Annotated[
        str | None, typer.Argument(help="In place of the setting compatible_revisions, such as 0012:head.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Count the tenants by revision, and say which the code serves; exit status 1 where it does not serve some.

    It asks the control database alone: run it with the next release's code before you replace the processes.
    With REVISIONS it says which tenants another release serves, such as the one that still runs.
    """

    async def command(tenancy: Tenancy) -> CompatibilityReport:
        return await tenancy.migrations.compatibility(revisions)

    report = run(command)
    if as_json:
        print_json(
            {
                "declared": report.declared,
                "total": report.total,
                "outside": report.outside,
                "revisions": report.revisions,
                "failed": report.failed,
            }
        )
    else:
        rows = [(x.revision or "base", x.tenants, x.migrating, "yes" if x.served else "no") for x in report.revisions]
        print_table("tenants by revision", ("revision", "tenants", "being migrated", "served"), rows)
        if report.failed:
            failed = [(x.slug, x.target, x.failures, x.next_at, x.error) for x in report.failed]
            print_table("failed before their use", ("tenant", "to", "failures", "next attempt", "error"), failed)
        console.print(report.summary(), highlight=False)
    if not report.ok:
        raise typer.Exit(EXIT_FAILED)


__all__ = ["compatible"]
