"""``tenancy template``: the templates that new tenants are cloned from."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from ..provisioning import Template, TemplateInfo, TemplatePruneReport
from ..tenancy import Tenancy
from .output import Column, console, note, print_json, print_table
from .runtime import EXIT_FAILED, Json, operator, run

app = typer.Typer(help="List templates, build them again, and drop those that nobody uses.", no_args_is_help=True)

Servers = Annotated[list[str] | None, typer.Option("--server", "-s", help="Only this server; repeatable.")]

_DAY = 86_400


@app.command("list")
def list_templates(server: Servers = None, as_json: Json = False) -> None:
    """List the templates: the current one, those that other processes use, and superseded ones."""

    async def command(tenancy: Tenancy) -> list[Template]:
        return await tenancy.templates.list(servers=server)

    found = run(command)
    if as_json:
        print_json(found)
    else:
        _print(found)


@app.command()
def rebuild(server: Servers = None, as_json: Json = False) -> None:
    """Build the current template again. New tenants are cloned from it from then on; existing ones do not change."""

    async def command(tenancy: Tenancy) -> list[TemplateInfo]:
        return await tenancy.templates.rebuild(servers=server, actor=operator())

    built = run(command)
    if as_json:
        print_json(built)
    else:
        print_table("built", ("server", "name", "revision"), [(x.server, x.name, x.revision) for x in built])


@app.command()
def prune(
    server: Servers = None,
    older_than: Annotated[
        float | None,
        typer.Option("--older-than", min=0, metavar="DAYS", help="Days unused; retention.template_seconds by default."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be dropped, and drop nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Drop superseded templates. One that a process has used within 15 minutes stays, and so does the current one."""

    async def command(tenancy: Tenancy) -> TemplatePruneReport:
        seconds = None if older_than is None else older_than * _DAY
        return await tenancy.templates.prune(servers=server, unused_seconds=seconds, dry_run=dry_run, actor=operator())

    report = run(command)
    if as_json:
        print_json({"dry_run": dry_run, **asdict(report)})
    elif report.removed:
        _print(report.removed, title="would be dropped" if dry_run else "dropped")
    else:
        console.print("no template is due", highlight=False)
    if report.errors:
        for error in report.errors:
            note(error)
        raise typer.Exit(EXIT_FAILED)


def _print(found: Any, title: str = "templates") -> None:
    columns = (
        Column("server"),
        Column("name", keep=True),
        Column("revision"),
        Column("state"),
        Column("built", drop=2),
        Column("last used", drop=1),
        Column("by", drop=4),
        Column("MB", drop=3),
    )
    rows = [
        (
            x.server,
            x.name,
            x.revision,
            x.state,
            x.built_at,
            x.last_used_at,
            x.last_used_by,
            None if x.size_bytes is None else f"{x.size_bytes / 1e6:.1f}",
        )
        for x in found
    ]
    print_table(title, columns, rows)
