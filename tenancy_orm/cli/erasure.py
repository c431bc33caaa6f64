"""``tenancy erasure``: certificates of what was erased of purged tenants."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..audit.checkpoints import Verifier
from ..exports import ErasureCertificate
from ..tenancy import Tenancy
from .audit import read_verifier
from .output import console, note, print_json, printable
from .runtime import Json, TenantArgument, exit_on_error, fail, operator, run

app = typer.Typer(help="Certify what was erased of purged tenants.", no_args_is_help=True)


@app.command()
def certificate(
    tenant: TenantArgument,
    out: Annotated[Path | None, typer.Option("--out", help="Write it to this file, which must not exist.")] = None,
) -> None:
    """Print the signed certificate of a purged tenant as JSON, completing its erasure first where that is not done.

    The keys of its backups are destroyed then, so that nobody can read them.
    """

    async def command(tenancy: Tenancy) -> ErasureCertificate:
        return await tenancy.erasures.complete(tenant, actor=operator())

    found = run(command)
    if out is None:
        sys.stdout.write(found.to_bytes().decode())
        return
    try:
        with out.open("xb") as file:
            file.write(found.to_bytes())
    except OSError as exc:
        fail(f"{str(out)!r} cannot be written: {exc.strerror}")
    note(f"wrote the certificate of {found.slug} to {out}")


@app.command()
def verify(
    file: Annotated[Path, typer.Argument(help="A certificate.")],
    public_keys: Annotated[
        Path | None,
        typer.Option(help="Check its signature with these keys only, as printed by audit public-keys: no database."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Verify a certificate, and print what it says; exit status 1 where it is not genuine."""
    try:
        data = file.read_bytes()
    except OSError as exc:
        fail(f"{str(file)!r} cannot be read: {exc.strerror}")

    if public_keys is not None:
        verifier = exit_on_error(lambda: read_verifier(public_keys))
        found = exit_on_error(lambda: _verified(data, verifier))
    else:

        async def command(tenancy: Tenancy) -> ErasureCertificate:
            return await tenancy.erasures.verify(data)

        found = run(command)
    if as_json:
        print_json(found.statement.fields)
    else:
        console.print(printable(found.text()), markup=False)


def _verified(data: bytes, verifier: Verifier) -> ErasureCertificate:
    found = ErasureCertificate.from_bytes(data)
    found.verify(verifier)
    return found


__all__ = ["app"]
