"""``tenancy schedule``: suspensions and purges that ``housekeeping`` does at a given time."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

import typer

from ..errors import ConfigurationError
from ..tenancy import Tenancy
from .output import console, print_json
from .runtime import Json, TenantArgument, exit_on_error, operator, run

app = typer.Typer(help="Schedule the suspension or the purge of a tenant.", no_args_is_help=True)

When = Annotated[str, typer.Argument(help="ISO 8601 time with an offset (2027-01-31T00:00+00:00), or never.")]


def parse_time(text: str) -> datetime | None:
    """Parse a time given on the command line; None for ``never``.

    Raises:
        ConfigurationError: it is not ISO 8601, or has no offset.
    """
    if text == "never":
        return None
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise ConfigurationError(f"{text!r} is not a time; write 2027-01-31T00:00+00:00, or never") from None
    if found.tzinfo is None:
        raise ConfigurationError(f"{text!r} has no offset from UTC; write {found.isoformat()}+00:00, for example")
    return found


@app.command()
def suspension(
    tenant: TenantArgument,
    at: When,
    reason: Annotated[str | None, typer.Option("--reason", "-r", help="Why; shown to the tenant's requests.")] = None,
    as_json: Json = False,
) -> None:
    """Suspend a tenant at a given time; never cancels it."""
    when = exit_on_error(lambda: parse_time(at))

    async def command(tenancy: Tenancy) -> str:
        found = await tenancy.tenants.schedule_suspension(tenant, when, reason=reason, actor=operator())
        return found.slug

    _show(run(command), "suspend_at", when, as_json)


@app.command()
def purge(tenant: TenantArgument, at: When, as_json: Json = False) -> None:
    """Purge a deleted tenant at a given time; never means after the usual retention."""
    when = exit_on_error(lambda: parse_time(at))

    async def command(tenancy: Tenancy) -> str:
        return (await tenancy.tenants.schedule_purge(tenant, when, actor=operator())).slug

    _show(run(command), "purge_at", when, as_json)


def _show(slug: str, field: str, when: datetime | None, as_json: bool) -> None:
    if as_json:
        print_json({"slug": slug, field: when})
    else:
        console.print(f"[bold]{slug}[/]: {field} {when.isoformat() if when else 'never'}", highlight=False)
