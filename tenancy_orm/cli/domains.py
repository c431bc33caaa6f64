"""``tenancy domains``: tenants' own domains."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from ..tenancy import Tenancy
from ..tenants.domains import Domain
from .output import Column, cell, console, print_json, print_table
from .runtime import Json, TenantArgument, operator, run

app = typer.Typer(help="Claim, verify and release tenants' own domains.", no_args_is_help=True)

DomainArgument = Annotated[str, typer.Argument(help="A domain name of two labels or more.")]


def _fields(domain: Domain) -> dict[str, Any]:
    return {**asdict(domain), "challenge": domain.challenge}


@app.command()
def claim(tenant: TenantArgument, domain: DomainArgument, as_json: Json = False) -> None:
    """Claim a domain for a tenant, and print the TXT record that the domain's owner must publish."""

    async def command(tenancy: Tenancy) -> Domain:
        return await tenancy.domains.claim(tenant, domain, actor=operator())

    claimed = run(command)
    if as_json:
        print_json(_fields(claimed))
        return
    until = f" until {cell(claimed.expires_at)}" if claimed.expires_at else ""
    console.print(
        f"publish this record and keep it published; run{until}: tenancy domains verify {tenant} {claimed.domain}"
    )
    print(f'{claimed.challenge}. IN TXT "{claimed.token}"')


@app.command()
def verify(tenant: TenantArgument, domain: DomainArgument, as_json: Json = False) -> None:
    """Look up the TXT record of a claim, and make the domain the tenant's."""

    async def command(tenancy: Tenancy) -> Domain:
        return await tenancy.domains.verify(tenant, domain, actor=operator())

    verified = run(command)
    if as_json:
        print_json(_fields(verified))
    else:
        console.print(f"[bold]{verified.domain}[/] is verified", highlight=False)


@app.command()
def release(tenant: TenantArgument, domain: DomainArgument, as_json: Json = False) -> None:
    """Release a tenant's domain."""

    async def command(tenancy: Tenancy) -> None:
        await tenancy.domains.release(tenant, domain, actor=operator())

    run(command)
    if as_json:
        print_json({"domain": domain, "released": True})
    else:
        console.print(f"[bold]{domain}[/] is released", highlight=False)


@app.command("list")
def list_domains(tenant: TenantArgument, as_json: Json = False) -> None:
    """List a tenant's domains."""

    async def command(tenancy: Tenancy) -> list[Domain]:
        return await tenancy.domains.list(tenant)

    found = run(command)
    if as_json:
        print_json([_fields(domain) for domain in found])
        return
    rows = [(x.domain, x.created_at, x.expires_at, x.verified_at, x.failing_since, x.challenge) for x in found]
    columns = (
        Column("domain", keep=True),
        Column("claimed", drop=3),
        Column("expires", drop=1),
        "verified",
        Column("failing since", drop=2),
        Column("challenge", drop=4),
    )
    print_table(f"domains of {tenant}", columns, rows)
