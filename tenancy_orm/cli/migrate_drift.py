"""``tenancy migrate drift``: tenants with a schema that is not what their revision says."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.progress import Progress as ProgressBar

from ..drift import Difference, DriftGroup, DriftReport
from ..drift.mending import TENANT_ROLE
from ..postgres.quoting import quote_identifier
from ..tenancy import Tenancy
from .output import TenantBar, console, note, print_json, print_table, printable, progress_bar
from .runtime import EXIT_FAILED, Json, run
from .selection import Named, Tiers

Refuse = Annotated[
    bool, typer.Option("--refuse-drift", help="Change nothing where a tenant's schema is not what its revision says.")
]

_NAMED = 10  # tenants of a group that are named


def drift(
    tenant: Named = None,
    tier: Tiers = None,
    server: Annotated[
        list[str] | None, typer.Option("--server", help="The tenants on this server; repeatable.")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, max=64, help="Tenants read at once.")] = 8,
    as_json: Json = False,
) -> None:
    """Compare every tenant's schema with what its revision says, and print the differences. It changes nothing.

    Exit status 1 where a tenant drifts, or cannot be compared.
    """

    async def command(tenancy: Tenancy, bar: ProgressBar) -> DriftReport:
        return await tenancy.migrations.drift(
            tenants=tenant or None,
            tiers=tier or (),
            servers=server or (),
            concurrency=concurrency,
            progress=TenantBar(bar, "read"),
        )

    with progress_bar(shown=not as_json) as bar:
        report = run(lambda tenancy: command(tenancy, bar))
    if as_json:
        print_json(report)
    else:
        _show(report)
    if not report.ok:
        raise typer.Exit(EXIT_FAILED)


def _show(report: DriftReport) -> None:
    for group in report.groups:
        _print(f"{_members(group)} (at {group.revision or 'base'}):")
        for difference in group.differences:
            _print(f"  {difference.text}")
            for line in difference.lines:
                _print(f"    {line}")
            _show_statements(group, difference)
        print()
    if report.errors:
        print_table("not compared", ("tenant", "error"), report.errors.items())
    console.print(report.summary(), highlight=False)
    if any(TENANT_ROLE in text for text in _shared_statements(report)):
        note(f"{TENANT_ROLE} is a variable of psql: give it the name of the tenant's role, by -v tenant_role=...")


def _members(group: DriftGroup) -> str:
    rest = len(group.tenants) - _NAMED
    return ", ".join(group.tenants[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def _show_statements(group: DriftGroup, difference: Difference) -> None:
    if not difference.statements:
        _print("    no safe statement")
    for statement in difference.statements:
        text = statement if len(group.roles) > 1 else statement.replace(TENANT_ROLE, quote_identifier(group.roles[0]))
        for line in f"{text};".splitlines():
            _print(f"    {line}")


def _shared_statements(report: DriftReport) -> list[str]:
    groups = (group for group in report.groups if len(group.roles) > 1)
    return [text for group in groups for difference in group.differences for text in difference.statements]


def _print(line: str) -> None:
    print(printable(line))


__all__ = ["Refuse", "drift"]
