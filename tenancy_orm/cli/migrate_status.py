"""``tenancy migrate status``: the revision of every tenant, from the registry or from the databases."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Annotated, Any

import typer

from ..errors import counted
from ..migrations.selection import NO_TENANTS
from ..runs import TenantRevision
from ..seeds import SeedStatus
from ..tenancy import Tenancy
from . import seed
from .output import console, note, print_json, print_table
from .runtime import EXIT_FAILED, Json, run

_SHOWN = {True: "yes", False: "no", None: None}


def status(
    verify: Annotated[
        bool, typer.Option("--verify", help="Ask every database: for its revision, extensions and seeds.")
    ] = False,
    everyone: Annotated[bool, typer.Option("--all", help="List all tenants, and not only those behind.")] = False,
    as_json: Json = False,
) -> None:
    """Show how many tenants are at which revision, as the registry has it, and list those that are not at head.

    Exit status 1 where one is not at head, or has an unfinished data migration; with --verify also where one lacks an
    extension, or cannot be read.
    """

    async def command(tenancy: Tenancy) -> tuple[list[TenantRevision], dict[str, SeedStatus]]:
        seeds = await seed.read_status(tenancy) if verify else {}
        return await tenancy.migrations.status(verify=verify), seeds

    revisions, seeds = run(command)
    if as_json:
        fields = ((asdict(x), seed.status_fields(seeds.get(x.slug))) for x in revisions)
        print_json([{**found, **more} for found, more in fields])
    elif not revisions:
        console.print(NO_TENANTS, highlight=False)
    elif verify:
        _show_verified(revisions, seeds)
    else:
        _show_counts(revisions)
        _show_recorded(revisions, everyone)
    if not all(x.is_complete for x in revisions):
        raise typer.Exit(EXIT_FAILED)


def _show_counts(revisions: Sequence[TenantRevision]) -> None:
    counts = Counter((x.revision, _at_head(x)) for x in revisions)
    rows = [(revision, number, at_head) for (revision, at_head), number in counts.most_common()]
    print_table(f"revisions of {counted(len(revisions))}", ("revision", "tenants", "at head"), rows)


def _show_recorded(revisions: Sequence[TenantRevision], everyone: bool) -> None:
    listed = [x for x in revisions if everyone or not x.is_complete]
    if listed:
        print()
        rows = [(x.slug, x.revision, _at_head(x), x.server) for x in listed]
        title = "all tenants" if everyone else "not at head"
        print_table(title, ("tenant", "revision", "at head", "server"), rows)
    note("these are the recorded revisions; --verify asks the databases, and shows extensions as well")


def _show_verified(revisions: Sequence[TenantRevision], seeds: Mapping[str, SeedStatus]) -> None:
    columns = ["tenant", "revision", "at head", "lacks extensions", "not in the setting"]
    rows: list[list[Any]] = [
        [x.slug, x.revision, _at_head(x), *map(", ".join, (x.missing_extensions, x.other_extensions))]
        for x in revisions
    ]
    if seeds:
        columns.append("lacks seeds")
        for row, x in zip(rows, revisions, strict=True):
            row.append(", ".join(seeds[x.slug].outstanding) if x.slug in seeds else None)
    print_table(
        "schema revisions", [*columns, "error"], ([*row, x.error] for row, x in zip(rows, revisions, strict=True))
    )


def _at_head(x: TenantRevision) -> str | None:
    return "yes, data migrations are unfinished" if x.at_head and x.has_unfinished_data else _SHOWN[x.at_head]


__all__ = ["status"]
