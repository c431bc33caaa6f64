"""``tenancy adopt``: an existing database, a schema of one, or rows become tenants."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from ..adoption import AdoptionReport
from ..errors import AdoptionDifferencesError
from ..tenancy import Tenancy
from .adopt_rows import INTERRUPTED, adopt_fleet, adopt_rows, print_made, refuse_unfit
from .metadata import Metadata, parse_metadata
from .output import Column, console, note, print_table, printable, size_text
from .runtime import EXIT_FAILED, Json, Yes, confirm, exit_on_error, fail, given_url, operator, run_stoppable

_QUESTION = (
    "The database itself becomes tenant {slug}'s: it gets another owner and another name, and nobody else can connect "
    "to it any more. Continue?"
)


def adopt(
    slug: Annotated[
        str | None, typer.Argument(help="The slug of the tenant that is made; with --plan, the plan names them.")
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="URL",
            help="The database, with a login that may read it; - reads the URL from standard input, $NAME a variable.",
        ),
    ] = None,
    schema: Annotated[str | None, typer.Option(help="Adopt this schema of it alone.")] = None,
    with_shared: Annotated[
        list[str] | None,
        typer.Option(metavar="SCHEMA.TABLE", help="With --schema: bring this table of another schema too; repeatable."),
    ] = None,
    without: Annotated[
        list[str] | None,
        typer.Option(metavar="SCHEMA.TABLE", help="Leave this table out, of another tool for example; repeatable."),
    ] = None,
    where: Annotated[
        str | None,
        typer.Option(metavar="SQL", help='Adopt the rows of one customer alone, as "tenant_id = 42".'),
    ] = None,
    mapping: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="With --where: what tables become, and what references do not say; TOML."),
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Adopt the tenants of this plan, in TOML; run it again to continue."),
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="With --plan: how many tenants are made at once.")
    ] = None,
    at: Annotated[
        str | None,
        typer.Option(metavar="REVISION", help="The revision it is at, where it has no version table; base for none."),
    ] = None,
    accept_differences: Annotated[
        bool, typer.Option("--accept-differences", help="Adopt it although its tables differ from its revision's.")
    ] = False,
    in_place: Annotated[
        bool,
        typer.Option("--in-place", help="Let the database itself become the tenant's, with another owner and name."),
    ] = False,
    revoke: Annotated[
        bool, typer.Option("--revoke", help="In place: take the rights of roles other than its owner away.")
    ] = False,
    yes: Yes = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Compare and count, and change nothing. Exit status 1 if it differs.")
    ] = False,
    tier: Annotated[str | None, typer.Option(help="A configured tier; the default tier if not given.")] = None,
    metadata: Metadata = None,
    server: Annotated[
        str | None, typer.Option(help="The server to place it on; what placement or default_server says if not given.")
    ] = None,
    region: Annotated[str | None, typer.Option(help="Where its data has to stay.")] = None,
    as_json: Json = False,
) -> None:
    """Make a tenant of an existing database, schema or set of rows: of a copy, or of a database in place.

    Its schema is compared with that of its revision first. If it differs, nothing is changed, and the exit status is 1.
    """
    alone = {"--schema": schema, "--with-shared": with_shared, "--in-place": in_place, "--revoke": revoke}
    alone |= {"--accept-differences": accept_differences, "--without": without}
    if plan is not None:
        one = {"SLUG": slug, "--where": where, "--mapping": mapping, "--at": at, "--tier": tier, "--server": server}
        refuse_unfit({"--in-place": in_place, "--revoke": revoke, "--metadata": metadata}, "--plan")
        refuse_unfit({**one, "--region": region, **alone}, "--plan: write it into the plan")
        adopt_fleet(plan, source, concurrency=concurrency, dry_run=dry_run, as_json=as_json)
        return
    refuse_unfit({"--concurrency": concurrency}, "one tenant: it needs --plan")
    if slug is None or source is None:
        fail("name a tenant and its source: tenancy adopt SLUG --from URL", kind="ConfigurationError")
    options: dict[str, Any] = {"at": at, "server": server, "region": region, "tier": tier}
    if where is not None or mapping is not None:
        refuse_unfit(alone, "rows: it is for databases and schemas")
        adopt_rows(
            slug,
            given_url(source),
            where=where,
            mapping=mapping,
            dry_run=dry_run,
            as_json=as_json,
            metadata=exit_on_error(lambda: parse_metadata(metadata)),
            options=options,
        )
        return
    given = exit_on_error(lambda: parse_metadata(metadata))
    _adopt_database(
        slug,
        given_url(source),
        accept_differences=accept_differences,
        in_place=in_place,
        revoke=revoke,
        yes=yes,
        dry_run=dry_run,
        as_json=as_json,
        metadata=given,
        options={"schema": schema, "with_shared": with_shared or (), "without": without or (), **options},
    )


def _adopt_database(
    slug: str,
    url: str,
    *,
    accept_differences: bool,
    in_place: bool,
    revoke: bool,
    yes: bool,
    dry_run: bool,
    as_json: bool,
    metadata: dict[str, Any] | None,
    options: dict[str, Any],
) -> None:
    """Make a tenant of a database or of a schema of it."""
    progress = None if as_json else lambda text: note(f"{slug}: {text}")
    arguments = {**options, "in_place": in_place, "progress": progress}

    async def command(tenancy: Tenancy) -> AdoptionReport | AdoptionDifferencesError:
        if dry_run:
            return await tenancy.adoption.check(slug, url, **arguments)
        try:
            return await tenancy.adoption.adopt(
                slug,
                url,
                accept_differences=accept_differences,
                revoke=revoke,
                metadata=metadata,
                actor=operator(),
                **arguments,
            )
        except AdoptionDifferencesError as exc:
            if as_json:
                raise
            return exc

    if in_place and not dry_run and not yes and not confirm(_QUESTION.format(slug=slug)):
        fail("nothing was changed")
    found = run_stoppable(command, stopped=INTERRUPTED)
    if isinstance(found, AdoptionDifferencesError):
        _print_differences(found.differences)
        fail(
            f"{found.source} differs from revision {found.revision or 'base'}: nothing was changed; correct it, "
            "name its revision with --at, or add --accept-differences",
            kind=type(found).__name__,
        )
    _show(found, as_json)
    if dry_run and (found.differences or found.refused or (found.foreign_rights and not revoke)):
        raise typer.Exit(EXIT_FAILED)


def _show(report: AdoptionReport, as_json: bool) -> None:
    if as_json:
        print_made(report)
        return
    rows = [(one.source, one.target, one.rows) for one in report.tables]
    print_table("tables", (Column("source", drop=1), "table", "rows"), rows)
    _print_differences([text for one in report.differences for text in (one.text, *one.lines)])
    for text in _remarks(report):
        console.print(printable(text), markup=False)
    if report.api_key is not None:
        console.print("API key, not shown again:", highlight=False)
        print(report.api_key)


def _print_differences(texts: tuple[str, ...] | list[str]) -> None:
    if texts:
        console.print("differences from its revision:")
    for text in texts:
        console.print(printable(f"  {text}"), markup=False)


def _remarks(report: AdoptionReport) -> Iterator[str]:
    for one in report.foreign_rights:
        yield f"rights that --revoke takes away: {one}"
    for one in report.refused:
        yield f"refused: {one}, which its revision does not make: it would run with the owner's rights"
    yield from (f"note: {one}" for one in report.notes)
    rows, tables = report.rows, len(report.tables)
    what = f"{rows} row{'s' * (rows != 1)} in {tables} table{'s' * (tables != 1)}, {size_text(report.size)}"
    came = f"{report.source} (PostgreSQL {report.version}, {report.revision or 'base'}): {what}"
    after = f", then brought to {report.pending}" if report.pending else ""
    if report.tenant is None:
        yield f"{came}{after}; nothing was changed"
    else:
        yield f"adopted {report.slug} on server {report.server} as {report.tenant.id} from {came}{after}"


__all__ = ["adopt"]
