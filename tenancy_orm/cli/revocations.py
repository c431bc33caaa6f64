"""``tenancy revocations``: end tokens and sessions before they expire."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

import typer

from ..authentication.revocations import Revocation
from ..tenancy import Tenancy
from .output import Column, console, print_json, print_table, printable
from .runtime import ExpiresIn, Json, duration, fail, operator, run

app = typer.Typer(help="Revoke tokens and sessions before they expire.", no_args_is_help=True)

Subject = Annotated[str | None, typer.Option(help="Everything that was issued to this subject until now.")]
Token = Annotated[str | None, typer.Option(help="The one token (its jti) or session with this id.")]


@app.command()
def add(
    subject: Subject = None,
    token: Token = None,
    expires_in: ExpiresIn = None,
    reason: Annotated[str | None, typer.Option("--reason", "-r", help="Why; recorded in the audit log.")] = None,
    as_json: Json = False,
) -> None:
    """Revoke what was issued to a subject until now, or one token, for all tenants, at once in every process.

    With --expires-in, housekeeping removes the revocation after that time: give the longest life of what it refuses.
    """
    _check_one(subject, token)
    lifetime = duration(expires_in)

    async def command(tenancy: Tenancy) -> Revocation:
        expires_at = None if lifetime is None else datetime.now(UTC) + lifetime
        return await tenancy.revocations.add(
            subject=subject, token_id=token, expires_at=expires_at, reason=reason, actor=operator()
        )

    added = run(command)
    if as_json:
        print_json(added)
    else:
        console.print(f"{added.kind} {printable(added.value)} is revoked", markup=False, highlight=False)


@app.command()
def remove(subject: Subject = None, token: Token = None, as_json: Json = False) -> None:
    """Take a revocation back: what it refused is valid again."""
    _check_one(subject, token)

    async def command(tenancy: Tenancy) -> bool:
        return await tenancy.revocations.remove(subject=subject, token_id=token, actor=operator())

    removed = run(command)
    if as_json:
        print_json({"subject": subject, "token": token, "removed": removed})
    else:
        kind, value = ("subject", subject) if subject is not None else ("token", token)
        what = "is not revoked any more" if removed else "was not revoked"
        console.print(f"{kind} {printable(str(value))} {what}", markup=False, highlight=False)


@app.command("list")
def list_revocations(
    limit: Annotated[int, typer.Option(min=1, help="How many at most.")] = 1_000, as_json: Json = False
) -> None:
    """List the revocations in force, the newest first."""

    async def command(tenancy: Tenancy) -> list[Revocation]:
        return await tenancy.revocations.list(limit=limit)

    found = run(command)
    if as_json:
        print_json(found)
        return
    columns = (
        Column("kind", keep=True),
        Column("value", keep=True),
        Column("revoked", drop=1),
        Column("expires", drop=2),
        Column("reason", drop=3),
    )
    print_table("revocations", columns, [(x.kind, x.value, x.revoked_at, x.expires_at, x.reason) for x in found])


def _check_one(subject: str | None, token: str | None) -> None:
    if (subject is None) == (token is None):
        fail("give either --subject or --token", kind="ConfigurationError")
