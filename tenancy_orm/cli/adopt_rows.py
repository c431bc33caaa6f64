"""``tenancy adopt --where`` and ``--plan``: rows of a shared database become tenants, one or many."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import typer

from ..adoption import AdoptionPlan, AdoptionReport, FleetOutcome, FleetReport, RowsMapping, RowsReport
from ..tenancy import Tenancy
from .output import (
    Column,
    TenantBar,
    console,
    note,
    print_json,
    print_table,
    printable,
    progress_bar,
    tenant_fields,
)
from .runtime import EXIT_FAILED, exit_on_error, fail, given_url, operator, run_stoppable

INTERRUPTED = "stopped: what was made was removed; the source is unchanged"
"""What is said where the adoption of one tenant was stopped."""

_FLEET_INTERRUPTED = "stopped: run the same command again, and the tenants that are complete are skipped"


def adopt_rows(
    slug: str,
    url: str,
    *,
    where: str | None,
    mapping: Path | None,
    dry_run: bool,
    as_json: bool,
    metadata: dict[str, Any] | None,
    options: dict[str, Any],
) -> None:
    """Make a tenant of the rows of one customer."""
    said = exit_on_error(
        lambda: RowsMapping.parse({}, where=where) if mapping is None else RowsMapping.read(mapping, where=where)
    )
    arguments = {"mapping": said, **options, "progress": None if as_json else lambda text: note(f"{slug}: {text}")}

    async def command(tenancy: Tenancy) -> RowsReport:
        if dry_run:
            return await tenancy.adoption.rows.check(slug, url, **arguments)
        return await tenancy.adoption.rows.adopt(slug, url, metadata=metadata, actor=operator(), **arguments)

    report = run_stoppable(command, stopped=INTERRUPTED)
    if as_json:
        print_made(report)
    else:
        _show(report)
    if report.problems:
        raise typer.Exit(EXIT_FAILED)


def adopt_fleet(plan: Path, source: str | None, *, concurrency: int | None, dry_run: bool, as_json: bool) -> None:
    """Make the tenants of a plan."""
    url = None if source is None else given_url(source)
    said = exit_on_error(lambda: AdoptionPlan.read(plan, source=url, resolve=given_url))
    if concurrency is not None:
        said = said.at_once(concurrency)

    async def command(tenancy: Tenancy) -> FleetReport:
        with progress_bar(shown=not as_json) as bar:
            shown = TenantBar(bar, "looked at" if dry_run else "adopted")
            shown.total(len(await tenancy.adoption.fleet.tenants(said)))

            def done(outcome: FleetOutcome) -> None:
                shown.done(outcome)
                if outcome.api_key is not None and not as_json:
                    # at once, since it is shown only here
                    print(f"{outcome.slug} {outcome.api_key}", flush=True)

            if dry_run:
                return await tenancy.adoption.fleet.check(said, progress=done)
            return await tenancy.adoption.fleet.adopt(said, progress=done, actor=operator())

    report = run_stoppable(command, stopped=_FLEET_INTERRUPTED)
    if as_json:
        print_json(asdict(report) | {"ok": report.ok})
    else:
        _show_fleet(report, dry_run)
    if not report.ok:
        raise typer.Exit(EXIT_FAILED)


def print_made(report: AdoptionReport | RowsReport) -> None:
    """Print a report as JSON, with the tenant that was made, or null."""
    tenant = None if report.tenant is None else tenant_fields(report.tenant)
    print_json({field.name: getattr(report, field.name) for field in fields(report)} | {"tenant": tenant})


def refuse_unfit(given: dict[str, Any], what: str) -> None:
    """Refuse options that do not go with ``what``."""
    if unfit := [name for name, value in given.items() if value]:
        fail(f"{unfit[0]} cannot be combined with {what}", kind="ConfigurationError")


def _show(report: RowsReport) -> None:
    columns = (Column("source"), Column("table", drop=2), "rows", "of", Column("how", drop=1))
    print_table("tables", columns, [(one.source, one.target, one.rows, one.total, one.how) for one in report.tables])
    for text in report.problems:
        console.print(printable(f"refused: {text}"), markup=False)
    for text in report.notes:
        console.print(printable(f"note: {text}"), markup=False)
    after = f", then brought to {report.pending}" if report.pending else ""
    came = f"{report.rows} rows of {report.source} where {report.where}, at {report.revision or 'base'}{after}"
    if report.tenant is None:
        console.print(printable(f"{came}; nothing was changed"), markup=False)
        return
    console.print(
        printable(f"adopted {report.slug} on server {report.server} as {report.tenant.id}: {came}"), markup=False
    )
    if report.api_key is not None:
        console.print("API key, not shown again:", highlight=False)
        print(report.api_key)


def _show_fleet(report: FleetReport, dry_run: bool) -> None:
    rows = [(one.slug, one.state, one.rows, f"{one.seconds:.1f}", one.error) for one in report.tenants]
    print_table("tenants", ("slug", "state", "rows", Column("seconds", drop=1), "error"), rows)
    if dry_run and report.tables:
        columns = ("table", "rows", "tenants'", Column("nobody's", drop=1), "way")
        print_table(
            "tables", columns, [(one.source, one.total, one.claimed, one.nobodys, one.way) for one in report.tables]
        )
    for text in report.problems:
        console.print(printable(f"refused: {text}"), markup=False)
    for text in report.notes:
        console.print(printable(f"note: {text}"), markup=False)
    counts = {
        state: sum(one.state == state for one in report.tenants)
        for state in ("adopted", "checked", "skipped", "failed")
    }
    said = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    console.print(f"{said or 'no tenants'}{'; nothing was changed' if dry_run else ''}", markup=False)


__all__ = ["INTERRUPTED", "adopt_fleet", "adopt_rows", "refuse_unfit"]
