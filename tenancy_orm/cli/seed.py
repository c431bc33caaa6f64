"""``tenancy seed``: bringing seeds and reference data to existing tenants."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.progress import Progress as ProgressBar

from ..seeds import SeedReport, SeedStatus
from ..tenancy import Tenancy
from ..tenant import Status
from .output import TenantBar, console, failures_listed, note, print_json, print_table, progress_bar
from .runtime import EXIT_FAILED, Json, fail, operator, run
from .selection import Named, Selection, Tiers


def seed(
    tenant: Named = None,
    tier: Tiers = None,
    status: Annotated[
        list[Status] | None, typer.Option("--status", help="The tenants of this status; repeatable.")
    ] = None,
    everyone: Annotated[bool, typer.Option("--all", help="All tenants, also suspended and deleted ones.")] = False,
    only: Annotated[
        list[str] | None, typer.Option(help="Only the seed or reference table of this name; repeatable.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be applied, and change nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Apply what --only names even where it was applied.")] = False,
    concurrency: Annotated[int, typer.Option(min=1, max=64, help="Tenants at once.")] = 8,
    as_json: Json = False,
) -> None:
    """Bring tenants the seeds and reference data that they lack; one that fails does not stop the others. Audited."""
    chosen = Selection.of(tenant, tier, status, everyone)

    async def command(tenancy: Tenancy, bar: ProgressBar) -> SeedReport:
        return await tenancy.seeds.apply(
            chosen.tenants or None,
            tier=chosen.tiers,
            status=chosen.statuses,
            only=only,
            force=force,
            dry_run=dry_run,
            concurrency=concurrency,
            progress=TenantBar(bar, "seed"),
            actor=operator(),
        )

    if force and not only:
        fail("--force needs --only", kind="ConfigurationError")
    with failures_listed(), progress_bar(shown=not as_json) as bar:
        report = run(lambda tenancy: command(tenancy, bar))
    if as_json:
        print_json(report)
    else:
        _show(report)
    if not report.ok:
        raise typer.Exit(EXIT_FAILED)


async def read_status(tenancy: Tenancy, tenants: list[str] | None = None) -> dict[str, SeedStatus]:
    """Return what the tenants' databases have and lack, by slug; nothing where no seed is configured."""
    return {found.slug: found for found in await tenancy.seeds.status(tenants)}


def status_fields(found: SeedStatus | None) -> dict[str, Any]:
    """Return what ``tenancy show`` adds to a tenant's fields."""
    if found is None:
        return {}
    fields = asdict(found)
    return {
        "seeds": fields["applied"],
        "seeds_outstanding": fields["outstanding"],
        **({"seeds_error": found.error} if found.error else {}),
    }


def _show(report: SeedReport) -> None:
    console.print(report.summary(), highlight=False)
    if report.changed:
        rows = [(x.slug, [f"{name} {version}" for name, version in x.applied.items()]) for x in report.changed]
        print_table("would be applied" if report.dry_run else "applied", ("tenant", "applied"), rows)
    if report.failures:
        print_table("failed", ("tenant", "error"), [(x.slug, x.error) for x in report.failures])
    for outcome in report.outcomes:
        for name, keys in outcome.kept.items():
            note(f"{outcome.slug}: {name}: other tables refer to rows that the source lacks: {', '.join(keys)}")
        if outcome.skipped:
            note(f"{outcome.slug}: its role cannot log in, so these wait: {', '.join(outcome.skipped)}")
