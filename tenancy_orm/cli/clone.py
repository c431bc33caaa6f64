"""``tenancy clone``: a copy of a tenant becomes another tenant for a time."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..clones import AnonymisationRules, Clone, CloneReport
from ..clones.manager import LONGEST
from ..tenancy import Tenancy
from .metadata import Metadata, parse_metadata
from .output import console, note, print_fields, print_json, tenant_fields
from .runtime import Json, TenantArgument, duration, exit_on_error, fail, operator, run_stoppable


def clone(
    tenant: TenantArgument,
    slug: Annotated[str, typer.Argument(help="The clone's slug.")],
    ttl: Annotated[str, typer.Option("--ttl", help="For how long it is kept: 12h or 2d. Housekeeping purges it then.")],
    anonymise: Annotated[
        Path | None,
        typer.Option("--anonymise", metavar="RULES.TOML", help="What replaces the values of which columns."),
    ] = None,
    require_rules: Annotated[
        bool,
        typer.Option("--require-rules", help="Refuse columns of text, JSON, bytes and addresses without a rule."),
    ] = False,
    tier: Annotated[str | None, typer.Option(help="The clone's tier; the tenant's if not given.")] = None,
    metadata: Metadata = None,
    server: Annotated[str | None, typer.Option(help="The server to place it on; within the tenant's region.")] = None,
    accept_differences: Annotated[
        bool,
        typer.Option("--accept-differences", help="Accept functions, triggers and views that no revision makes."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Make another tenant of a copy of a tenant, for a time, and print its API key. The key is not shown again."""
    given = exit_on_error(lambda: parse_metadata(metadata))
    kept = duration(ttl, longest=LONGEST)
    if require_rules and anonymise is None:
        fail("--require-rules needs --anonymise", kind="ConfigurationError")
    rules = None if anonymise is None else exit_on_error(lambda: AnonymisationRules.load(anonymise))
    assert kept is not None  # noqa: S101 - for the type checker

    async def command(tenancy: Tenancy) -> CloneReport:
        return await tenancy.clones.create(
            tenant,
            slug,
            ttl=kept,
            rules=rules,
            require_rules=require_rules,
            tier=tier,
            metadata=given,
            server=server,
            accept=accept_differences,
            progress=None if as_json else lambda step: note(f"{step} ..."),
            actor=operator(),
        )

    _print(run_stoppable(command), as_json)


def clone_fields(found: Clone | None) -> dict[str, Any]:
    """Return what is recorded of a clone, beside a tenant's other fields; nothing for other tenants."""
    if found is None:
        return {}
    return {"clone_of": str(found.of), "expires_at": found.expires_at, "anonymised_columns": list(found.columns)}


def _print(report: CloneReport, as_json: bool) -> None:
    fields = {
        **tenant_fields(report.tenant),
        **clone_fields(report.clone),
        "tables": report.tables,
        "rows": report.rows,
        "differences": list(report.differences),
        "left_out": list(report.left_out),
        "seconds": round(report.seconds, 3),
    }
    if as_json:
        print_json({**fields, "api_key": report.api_key})
        return
    print_fields("clone", {name: value for name, value in fields.items() if value not in (None, [], {})})
    console.print("API key, not shown again:", highlight=False)
    print(report.api_key)


__all__ = ["clone", "clone_fields"]
