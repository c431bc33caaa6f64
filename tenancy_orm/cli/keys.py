"""``tenancy keys``: issue, list, rotate and revoke API keys."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..tenancy import Tenancy
from .output import Column, console, print_json, print_table
from .runtime import Json, TenantArgument, days_from_now, operator, run

app = typer.Typer(help="Issue, list, rotate and revoke API keys.", no_args_is_help=True)

_LISTED = (
    Column("id", keep=True),
    Column("state", keep=True),
    "name",
    "scopes",
    Column("created", drop=4),
    Column("expires", drop=1),
    Column("revoked", drop=3),
    Column("last used", drop=2),
)

KeyId = Annotated[str, typer.Argument(help="The key's id, as keys list prints it.")]


def show_issued(key: Any, as_json: bool) -> None:
    """Print a new key, which is not shown again."""
    if as_json:
        print_json({"api_key": key.text, "key_id": key.key_id})
        return
    console.print(f"key {key.key_id}, not shown again:", highlight=False)
    print(key.text)


@app.command()
def issue(
    tenant: TenantArgument,
    name: Annotated[str, typer.Option(help="What it is for.")] = "",
    scope: Annotated[list[str] | None, typer.Option(help="A scope it grants; repeatable.")] = None,
    network: Annotated[
        list[str] | None, typer.Option(help="A network it may be used from, in CIDR notation; repeatable.")
    ] = None,
    prefix: Annotated[str | None, typer.Option(help="One of the configured prefixes.")] = None,
    expires_in_days: Annotated[
        float | None, typer.Option(min=0, help="Days until it expires; never if not given.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Issue another API key for a tenant."""
    expires_at = None if expires_in_days is None else days_from_now(expires_in_days)

    async def command(tenancy: Tenancy) -> Any:
        found = await tenancy.tenants.get(tenant)
        return await tenancy.keys.issue(
            found,
            name=name,
            scopes=scope or (),
            networks=network or (),
            prefix=prefix,
            expires_at=expires_at,
            actor=operator(),
        )

    show_issued(run(command), as_json)


@app.command("list")
def list_keys(tenant: TenantArgument, as_json: Json = False) -> None:
    """List a tenant's API keys, without their secrets."""

    async def command(tenancy: Tenancy) -> Any:
        found = await tenancy.tenants.get(tenant)
        return await tenancy.keys.list(found)

    keys = run(command)
    if as_json:
        print_json(list(keys))
        return
    rows = [
        (k.key_id, k.state, k.name, sorted(k.scopes), k.created_at, k.expires_at, k.revoked_at, k.last_used_at)
        for k in keys
    ]
    print_table(f"API keys of {tenant}", _LISTED, rows)


@app.command()
def rotate(
    key_id: KeyId,
    overlap: Annotated[float, typer.Option(min=0, help="Seconds for which the old key still works.")] = 86_400.0,
    as_json: Json = False,
) -> None:
    """Replace a key by a new one; the old key works until the overlap ends."""

    async def command(tenancy: Tenancy) -> Any:
        return await tenancy.keys.rotate(key_id, overlap=overlap, actor=operator())

    show_issued(run(command), as_json)


@app.command()
def revoke(
    key_id: KeyId,
    reason: Annotated[str | None, typer.Option("--reason", "-r", help="Why; recorded in the audit log.")] = None,
    as_json: Json = False,
) -> None:
    """Revoke a key, at once in every process."""

    async def command(tenancy: Tenancy) -> None:
        await tenancy.keys.revoke(key_id, reason=reason, actor=operator())

    run(command)
    if as_json:
        print_json({"key_id": key_id, "revoked": True})
    else:
        console.print(f"key {key_id} is revoked", highlight=False)
