"""``tenancy rebuild``: register tenants again that the control database does not know."""

from __future__ import annotations

import asyncio
import tomllib
from datetime import UTC
from pathlib import Path
from typing import Annotated, Any
from uuid import UUID

import typer

from ..errors import ConfigurationError
from ..restores import FoundDatabase, RebuildReport
from ..tenant import parse_id
from .output import Column, note, print_json, print_table
from .runtime import EXIT_FAILED, Json, exit_on_error, load_tenancy, operator

_LISTED = (
    Column("tenant", keep=True),
    "slug",
    "server",
    Column("database", drop=3),
    Column("revision", drop=2),
    Column("size", drop=1),
    Column("state", keep=True),
    "why",
)


def rebuild(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would be registered, and change nothing.")
    ] = False,
    slugs: Annotated[
        Path | None,
        typer.Option(help='A TOML file with slugs by ids: "ID" = "acme", or { slug = "acme", tier = "pro" }.'),
    ] = None,
    installation: Annotated[
        UUID | None, typer.Option(help="The lost installation, where the servers have databases of several.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Register the tenants that have databases and no rows: after the control database was lost.

    A row that names a database that another one has replaced since, by a restore or a move, gets that one.

    The markers of the databases name the tenants. Ids, databases and roles stay; passwords are rotated. Slugs are those
    of --slugs, or "tenant-" and the last 12 digits of the id. A new control database gets the id of the lost one.
    """
    given, tiers = exit_on_error(lambda: ({}, {}) if slugs is None else _read(slugs))

    async def opened() -> RebuildReport:
        tenancy = load_tenancy()
        await tenancy.open(warm=False)
        try:
            report = await tenancy.rebuilding.look(slugs=given, tiers=tiers, installation=installation)
            if dry_run:
                return report
            if await tenancy.rebuilding.take_installation(report.installation, actor=operator()):
                await tenancy.close()
                await tenancy.open(initialise=True, warm=False)
            return await tenancy.rebuilding.run(slugs=given, tiers=tiers, actor=operator())
        finally:
            await tenancy.close()

    _show(exit_on_error(lambda: asyncio.run(opened())), as_json)


def _read(path: Path) -> tuple[dict[UUID, str], dict[UUID, str]]:
    """Return the slugs and the tiers that a file gives, by id.

    Raises:
        ConfigurationError: it cannot be read, or says something that is not understood.
    """
    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeError, tomllib.TOMLDecodeError) as exc:
        raise ConfigurationError(f"{path} cannot be read: {exc}") from exc
    slugs: dict[UUID, str] = {}
    tiers: dict[UUID, str] = {}
    for name, value in values.items():
        fields: Any = {"slug": value} if isinstance(value, str) else value
        if not isinstance(fields, dict) or not fields or not fields.keys() <= {"slug", "tier"}:
            raise ConfigurationError(f'{path}: {name} needs "SLUG", or {{ slug = "SLUG", tier = "TIER" }}')
        if not all(isinstance(text, str) for text in fields.values()):
            raise ConfigurationError(f"{path}: slug and tier of {name} are texts")
        if (tenant_id := parse_id(name)) is None:
            raise ConfigurationError(f"{path}: {name!r} is not the id of a tenant")
        if tenant_id in slugs or tenant_id in tiers:
            raise ConfigurationError(f"{path} names {tenant_id} twice")
        if "slug" in fields:
            slugs[tenant_id] = fields["slug"]
        if "tier" in fields:
            tiers[tenant_id] = fields["tier"]
    return slugs, tiers


def _show(report: RebuildReport, as_json: bool) -> None:
    if as_json:
        others = {str(which): number for which, number in report.others.items()}
        print_json(
            {
                "installation": report.installation,
                "databases": report.databases,
                "others": others,
                "unknown": report.unknown,
                "complete": report.complete,
            }
        )
    else:
        rows = [
            (x.tenant_id, x.slug, x.server, x.database, x.revision, x.size_bytes, x.state, _why(x))
            for x in report.databases
        ]
        print_table(f"installation {report.installation}", _LISTED, rows)
        for which, number in report.others.items():
            note(f"{number} database{'s' * (number != 1)} of installation {which}: left alone")
        for server, reason in report.unknown.items():
            note(f"server {server} cannot be read, so its tenants are unknown: {reason}")
        for one in report.databases:
            if one.state == "taken" and one.replaces is None:
                note(f"next: tenancy keys issue {one.slug}")
    if not report.complete:
        raise typer.Exit(EXIT_FAILED)


def _why(found: FoundDatabase) -> str | None:
    if found.reason:
        return found.reason
    if found.replaces:
        return f"in place of {found.replaces}"
    if found.expires_at is not None:
        return f"a clone, until {found.expires_at.astimezone(UTC):%Y-%m-%d %H:%M} UTC"
    return None


__all__ = ["rebuild"]
