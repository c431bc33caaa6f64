"""``tenancy quotas``: limits and usage."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..config.tiers import UNLIMITED
from ..errors import ConfigurationError
from ..quotas.overrides import Override
from ..tenancy import Tenancy
from .output import Column, print_json, print_table
from .runtime import Json, TenantArgument, exit_on_error, operator, run

app = typer.Typer(help="Show usage, and set limits.", no_args_is_help=True)


@app.command()
def usage(tenant: TenantArgument, as_json: Json = False) -> None:
    """Show what a tenant has used of each resource, and its limits."""

    async def command(tenancy: Tenancy) -> Any:
        return await tenancy.quotas.usage(tenant)

    _show(tenant, run(command), as_json)


@app.command("at-risk")
def at_risk(
    fraction: Annotated[float, typer.Option(help="Fraction of the limit, above 0 and at most 1.")] = 0.8,
    limit: Annotated[int, typer.Option(help="How many at most.")] = 100,
    as_json: Json = False,
) -> None:
    """List the tenants that are near a limit, highest fraction first."""

    async def command(tenancy: Tenancy) -> Any:
        return await tenancy.quotas.at_risk(fraction, limit=limit)

    found = run(command)
    if as_json:
        print_json(list(found))
        return
    rows = [
        (x.slug, x.tier, x.usage.resource, x.usage.used, x.usage.limit, f"{x.fraction:.0%}", x.usage.resets_at)
        for x in found
    ]
    columns = ("tenant", "tier", "resource", "used", "limit", "fraction", Column("resets at", drop=1))
    print_table("at risk", columns, rows)


@app.command("set")
def set_limits(
    tenant: TenantArgument,
    limits: Annotated[
        list[str],
        typer.Argument(help="resource=amount, resource=unlimited or resource=500/day; resource= removes the override."),
    ],
    as_json: Json = False,
) -> None:
    """Override limits of the tenant's tier."""
    overrides = exit_on_error(lambda: dict(_parse(text) for text in limits))

    async def command(tenancy: Tenancy) -> Any:
        await tenancy.quotas.set(tenant, overrides, actor=operator())
        return await tenancy.quotas.usage(tenant)

    _show(tenant, run(command), as_json)


def _parse(text: str) -> tuple[str, Override]:
    resource, separator, given = text.partition("=")
    amount, slash, period = given.partition("/")
    if not separator or (amount != UNLIMITED and not amount.isdecimal() and given):
        raise ConfigurationError(f"{text!r} is not of the form resource=amount, =unlimited or =amount/period")
    if not given:
        return resource, None
    limit: dict[str, Any] = {"amount": None if amount == UNLIMITED else int(amount)}
    return resource, {**limit, "period": period} if slash else limit


def _show(tenant: str, found: Any, as_json: bool) -> None:
    if as_json:
        print_json(list(found))
        return
    rows = [(x.resource, x.used, x.limit, x.period, x.resets_at) for x in found]
    columns = ("resource", "used", "limit", "period", Column("resets at", drop=1))
    print_table(f"quotas of {tenant}", columns, rows)
