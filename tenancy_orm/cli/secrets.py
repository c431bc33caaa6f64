"""``tenancy secrets``: rotate the passwords of tenants' roles, and the keys that seal them."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from ..audit.log import AuditLog
from ..config import TenancyConfig
from ..control.database import ControlDatabase
from ..errors import ConfigurationError
from ..rotation import CONCURRENCY, RotationReport
from ..secrets.key_checks import check_keys
from ..secrets.providers import read_secrets
from ..secrets.sealed import ResealReport
from ..tenancy import Tenancy
from .output import console, print_json, print_table, progress_bar
from .runtime import EXIT_FAILED, Json, Yes, confirm, exit_on_error, fail, load_tenancy, operator, run

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


@app.command("accept-keys")
def accept_keys(yes: Yes = False, as_json: Json = False) -> None:
    """Take the configured encryption keys and peppers for the right ones, where others were recorded under their ids.

    An encryption key that opens none of the passwords under its id is still refused. Run it as the owner of the
    control database's tables.
    """
    if not yes and not confirm("The keys recorded before will be refused from now on. Continue?"):
        fail("nothing was changed")
    accepted = exit_on_error(lambda: asyncio.run(_accept_keys(load_tenancy().config)))
    if as_json:
        print_json(accepted)
    else:
        console.print(f"accepted: {', '.join(itertools.chain(*accepted.values()))}", markup=False, highlight=False)


async def _accept_keys(config: TenancyConfig) -> dict[str, list[str]]:
    """Record the configured keys. A ``Tenancy`` would not open: it refuses them."""
    if config.is_embedded:
        raise ConfigurationError("an embedded server keeps its own key; there is nothing to accept")
    async with contextlib.AsyncExitStack() as stack:
        if config.secrets.provider is not None:
            stack.push_async_callback(config.secrets.provider.close)
        config = await read_secrets(config)
        control = ControlDatabase(config.control_url, pool_size=1, purpose="tenancy-admin", direct=config.listen_dsn)
        stack.push_async_callback(control.close)
        await control.open()
        keys, peppers = config.sealing_keys, config.keys.decoded_peppers
        await check_keys(control, encryption_keys=keys, peppers=peppers, accept=True)
        accepted = {"encryption_keys": list(keys), "peppers": list(peppers)}
        async with control.transaction() as connection:
            await AuditLog(control).append(connection, action="secrets.accept_keys", actor=operator(), detail=accepted)
        return accepted


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
