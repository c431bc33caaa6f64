"""``tenancy secrets``: rotate the passwords of tenants' roles, and the keys that seal them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from ..provisioning.rotation import CONCURRENCY, RotationReport
from ..secrets.sealed import ResealReport
from ..tenancy import Tenancy
from .output import console, print_json, print_table, progress_bar
from .runtime import EXIT_FAILED, Json, operator, run

app = typer.Typer(help="Rotate passwords, and the keys that seal them, during operation.", no_args_is_help=True)


@app.command("rotate-passwords")
def rotate_passwords(
    tenant: Annotated[list[str] | None, typer.Option("--tenant", "-t", help="Only this tenant; repeatable.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, max=64, help="Tenants rotated at once.")] = CONCURRENCY,
    as_json: Json = False,
) -> None:
    """Give every tenant's role a new password; one that fails does not stop the others."""

    async def command(tenancy: Tenancy) -> RotationReport:
        only = [await tenancy.tenants.get(each) for each in tenant] if tenant else None
        with _progress(shown=not as_json) as advance:
            return await tenancy.secrets.rotate_passwords(
                only, concurrency=concurrency, progress=advance, actor=operator()
            )

    report = run(command)
    _print_result("rotated", report.rotated, dict(report.failed), as_json)


@app.command("rotate-key")
def rotate_key(as_json: Json = False) -> None:
    """Seal every tenant's password under the newest key; with a key wrapper, under a new key."""

    async def command(tenancy: Tenancy) -> ResealReport:
        return await tenancy.secrets.rotate_encryption_key(actor=operator())

    _print_reseal(run(command), as_json)


@app.command("reseal")
def reseal(as_json: Json = False) -> None:
    """Seal the passwords that are not under the newest key yet, after a rotate-key that was interrupted."""

    async def command(tenancy: Tenancy) -> ResealReport:
        return await tenancy.secrets.reseal(actor=operator())

    _print_reseal(run(command), as_json)


@app.command("keys")
def keys(as_json: Json = False) -> None:
    """List the keys that passwords are sealed under; every other key can be removed."""

    async def command(tenancy: Tenancy) -> list[str]:
        return sorted(await tenancy.secrets.keys_in_use())

    found = run(command)
    if as_json:
        print_json({"keys_in_use": found})
    else:
        print_table("keys in use", ("key",), ((key_id,) for key_id in found))


@app.command("forget-keys")
def forget_keys(as_json: Json = False) -> None:
    """Delete wrapped keys that nothing is sealed under any more. Run it some hours after rotate-key."""

    async def command(tenancy: Tenancy) -> list[str]:
        return await tenancy.secrets.forget_unused_keys()

    forgotten = run(command)
    if as_json:
        print_json({"forgotten": forgotten})
    else:
        console.print(f"{len(forgotten)} keys forgotten", highlight=False)


@contextmanager
def _progress(*, shown: bool) -> Iterator[Callable[[int], None]]:
    """Show how many tenants are done, unless the output is JSON."""
    with progress_bar(shown=shown) as progress:
        task = progress.add_task("passwords", total=None)
        yield lambda done: progress.update(task, completed=done)


def _print_reseal(report: ResealReport, as_json: bool) -> None:
    in_use = {"key_id": report.key_id, "keys_in_use": sorted(report.keys_in_use)}
    if report.remaining and not as_json:
        # before _print_result, which exits where something failed
        console.print(f"still in use: {', '.join(sorted(report.remaining))}; run: tenancy secrets reseal")
    _print_result("resealed", report.resealed, dict(report.failed), as_json, **in_use)
    if report.remaining:
        raise typer.Exit(EXIT_FAILED)


def _print_result(verb: str, done: int, failed: dict[str, str], as_json: bool, **more: object) -> None:
    if as_json:
        print_json({verb: done, "failed": failed, **more})
    else:
        console.print(f"{done} passwords {verb}, {len(failed)} failed", highlight=False)
        if failed:
            print_table("failed", ("tenant", "reason"), failed.items())
    if failed:
        raise typer.Exit(EXIT_FAILED)
