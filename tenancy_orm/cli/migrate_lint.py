"""``tenancy migrate lint``: what is dangerous in revisions, for a person and for CI."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Annotated

import typer

from ..config import TenancyConfig
from ..errors import ConfigurationError, MigrationError
from ..migrations.configuration import alembic_config
from ..migrations.scripts import Environment, load
from ..rehearsal.git import changed_since
from ..rehearsal.lint import LintFinding, LintReport, heads_of, lint, revisions_between
from ..tenancy import Tenancy
from .output import console, note, print_json, printable
from .runtime import EXIT_FAILED, Json, exit_on_error, load_tenancy, run

EXIT_NOT_CHECKED = 2
"""The exit status where the revisions could not be checked, as without squawk."""


def lint_revisions(
    revisions: Annotated[
        list[str] | None, typer.Argument(help="Revisions; those that tenants lack by default.")
    ] = None,
    start: Annotated[
        str | None, typer.Option("--from", metavar="REVISION", help="Revisions after this one, or base.")
    ] = None,
    target: Annotated[str, typer.Option("--to", metavar="REVISION", help="The last revision.")] = "heads",
    since: Annotated[
        str | None,
        typer.Option("--since", metavar="COMMIT", help="Revisions that are new or changed since this commit of git."),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", metavar="RULE", help="Leave out this rule; repeatable.")
    ] = None,
    pg_version: Annotated[
        str | None, typer.Option(help="PostgreSQL's version; squawk's configuration by default.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Look for what is dangerous in revisions, with squawk. Exit status 1 with findings, 2 if unchecked."""
    if sum(1 for given in (revisions, start, since) if given) > 1:
        raise typer.BadParameter("give revisions, --from or --since")

    def checked(config: TenancyConfig, environment: Environment, chosen: Iterable[str]) -> LintReport:
        return lint(
            environment,
            chosen,
            settings=config.migration,
            exclude=tuple(exclude or ()),
            pg_version=pg_version,
        )

    async def by_fleet(tenancy: Tenancy) -> LintReport:
        found = {one.revision for one in await tenancy.migrations.status()} or {None}
        environment = await tenancy.migrations.environment()
        chosen: dict[str, None] = {}
        unknown: dict[str | None, MigrationError] = {}
        for revision in sorted(found, key=str):
            heads = frozenset(filter(None, (revision or "").split(",")))
            try:
                chosen |= dict.fromkeys(revisions_between(environment, [heads], target))
            except MigrationError as exc:  # of newer code, or of another branch
                unknown[revision] = exc
        if len(unknown) == len(found):
            raise next(iter(unknown.values()))
        if unknown:
            note(f"left out: tenants at {', '.join(map(str, unknown))}, from where no revision leads to {target}")
        return checked(tenancy.config, environment, chosen)

    def without_database() -> LintReport:
        config = load_tenancy().config
        if config.migrations is None:
            raise ConfigurationError("TenancyConfig.migrations names no directory; make one with: tenancy init")
        environment = load(alembic_config(config.migrations, config.migration))
        if since is not None:
            return checked(config, environment, changed_since(environment, since))
        if start is not None:
            chosen = revisions_between(environment, [heads_of(environment, start)], target)
            return checked(config, environment, chosen)
        return checked(config, environment, revisions or ())

    try:
        report = exit_on_error(without_database) if revisions or start or since else run(by_fleet)
    except typer.Exit:
        # CI tells by the status what is to be mended: the revisions, or its own setup
        raise typer.Exit(EXIT_NOT_CHECKED) from None
    if as_json:
        print_json(report)
    else:
        _print(report)
    if not report.ok:
        raise typer.Exit(EXIT_FAILED)


def _print(report: LintReport) -> None:
    for one in report.findings:
        console.print(printable(_line(one)), markup=False)
        if one.statement:
            console.print(printable(f"    {one.statement}"), markup=False)
        if one.help:
            console.print(printable(f"    {one.help}"), markup=False)
    count, checked = len(report.findings), len(report.revisions)
    note(f"{count} finding{'s' * (count != 1)} in {checked} revision{'s' * (checked != 1)}")


def _line(one: LintFinding) -> str:
    """One line as compilers print it, which editors and CI can read: path:line: level: message [rule]."""
    path = os.path.relpath(one.path)
    where = one.path if path.startswith("..") else path
    return f"{where}:{one.line or 1}: {one.level}: {one.message} [{one.rule}]"


__all__ = ["EXIT_NOT_CHECKED", "lint_revisions"]
